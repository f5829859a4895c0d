"""Methods by which a token has as many experts as its scores ask for, and `model.top_k` on average.

An empty slot is id E. T tokens, S slots, E experts, k `model.top_k`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.balance.measures import mean_over_tokens
from moe_jax.balance.protocol import Balancer, Seen
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.selector_options import Relu, TopP
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
        tokens = jnp.maximum(num_tokens(routing), 1).astype(jnp.float32)
        copies = routing.loads.astype(jnp.float32) * (len(routing.loads) / model.top_k) / tokens
        penalty = (copies * mean_over_tokens(routing.scores, routing)).sum()
        return options.weight * jnp.exp(seen.state) * penalty

    def update(seen: Seen) -> tuple[Array, Float32[Array, ""]]:
        excess = jnp.sign(seen.loads.sum(dtype=jnp.int32) - model.top_k * seen.own).astype(jnp.float32)
        return seen.bias, jnp.clip(seen.state + math.log(options.factor) * excess, -limit, limit)

    return Balancer(
        own_state=zero,
        own_statistics=num_tokens,
        own_loss=loss,
        own_update=update,
        select=select,
    )


@register(
    "top_p",
    equation="token t uses its best experts up to the share P; P = I + kp e; I += ki e; e = (k - experts) / E",
    source="DTop-p (arXiv 2512.13996), as its abstract describes it; top-p routing: arXiv 2403.07652",
)
def top_p(options: TopP, model: ModelConfig) -> Balancer:
    """Dynamic top-p: a token uses its best experts until their scores reach the share P of all its scores.

    A confident token needs few experts, an undecided one many. After every step a PI controller moves P, so that tokens
    have k experts on average: e is the step's error, as a share of the experts. I and P stay within [0, 1], and a token
    always has its best expert. P decides how many experts are used, not which: a loss has to balance them. It is
    causal, and evaluation routes the same way.

    The gains are ours. The paper shares P among the layers, whose logits it normalises with a learned scale, so that
    layers differ in their number of experts; here each layer has a P of its own, and k experts. Own state: I and P,
    float32 [2], from k / E, which is right where all scores are equal. Statistics: the number of valid tokens.
    """

    def select(
        scores: Array, biased: Array, *, top_k: int, state: Array | None = None, **_: Any
    ) -> Int32[Array, "tokens slots"]:
        num_experts = scores.shape[1]
        p = top_k / num_experts if state is None else state[1]
        scores = jax.lax.stop_gradient(scores)
        ids = best(scores, num_experts)
        falling = jnp.take_along_axis(scores, ids, axis=-1)
        before = jnp.cumsum(falling, axis=-1) - falling
        total = falling.sum(-1, keepdims=True)
        used = (before < p * total) | (jnp.arange(num_experts) == 0)[None]
        return jnp.where(used, ids, num_experts)[:, : options.slots or num_experts]

    def start(num_experts: int, layer: Any) -> Float32[Array, "2"]:
        return jnp.full(2, model.top_k / num_experts, jnp.float32)

    def update(seen: Seen) -> tuple[Array, Float32[Array, "2"]]:
        missing = model.top_k * seen.own - seen.loads.sum(dtype=jnp.int32)
        error = missing.astype(jnp.float32) / (jnp.maximum(seen.own, 1).astype(jnp.float32) * len(seen.loads))
        level = jnp.clip(seen.state[0] + options.integral * error, 0.0, 1.0)
        new = jnp.stack([level, jnp.clip(level + options.proportional * error, 0.0, 1.0)])
        frozen = False if options.freeze_step is None else seen.step >= options.freeze_step
        return seen.bias, jnp.where(frozen, seen.state, new)

    return Balancer(own_state=start, own_statistics=num_tokens, own_update=update, select=select)


def num_tokens(routing: Routing) -> Int32[Array, ""]:
    """The number of valid tokens."""
    return routing.is_token.sum(dtype=jnp.int32)
