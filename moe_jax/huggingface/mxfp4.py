"""gpt-oss's experts as they are published: fp4 (e2m1) numbers in blocks of 32, each with a power of two as its scale.

A tensor X [E, in, out] is stored as X_blocks [E, out, in / 32, 16] and X_scales [E, out, in / 32], both uint8.

Source: the OCP Microscaling specification 1.0; the order of the two numbers in a byte is that of transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from moe_jax.huggingface import shards
from moe_jax.huggingface.shards import Entry

BLOCKS, SCALES = "_blocks", "_scales"

# by their four bits: a sign, two of the exponent, one of the mantissa
FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
FP4 = np.concatenate([FP4, -FP4])
BIAS = 127  # of a scale's exponent
NAN = 255
NUMBERS = 2  # in a byte


class Packed(NamedTuple):
    """A tensor in two, where one that is stored whole has an `Entry`."""

    blocks: Entry
    scales: Entry

    @property
    def dtype(self) -> str:
        """Its name in messages; each number is exact in bfloat16."""
        return "MXFP4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, [E, in, out]."""
        *experts, rows, groups, size = self.blocks.shape
        return (*experts, groups * size * NUMBERS, rows)

    @property
    def file(self) -> Path:
        """Where the blocks are."""
        return self.blocks.file

    @property
    def begin(self) -> int:
        """Where the blocks begin."""
        return self.blocks.begin

    @property
    def end(self) -> int:
        """Where the blocks end."""
        return self.blocks.end

    def read(self) -> Float32[np.ndarray, "experts rows columns"]:
        """The tensor's numbers, expert by expert, so that no second array of its size is needed."""
        blocks, scales = shards.read(self.blocks), shards.read(self.scales)
        value = np.empty(self.shape, np.float32)
        for expert in range(len(value)):
            value[expert] = dequantised(blocks[expert], scales[expert]).T
        return value


Stored = Entry | Packed


def joined(entries: Mapping[str, Entry]) -> dict[str, Stored]:
    """The tensors of a folder, with blocks and their scales as one.

    Raises:
        ValueError: a tensor of bytes is neither, or lacks the other, or their shapes do not belong together.
    """
    found: dict[str, Stored] = {}
    for name, entry in entries.items():
        if entry.dtype != "U8":
            found[name] = entry
            continue
        base, other = name.removesuffix(BLOCKS), name.removesuffix(BLOCKS) + SCALES
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in entries:
            continue
        scales = entries.get(other)
        if base == name or scales is None or len(entry.shape) != 4 or scales.shape != entry.shape[:-1]:
            raise ValueError(
                f"tensor {name} {list(entry.shape)} is U8, as only the {BLOCKS} and {SCALES} of fp4 can be, "
                "[E, rows, G, 16] and [E, rows, G]; fetch the file again, or convert another model."
            )
        found[base] = Packed(entry, scales)
    return found


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
