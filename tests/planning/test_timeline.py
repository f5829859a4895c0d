"""The schedule of small programs, with answers by hand: a second is a unit of the chip's peak, memory or links."""

import pytest

from moe_jax.planning.cost import Program
from moe_jax.planning.timeline import simulate
from moe_jax.planning.topology import Place, Topology
from moe_jax.runtime import chips

# 8 x 8 products of 1024 FLOPs take 1 s; memory takes no time unless a test slows it; an exchange of
# 256 bytes in a group of four on one ring has two links, so that 192 bytes take 1 s
CHIP = chips.CHIPS["v5p"]._replace(flops=1024.0, hbm_bandwidth=float("inf"), link=96.0, dcn=96.0)
PLACES = [Place(0, (0, 0, n)) for n in range(4)]

HEAD = """HloModule schedule, is_scheduled=true, num_partitions=4

ENTRY %main (a: f32[8,8], b: f32[64]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
"""
PRODUCT = "  %{name} = f32[8,8]{{1,0}} dot(%{of}, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}\n"
GROUP = "replica_groups={{0,1,2,3}}, dimensions={0}"


def product(name, of="a"):
    return PRODUCT.format(name=name, of=of)


@pytest.fixture
def run(monkeypatch):
    """The schedule of the lines of an entry, or of a whole program."""

    def simulated(*lines, text=None, chip=CHIP, places=PLACES, dims=(1, 1, 4), **options):
        monkeypatch.setitem(chips.CHIPS, "v5p", chip)
        program = Program(text or HEAD + "".join(lines) + "}\n", **options)
        return simulate(program, places, Topology("v5p", dims))

    return simulated


GATHER = f"  %g = f32[64]{{0}} all-gather(%b), {GROUP}\n"
START = f"  %gs = (f32[16]{{0}}, f32[64]{{0}}) all-gather-start(%b), {GROUP}\n"
DONE = "  %gd = f32[64]{0} all-gather-done(%gs)\n"


def test_products_follow_one_another(run):
    schedule = run(product("p"), product("q", "p"))
    assert schedule.seconds == pytest.approx(2.0)
    assert schedule.causes == pytest.approx({"compute": 2.0})


def test_a_synchronous_exchange_stops_the_core(run):
    schedule = run(product("p"), GATHER, product("q"))
    assert schedule.seconds == pytest.approx(3.0)
    assert schedule.causes == pytest.approx({"compute": 2.0, "synchronous all-gather": 1.0})


def test_an_asynchronous_exchange_hides_behind_products(run):
    assert run(START, product("p"), DONE).causes == pytest.approx({"compute": 1.0})


def test_the_rest_of_an_asynchronous_exchange_is_waited_for(run):
    slow = CHIP._replace(link=CHIP.link / 3)  # 3 s, of which one product hides 1
    schedule = run(START, product("p"), DONE, product("q"), chip=slow)
    assert schedule.causes == pytest.approx({"compute": 2.0, "asynchronous all-gather": 2.0})


def test_what_nobody_waits_for_ends_before_the_step(run):
    assert run(START, chip=CHIP._replace(link=CHIP.link / 3)).causes == pytest.approx({"asynchronous all-gather": 3.0})


def test_exchanges_on_the_same_links_follow_one_another(run):
    second = START.replace("%gs", "%hs"), DONE.replace("%gs", "%hs").replace("%gd", "%hd")
    schedule = run(START, second[0], product("p"), DONE, second[1])
    assert schedule.causes == pytest.approx({"compute": 1.0, "asynchronous all-gather": 1.0})


def test_an_exchange_that_stops_the_core_passes_and_delays_those_beside_it(run):
    # 1 s stopped, then 1 s of products; of the 3 s of the other, delayed by 1 s, 2 are left
    slow = START.replace("f32[64]", "f32[192]").replace("f32[16]", "f32[48]"), DONE.replace("f32[64]", "f32[192]")
    schedule = run(slow[0], GATHER, product("p"), slow[1])
    assert schedule.causes == pytest.approx(
        {"compute": 1.0, "synchronous all-gather": 1.0, "asynchronous all-gather": 2.0}
    )


def test_exchanges_on_different_dimensions_run_at_once(run):
    # a plane of 4 x 4: rows {0, 4, ...} along x, columns {0, 1, ...} along y
    places = [Place(0, (0, x, y)) for x in range(4) for y in range(4)]
    other = START.replace("%gs", "%hs").replace("0,1,2,3", "0,4,8,12"), DONE.replace("%gs", "%hs").replace("%gd", "%hd")
    schedule = run(START, other[0], product("p"), DONE, other[1], places=places, dims=(1, 4, 4))
    assert schedule.causes == pytest.approx({"compute": 1.0})


def test_bytes_beyond_the_products_are_time_of_the_memory(run):
    # 3 x 256 bytes in 1.5 s, of which 1 s is also compute
    assert run(product("p"), chip=CHIP._replace(hbm_bandwidth=512.0)).causes == pytest.approx(
        {"compute": 1.0, "memory": 0.5}
    )


