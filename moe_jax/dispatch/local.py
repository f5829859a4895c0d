"""Dispatch on one device: every expert on every token (the oracle), or copies sorted by expert."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.dispatch.work import Traffic, Work, register
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.routing import count


@register("dense")
def dense(work: Work) -> tuple[Array, Traffic]:
    """Every expert on every token: the oracle."""
    num_experts = work.num_experts
    outputs = work.multiply.each(work.x, work.weights)
    share = jax.nn.one_hot(work.expert_ids, num_experts, dtype=jnp.float32) * work.gates[..., None]
    y = jnp.einsum("te,etd->td", share.sum(1), outputs.astype(jnp.float32))
    return y, Traffic.of(rows=work.x.shape[0] * num_experts, visits=work.visits())


@register("local")
def local(work: Work) -> tuple[Array, Traffic]:
    """Copies sorted by expert, every device having all experts: the cost does not grow with E.

    Source: dropless sorting as in MegaBlocks (arXiv 2211.15841).
    """
    rows = rows_multiplied(count(work.expert_ids, work.num_experts), work.multiply.tile)
    y = work.multiply.routed(work.x, work.expert_ids, work.gates, work.weights)
    return y, Traffic.of(rows=rows, visits=work.visits())
