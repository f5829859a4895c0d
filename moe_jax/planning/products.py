"""FLOPs of matrix products and convolutions in a compiled program."""

import functools
import math
import re
from collections.abc import Callable

from moe_jax.planning.hlo import Computation, Instruction


def flops(i: Instruction, here: Computation) -> int:
    """The FLOPs of a dot or a convolution; 0 for everything else."""
    if i.opcode == "dot":
        left = here.instructions[i.operands[0]].leaves[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        sizes = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2 * math.prod(i.leaves[0].dims) * math.prod(sizes)
    if i.opcode == "convolution":
        return _convolution(i, here)
    return 0


def _convolution(i: Instruction, here: Computation) -> int:
    """2 x outputs x input features x kernel positions that meet an input; on TPU, batched products are convolutions."""
    left, right = (here.instructions[name].leaves[0].dims for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i.attributes
    window = _window(i.attributes)
    out = i.leaves[0].dims
    features = right[labels[2].index("i")]
    total = 2 * features * out[labels[3].index("b")] * out[labels[3].index("f")]
    for n in range(len(labels[1]) - 2):
        where = [label.index(str(n)) for label in labels.groups()]
        total *= meetings(left[where[0]], right[where[1]], out[where[2]], **window(n))
    return total


def _window(attributes: str) -> Callable[[int], dict[str, int]]:
    """(n) -> the window's settings in spatial dimension n."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(p.split("=") for p in found[1].split()) if found else {}

    def of(n: int) -> dict[str, int]:
        def get(key: str, default: str) -> str:
            return parts[key].split("x")[n] if key in parts else default

        return {
            "stride": int(get("stride", "1")),
            "low": int(get("pad", "0_0").split("_")[0]),
            "left_dilation": int(get("lhs_dilate", "1")),
            "right_dilation": int(get("rhs_dilate", "1")),
        }

    return of


@functools.lru_cache(maxsize=4096)
def meetings(
    left: int, right: int, out: int, stride: int = 1, low: int = 0, left_dilation: int = 1, right_dilation: int = 1
) -> int:
    """Pairs (output, kernel position) of one spatial dimension that meet an input element, not padding or a gap."""
    span = (left - 1) * left_dilation + 1

    def meet(at: int) -> bool:
        return 0 <= at < span and at % left_dilation == 0

    if right == 1:
        return sum(meet(o * stride - low) for o in range(out))
    return sum(meet(o * stride + k * right_dilation - low) for o in range(out) for k in range(right))
