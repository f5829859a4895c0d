"""Rotary positions (RoPE), and YaRN and LongRoPE for long contexts."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.config import LongRopeConfig, YarnConfig


def rope(
    x: Float[Array, "batch seq heads head_dim"],
    positions: Int32[Array, "batch seq"],
    theta: float,
    yarn: YarnConfig = YarnConfig(),
    longrope: LongRopeConfig = LongRopeConfig(),
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (i, i + head_dim / 2) by position x frequency; YaRN and LongRoPE also scale their length.

    Source: arXiv 2104.09864; the length, `mscale` over `mscale_all_dim`, as in DeepSeek-V2's code.
    """
    half = x.shape[-1] // 2
    frequency = frequencies(half, theta, yarn)
    if longrope.short_factor:
        frequency = frequency / jnp.asarray(longrope.short_factor, jnp.float32)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if yarn.factor > 1:
        length = _yarn_scale(yarn, yarn.mscale) / _yarn_scale(yarn, yarn.mscale_all_dim)
        cos, sin = length * cos, length * sin
    if longrope.short_factor:
        cos, sin = longrope.short_mscale * cos, longrope.short_mscale * sin
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def frequencies(half: int, theta: float, yarn: YarnConfig) -> Float[Array, "half"]:
    """theta^(-i / half), in radians a position; under YaRN slow pairs turn `factor` times slower.

    Between the pairs that turn `beta_fast` and `beta_slow` times over the original length, the share of the slowing
    rises linearly. Source: arXiv 2309.00071, section 3.2; its bounds are rounded outwards in its code.
    """
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if yarn.factor == 1:
        return frequency

    def pair_turning(turns: float) -> float:
        return half * math.log(yarn.original_length / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(2 * half - 1, high)
    slowed = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
    return frequency * (slowed / yarn.factor + 1.0 - slowed)


def softmax_scale(width: int, yarn: YarnConfig) -> float:
    """The factor of query . key: 1 / sqrt(width), under YaRN times the square of the scale of `mscale_all_dim`."""
    return _yarn_scale(yarn, yarn.mscale_all_dim) ** 2 / math.sqrt(width)


def _yarn_scale(yarn: YarnConfig, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1.0
