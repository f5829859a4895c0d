"""Methods by which a token has as many experts as its scores ask for, and `model.top_k` on average.

An empty slot is id E. T tokens, S slots, E experts, k `model.top_k`.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.balance.measures import mean_over_tokens
from moe_jax.balance.protocol import Balancer, Seen
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.selector_options import Relu
from moe_jax.routing import Routing, best


@register(
    "relu",
    equation="token t uses expert j iff relu(x_tj) > 0; loss lambda sum_i f_i P_i; lambda *= 1.2^sign(experts - k)",
    source="ReMoE (arXiv 2412.14711) eq. 6-9, as a port to Megatron-LM and a reimplementation have them",
)
def relu(options: Relu, model: ModelConfig) -> Balancer:
    """ReLU routing: a token uses the experts with a positive logit, and an L1 loss of adaptive strength limits them.

    Scores are relu(logits) (`model.score="relu"`), so with `model.normalize_gates=False`, as in the paper, the output
    is continuous where an expert comes or goes. f_i = E / (k T) x (copies of expert i) has no gradient; P_i is expert
    i's mean score over the valid tokens. After every step lambda grows by `factor` if the tokens had more than k
    experts on average, and shrinks if they had fewer. The paper's lambda is shared by all layers, whose experts then
    differ in number; here each layer has its own, and k experts. It is causal, and evaluation routes the same way.

    With random weights half of all logits are positive, so the first steps use E / 2 experts per token, unless `slots`
    limits them. Own state: log(lambda / weight), float32 []. Statistics: the number of valid tokens, int32 [].
    """
    limit = math.log(options.limit)

    def select(scores: Array, biased: Array, *, top_k: int, **_: Any) -> Int32[Array, "tokens slots"]:
        ids = best(scores, options.slots or scores.shape[1])
        return jnp.where(jnp.take_along_axis(scores, ids, axis=-1) > 0, ids, scores.shape[1])

    def zero(num_experts: int, layer: Any) -> Float32[Array, ""]:
        return jnp.zeros((), jnp.float32)

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        tokens = jnp.maximum(routing.is_token.sum(dtype=jnp.int32), 1).astype(jnp.float32)
        copies = routing.loads.astype(jnp.float32) * (len(routing.loads) / model.top_k) / tokens
        penalty = (copies * mean_over_tokens(routing.scores, routing)).sum()
        return options.weight * jnp.exp(seen.state) * penalty

    def update(seen: Seen) -> tuple[Array, Float32[Array, ""]]:
        excess = jnp.sign(seen.loads.sum(dtype=jnp.int32) - model.top_k * seen.own).astype(jnp.float32)
        return seen.bias, jnp.clip(seen.state + math.log(options.factor) * excess, -limit, limit)

    return Balancer(
        own_state=zero,
        own_statistics=lambda routing: routing.is_token.sum(dtype=jnp.int32),
        own_loss=loss,
        own_update=update,
        select=select,
    )
