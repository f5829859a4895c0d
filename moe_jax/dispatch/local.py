"""Dispatch on one device: every expert on every token (the oracle), or copies sorted by expert."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.dispatch.experts import ExpertWeights, Kernel, Traffic, _swiglu_of_each, _traffic, _visits, swiglu
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.routing import Routing, count

# --- dense: the oracle ----------------------------------------------------------------------------------------


def _dense(x: Array, routing: Routing, weights: ExpertWeights, quantization: str) -> Array:
    num_experts = weights.gate.shape[0]
    if quantization == "none":
        outputs = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x, *weights)
    else:
        outputs = _swiglu_of_each(jnp.broadcast_to(x, (num_experts, *x.shape)), weights, quantization)
    share = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.float32) * routing.gates[..., None]
    return jnp.einsum("te,etd->td", share.sum(1), outputs.astype(jnp.float32)).astype(x.dtype)


def _local(
    x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, *, kernel: Kernel
) -> tuple[Array, Traffic]:
    num_experts = weights.gate.shape[0]
    rows = rows_multiplied(count(expert_ids, num_experts), kernel.tile)
    y = kernel.multiply(x, expert_ids, gates, weights)
    return y, _traffic(rounds=1, rows=rows, visits=_visits(expert_ids, num_experts, 1))
