"""The dispatcher `dense`: every expert on every token, the oracle of the tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe_jax.dispatch.work import Traffic, Work, register


@register("dense")
def dense(work: Work) -> tuple[Array, Traffic]:
    """Multiply every token by every expert, weighted by the gates, which are 0 for experts not chosen."""
    num_experts = work.num_experts
    share = jax.nn.one_hot(work.expert_ids, num_experts, dtype=jnp.float32) * work.gates[..., None]
    outputs = work.multiply.each(work.x, share.sum(1).T[..., None], work.weights)
    y = outputs.astype(jnp.float32).sum(0)
    return y, Traffic.of(rows=work.x.shape[0] * num_experts, visits=work.visits())
