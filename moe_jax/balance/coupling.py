"""A loss that couples the router to what the experts respond to. N experts that compute, D embed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moe_jax.balance.losses import SMALLEST_SQUARE
from moe_jax.balance.protocol import Balancer, Seen
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.balance import CouplingLoss
from moe_jax.routing import Routing


@register(
    "coupling_loss",
    equation=(
        "weight x mean_ij [i != j] (max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0)); "
        "M_ij = ||(r_i u_i) W_j||, u_i ~ U(1 - e_i, 1 + e_i), e_i = min_j ||r_i - r_j|| / (2 ||r_i||)"
    ),
    source="Expert-Router Coupling (ERC) loss (arXiv 2512.23447), eq. 1-3",
)
def coupling_loss(options: CouplingLoss, model: ModelConfig) -> Balancer:
    """Expert-router coupling: every expert responds most to the column of the router that stands for it.

    Column i of the router, r_i, is taken for the centre of the tokens of expert i, and W_j is the first matrix of
    expert j: its gate, or up where it has none; with `model.latent_dim` r_i is narrowed first, as tokens are. An expert
    is to respond less to the columns of others than to its own, and a column is to find no stronger response elsewhere;
    `alpha` below 1 asks for a distance. The mean is over all N^2 pairs. It does not balance, and reads no token, so
    that the value is the same however a batch is split; the gradient reaches router and experts.

    r_i is multiplied by noise that keeps it nearer to itself than to any other column: `noise` is the share of that
    bound, 0 for none. The noise has no gradient. It is another one in every layer and every step, but the same in all
    micro-batches of a step. Zero-computation experts are left out.

    Own state: int32 [2], the layer and the step, from which the noise is drawn.
    """

    def counter(num_experts: int, layer: Any) -> Array:
        return jnp.stack([jnp.asarray(layer, jnp.int32), jnp.int32(0)])

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        if seen.responses is None:
            raise ValueError(
                "coupling_loss reads the weights of the experts, but was called without their responses; give "
                "losses(..., responses=...)."
            )
        centres = router_weight[:, : router_weight.shape[1] - model.num_zero_experts].T
        if len(centres) == 1:  # there is no other expert
            return jnp.zeros((), jnp.float32)
        reach = options.noise * jax.lax.stop_gradient(_reach(centres))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(options.seed), seen.state[0]), seen.state[1])
        drawn = jax.random.uniform(key, centres.shape, jnp.float32, -1.0, 1.0)
        found = seen.responses(centres * (1.0 + reach[:, None] * drawn))
        own = options.alpha * jnp.diagonal(found)
        excess = jax.nn.relu(found - own[:, None]) + jax.nn.relu(found - own[None])
        others = 1.0 - jnp.eye(len(centres), dtype=jnp.float32)
        return jnp.where(routing.is_token.any(), options.weight * (others * excess).mean(), 0.0)

    return Balancer(
        own_state=counter,
        own_loss=loss,
        own_update=lambda seen: (seen.bias, seen.state.at[1].add(1)),
        at_step=lambda own, step: own.at[1].set(step),
    )


def _reach(centres: Float32[Array, "experts embed"]) -> Float32[Array, "experts"]:
    """Half the distance of each centre from the nearest other one, over its length."""
    products = jnp.matmul(centres, centres.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.diagonal(products)
    apart = jnp.maximum(squares[:, None] + squares[None] - 2.0 * products, 0.0)
    nearest = jnp.where(jnp.eye(len(centres), dtype=bool), jnp.inf, apart).min(1)
    return 0.5 * jnp.sqrt(nearest / jnp.maximum(squares, SMALLEST_SQUARE))
