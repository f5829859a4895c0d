"""The costs read from a compiled program's text, against arithmetic by hand."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from moe_jax.planning import collectives, hlo, loops, products
from moe_jax.planning import cost as cost_

# Eight local devices as data 2 x expert 4; one separate process writes every program's text by name.
PROGRAMS = """
    import json
    import jax, jax.numpy as jnp
    from jax import lax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    BOTH = P(("data", "expert"))

    def text(f, *arguments):
        made = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, p)) for shape, p in arguments]
        return jax.jit(f).lower(*made).compile().as_text()

    def shard_map(f, in_specs, out_specs):
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    def layer(x, w):
        def here(x, w):
            x = lax.all_to_all(x.reshape(4, -1, 16), "expert", 0, 0).reshape(x.shape)
            return jnp.tanh(x @ lax.all_gather(w, "data", axis=0, tiled=True))
        return shard_map(here, (BOTH, P("data")), BOTH)(x, w), None

    def loss(ws, x):
        return (lax.scan(jax.checkpoint(layer), x, ws)[0] ** 2).mean()

    gather = jax.shard_map(
        lambda w: lax.psum(jnp.sin(lax.all_gather(w, "data", axis=0, tiled=True)), "expert"),
        mesh=mesh, in_specs=P("data", "expert"), out_specs=P("data"),
    )
    print(json.dumps(dict(
        gather=text(gather, ((32, 64), P("data", "expert"))),
        train=text(jax.grad(loss), ((7, 16, 16), P(None, "data")), ((64, 16), BOTH)),
    )))