COPY = "  %cs = (f32[64]{0:S(1)}, f32[64]{0}, u32[]) copy-start(%b)\n", "  %cd = f32[64]{0:S(1)} copy-done(%cs)\n"


def test_a_copy_runs_beside_products(run):
    # 256 bytes read by the copy in 0.2 s; then those of the product, which are through after 0.8 s
    assert run(COPY[0], product("p"), COPY[1], chip=CHIP._replace(hbm_bandwidth=1280.0)).causes == pytest.approx(
        {"compute": 1.0}
    )
    # alone it is waited for, and a second one follows it
    other = COPY[0].replace("%cs", "%ds"), COPY[1].replace("%cs", "%ds").replace("%cd", "%dd")
    both = run(COPY[0], other[0], COPY[1], other[1], chip=CHIP._replace(hbm_bandwidth=1280.0))
    assert both.causes == pytest.approx({"memory": 0.4})
    assert run(*COPY, chip=CHIP._replace(hbm_bandwidth=1280.0)).causes == pytest.approx({"memory": 0.2})


LOOP = """HloModule loop, is_scheduled=true, num_partitions=4

%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %r = f32[8,8]{1,0} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %u = (s32[], f32[8,8]{1,0}) tuple(%i, %r)
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %n = s32[] constant(0)
  %s = (s32[], f32[8,8]{1,0}) tuple(%n, %a)
  %w = (s32[], f32[8,8]{1,0}) while(%s), condition=%never, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %z = f32[8,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_loops_multiply(run):
    # 2 x 3 / 4 x 256 bytes over two links: 2 s each time
    schedule = run(text=LOOP)
    assert schedule.seconds == pytest.approx(5 * 3.0)
    assert schedule.causes == pytest.approx({"compute": 5.0, "synchronous all-reduce": 10.0})


BRANCHES = """HloModule branches, is_scheduled=true

%cheap (x: f32[8,8]) -> f32[8,8] {
  ROOT %x = f32[8,8]{1,0} parameter(0)
}

%dear (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,8], p: pred[]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %p = pred[] parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%p, %a, %a), true_computation=%dear, false_computation=%cheap, \
metadata={op_name="jit(f)/of_layers/cond"}
}
"""


def test_a_conditional_takes_the_branch_that_the_costs_count(run):
    assert run(text=BRANCHES).seconds == 0.0


def test_a_conditional_whose_shares_are_known_takes_both_branches_as_often(run):
    shares = dict(of_layers=0.25)
    assert run(text=BRANCHES, shares=shares).seconds == pytest.approx(0.25)
    cost = Program(BRANCHES, shares=shares).computation("main")
    assert (cost.flops.total(), cost.untaken) == (0.25 * 2 * 8**3, (0.0, 0.0))


FUSIONS = """HloModule fusions, is_scheduled=true, num_partitions=4

%start (p: f32[16]) -> (f32[16], f32[64]) {
  %p = f32[16]{0} parameter(0)
  %g = f32[64]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (f32[16]{0}, f32[64]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p: f32[16], q: f32[64], a: f32[8,8]) -> (f32[8,8], f32[16], f32[64]) {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %a = f32[8,8]{1,0} parameter(2)
  %y = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = f32[64]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[8,8]{1,0}, f32[16]{0}, f32[64]{0}) tuple(%y, %p, %g)
}

%done (p: f32[16], q: f32[64]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %g = f32[64]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = f32[64]{0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (b: f32[16], a: f32[8,8]) -> f32[64] {
  %b = f32[16]{0} parameter(0)
  %a = f32[8,8]{1,0} parameter(1)
  %f = (f32[16]{0}, f32[64]{0}) fusion(%b), kind=kCustom, calls=%start
  %x = f32[16]{0} get-tuple-element(%f), index=0
  %y = f32[64]{0} get-tuple-element(%f), index=1
  %h = (f32[8,8]{1,0}, f32[16]{0}, f32[64]{0}) fusion(%x, %y, %a), kind=kCustom, calls=%meanwhile
  %u = f32[16]{0} get-tuple-element(%h), index=1
  %v = f32[64]{0} get-tuple-element(%h), index=2
  %d = f32[64]{0} fusion(%u, %v), kind=kCustom, calls=%done
  ROOT %after = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_an_exchange_in_three_fusions_runs_beside_the_second(run):
    assert run(text=FUSIONS).causes == pytest.approx({"compute": 2.0})
    slow = CHIP._replace(link=CHIP.link / 3)
    assert run(text=FUSIONS, chip=slow).causes == pytest.approx({"compute": 2.0, "asynchronous all-gather": 2.0})


def test_causes_add_up_to_the_step(run):
    schedule = run(START, product("p"), GATHER, DONE, *COPY, chip=CHIP._replace(hbm_bandwidth=512.0))
    assert sum(schedule.causes.values()) == pytest.approx(schedule.seconds)
