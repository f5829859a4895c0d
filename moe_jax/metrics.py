"""Measures of balance: pure functions of loads, the same for every method. numpy or jax arrays alike.

Loads are token copies per expert, any integer dtype, with experts last; leading dimensions (layers) stay.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from moe_jax.balance.losses import balance_value, mean_over_tokens
from moe_jax.routing import Routing, normalized_scores


def max_violation(loads: Any) -> Any:
    """MaxVio: (max load - mean load) / mean load, 0 to E - 1; 0 at perfect balance or with no load at all.

    Args:
        loads: int [..., E].

    Returns:
        float32 [...].

    Source: Loss-Free Balancing (arXiv 2408.15664) eq. 4.
    """
    xp = loads.__array_namespace__()
    share = _shares(loads)
    return xp.max(share, axis=-1) * loads.shape[-1] - 1.0


def load_entropy(loads: Any) -> Any:
    """Entropy of the load shares over log E: 1 is uniform, 0 one expert only. float32 [...]."""
    xp = loads.__array_namespace__()
    share = _shares(loads)
    terms = xp.where(share > 0, share * xp.log(xp.where(share > 0, share, 1.0)), 0.0)
    if loads.shape[-1] == 1:
        return xp.ones(loads.shape[:-1], dtype=share.dtype)
    return (0.0 - xp.sum(terms, axis=-1)) / xp.log(xp.asarray(loads.shape[-1], dtype=share.dtype))


def dead_experts(loads: Any) -> Any:
    """How many experts had no token at all: int [...]."""
    xp = loads.__array_namespace__()
    return xp.sum(loads == 0, axis=-1)


def bias_range(bias: Any) -> Any:
    """Largest minus smallest bias: float32 [...]; selection only sees differences."""
    xp = bias.__array_namespace__()
    return xp.max(bias, axis=-1) - xp.min(bias, axis=-1)


def aux_loss_value(routing: Routing) -> Float32[Array, ""]:
    """The expert-level auxiliary loss of this micro-batch, weight 1, scores normalised: 1.0 at balance.

    Measured without back-propagation, so that methods which do not use it can be compared by it.
    """
    return balance_value(routing.loads, mean_over_tokens(normalized_scores(routing), routing))


def _shares(loads: Any) -> Any:
    """Loads over their sum, float32; uniform where there is no load."""
    xp = loads.__array_namespace__()
    total = xp.sum(loads, axis=-1, keepdims=True)
    share = xp.astype(loads, jnp.float32) / xp.astype(xp.maximum(total, 1), jnp.float32)
    return xp.where(total > 0, share, xp.asarray(1.0 / loads.shape[-1], dtype=share.dtype))
