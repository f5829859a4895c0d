"""A method that drops copies: those of lowest affinity beyond what a device may get."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from moe_jax.balance.protocol import Balancer
from moe_jax.balance.registry import register
from moe_jax.balance.selectors import rank_in_group
from moe_jax.config import ModelConfig
from moe_jax.config.selector_options import DeviceCapacity
from moe_jax.routing import Routing, Tokens


@register(
    "device_capacity",
    equation="each device keeps its capacity_factor x (copies / devices) copies of highest affinity s_tj",
    source="DeepSeek-V2 (arXiv 2405.04434), sections 2.2.4 and 3.1.2",
)
def device_capacity(options: DeviceCapacity, model: ModelConfig) -> Balancer:
    """Device capacity: in training, the copies beyond a device's capacity are dropped.

    A dropped copy is not dispatched and adds nothing to the output, but loads count it. A device is a logical group of
    consecutive experts; their number is `num_devices`, or model.num_groups if that is 0, or (never in a config) the
    number of experts. A random share `protected` of the sequences, drawn in every forward pass, keeps all its copies,
    which are the first to use their devices' budgets. It is not causal, because copies of later tokens compete, but
    evaluation drops nothing.
    """

    def drop(routing: Routing, state: None, key: Array, train: bool) -> Bool[Array, "tokens slots"]:
        ids = routing.expert_ids
        num_experts = routing.loads.shape[0]
        travels = ids < num_experts
        if not train:
            return travels
        devices = _devices(num_experts)
        copies = travels.sum(dtype=jnp.int32).astype(jnp.float32)
        budget = jnp.round(options.capacity_factor / devices * copies).astype(jnp.int32)
        affinity = jnp.take_along_axis(routing.scores, jnp.minimum(ids, num_experts - 1), axis=-1)
        safe = _drawn_sequences(routing.tokens, len(ids), key, options.protected)[:, None]
        device = jnp.where(travels, ids * devices // num_experts, devices)
        order = lax.stop_gradient(jnp.where(safe, jnp.inf, affinity))
        rank = rank_in_group(order.ravel(), device.ravel(), devices + 1).reshape(ids.shape)
        return travels & (safe | (rank < budget))

    def _devices(num_experts: int) -> int:
        devices = options.num_devices or (model.num_groups if model.num_groups > 1 else num_experts)
        assert num_experts % devices == 0, "the config's rules require that num_devices divides num_experts"
        return devices

    return Balancer(drop=drop)


def _drawn_sequences(tokens: Tokens, num_tokens: int, key: Array, share: float) -> Bool[Array, "tokens"]:
    """A mask that is true for the tokens of a random share of the sequences."""
    if tokens.rows is not None:
        drawn = jax.random.uniform(key, (tokens.rows.count,), jnp.float32) < share
        return jnp.repeat(drawn, num_tokens // tokens.rows.count)
    row, _ = tokens.sequences(num_tokens)
    return (jax.random.uniform(key, (num_tokens,), jnp.float32) < share)[row]
