"""Laws of gpt-oss's fp4: the numbers of its format by hand, and those of transformers."""

import numpy as np
import pytest

from moe_jax.huggingface.mxfp4 import dequantised


def test_a_byte_has_two_numbers_and_a_block_one_scale():
    # 0x71: low 1 is 0.5, high 7 is 6; 0x9F: low 15 is -6, high 9 is -0.5; scales 2^1 and 2^-1
    blocks = np.array([[[0x71, 0x9F], [0x71, 0x9F]]], np.uint8)
    found = dequantised(blocks, np.array([[128, 126]], np.uint8))
    np.testing.assert_array_equal(found, [[1, 12, -12, -1, 0.25, 3, -3, -0.25]])
    assert found.dtype == np.float32


def test_all_numbers_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install 'moe_jax[peers]'")
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (2, 6, 3, 16), np.uint8)  # experts, rows, blocks, bytes
    scales = draw.integers(100, 140, (2, 6, 3), np.uint8)
    both = torch.from_numpy(blocks), torch.from_numpy(scales)
    expected = theirs.convert_moe_packed_tensors(*both, dtype=torch.float32)
    found = dequantised(blocks, scales)
    assert found.shape == (2, 6, 96)
    np.testing.assert_array_equal(found.swapaxes(1, 2), expected.numpy())  # they transpose what they have read


@pytest.mark.parametrize(
    ("blocks", "scales", "why"),
    [
        (np.zeros((2, 16), np.int8), np.zeros(2, np.uint8), "must be uint8, one scale for each block"),
        (np.zeros((2, 16), np.uint8), np.zeros(3, np.uint8), r"blocks \[2, 16\] .* scales \[3\]"),
        (np.zeros((2, 16), np.uint8), np.array([1, 255], np.uint8), "1 scales are 255, which is NaN"),
    ],
)
def test_what_is_no_fp4_is_refused(blocks, scales, why):
    with pytest.raises(ValueError, match=why):
        dequantised(blocks, scales)
