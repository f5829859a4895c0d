"""A dispatcher of one's own, registered under a name, and a config that uses it."""

import jax
import jax.numpy as jnp

from moe_jax.config import DISPATCHERS, Dispatcher, default, validate
from moe_jax.dispatch import ExpertWeights, Traffic, Work, apply_experts, register
from moe_jax.routing import RouterConfig, route

DISPATCHERS["loop"] = Dispatcher(splits_experts=False)  # drops nothing; every device must have all experts


@register("loop")
def loop(work: Work) -> tuple[jax.Array, Traffic]:
    """One expert after the other, each on all tokens: no copy is moved, and most rows are multiplied for nothing."""

    def add_expert(y: jax.Array, expert: tuple[jax.Array, ExpertWeights]) -> tuple[jax.Array, None]:
        number, weights = expert
        gate = jnp.where(work.expert_ids == number, work.gates, 0.0).sum(1, keepdims=True)
        only = jax.tree.map(lambda w: w[None], weights)
        return y + work.multiply.each(work.x, gate[None], only)[0], None

    experts = jnp.arange(work.num_experts), work.weights
    y, _ = jax.lax.scan(add_expert, jnp.zeros_like(work.x, jnp.float32), experts)
    return y, Traffic.of(rows=work.num_experts * work.x.shape[0], visits=work.visits())


config = validate(default(model=dict(num_experts=8, top_k=2, dispatch="loop")))

# 32 tokens and 8 experts, against the oracle
keys = jax.random.split(jax.random.key(0), 5)
x, logits = jax.random.normal(keys[0], (32, 16)), jax.random.normal(keys[1], (32, 8))
shapes = dict(gate=(8, 16, 24), up=(8, 16, 24), down=(8, 24, 16))
weights = ExpertWeights(**{name: jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys[2:], strict=True)})
routing = route(logits, RouterConfig.of(config.model))
y, traffic = apply_experts(x, routing, weights, dispatcher=config.model.dispatch)
exact, _ = apply_experts(x, routing, weights, dispatcher="dense")
assert jnp.allclose(y, exact, rtol=1e-4, atol=1e-4)
assert traffic.rows == 8 * 32