"""


@pytest.fixture(scope="module")
def sharded():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAMS)]
    return json.loads(subprocess.run(command, env=flags, capture_output=True, text=True, check=True).stdout)


def compiled(f, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*arguments).compile().as_text()


def by_kind(cost):
    return {kind: sum(n for c, n in cost.collectives.items() if c.kind == kind) for kind in collectives.COLLECTIVES}


# --- FLOPs and loops --------------------------------------------------------------------------------------------


def test_a_matrix_product_has_two_flops_a_multiply_add():
    cost = cost_.analyze(compiled(lambda a, b: a @ b, (8, 16), (16, 32)))
    assert cost.flops.total() == 2 * 8 * 16 * 32


def test_a_batched_product_counts_every_batch():
    cost = cost_.analyze(compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 8, 16), (3, 16, 32)))
    assert cost.flops.total() == 3 * 2 * 8 * 16 * 32


def test_a_scan_of_seven_products_counts_seven():
    def f(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    assert cost_.analyze(compiled(f, (8, 16), (7, 16, 16))).flops.total() == 7 * 2 * 8 * 16 * 16


def test_loops_within_loops_multiply():
    def inner(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x), None

    assert cost_.analyze(compiled(lambda x, ws: jax.lax.scan(inner, x, ws)[0], (8, 16), (3, 16, 16))).flops.total() == (
        3 * 5 * 2 * 8 * 16 * 16
    )


def test_a_loop_whose_length_depends_on_data_is_reported_and_counted_once():
    def f(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: jnp.tanh(x @ w) + 1.0, x)

    text = compiled(f, (8, 16), (16, 16))
    cost = cost_.analyze(text)
    assert cost.flops.total() == 2 * 8 * 16 * 16
    assert len(cost.unknown_loops) == 1
    guessed = cost_.analyze(text, trips=lambda loop, body: 11)
    assert guessed.flops.total() == 11 * 2 * 8 * 16 * 16
    assert guessed.unknown_loops == frozenset()


def test_the_trip_count_is_read_from_the_condition_where_xla_does_not_report_it():
    text = LOOP.format(start=2, limit=9)
    assert cost_.analyze(text).flops.total() == (9 - 2) * 2 * 4 * 4 * 4


def test_a_conditional_counts_as_its_cheapest_branch_and_the_rest_is_reported():
    def more(x, w):
        return x @ w @ w

    def f(x, w):
        return jax.lax.cond(x[0, 0] > 3.0, more, lambda x, w: x, x, w)

    cost = cost_.analyze(compiled(f, (8, 16), (16, 16)))
    assert cost.flops.total() == 0
    assert cost.untaken == (2 * 2 * 8 * 16 * 16, 0)


def test_a_kernel_is_counted_by_its_own_estimate():
    estimate = '"custom_call_config":{"body":"...","cost_estimate":{"flops":"4096","transcendentals":"0"}}'
    cost = cost_.analyze(KERNEL.format(config=estimate))
    assert cost.flops.total() == 4096
    assert cost.kernels == {"grouped": 1}
    assert cost.uncosted == frozenset()
    assert cost_.analyze(KERNEL.format(config='"x":1')).uncosted == {"grouped"}


def test_a_kernel_of_pallas_has_its_own_name_and_metadata_of_several_lines():
    text = KERNEL.format(config='"x":1').replace("(f)/grouped", "(f)/while/jit(gmm)/pallas_call")
    pallas = text.replace("metadata=", 'frontend_attributes={kernel_metadata={\n"xprof":"{\\"a\\": 1}"\n}}, metadata=')
    assert cost_.analyze(text).kernels == {"gmm": 1}
    assert cost_.analyze(pallas) == cost_.analyze(text)


def test_a_batched_product_written_as_a_dilated_convolution_counts_what_it_multiplies():
    # TPU: 4 products of 8 x 16 by 16 x 32, as one convolution of 4 positions, each meeting its own matrix only
    assert cost_.analyze(CONVOLUTION).flops.total() == 4 * 2 * 8 * 16 * 32


def test_a_convolution_does_not_multiply_padding():
    # 5 inputs, window 3, padded by 1 at each end: the two outer outputs meet 2 inputs, the inner three meet 3
    assert products.meetings(5, 3, 5, low=1) == 2 + 3 + 3 + 3 + 2


# --- collectives ------------------------------------------------------------------------------------------------


def test_an_all_gather_of_known_size_has_its_bytes(sharded):
    found = {c.kind: (c, n) for c, n in cost_.analyze(sharded["gather"]).collectives.items()}
    gather, count = found["all-gather"]
    # 32 x 64 floats split 2 x 4: a device gathers the 2 parts of 16 x 16 that its column of the mesh holds
    assert (gather.bytes, gather.sent, count) == (4 * 32 * 16, 4 * 16 * 16, 1)
    assert gather.group == (0, 4)
    reduce, _ = found["all-reduce"]
    assert len(reduce.group) == 4
    assert reduce.sent == 2 * reduce.bytes * 3 / 4


def test_a_rematerialised_scan_over_seven_layers_counts_its_exchanges(sharded):
    cost = cost_.analyze(sharded["train"])
    # of each layer: gathered forward and again for backward, its gradient scattered; tokens there, again, and back
    assert by_kind(cost)["all-gather"] == 2 * 7
    assert by_kind(cost)["reduce-scatter"] == 7
    assert by_kind(cost)["all-to-all"] == 3 * 7
    # 8 rows a device: forward, again, and one product each for the gradients of x and w
    assert cost.flops.total() == 4 * 7 * 2 * 8 * 16 * 16
    scatter = next(c for c in cost.collectives if c.kind == "reduce-scatter")
    assert (scatter.bytes, scatter.sent) == (4 * 16 * 16, 4 * 16 * 8)


def test_arrays_that_a_scan_saves_for_its_backward_pass_are_found(sharded):
    # the input of every layer, 8 x 16 floats on a device
    assert loops.saved_bytes(sharded["train"]) == 7 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=1,'b'=1,'c'=2,'d'=4], device_ids=([2,2,2]T(1,0,2)) {'c'}", (0, 2)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
        ("replica_groups={}", ()),
    ],
)
def test_every_way_of_writing_groups_is_read(text, group):
    assert collectives.replica_group(text) == group


def test_groups_in_another_notation_are_not_taken_for_all_devices():
    with pytest.raises(ValueError, match="have an unknown form"):
        collectives.replica_group("replica_groups=@mesh<x=2>")


def test_an_exchange_that_names_no_group_is_of_all_devices():
    found, _ = next(iter(cost_.analyze(EVERYBODY.format(devices=8)).collectives.items()))
    assert found.group == tuple(range(8))
    assert found.sent == 2 * 4 * 64 * 7 / 8


def test_a_group_of_one_device_exchanges_nothing():
    assert not cost_.analyze(EVERYBODY.format(devices=1)).collectives


def test_an_asynchronous_exchange_in_three_fusions_counts_once():
    cost = cost_.analyze(ASYNC)
    assert [(c.kind, c.asynchronous, n) for c, n in cost.collectives.items()] == [("all-gather", True, 1)]
    # start reads 8 floats; the part that runs meanwhile reads and writes 8 others and passes the buffers on
    assert cost.hbm == 4 * 8 + 4 * 16 + 2 * 4 * 8


BESIDE = """HloModule overlapped, num_partitions=4

