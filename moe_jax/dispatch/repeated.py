"""A dispatch in rounds of bounded size: the first always, others while they are needed, and nothing of them is kept.

T tokens, K slots, D embed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.weights import ExpertWeights


class Inputs(NamedTuple):
    """What the output of a dispatch is differentiated by: x [T, D], gates float32 [T, K], this device's experts."""

    x: Float[Array, "tokens embed"]
    gates: Float[Array, "tokens slots"]
    weights: ExpertWeights


class Repeated(NamedTuple):
    """The rounds of one dispatch.

    needed: how many are needed.
    one: (number, inputs) -> float32 [T, D], what the copies of a round add to the output, and int32 [], how many rows
        were multiplied.
    """

    needed: Int32[Array, ""]
    one: Callable[[Array | int, Inputs], tuple[Array, Array]]


# from int32 arrays that say which copy goes where to the rounds; it closes over no array, since both passes call it
Plan = Callable[[Any], Repeated]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_of_rounds(
    plan: Plan, inputs: Inputs, copies: Any
) -> tuple[Float[Array, "tokens embed"], Int32[Array, ""], Int32[Array, ""]]:
    """What all rounds add to the output, float32 [T, D]; how many were needed; how many rows they multiplied.

    The first round is differentiated as any function is, so that a layer keeps of it what `model.remat` says. Of the
    others nothing is kept, because memory must not grow with the number of rounds that could be needed: the backward
    pass repeats them, one at a time. Each pass adds them to its result of the first.

    If a round has a collective, `needed` must be equal on all devices, because a device that stopped early would leave
    the others waiting in it.

    Args:
        plan: makes the rounds of `copies`.
        inputs: the tokens, gates and experts.
        copies: int32 arrays.
    """
    needed, one = plan(copies)
    y, rows = _and_further(one(0, inputs), needed, lambda number: one(number, inputs))
    return y, needed, rows


def _forward(plan: Plan, inputs: Inputs, copies: Any) -> tuple[tuple[Array, Array, Array], tuple]:
    needed, one = plan(copies)
    y, transpose, rows = jax.vjp(functools.partial(one, 0), inputs, has_aux=True)
    y, rows = _and_further((y, rows), needed, lambda number: one(number, inputs))
    return (y, needed, rows), (transpose, inputs, copies)


def _backward(plan: Plan, kept: tuple, d: tuple) -> tuple[Inputs, None]:
    (transpose, inputs, copies), (dy, *_) = kept, d
    needed, one = plan(copies)

    def gradients(number: Array) -> tuple[Inputs]:
        return jax.vjp(functools.partial(one, number), inputs, has_aux=True)[1](dy)

    (of_inputs,) = _and_further(transpose(dy), needed, gradients)
    return of_inputs, None


sum_of_rounds.defvjp(_forward, _backward)


def _and_further(first: Any, needed: Array, result: Callable[[Array], Any]) -> Any:
    """The first round's result plus those of the rounds 1 to `needed` - 1.

    A balanced step takes the branch without a loop, and that is the one that a plan counts.
    """

    def add_next(number: Array, sofar: Any) -> Any:
        return jax.tree.map(jnp.add, sofar, result(number))

    return lax.cond(needed > 1, lambda sofar: lax.fori_loop(1, needed, add_next, sofar), lambda sofar: sofar, first)
