"""FLOPs of kernels by formula, against the kernels' own bookkeeping."""

import jax.numpy as jnp
import pytest

from moe_jax.planning import hlo
from moe_jax.planning.kernels import kernel_flops, tiled_share

# 1024 rows, of which groups need 600, in tiles of 128: 8 tiles and 4 groups make tables of 8 + 4 - 1 entries
GROUPED = """HloModule grouped

ENTRY %main (x: bf16[1024,32]) -> bf16[1024,16] {
  %tiles = s32[] parameter(0)
  %offsets = s32[5]{0} parameter(1)
  %groups = s32[11]{0} parameter(2)
  %places = s32[11]{0} parameter(3)
  %first = s32[1]{0} parameter(4)
  %x = bf16[1024,32]{1,0} parameter(5)
  %w = bf16[4,32,16]{2,1,0} parameter(6)
  ROOT %k = bf16[1024,16]{1,0} custom-call(%tiles, %offsets, %groups, %places, %first, /*index=5*/%x, %w), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jit(gmm)/pallas_call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"1048576","bytes_accessed":"1"}}}
}
"""


def only(text):
    """The last instruction of a program, and its computation."""
    module = hlo.parse(text)
    here = module.computations[module.entry]
    return here.root, here


@pytest.mark.parametrize(
    ("rows", "multiplied"),
    [
        (600, 600 + 3 * 128),  # the rows of groups, and a tile more for each of the 3 borders between them
        (1024, 1024 + 3 * 128),
        (5000, 1024 + 3 * 128),  # no more than the buffer holds
        (None, 1024 + 3 * 128),
    ],
)
def test_a_grouped_product_counts_rows_of_groups_and_tiles_at_their_borders(rows, multiplied):
    kernel, here = only(GROUPED)
    assert tiled_share(kernel, here, rows) == multiplied / 1024
    assert kernel_flops(kernel, here, rows) == 2 * multiplied * 32 * 16  # the estimate is 2 x 1024 x 32 x 16


def test_megablox_itself_visits_as_many_tiles():
    gmm = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox.gmm")
    sizes = jnp.array([150, 149, 151, 190], jnp.int32)  # 640 rows, five tiles, and no border falls between two of them
    _, tiles = gmm.make_group_metadata(
        group_sizes=sizes, m=1024, tm=128, start_group=0, num_nonzero_groups=4, visit_empty_groups=False
    )
    kernel, here = only(GROUPED)
    assert int(tiles) * 128 == tiled_share(kernel, here, 640) * 1024


def test_nothing_is_known_of_a_kernel_without_an_estimate():
    other = GROUPED.replace("jit(gmm)", "jit(other)")
    assert kernel_flops(*only(other)) == 1048576
    assert kernel_flops(*only(other.replace("cost_estimate", "no_estimate"))) is None
