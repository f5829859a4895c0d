"""The problem that every contestant of `layer` computes, and the comparison of their outcomes.

T tokens, d embed, E experts, h expert ffw, k experts per token. Imports no framework.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

DType = Literal["float32", "bfloat16"]
Skew = Literal["uniform", "zipf", "collapsed"]

# Largest relative difference between two correct outputs, from rounding and the order of sums. One token of 4,096 with
# a wrong expert would give 1e-2.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
# A token whose k-th and next logits are closer is drawn again, because rounding could choose its expert: some peers
# round a logit, and then its sigmoid, to the 8 bits of bfloat16.
MARGIN = {"float32": 1e-4, "bfloat16": 0.1}


class Shape(NamedTuple):
    """The shape of an MoE layer without shared experts."""

    tokens: int
    embed: int
    experts: int
    ffw: int
    top_k: int

    @property
    def flops(self) -> float:
        """Useful FLOPs of SwiGLU experts, forward + backward: nine matmuls of T k rows, with 2 d h per row."""
        return 18.0 * self.tokens * self.top_k * self.embed * self.ffw

    def text(self) -> str:
        """The shape as text, for a heading."""
        return "T {}, d {}, E {}, h {}, k {}".format(*self)


class Problem(NamedTuple):
    """Float32 values that the dtype can represent: x, dy [T, d], router [d, E], gate, up [E, d, h], down [E, h, d]."""

    x: np.ndarray
    dy: np.ndarray
    router: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


class Outcome(NamedTuple):
    """The output y [T, d], and the gradients for dy, with the shapes in `Problem`; all float32."""

    y: np.ndarray
    x: np.ndarray
    router: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


class Contestant(NamedTuple):
    """A layer that is ready to be timed.

    run: forward + backward, finished when it returns. read: converts the result of `run` to an Outcome. memory: returns
    its peak in bytes after a run; None if unknown. tolerance: the dtype by which its numbers are judged.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Outcome]
    memory: Callable[[], int | None]
    tolerance: DType


def draw(shape: Shape, skew: Skew, dtype: DType, seed: int = 0) -> Problem:
    """Draw normal inputs and weights; the router's first row, whose input is the constant 1, skews the choice."""
    rng = np.random.default_rng(seed)
    t, d, e, h, k = shape

    def normal(*dims: int, scale: float = 1.0) -> np.ndarray:
        return rounded(rng.standard_normal(dims, np.float32) * np.float32(scale), dtype)

    router = normal(d, e, scale=d**-0.5)
    router[0] = rounded(offsets(skew, e, k), dtype)
    x = decided(normal(t, d), router, k, MARGIN[dtype], lambda n: normal(n, d))
    return Problem(
        x=x,
        dy=normal(t, d),
        router=router,
        gate=normal(e, d, h, scale=d**-0.5),
        up=normal(e, d, h, scale=d**-0.5),
        down=normal(e, h, d, scale=h**-0.5),
    )


def rounded(values: np.ndarray, dtype: DType) -> np.ndarray:
    """The values rounded to the dtype, as float32."""
    if dtype == "bfloat16":
        values = values.astype(ml_dtypes.bfloat16)
    return values.astype(np.float32)


def offsets(skew: Skew, experts: int, top_k: int) -> np.ndarray:
    """Offsets of the logits, whose standard deviation is 1: 0, log(1 / rank), or -10 for all but the first k experts.

    None is above 0, because a sigmoid saturates there and its gradient is lost in rounding.
    """
    rank = np.arange(experts)
    return {"uniform": 0.0 * rank, "zipf": -np.log(rank + 1.0), "collapsed": -10.0 * (rank >= top_k)}[skew]


def decided(
    x: np.ndarray, router: np.ndarray, top_k: int, margin: float, redraw: Callable[[int], np.ndarray]
) -> np.ndarray:
    """x with the constant feature; tokens whose choice is not clear by `margin` are drawn again until it is."""
    x[:, 0] = 1.0
    unclear = np.arange(len(x))
    while unclear.size and top_k < router.shape[1]:
        logits = np.sort(x[unclear] @ router, axis=-1)
        unclear = unclear[logits[:, -top_k] - logits[:, -top_k - 1] < margin]
        x[unclear] = redraw(unclear.size)
        x[unclear, 0] = 1.0
    return x


def difference(got: Outcome, expected: Outcome) -> dict[str, float]:
    """|got - expected| / |expected| in the Euclidean norm, for every array."""
    return {name: _relative(a, b) for name, a, b in zip(Outcome._fields, got, expected, strict=True)}


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), np.finfo(np.float32).tiny))


def check(name: str, got: Outcome, expected: Outcome, dtype: DType) -> float:
    """The largest difference between a contestant's outcome and ours.

    Raises:
        ValueError: the outcomes differ, so that the times cannot be compared.
    """
    worst, error = max(
        difference(got, expected).items(), key=lambda item: float("inf") if item[1] != item[1] else item[1]
    )
    if not error <= TOLERANCE[dtype]:
        where = "y" if worst == "y" else f"the gradient of {worst}"
        raise ValueError(
            f"{name} and moe_jax differ in {where} by {error:.1e}, more than {TOLERANCE[dtype]:.0e}; "
            "their times cannot be compared."
        )
    return error
