"""FLOPs of attention's kernels by formula, against masks drawn out."""

import numpy as np
import pytest

from moe_jax.planning import hlo
from moe_jax.planning.kernels import kernel_flops

# 2 sequences, 4 heads over 2 of keys, 1024 queries and keys, widths 24 and 16
SPLASH = """HloModule splash

ENTRY %main (q: bf16[2,4,1024,24]) -> bf16[2,4,1024,16] {
  %next = s8[1,8,8]{2,1,0} parameter(0)
  %mask = s8[1,8,8]{2,1,0} parameter(1)
  %q = bf16[2,4,1024,24]{3,2,1,0} parameter(2)
  %k = bf16[2,2,1024,24]{3,2,1,0} parameter(3)
  %v = bf16[2,2,1024,16]{3,2,1,0} parameter(4)
  %segments = s32[2,1024,128]{2,1,0} parameter(5)
  ROOT %o = bf16[2,4,1024,16]{3,2,1,0} custom-call(%next, %mask, %q, %k, %v, /*index=5*/%segments), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={"xprof_metadata":"\
{\\"block_qPHASE\\": QUERIES, \\"block_kvPHASE\\": KEYS, \\"q_layout\\": 1}"}}, \
metadata={op_name="jit(f)/splash_mha_NAME/pallas_call"}
}
"""


def flops(text):
    """Of the last instruction of a program."""
    module = hlo.parse(text)
    here = module.computations[module.entry]
    return kernel_flops(here.root, here)


def scores(queries, keys):
    """Of 1024 queries and keys, in the blocks that hold one that a query sees."""
    visible = np.tril(np.ones((1024, 1024), bool))
    return visible.reshape(1024 // queries, queries, 1024 // keys, keys).any((1, 3)).sum() * queries * keys


def splash(name, queries, keys, phase=""):
    text = SPLASH.replace("NAME", name).replace("PHASE", phase)
    return flops(text.replace("QUERIES", str(queries)).replace("KEYS", str(keys)))


@pytest.mark.parametrize(
    ("name", "phase", "widths"),
    [
        ("fwd_segmented_residuals", "", 24 + 16),  # query . key, and the mean of values
        ("dq_segmented_no_residuals", "_dq", 24 + 16 + 24),  # scores again, their gradient, the query's
        ("dkv_segmented_no_residuals", "_dkv", 24 + 16 + 16 + 24),  # and the gradients of value and key
    ],
)
@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (512, 128), (128, 512)])
def test_attention_multiplies_the_blocks_that_the_causal_mask_does_not_hide(name, phase, widths, queries, keys):
    assert splash(name, queries, keys, phase) == 2 * (2 * 4) * scores(queries, keys) * widths


@pytest.mark.parametrize(("name", "grid"), [("fwd_segmented", "1,8,3"), ("dq", "1,8,3"), ("dkv", "1,3,8")])
def test_attention_with_a_window_multiplies_the_blocks_that_it_does_not_hide(name, grid):
    # a token and the 255 before it are in 3 blocks of 128, so there are 1 + 2 + 6 x 3 blocks
    text = SPLASH.replace("NAME", name).replace("PHASE", "").replace("QUERIES", "128").replace("KEYS", "128")
    causal, windowed = flops(text), flops(text.replace("s8[1,8,8]", f"s8[{grid}]"))
    assert (causal * 21, scores(128, 128)) == (windowed * 36, 36 * 128**2)


def test_attention_without_named_blocks_multiplies_what_is_visible():
    text = SPLASH.replace("NAME", "fwd_segmented").replace("block_q", "x").replace("block_kv", "y")
    assert flops(text) == 2 * (2 * 4) * (1024 * 1025 // 2) * (24 + 16)


# 2 sequences of 1024, 4 heads over 2 of keys, widths 128 and 64; the call is tokamax's, shortened
TOKAMAX = """HloModule tokamax

ENTRY %main (q: bf16[2,1024,4,128]) -> bf16[2,1024,4,128] {
  %q = bf16[2,1024,4,128]{3,2,1,0} parameter(0)
  %k = bf16[2,1024,2,128]{3,2,1,0} parameter(1)
  %v = bf16[2,1024,2,64]{3,2,1,0} parameter(2)
  %first = s32[2,1,1024]{2,1,0} parameter(3)
  ROOT %o = (RESULTS) custom-call(%q, %k, %v, %first), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/attention/tokamax:{\\"op\\":{\\"__type\\":\\"tokamax._src.ops.attention.NAME\\",\
\\"config\\":{\\"block_qPHASE\\":64,\\"block_kvPHASE\\":128},\\"vjp\\":null},\\"arguments\\":{\\"bias\\":null}}\
/vmap()/batched_body/mpmd_map"}
}
"""
QUERY, KEY, VALUE, SUMS = "bf16[2,1024,4,128]", "bf16[2,1024,4,128]", "bf16[2,1024,4,64]", "f32[2,4,1024]"


@pytest.mark.parametrize(
    ("name", "phase", "results", "widths"),
    [
        ("PallasMosaicGpuFlashAttention", "", (VALUE, SUMS, SUMS), 128 + 64),
        ("PallasMosaicGpuFlashAttentionVjp", "_dq", (QUERY,), 128 + 64 + 128),
        ("PallasMosaicGpuFlashAttentionVjp", "_dkv", (KEY, VALUE), 128 + 64 + 64 + 128),
        ("PallasMosaicGpuFlashAttentionVjp", "", (QUERY, KEY, VALUE), 128 + 64 + 64 + 128 + 128),
    ],
)
def test_attention_of_tokamax_multiplies_the_same_blocks(name, phase, results, widths):
    text = TOKAMAX.replace("NAME", name).replace("PHASE", phase).replace("RESULTS", ", ".join(results))
    assert flops(text) == 2 * (2 * 4) * scores(64, 128) * widths
    assert flops(text.replace("16[2,1", "16[1").replace("f32[2,", "f32[")) == 2 * 4 * scores(64, 128) * widths


CUDNN = """HloModule cudnn

ENTRY %main (q: bf16[2,1024,4,128]) -> bf16[2,4,1024,128] {
  %q = bf16[2,1024,4,128]{3,2,1,0} parameter(0)
  %k = bf16[2,1024,2,128]{3,2,1,0} parameter(1)
  %v = bf16[2,1024,2,128]{3,2,1,0} parameter(2)
  %documents = bf16[2,1,1024,1024]{3,2,1,0} parameter(3)
  ROOT %o = (bf16[2,4,1024,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v, %documents), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmax", metadata={op_name="jit(f)/attention/dot_product_attention"}
}
"""


@pytest.mark.parametrize(("target", "products"), [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_attention_of_cudnn_multiplies_what_is_visible(target, products):
    assert flops(CUDNN.replace("Softmax", target)) == 2 * (2 * 4) * (1024 * 1025 // 2) * products * 128
