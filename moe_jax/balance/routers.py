"""Methods that put another router in place of the learned one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moe_jax.balance.losses import SMALLEST_SQUARE
from moe_jax.balance.protocol import Balancer, Seen
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.balance import FrozenRouter, KmeansRouter
from moe_jax.config.multipliers import of_matrix
from moe_jax.routing import Routing


@register(
    "frozen_router",
    equation="logits x_t W with random W, which is never trained",
    source="a control, as in marin-community/marin, issue 5502",
)
def frozen_router(options: FrozenRouter, model: ModelConfig) -> Balancer:
    """Frozen router: the control whose router is random and stays as it was drawn.

    What a learned router adds is the difference from it; as the experts do learn, each still specialises in the tokens
    in its directions. The weight is state, not a parameter, so neither a gradient nor weight decay reaches it, and the
    learned weight, which nothing reads, gets no gradient. It does not balance: combine it with a bias, `quantile` or a
    selector. A loss has nothing to train but the layers below.

    Own state: W, float32 [D, E], the same in every run with this `seed`: the standard deviation of a learned router
    with random signs, which gives logits the deviation of a learned router's first ones, and has the same bits however
    it is compiled, as normals have not.
    """

    def weight(num_experts: int, layer: Any) -> Float32[Array, "embed experts"]:
        std = model.init_std * of_matrix(model, "router", dict(embed=model.embed_dim, experts=num_experts)).std
        return std * _signs(options.seed, layer, model.embed_dim, num_experts)

    return Balancer(own_state=weight, router=lambda learned, own: own)


@register(
    "kmeans_router",
    equation="logits x_t . c_e / (|c_e| sqrt(D)); c_e <- ema c_e + (1 - ema) mean of the x_t that chose e",
    source="the online K-means router of arXiv 2605.12476; the decay of its running average is ours",
)
def kmeans_router(options: KmeansRouter, model: ModelConfig) -> Balancer:
    """Online K-means: the control whose router learns without a gradient, by following its tokens.

    An expert's column is its centroid, a running mean of what the router reads of the tokens that chose it, and a token
    chooses by direction: where the root mean square of x is 1, as with `model.router_norm="plain"`, the logits are
    cosines times `model.router_scale`. What a learned router adds is the difference from it. It does not balance by
    rule: a centroid that many tokens choose moves to their middle and loses those at the edge. Combine it with a bias
    as a learned router. The learned weight, which nothing reads, gets no gradient.

    A centroid moves once a step, by all tokens of the step, in every layer; one that no token chose stays. Sums of
    vectors round, so unlike loads they are the same under another split of a batch only up to rounding.

    Own state: c, float32 [D, E], at first random signs, the same in every run with this `seed`. Statistics: the sums of
    x [D, E], and of how many.
    """

    def centroids(num_experts: int, layer: Any) -> Float32[Array, "embed experts"]:
        return _signs(options.seed, layer, model.embed_dim, num_experts)

    def sums(routing: Routing, inputs: Array | None) -> dict[str, Array]:
        num_experts = routing.loads.shape[0]
        if inputs is None:  # nothing moves
            return {"sum": jnp.zeros((model.embed_dim, num_experts)), "count": jnp.zeros(num_experts, jnp.int32)}
        chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=bool).any(1)
        total = jnp.matmul(inputs.T, chosen.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return {"sum": total, "count": chosen.sum(0, dtype=jnp.int32)}

    def follow(seen: Seen) -> tuple[Array, Array]:
        count = seen.own["count"]
        mean = seen.own["sum"] / jnp.maximum(count, 1).astype(jnp.float32)[None]
        moved = options.ema * seen.state + (1.0 - options.ema) * mean
        return seen.bias, jnp.where(count[None] > 0, moved, seen.state)

    def directions(learned: Array, own: Array) -> Float32[Array, "embed experts"]:
        squared = jnp.maximum((own**2).sum(0, keepdims=True), SMALLEST_SQUARE)
        return own * jax.lax.rsqrt(squared * own.shape[0])

    return Balancer(own_state=centroids, own_statistics=sums, reads_inputs=True, own_update=follow, router=directions)


def _signs(seed: int, layer: Any, *shape: int) -> Float32[Array, "embed experts"]:
    """Random signs, other ones in every layer, with the same bits however they are compiled."""
    return jax.random.rademacher(jax.random.fold_in(jax.random.key(seed), layer), shape, jnp.float32)
