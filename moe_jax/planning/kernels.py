"""FLOPs of kernels that are not XLA's own code, by formula or by their own estimate."""

import math
import re

from moe_jax.planning.gpu_kernels import PALLAS, gpu_flops
from moe_jax.planning.hlo import Computation, Instruction

# custom calls that run no kernel
BOOKKEEPING = {"AllocateBuffer", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast", "Sharding"}
BOOKKEEPING |= {"PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound"}
BOOKKEEPING |= {"SPMDFullToShardShape", "SPMDShardToFullShape", "xla.sdy.FuncResultSharding"}


def kernel_name(i: Instruction) -> str:
    """The name of a kernel that is not XLA's own code; "" for other instructions."""
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    if i.opcode != "custom-call" or not target or target[1] in BOOKKEEPING:
        return ""
    own = re.search(r"(?:^|/)(?:jit\()?([^/()]*)\)?(?:/vmap\(\))?(?:/pallas_call)?$", i.op_name)
    return own[1] if target[1] in ("tpu_custom_call", *PALLAS) and own and own[1] else target[1]


def kernel_flops(i: Instruction, here: Computation, rows: int | None = None) -> int | None:
    """The FLOPs of a kernel; 0 for other instructions, None for a kernel of which nothing is known.

    Args:
        i: any instruction.
        here: its computation.
        rows: rows of a grouped product that belong to a group; all, if None. Buffers of a dispatcher have room for
            more, but megablox multiplies only the tiles that groups reach.
    """
    name = kernel_name(i)
    if not name:
        return 0
    if name.startswith("splash_"):
        return _splash(i, here)
    estimate = _estimate(i)
    if name in ("gmm", "tgmm") and estimate is not None:
        return round(estimate * tiled_share(i, here, rows))
    return gpu_flops(i, here, name, rows) if estimate is None else estimate


def _estimate(i: Instruction) -> int | None:
    """What the kernel's author says of its FLOPs."""
    found = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.attributes)
    return int(found[1]) if found else None


def tiled_share(i: Instruction, here: Computation, rows: int | None) -> float:
    """Rows that megablox multiplies over the rows of its buffer, which its own estimate counts.

    A tile in which a group ends and the next begins is multiplied once for each. Groups of random sizes end within
    tiles, so that E groups add E - 1 tiles.
    """
    operands = [here.instructions[name].leaves[0] for name in i.operands]
    lengths = [leaf.dims[0] for leaf in operands if len(leaf.dims) == 1]  # of groups' offsets, then of tiles' groups
    buffer = next(leaf.dims[0] for leaf in operands if len(leaf.dims) == 2)
    groups = lengths[0] - 1
    tile = buffer // (lengths[1] - groups + 1)
    return (min(buffer, buffer if rows is None else rows) + (groups - 1) * tile) / buffer


SPLASH = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}  # products of width K and of width V for every score


def _splash(i: Instruction, here: Computation) -> int:
    """2 FLOPs a score, and width of its products, in every block of scores that the causal mask does not hide.

    Documents differ by their ids, which hide scores and skip no block.
    """
    operands = [here.instructions[name].leaves[0] for name in i.operands]
    query, key, value = [leaf.dims for leaf in operands if len(leaf.dims) > 2 and "f" in leaf.dtype][:3]
    phase = next(phase for phase in SPLASH if f"_{phase}" in kernel_name(i))
    of_keys, of_values = SPLASH[phase]
    width = of_keys * query[-1] + of_values * value[-1]
    return 2 * math.prod(query[:-2]) * _scores(query[-2], key[-2], *_blocks(i)) * width


def _blocks(i: Instruction) -> tuple[int, int]:
    """Queries and keys of a block; 1 and 1 if the text does not say, which counts no score that is hidden."""
    sizes = [re.search(rf"block_{of}\w*\W+(\d+)", i.attributes) for of in ("q", "kv")]
    return tuple(int(found[1]) if found else 1 for found in sizes)  # type: ignore[return-value]


def _scores(queries: int, keys: int, block_q: int, block_kv: int) -> int:
    """Scores in the blocks that hold a visible one."""
    starts = range(0, queries, block_q)
    return sum(block_q * min(keys, -(-(first + block_q) // block_kv) * block_kv) for first in starts)
