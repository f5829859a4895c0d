"""FLOPs of kernels on GPUs, on programs small enough to count by hand."""

import pytest

from moe_jax.planning import cost as cost_
from moe_jax.planning import hlo
from moe_jax.planning.kernels import kernel_flops, kernel_name

# three products of [8, 16] and [16, 32], summed over the second dimension of the left and the last of the right
CUBLAS = """HloModule cublas

ENTRY %main (a: bf16[3,8,16], b: bf16[3,32,16]) -> bf16[3,8,32] {
  %a = bf16[3,8,16]{2,1,0} parameter(0)
  %b = bf16[3,32,16]{2,1,0} parameter(1)
  %product = (bf16[3,8,32]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %result = bf16[3,8,32]{2,1,0} get-tuple-element(%product), index=0
}
"""


def test_a_product_of_cublas_counts_its_batch_and_what_it_sums():
    cost = cost_.analyze(CUBLAS)
    assert cost.flops == {"jit(f)/dot_general": 2 * 3 * 8 * 32 * 16}
    assert cost.uncosted == frozenset()
    assert cost.kernels == {"__cublas$gemm": 1}


# 4 groups in a buffer of 1024 rows, of which each has a quarter of the rows that are real
PRODUCT = """HloModule product

ENTRY %main (x: bf16[1024,64]) -> bf16[1024,32] {
  %x = bf16[1024,64]{1,0} parameter(0)
  %w = bf16[4,64,32]{2,1,0} parameter(1)
  %first = s32[4]{0} parameter(2)
  %last = s32[4]{0} parameter(3)
  ROOT %y = bf16[1024,32]{1,0} custom-call(%x, %w, %first, %last), custom_call_target="TARGET", \
metadata={op_name="jit(f)/experts/CALL/pallas_call"}
}
"""
OUTER = """HloModule outer

ENTRY %main (x: bf16[1024,64]) -> f32[4,64,32] {
  %x = bf16[1024,64]{1,0} parameter(0)
  %dy = bf16[1024,32]{1,0} parameter(1)
  %first = s32[4]{0} parameter(2)
  %last = s32[4]{0} parameter(3)
  ROOT %dw = f32[4,64,32]{2,1,0} custom-call(%x, %dy, %first, %last), custom_call_target="TARGET", \
metadata={op_name="jit(f)/experts/CALL/vmap()/pallas_call"}
}
"""


CALL = (  # as tokamax names its kernels, shortened
    r"tokamax:{\"op\":{\"__type\":\"tokamax._src.ops.ragged_dot.pallas_triton.PallasTritonRaggedDot\",\"config\":{"
    r"\"block_m\":128,\"block_n\":128,\"block_k\":32}},\"arguments\":{\"lhs\":\"f32[512,96]\",\"dims\":[[[1],[1]],[[],[]]]}}"
)


def only(text):
    """The last instruction of a program, and its computation."""
    module = hlo.parse(text.replace("CALL", CALL))
    here = module.computations[module.entry]
    return here.root, here


TARGETS = ["__gpu$xla.gpu.triton", "mosaic_gpu_v2"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("rows", "tiles"),  # of 128 rows, of each of the 4 groups
    [(512, 1), (513, 2), (600, 2), (5000, 2), (None, 2)],  # no more than the buffer holds
)
def test_a_grouped_product_multiplies_the_whole_tiles_of_every_group(target, rows, tiles):
    kernel, here = only(PRODUCT.replace("TARGET", target))
    assert kernel_flops(kernel, here, rows) == 2 * 4 * tiles * 128 * 64 * 32


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rows", "tiles"), [(512, 4), (513, 5), (600, 5), (5000, 8), (None, 8)])  # of 32 rows
def test_the_product_of_each_group_sums_over_whole_tiles(target, rows, tiles):
    for left in ("[1024,64]", "[64,1024]"):  # Triton takes rows, Mosaic columns
        kernel, here = only(OUTER.replace("[1024,64]", left).replace("TARGET", target))
        assert kernel_flops(kernel, here, rows) == 2 * 4 * tiles * 32 * 64 * 32


def test_a_kernel_of_pallas_on_a_gpu_has_its_own_name():
    assert kernel_name(only(OUTER.replace("TARGET", "mosaic_gpu_v2"))[0]) == "PallasTritonRaggedDot"
    kernel, _ = only(PRODUCT.replace("TARGET", "mosaic_gpu_v2"))
    assert kernel_name(kernel) == "PallasTritonRaggedDot"
    assert kernel.op_name == "jit(f)/experts/PallasTritonRaggedDot/pallas_call"


def test_nothing_is_known_of_another_kernel():
    kernel, here = only(PRODUCT.replace("TARGET", "mosaic_gpu_v2").replace("CALL", "another"))
    assert kernel_flops(kernel, here) is None
