"""FLOPs of products on NVIDIA GPUs, whose kernels tell XLA nothing: from the shapes of what they read and write."""

import json
import math
import re

from moe_jax.planning.hlo import Computation, Instruction, Leaf

PALLAS = ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")  # the custom calls of kernels in Triton and in Mosaic


def gpu_flops(i: Instruction, here: Computation, name: str, rows: int | None) -> int | None:
    """The FLOPs of a GPU's kernel; None if nothing is known of it.

    Args:
        i: a custom call.
        here: its computation.
        name: the kernel's.
        rows: rows of a grouped product that belong to a group; all, if None.
    """
    if name.startswith("__cublas$"):
        return _product(i, here)
    return _grouped(i, here, rows) if "RaggedDot" in name else None


def _operands(i: Instruction, here: Computation) -> list[Leaf]:
    return [here.instructions[name].leaves[0] for name in i.operands]


def _product(i: Instruction, here: Computation) -> int:
    """cuBLAS: two for every number that each element of the result sums."""
    left = _operands(i, here)[0].dims
    summed = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', i.attributes)
    assert summed, i.attributes
    return 2 * math.prod(i.leaves[0].dims) * math.prod(left[int(n)] for n in json.loads(summed[1]))


def _grouped(i: Instruction, here: Computation, rows: int | None) -> int | None:
    """tokamax: rows [M, D] times matrices [E, D, F], or the products of rows [M, D], or [D, M], and [M, F] by group.

    Each group multiplies whole tiles, and groups of a balanced routing are equal. The call says how many rows a tile
    has, which the products by group sum over.
    """
    arrays = [leaf.dims for leaf in (*_operands(i, here), *i.leaves) if "f" in leaf.dtype]
    matrices = [dims for dims in arrays if len(dims) == 3]
    buffers = [dims[0] for dims in arrays if len(dims) == 2]
    if len(matrices) != 1 or not buffers:
        return None
    groups, *sizes = matrices[0]
    multiplied = min(buffers[-1], buffers[-1] if rows is None else rows)
    by_group = len(i.leaves[0].dims) == 3
    found = re.search(rf"block_{'k' if by_group else 'm'}\W+(\d+)", i.attributes)
    tile = int(found[1]) if found else 1
    return 2 * groups * -(-multiplied // (groups * tile)) * tile * math.prod(sizes)
