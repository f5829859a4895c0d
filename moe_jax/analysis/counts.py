"""Counts of expert use by domain and by pairs of experts, and the shares computed from them."""

from typing import Any

import jax.numpy as jnp

from moe_jax.balance.measures import shares

# --- specialisation -------------------------------------------------------------------------------------------


def domain_matrix(loads: Any) -> Any:
    """How much each domain uses each expert, relative to a balanced load: from 0 to E, 1 for a balanced load.

    Args:
        loads: int [..., D, E], by domain.

    Returns:
        float32 [..., E, D].

    Source: DeepSeek-V3 (arXiv 2412.19437) Fig. 9: the actual over the balanced load.
    """
    xp = loads.__array_namespace__()
    return xp.swapaxes(shares(loads), -1, -2) * loads.shape[-1]


def pair_counts(ids: Any, num_experts: int) -> Any:
    """How many tokens chose both expert i and expert j; on the diagonal, expert i: int [..., E, E], additive.

    Args:
        ids: int [..., T, S]; num_experts or more is an empty slot. T below 2^24, so that counting in float32 is exact.
    """
    xp = ids.__array_namespace__()
    experts = xp.broadcast_to(xp.arange(num_experts, dtype=ids.dtype), (*ids.shape, num_experts))
    chosen = xp.astype(xp.any(ids[..., None] == experts, axis=-2), jnp.float32)
    return xp.astype(xp.matmul(xp.swapaxes(chosen, -1, -2), chosen), jnp.int32)


def coactivation(pairs: Any) -> Any:
    """N(i, j) / N(i): the share of expert i's tokens that also chose j; 1 on the diagonal, 0 for a dead expert.

    Args:
        pairs: int [..., E, E], from `pair_counts`.

    Returns:
        float32 [..., E, E], 0 to 1; off the diagonal (K - 1) / (E - 1) for a random router.

    Source: OLMoE (arXiv 2409.02060) eq. 6. Its script counts only neighbours in the order of scores; this counts all
    pairs.
    """
    xp = pairs.__array_namespace__()
    own = xp.linalg.diagonal(pairs)[..., None]
    return xp.astype(pairs, jnp.float32) / xp.astype(xp.maximum(own, 1), jnp.float32)