ENTRY %main (p: f32[8,16], w: f32[16,32]) -> f32[8,16] {
  %p = f32[8,16] parameter(0)
  %w = f32[16,32] parameter(1)
  %start = (f32[8,16], f32[8,16]) all-to-all-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %during = f32[8,32] dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[8,16] all-to-all-done(%start)
  %after = f32[8,32] dot(%done, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %sum = f32[8,32] add(%during, %after)
}
"""


def test_instructions_between_start_and_end_of_an_exchange_overlap_with_it():
    cost = cost_.analyze(BESIDE)
    assert cost.flops.total() == 2 * 2 * 8 * 16 * 32
    assert cost.overlapped == {"all-to-all": 2 * 8 * 16 * 32}  # one of the two products


def test_an_all_reduce_followed_by_a_slice_is_a_reduce_scatter():
    found, _ = next(iter(cost_.analyze(SCATTER).collectives.items()))
    assert (found.kind, found.bytes, found.sent) == ("reduce-scatter", 4 * 64, 4 * 64 * 3 / 4)


# --- memory traffic ---------------------------------------------------------------------------------------------


def test_traffic_is_operands_and_results():
    assert cost_.analyze(compiled(lambda a, b: a @ b, (8, 16), (16, 32))).hbm == 4 * (8 * 16 + 16 * 32 + 8 * 32)


def test_a_layer_sliced_from_a_stack_reads_only_itself():
    def f(x, ws):
        return jax.lax.scan(lambda x, w: (x * w, None), x, ws)[0]

    # 5 x (x read, one slice read, x written) of 1024 floats, and little more than that; the stack is 5 times it
    traffic = cost_.analyze(compiled(f, (1024,), (5, 1024))).hbm
    assert 5 * 3 * 4096 <= traffic < 5 * 3 * 4096 + 2 * 4096 + 1024


def test_data_that_stays_on_the_chip_is_no_traffic():
    assert cost_.analyze(ON_CHIP).hbm == 4 * 16


# --- text -------------------------------------------------------------------------------------------------------


def test_sizes_of_element_types():
    assert [hlo.bits(t) for t in ("bf16", "f32", "pred", "s4", "f8e4m3fn", "u64")] == [16, 32, 8, 4, 8, 64]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing\n")


LOOP = """HloModule loop

%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %p = (s32[]{{:T(128)}}, f32[4,4]{{1,0:T(8,128)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{{1,0}} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (s32[], f32[4,4]{{1,0}}) tuple(%next, %y)
}}

%condition (q: (s32[], f32[4,4])) -> pred[] {{
  %q = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}

ENTRY %main (a: f32[4,4]) -> (s32[], f32[4,4]) {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %start = s32[] constant({start})
  %init = (s32[], f32[4,4]{{1,0}}) tuple(%start, %a)
  ROOT %loop = (s32[], f32[4,4]{{1,0}}) while(%init), condition=%condition, body=%body, metadata={{op_name="scan"}}
}}
"""

KERNEL = """HloModule kernel

ENTRY %main (a: f32[4,4]) -> f32[4,4] {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %b = f32[4,4]{{1,0}} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %k = f32[4,4]{{1,0}} custom-call(%a, %b), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(f)/grouped"}}, backend_config={{{config}}}
}}
"""

CONVOLUTION = """HloModule convolution

ENTRY %main (a: f32[4,8,16], b: f32[4,16,32]) -> f32[4,8,32] {
  %a = f32[4,8,16]{2,1,0} parameter(0)
  %b = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %c = f32[4,8,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""

ASYNC = """HloModule asynchronous

%start (p: f32[8]) -> (f32[8], f32[16]) {
  %p = f32[8]{0} parameter(0)
  %g = f32[16]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (f32[8]{0}, f32[16]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p: f32[8], q: f32[16], r: f32[8]) -> (f32[8], f32[8], f32[16]) {
  %p = f32[8]{0} parameter(0)
  %q = f32[16]{0} parameter(1)
  %r = f32[8]{0} parameter(2)
  %s = f32[8]{0} negate(%r)
  %g = f32[16]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[8]{0}, f32[8]{0}, f32[16]{0}) tuple(%s, %p, %g)
}

%done (p: f32[8], q: f32[16]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  %q = f32[16]{0} parameter(1)
  %g = f32[16]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = f32[16]{0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8], b: f32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %f = (f32[8]{0}, f32[16]{0}) fusion(%a), kind=kCustom, calls=%start, output_to_operand_aliasing={{0}: (0, {})}
  %x = f32[8]{0} get-tuple-element(%f), index=0
  %y = f32[16]{0} get-tuple-element(%f), index=1
  %h = (f32[8]{0}, f32[8]{0}, f32[16]{0}) fusion(%x, %y, %b), kind=kCustom, calls=%meanwhile, \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}
  %u = f32[8]{0} get-tuple-element(%h), index=1
  %v = f32[16]{0} get-tuple-element(%h), index=2
  ROOT %d = f32[16]{0} fusion(%u, %v), kind=kCustom, calls=%done, output_to_operand_aliasing={{}: (1, {})}
}
"""

EVERYBODY = """HloModule everybody, is_scheduled=true, num_partitions={devices}

ENTRY %main (a: f32[64]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%a), replica_groups={{}}, to_apply=%add
}}
"""

SCATTER = """HloModule scatter

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%fused (p: f32[64], i: s32[]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}
}

ENTRY %main (a: f32[64], i: s32[]) -> f32[16] {
  %a = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[16]{0} fusion(%a, %i), kind=kCustom, calls=%fused
}
"""

ON_CHIP = """HloModule chip

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0:T(128)} parameter(0)
  ROOT %n = f32[16]{0:T(128)S(1)} negate(%a)
}
"""
