"""FLOPs of the attention kernels of TPUs and GPUs, from their shapes and the causal mask."""

import math
import re

from moe_jax.planning.hlo import Computation, Instruction

ATTENTION = re.compile(r"^splash_|FlashAttention|^__cudnn\$fmha")  # in names of kernels: JAX's, tokamax's, cuDNN's

# products of width K and of width V for every score
FORWARD, OF_QUERIES, OF_KEYS, BACKWARD = (1, 1), (2, 1), (2, 2), (3, 2)
SPLASH = {"fwd": FORWARD, "dq": OF_QUERIES, "dkv": OF_KEYS}


def attention_flops(i: Instruction, here: Computation, name: str) -> int:
    """2 FLOPs a score, and width of its products, in every block of scores that the causal mask does not hide.

    Documents hide more scores: only tokamax skips blocks for them, and how many depends on the text. Windows hide more,
    too. Only the text of splash attention shows how many, by its grid: the most blocks of keys for one of queries, or
    for the gradients of keys and values the most blocks of queries for one of keys.

    Args:
        i: a custom call, whose operands begin with queries, keys and values: of splash attention [..., H, S, K], of
            others [B, S, H, K] or, of one sequence, [S, H, K].
        here: its computation.
        name: the kernel's, in which ATTENTION is found.
    """
    operands = [here.instructions[operand].leaves[0] for operand in i.operands]
    query, key, value = [leaf.dims for leaf in operands if len(leaf.dims) > 2 and "f" in leaf.dtype][:3]
    length = -2 if name.startswith("splash_") else -3
    of_keys, of_values = _products(i, name, len(query))
    width = of_keys * query[-1] + of_values * value[-1]
    rows = math.prod(query[:-1]) // query[length]
    lengths, blocks = (query[length], key[length]), _blocks(i)
    if not name.startswith("splash_") or blocks == (1, 1):
        return 2 * rows * _scores(*lengths, *blocks) * width
    by_key = "_dkv" in name
    grid = next(leaf.dims for leaf in operands if len(leaf.dims) == 3 and "f" not in leaf.dtype)
    return 2 * rows * _scores(*lengths, *blocks, most=grid[1 if by_key else 2], by_key=by_key) * width


def _products(i: Instruction, name: str, rank: int) -> tuple[int, int]:
    """Of every score; the backward pass of tokamax is one kernel, or one of queries and one of keys and values."""
    if name.startswith("splash_"):
        return next(products for phase, products in SPLASH.items() if f"_{phase}" in name)
    if name.endswith("Vjp"):
        gradients = sum(len(leaf.dims) == rank for leaf in i.leaves)
        return {1: OF_QUERIES, 2: OF_KEYS, 3: BACKWARD}[gradients]
    return BACKWARD if name.endswith("Backward") else FORWARD


def _blocks(i: Instruction) -> tuple[int, int]:
    """Queries and keys of a block; 1 and 1 if the text does not say, which counts no score that is hidden."""
    sizes = [re.search(rf"block_{of}\w*\W+(\d+)", i.attributes) for of in ("q", "kv")]
    return tuple(int(found[1]) if found else 1 for found in sizes)  # type: ignore[return-value]


def _scores(queries: int, keys: int, block_q: int, block_kv: int, most: int | None = None, by_key: bool = False) -> int:
    """Scores in the blocks that hold a visible one.

    Args:
        most: blocks of keys for one of queries, or with `by_key` of queries for one of keys; None is no limit.
    """
    if by_key:
        found = [-(-queries // block_q) - first // block_q for first in range(0, keys, block_kv)]
    else:
        found = [-(-min(keys, first + block_q) // block_kv) for first in range(0, queries, block_q)]
    return block_q * block_kv * sum(n if most is None else min(n, most) for n in found)
