"""An exponential moving average of the weights, kept beside those that are trained.

It covers the parameters and the selection bias, because a bias fits the scores of the parameters that it was moved
with. The rest of the balancer's state is counts, prices and tables of the run itself: it is not averaged, and is used
with the average as it is. The average changes no number of the training.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.config import EmaConfig
from moe_jax.model.abstract import Tree


class Ema(NamedTuple):
    """The averages, float32, in the structure of the state's fields of the same names."""

    params: Tree
    bias: Tree


def initial(config: EmaConfig, weights: Ema, places: Ema | None = None) -> Ema | None:
    """The average before the first step, a copy of the weights; None if `ema.decay` is 0.

    Args:
        weights: the parameters and the bias themselves.
        places: the shardings of both; None is one device.
    """
    if not config.decay:
        return None

    def copied(weights: Ema) -> Ema:
        return jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), weights)

    return jax.jit(copied, out_shardings=places)(weights)


def share_kept(config: EmaConfig, step: Int32[Array, ""]) -> Float32[Array, ""]:
    """The weight of the old average after step 0, 1, ...: it rises to `ema.decay`, so that early weights are forgotten.

    min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    steps = step.astype(jnp.float32)
    return jnp.minimum(config.decay, (1.0 + steps) / (10.0 + steps))


def advance(config: EmaConfig, before: Ema | None, params: Tree, bias: Tree, step: Int32[Array, ""]) -> Ema | None:
    """The average after a step whose moved weights are these."""
    if before is None:
        return None
    kept = share_kept(config, step)
    return jax.tree.map(lambda old, new: kept * old + (1.0 - kept) * new.astype(jnp.float32), before, Ema(params, bias))
