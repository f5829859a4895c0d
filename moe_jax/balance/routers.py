"""Methods that put another router in place of the learned one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moe_jax.balance.protocol import Balancer
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.balance import FrozenRouter


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

    Own state: W, float32 [D, E], the same in every run with this `seed`: init_std with random signs, which gives logits
    the deviation of a learned router's first ones, and has the same bits however it is compiled, as normals have not.
    """

    def weight(num_experts: int, layer: Any) -> Float32[Array, "embed experts"]:
        key = jax.random.fold_in(jax.random.key(options.seed), layer)
        return model.init_std * jax.random.rademacher(key, (model.embed_dim, num_experts), jnp.float32)

    return Balancer(own_state=weight, router=lambda learned, own: own)
