"""Methods that move the selection bias against the load just seen: state, and no gradient.

E real experts come first, then Z zero-computation experts (`model.num_zero_experts`), which are to get the share
`model.zero_share` of the copies; without them every expert's target is the mean load.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

from moe_jax.balance.base import register
from moe_jax.balance.method import Method
from moe_jax.balance.wrappers import factor_at
from moe_jax.config import ModelConfig
from moe_jax.options import BiasOptions, BiasSign


@register("bias_sign")
def bias_sign(options: BiasSign, model: ModelConfig) -> Method:
    """Loss-Free Balancing: `b_i += u sign(mean load - load_i)` after every step, effective on the next.

    An overloaded expert's bias falls. `zero_mean` subtracts the mean of the increments, which changes no
    selection but keeps the biases from drifting together.

    Source: arXiv 2408.15664, Algorithm 1; zero-mean as in Moonlight (`b += u (sign(e) - mean sign(e))`).
    """

    def update_bias(loads: Array, _: None, bias: Array, __: None, step: Array) -> tuple[Array, None]:
        return moved(options, bias, load_sign(loads, model), step), None

    return Method(update_bias=update_bias)


def moved(options: BiasOptions, bias: Array, direction: Float32[Array, "experts"], step: Array) -> Array:
    """The bias after an increment of `rate x direction`, the rate shaped over steps, centred if asked."""
    increment = jnp.float32(options.rate) * factor_at(options, step) * direction
    return bias + (increment - increment.mean() if options.zero_mean else increment)


def load_sign(loads: Shaped[Array, "experts"], model: ModelConfig = ModelConfig()) -> Float32[Array, "experts"]:
    """sign(target - load): -1 overloaded, +1 underloaded, 0 exactly at it, and for zero-computation experts.

    By integer arithmetic alone where loads are integers: float32 cannot tell 2^25 from 2^25 + 1, and E x load
    overflows int32 at the batch of DeepSeek-V3; a quotient and a remainder do neither. Loads sum to less than 2^31.
    """
    zero = model.num_zero_experts
    real = loads.shape[0] - zero
    if not jnp.issubdtype(loads.dtype, jnp.integer):
        sign = jnp.sign(target_loads(loads, model) - loads)
    else:
        quotient, remainder = jnp.divmod(_part(loads.sum(), 1.0 - model.zero_share if zero else 1.0), real)
        at_quotient = jnp.sign(remainder)
        sign = jnp.where(loads > quotient, -1, jnp.where(loads < quotient, 1, at_quotient)).astype(jnp.float32)
    return jnp.where(jnp.arange(loads.shape[0]) < real, sign, 0.0)


def target_loads(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """How many copies each expert is to have, float32 [E + Z]."""
    total = loads.sum().astype(jnp.float32)
    zero = model.num_zero_experts
    real = loads.shape[0] - zero
    if not zero:
        return jnp.full(real, total / real)
    share = model.zero_share
    return jnp.where(jnp.arange(real + zero) < real, total * (1.0 - share) / real, total * share / zero)


def relative_error(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """(target - load) / target for the real experts, 1 for one without load; 0 for zero-computation experts."""
    target = target_loads(loads, model)
    real = jnp.arange(loads.shape[0]) < loads.shape[0] - model.num_zero_experts
    return jnp.where(real & (target > 0), 1.0 - loads / jnp.where(target > 0, target, 1.0), 0.0)


def _part(total: Array, share: float) -> Array:
    """A share, in thousandths, of an int32, without overflow."""
    thousandths = round(1000 * share)
    return total // 1000 * thousandths + total % 1000 * thousandths // 1000
