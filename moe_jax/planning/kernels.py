"""FLOPs of kernels that are not XLA's own code, by formula or by their own estimate."""

import re

from moe_jax.planning.attention_kernels import ATTENTION, attention_flops
from moe_jax.planning.gpu_kernels import PALLAS, gpu_flops
from moe_jax.planning.hlo import Computation, Instruction

# custom calls that run no kernel
BOOKKEEPING = {"AllocateBuffer", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast", "Sharding"}
BOOKKEEPING |= {"PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound"}
BOOKKEEPING |= {"SPMDFullToShardShape", "SPMDShardToFullShape", "xla.sdy.FuncResultSharding"}

# where the origin of a Pallas kernel has the kernel's own name
OWN_NAME = {"tpu_custom_call": r"(?:^|/)(?:jit\()?([^/()]*)\)?(?:/pallas_call)?$"}
OWN_NAME |= dict.fromkeys(PALLAS, r"(?:^|/)(Pallas\w+)")  # a class of tokamax


def kernel_name(i: Instruction) -> str:
    """The name of a kernel that is not XLA's own code; "" for other instructions."""
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    if i.opcode != "custom-call" or not target or target[1] in BOOKKEEPING:
        return ""
    own = re.search(OWN_NAME[target[1]], i.op_name) if target[1] in OWN_NAME else None
    return own[1] if own and own[1] else target[1]


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
    if ATTENTION.search(name):
        return attention_flops(i, here, name)
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
