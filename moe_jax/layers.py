"""The layers a transformer is made of: RMSNorm, rotary grouped-query attention, SwiGLU.

Every parameter carries `dims`, the logical dimension of each of its axes without the axis of stacked layers:
weight decay and sharding read them. B batch, S sequence, D embed, H heads, F ffw, T = B S tokens.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from moe_jax.attention import attend
from moe_jax.config import ModelConfig
from moe_jax.dispatch import ExpertWeights, dense_swiglu
from moe_jax.mesh import is_sharded


def normal(config: ModelConfig, rngs: nnx.Rngs, dtype: str | None = None, **dims: int) -> nnx.Param:
    """A weight drawn from N(0, init_std^2), named by its dimensions: `normal(c, rngs, embed=8, ffw=32)`."""
    value = config.init_std * jax.random.normal(rngs.params(), tuple(dims.values()), jnp.float32)
    return nnx.Param(value.astype(dtype or config.param_dtype), dims=tuple(dims))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32. Source: arXiv 1910.07467."""

    def __init__(self, config: ModelConfig, **dims: int) -> None:
        self.scale = nnx.Param(jnp.ones(tuple(dims.values()), config.param_dtype), dims=tuple(dims))
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        scaled = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.eps)
        return (scaled * self.scale.astype(jnp.float32)).astype(x.dtype)


def rope(
    x: Float[Array, "batch seq heads head_dim"], positions: Int32[Array, "batch seq"], theta: float
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (i, i + head_dim / 2) by position x theta^(-2i / head_dim). Source: arXiv 2104.09864."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with RoPE, optional RMSNorm of queries and keys per head.

    A token sees earlier tokens of its own segment (document) only. Source: GQA arXiv 2305.13245.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, head = config.embed_dim, config.head_dim
        self.query = normal(config, rngs, embed=width, heads=config.num_heads, head_dim=head)
        self.key = normal(config, rngs, embed=width, kv_heads=config.num_kv_heads, head_dim=head)
        self.value = normal(config, rngs, embed=width, kv_heads=config.num_kv_heads, head_dim=head)
        self.out = normal(config, rngs, heads=config.num_heads, head_dim=head, embed=width)
        self.query_norm = RMSNorm(config, head_dim=head) if config.qk_norm else None
        self.key_norm = RMSNorm(config, head_dim=head) if config.qk_norm else None
        self.theta = config.rope_theta

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"],
        mesh: Mesh | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """x [B, S, D] with each token's position in its segment, and its segment."""
        query, key, value = project(x, [self.query[...], self.key[...], self.value[...]], mesh)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rope(query, positions, self.theta), rope(key, positions, self.theta)
        mixed = attend(query, key, value, segment_ids, mesh=mesh)
        return jnp.einsum("bshk,hkd->bsd", mixed, self.out.astype(x.dtype))


def project(
    x: Float[Array, "batch seq embed"], weights: Sequence[Float[Array, "embed _ head_dim"]], mesh: Mesh | None
) -> list[Float[Array, "batch seq _ head_dim"]]:
    """x by every weight [D, H, K], to [B, S, H, K] each: one product on one device; heads that are split stay apart."""
    weights = [w.astype(x.dtype) for w in weights]
    if is_sharded(mesh):
        return [jnp.einsum("bsd,dhk->bshk", x, w) for w in weights]
    ends = itertools.accumulate(w.shape[1] for w in weights[:-1])
    return jnp.split(jnp.einsum("bsd,dhk->bshk", x, jnp.concatenate(weights, 1)), list(ends), 2)


class SwiGLU(nnx.Module):
    """A gated feed-forward layer of hidden width `ffw`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, ffw: int) -> None:
        self.gate = normal(config, rngs, embed=config.embed_dim, ffw=ffw)
        self.up = normal(config, rngs, embed=config.embed_dim, ffw=ffw)
        self.down = normal(config, rngs, ffw=ffw, embed=config.embed_dim)
        self.cpu_kernel = config.cpu_kernel

    def __call__(self, x: Float[Array, "*batch embed"], mesh: Mesh | None = None) -> Float[Array, "*batch embed"]:
        """Same shape and dtype as x."""
        weights = ExpertWeights(*(w.astype(x.dtype) for w in (self.gate, self.up, self.down)))
        return dense_swiglu(x.reshape(-1, x.shape[-1]), weights, mesh, self.cpu_kernel).reshape(x.shape)
