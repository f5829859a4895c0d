"""The layers that others are built of: norms, the feed-forward layer, and their initial weights.

Every parameter carries `dims`, the logical dimension of each of its axes without the axis of stacked layers, which
weight decay and sharding read, the `part` of the model that it belongs to, by which the optimizer groups it, and the
`multipliers` of its learning rate.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from moe_jax.config import ModelConfig, Part, is_gated
from moe_jax.config.multipliers import of_matrix, of_vector
from moe_jax.dispatch import ExpertWeights, feed_forward
from moe_jax.kernels.activation import Activation


def normal(config: ModelConfig, rngs: nnx.Rngs, part: Part, dtype: str | None = None, **dims: int) -> nnx.Param:
    """A weight drawn from N(0, init_std^2), named by its dimensions: `normal(c, rngs, "dense", embed=8, ffw=32)`.

    With `model.scaling` its standard deviation is a multiple of init_std (`config.multipliers`).
    """
    multipliers = of_matrix(config, part, dims)
    value = config.init_std * multipliers.std * jax.random.normal(rngs.params(), tuple(dims.values()), jnp.float32)
    value = value.astype(dtype or config.param_dtype)
    return nnx.Param(value, dims=tuple(dims), part=part, multipliers=multipliers)


def filled(config: ModelConfig, value: float, part: Part, dtype: str, **dims: int) -> nnx.Param:
    """A bias or a scale that begins as `value` everywhere, named by its dimensions."""
    multipliers = of_vector(config, part, dims)
    return nnx.Param(jnp.full(tuple(dims.values()), value, dtype), dims=tuple(dims), part=part, multipliers=multipliers)


def over_rms(x: Float32[Array, "*batch width"], eps: float) -> Float32[Array, "*batch width"]:
    """x / rms(x) over the last axis."""
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32. Source: arXiv 1910.07467."""

    def __init__(self, config: ModelConfig, eps: float | None = None, **dims: int) -> None:
        self.scale = filled(config, 1.0, "norms", config.param_dtype, **dims)
        self.eps = config.norm_eps if eps is None else eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Same shape and dtype as x."""
        scaled = over_rms(x.astype(jnp.float32), self.eps)
        return (scaled * jnp.broadcast_to(self.scale.astype(jnp.float32), x.shape)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + shift over the last axis, in float32. Source: arXiv 1607.06450."""

    def __init__(self, config: ModelConfig, **dims: int) -> None:
        self.scale = filled(config, 1.0, "norms", config.param_dtype, **dims)
        self.shift = filled(config, 0.0, "norms", config.param_dtype, **dims)
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        scaled = over_rms(wide - wide.mean(-1, keepdims=True), self.eps)
        scale, shift = (jnp.broadcast_to(v.astype(jnp.float32), x.shape) for v in (self.scale, self.shift))
        return (scaled * scale + shift).astype(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig) -> Norm:
    """The norm of the residual stream that `model.norm` names."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config, embed=config.embed_dim)


class FeedForward(nnx.Module):
    """A feed-forward layer of hidden width `ffw`, with the config's activation and the gate that it has."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, part: Part, ffw: int) -> None:
        self.gate = normal(config, rngs, part, embed=config.embed_dim, ffw=ffw) if is_gated(config) else None
        self.up = normal(config, rngs, part, embed=config.embed_dim, ffw=ffw)
        self.down = normal(config, rngs, part, ffw=ffw, embed=config.embed_dim)
        self.cpu_kernel = config.cpu_kernel
        self.activation = nnx.static(Activation.of(config))

    def __call__(self, x: Float[Array, "*batch embed"], mesh: Mesh | None = None) -> Float[Array, "*batch embed"]:
        """Same shape and dtype as x."""
        gate = None if self.gate is None else self.gate.astype(x.dtype)
        weights = ExpertWeights(gate, self.up.astype(x.dtype), self.down.astype(x.dtype))
        flat = x.reshape(-1, x.shape[-1])
        return feed_forward(flat, weights, mesh, self.cpu_kernel, self.activation).reshape(x.shape)
