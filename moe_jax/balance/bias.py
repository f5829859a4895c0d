"""Methods that move the selection bias against the load just seen: state, and no gradient."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.balance.base import Method, register
from moe_jax.config import BiasSign


@register("bias_sign")
def bias_sign(options: BiasSign) -> Method:
    """Loss-Free Balancing: `b_i += u sign(mean load - load_i)` after every step, effective on the next.

    An overloaded expert's bias falls. `zero_mean` subtracts the mean of the increments, which changes no
    selection but keeps the biases from drifting together. The rate u is shaped by `rate_at`.

    Source: arXiv 2408.15664, Algorithm 1; zero-mean as in Moonlight (`b += u (sign(e) - mean sign(e))`).
    """

    def update(loads: Array, _: None, bias: Array, __: None, step: Array) -> tuple[Array, None]:
        increment = rate_at(options, step) * load_sign(loads)
        if options.zero_mean:
            increment -= increment.mean()
        return bias + increment, None

    return Method(update=update)


def load_sign(loads: Int32[Array, "experts"]) -> Float32[Array, "experts"]:
    """sign(mean load - load), by integer arithmetic alone: -1 overloaded, +1 underloaded, 0 exactly at the mean.

    float32 cannot tell 2^25 from 2^25 + 1, and E x load overflows int32 at the batch of DeepSeek-V3; the
    quotient and remainder of the sum do neither. Loads must sum to less than 2^31.
    """
    quotient, remainder = jnp.divmod(loads.sum(), loads.shape[0])
    at_quotient = jnp.sign(remainder)
    sign = jnp.where(loads > quotient, -1, jnp.where(loads < quotient, 1, at_quotient))
    return sign.astype(jnp.float32)


def rate_at(options: BiasSign, step: Int32[Array, ""]) -> Float32[Array, ""]:
    """The rate at `step`: a linear warm-up, then constant, or falling to 0 at `freeze_step`; 0 from there on."""
    step = jnp.asarray(step, jnp.float32)
    factor = jnp.minimum(1.0, (step + 1.0) / max(1, options.warmup_steps))
    if options.freeze_step is not None:
        span = max(1, options.freeze_step - options.warmup_steps)
        progress = jnp.clip((step - options.warmup_steps) / span, 0.0, 1.0)
        if options.schedule == "linear":
            factor *= 1.0 - progress
        if options.schedule == "cosine":
            factor *= 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        factor *= step < options.freeze_step
    return jnp.float32(options.rate) * factor
