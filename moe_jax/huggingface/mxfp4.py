"""gpt-oss's experts as they are published: fp4 (e2m1) numbers in blocks of 32, each with a power of two as its scale.

Source: the OCP Microscaling specification 1.0; the order of the two numbers in a byte is that of transformers.
"""

import numpy as np
from jaxtyping import Float32, UInt8

# by their four bits: a sign, two of the exponent, one of the mantissa
FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
FP4 = np.concatenate([FP4, -FP4])
BIAS = 127  # of a scale's exponent
NAN = 255


def dequantised(
    blocks: UInt8[np.ndarray, "*rows blocks bytes"], scales: UInt8[np.ndarray, "*rows blocks"]
) -> Float32[np.ndarray, "*rows columns"]:
    """The numbers, in float32, which holds each exactly.

    Args:
        blocks: [..., G, 16], two numbers a byte, the low half first.
        scales: [..., G], the exponent of each block's scale, plus 127.

    Returns:
        [..., G x 32].

    Raises:
        ValueError: other dtypes, shapes that do not belong together, or a scale of 255, which is NaN.
    """
    if not blocks.dtype == scales.dtype == np.uint8 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"blocks {list(blocks.shape)} in {blocks.dtype} and scales {list(scales.shape)} in {scales.dtype} must be "
            "uint8, one scale for each block; fetch the file again."
        )
    if (scales == NAN).any():
        raise ValueError(f"{(scales == NAN).sum()} scales are {NAN}, which is NaN; fetch the file again.")
    halves = np.stack([blocks & 0x0F, blocks >> 4], -1).reshape(*scales.shape, -1)
    values = np.ldexp(FP4[halves], scales.astype(np.int32)[..., None] - BIAS)
    return values.reshape(*scales.shape[:-1], -1)
