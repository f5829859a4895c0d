"""DeepSeek's float8: weights in blocks, each with a float32 factor; and which quantisations are known."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.huggingface.mxfp4 import Stored

SCALE = "_scale_inv"  # DeepSeek's float8: tensor X comes with X_scale_inv, one float32 for each block


def block_of(hf: Mapping[str, Any], entries: Mapping[str, Stored]) -> tuple[int, int]:
    """Rows and columns that share a float8 scale, (1, 1) without any.

    Raises:
        ValueError: another quantisation than DeepSeek's and gpt-oss's, whose blocks are always alike.
    """
    quantised = hf.get("quantization_config") or {}
    if not isinstance(quantised, Mapping):
        raise ValueError(f"config.json has quantization_config={quantised!r}, which must be an object; correct it.")
    if quantised.get("quant_method") == "mxfp4":
        return 1, 1
    block = quantised.get("weight_block_size")
    narrow = [name for name, entry in entries.items() if entry.dtype.startswith("F8")]
    fits = isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)
    fits &= quantised.get("quant_method") == "fp8"
    if quantised and not (fits and quantised.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")):  # two names of one
        raise ValueError(
            f"config.json has quantization_config={quantised!r}; known are quant_method 'mxfp4' and quant_method 'fp8' "
            "with fmt 'e4m3' and a weight_block_size of two integers."
        )
    if narrow and not quantised:
        raise ValueError(f"tensor {narrow[0]} is float8, but config.json has no quantization_config; give it.")
    return (block[0], block[1]) if block else (1, 1)


def dequantised(value: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float8 [O, I] times the float32 scale of each block, in float32. Source: DeepSeek-V3's published weights."""
    rows, columns = value.shape
    wide = value.astype(np.float32)
    for i in range(scale.shape[0]):  # a row of blocks at a time, to avoid a second array of this size
        factors = np.repeat(scale[i], block[1])[:columns]
        wide[i * block[0] : min(rows, (i + 1) * block[0])] *= factors
    return wide
