"""phi-balancing: a loss whose prices are the gradient of a convex potential of the mean scores over past steps."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.balance.losses import of_real_experts
from moe_jax.balance.measures import mean_over_tokens
from moe_jax.balance.protocol import Balancer, Seen
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.balance import PhiLoss
from moe_jax.routing import Routing, normalized_scores

DIGITS = 5  # of a score, hexadecimal: exact to 5e-7
SMALLEST_SHARE = 1e-6  # of a score: a mean below it is that of no token

PRICES: dict[str, Callable[[Array, int], Array]] = {
    "negative_entropy": lambda mean, experts: jnp.log(experts * jnp.maximum(mean, SMALLEST_SHARE)),
    "euclidean": lambda mean, experts: mean - 1.0 / experts,
}


@register(
    "phi_loss",
    equation="weight x sum_i P_i dphi/dm_i; m <- ema m + (1 - ema) P",
    source="phi-balancing (arXiv 2605.15403), Algorithm 1 and eq. 12, as two public implementations have them",
)
def phi_loss(options: PhiLoss, model: ModelConfig) -> Balancer:
    """phi-balancing: minimises a convex potential phi of the expected scores, which m estimates over many steps.

    P is the mean over valid tokens of each token's scores, divided by their sum; the bound of phi by its conjugate
    turns phi(E[P]) into a loss that is linear in P, with the prices dphi/dm, which have no gradient. phi is

    - `negative_entropy`, sum m log m: the price of expert i is log(E m_i), so that m = P costs the divergence of m from
      uniform, at most log E;
    - `euclidean`, sum m^2 / 2: the price is m_i - 1 / E, E times smaller near balance, for a weight E times larger.

    Each price is up to a constant, which has no gradient, because P sums to 1. Own state: m, float32 [E], which starts
    uniform and without prices. It moves once a step by the scores of all its tokens, so the prices of a step are those
    of the steps before (the paper's include the step itself), and the loss does not depend on how a batch is split.
    Soft scores are balanced, not loads: experts of equal mean scores can still have unequal loads. Zero-computation
    experts are left out, and scores are normalised without theirs.

    Statistics: the sums of the scores by hexadecimal digit, int32 [E, 5], exact for up to 2^27 tokens.
    """
    zero = model.num_zero_experts

    def shares(routing: Routing) -> Float32[Array, "tokens experts"]:
        return normalized_scores(of_real_experts(routing, routing.loads.shape[0] - zero))

    def uniform(num_experts: int, layer: Any) -> Float32[Array, "experts"]:
        return jnp.full(num_experts - zero, 1.0 / (num_experts - zero), jnp.float32)

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        prices = PRICES[options.potential](seen.state, len(seen.state))
        return options.weight * (prices * mean_over_tokens(shares(routing), routing)).sum()

    def statistics(routing: Routing) -> Int32[Array, "experts digits"]:
        return digit_sums(jnp.where(routing.is_token[:, None], shares(routing), 0.0))

    def update(seen: Seen) -> tuple[Array, Float32[Array, "experts"]]:
        sums = of_digits(seen.own)
        mean = sums / jnp.maximum(sums.sum(), 1.0)
        return seen.bias, options.ema * seen.state + (1.0 - options.ema) * mean

    return Balancer(own_state=uniform, own_statistics=statistics, own_loss=loss, own_update=update)


def digit_sums(values: Float32[Array, "tokens columns"]) -> Int32[Array, "columns digits"]:
    """The sum of each column, digit by digit in base 16: integers, so that any split of the tokens adds up exactly.

    values: from 0 to 1; each is rounded to `DIGITS` digits after the point, and 1 has 16 as its first.
    """
    whole = jnp.round(values * 16**DIGITS).astype(jnp.int32)
    digits = [(whole >> 4 * (DIGITS - 1)), *((whole >> 4 * place) & 15 for place in range(DIGITS - 2, -1, -1))]
    return jnp.stack([digit.sum(0, dtype=jnp.int32) for digit in digits], axis=-1)


def of_digits(sums: Int32[Array, "columns digits"]) -> Float32[Array, "columns"]:
    """The sums whose digits `digit_sums` added up."""
    places = 16.0 ** -jnp.arange(1, DIGITS + 1, dtype=jnp.float32)
    return (sums.astype(jnp.float32) * places[None]).sum(-1)
