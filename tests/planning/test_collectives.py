"""Exchanges as the TPU compiler writes them: on a SparseCore, across slices, around one ring."""

import pytest

from moe_jax.planning import cost as cost_
from moe_jax.planning.collectives import Collective
from moe_jax.planning.topology import ACROSS, Place, Topology, exchange
from moe_jax.runtime.chips import CHIPS

V5P = CHIPS["v5p"]

SPARSECORE = """HloModule sparsecore, is_scheduled=true, num_partitions=8

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %z = bf16[] add(%x, %y)
}, execution_thread="sparsecore"

%gather (p: bf16[4,8], t: token[]) -> bf16[16,8] {
  %t = token[] parameter(1)
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}, execution_thread="sparsecore"

%scatter (p: bf16[16,8], t: token[]) -> bf16[4,8] {
  %t = token[] parameter(1)
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %s = bf16[4,8]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[4,8], w: bf16[8,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0} parameter(1)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %gs = ((bf16[4,8]{1,0}, token[]), bf16[16,8]{1,0}) call-start(%a, %ready), async_execution_thread="sparsecore", \
to_apply=%gather
  %during = bf16[4,8]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gd = bf16[16,8]{1,0} call-done(%gs)
  %ss = ((bf16[16,8]{1,0}, token[]), bf16[4,8]{1,0}) call-start(%gd, %ready), async_execution_thread="sparsecore", \
to_apply=%scatter
  %sd = bf16[4,8]{1,0} call-done(%ss)
  ROOT %sum = bf16[4,8]{1,0} add(%during, %sd)
}
"""


def test_exchanges_on_a_sparsecore_are_counted_and_asynchronous():
    found = cost_.analyze(SPARSECORE).collectives
    assert {(c.kind, c.bytes, c.group, c.asynchronous, n) for c, n in found.items()} == {
        ("all-gather", 2 * 16 * 8, (0, 1, 2, 3), True, 1),
        ("reduce-scatter", 2 * 16 * 8, (0, 1, 2, 3), True, 1),
    }


def test_products_run_beside_an_exchange_on_a_sparsecore():
    assert cost_.analyze(SPARSECORE).overlapped == {"all-gather": 2 * 4 * 8 * 8, "reduce-scatter": 0}


# a reduction over four slices of two chips each, of the part that a chip keeps after the reduction in its slice
SLICES = """HloModule slices, is_scheduled=true, num_partitions=2

ENTRY %main (a: bf16[256,4]) -> bf16[256,4] {
  %a = bf16[256,4]{1,0} parameter(0)
  %free = token[] after-all()
  %send = (bf16[256,4]{1,0}, u32[], token[]) send(%a, %free), channel_id=2, is_host_transfer=true, \
frontend_attributes={MEGASCALE}
  %recv = (bf16[256,4]{1,0}, u32[], token[]) recv(%free), channel_id=1, is_host_transfer=true, \
frontend_attributes={MEGASCALE}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %received = (bf16[256,4]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %r = bf16[256,4]{1,0} get-tuple-element(%received), index=0
}
"""
ATTRIBUTES = '_xla_megascale_target="{1,2,3,4}x{0:1}",_xla_megascale_transfer_type="%s"'


def across_slices(kind):
    (found,) = cost_.analyze(SLICES.replace("MEGASCALE", ATTRIBUTES % kind)).collectives
    return found


@pytest.mark.parametrize(
    ("kind", "size", "sent"),
    [
        # 2048 bytes; of what n = 4 slices reduce, 2 (n - 1) / n leave one, of what they gather or scatter (n - 1) / n
        ("ALL_REDUCE", 2048, 2 * 2048 * 3 / 4),
        ("ALL_GATHER", 2048, 2048 * 3 / 4),
        ("REDUCE_SCATTER", 4 * 2048, 2048 * 3),
    ],
)
def test_what_crosses_slices_is_counted_once_with_its_kind(kind, size, sent):
    found = across_slices(kind)
    assert (found.kind, found.bytes, found.asynchronous) == (kind.lower().replace("_", "-"), size, True)
    assert found.group == (0, 2, 4, 6)
    assert found.sent == sent


def test_slices_in_another_notation_are_not_left_out():
    with pytest.raises(ValueError, match="slices have an unknown form"):
        cost_.analyze(SLICES.replace("MEGASCALE", ATTRIBUTES.replace("x{0:1}", "x{0,1}") % "ALL_REDUCE"))


def test_what_crosses_slices_takes_the_time_of_the_data_centre_network_and_no_link():
    places = [Place(n // 2, (0, 0, n % 2)) for n in range(8)]
    time = exchange(across_slices("ALL_REDUCE"), places, Topology("v5p", (1, 1, 2), slices=4))
    assert time.seconds == 2 * 2048 * 3 / 4 / V5P.dcn
    assert time.busy == {ACROSS: time.seconds}


# --- links by dimension -------------------------------------------------------------------------------------------

# a plane of 4 x 4 chips, both dimensions rings: four links
GATHER = """HloModule gather, is_scheduled=true, num_partitions=16

ENTRY %main (a: bf16[4,8]) -> bf16[64,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[64,8]{1,0} all-gather(%a), replica_groups={}, dimensions={0}, \
backend_config={"collective_algorithm_config":{"emitter":"NAME"}}
}
"""


@pytest.mark.parametrize(("emitter", "links"), [("1DAllGatherNonMajorDimImbalanced", 2), ("2DAllGather", 4)])
def test_a_gather_around_one_ring_has_two_links_whatever_it_spans(emitter, links):
    (found,) = cost_.analyze(GATHER.replace("NAME", emitter)).collectives
    places = [Place(0, (x, y, 0)) for x in range(4) for y in range(4)]
    time = exchange(found, places, Topology("v5p", (4, 4, 1)))
    assert time.seconds == pytest.approx(960 / (links * V5P.link))
    # either way its 960 bytes pass through the four links of the two dimensions
    assert time.busy == pytest.approx({"x": 960 / (4 * V5P.link), "y": 960 / (4 * V5P.link)})


# as XLA writes it for a gradient: the algorithm is named at the fusion, the exchange is within
FUSED = """HloModule fused, is_scheduled=true, num_partitions=16

%scatter (p: f32[64], i: s32[]) -> f32[4] {
  %p = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[64]{0} all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %s = f32[4]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}

ENTRY %main (a: f32[64], i: s32[]) -> f32[4] {
  %a = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[4]{0} fusion(%a, %i), kind=kCustom, calls=%scatter, \
backend_config={"collective_algorithm_config":{"debug":"Type: RING phase_count: 1"}}
}
"""


@pytest.mark.parametrize(("ring", "one_ring"), [("1D", True), ("2D", False)])
def test_the_algorithm_of_a_fused_reduction_is_read_from_its_fusion(ring, one_ring):
    (found,) = cost_.analyze(FUSED.replace("RING", ring)).collectives
    assert (found.kind, found.one_ring) == ("reduce-scatter", one_ring)


def test_an_exchange_keeps_only_its_own_dimensions_busy():
    rows = Collective("all-to-all", 1024, (0, 1, 2, 3), False, "", "")
    places = [Place(0, (0, 0, z)) for z in range(4)]
    time = exchange(rows, places, Topology("v5p", (8, 8, 4)))
    # 4 on a ring: two members send to two others through two links, s B a / 8
    assert time.busy == {"z": time.seconds}
    assert time.seconds == 1024 * 4 / 8 / V5P.link
