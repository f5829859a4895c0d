"""The multipliers of `model.scaling` multiplied into weights, for programs that do not know them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig, ScalingConfig
from moe_jax.config.multipliers import attention_multiplier, logits_divisor, residual_multiplier
from moe_jax.model.abstract import Read, abstract_model
from moe_jax.model.attention import Attention, LatentAttention
from moe_jax.model.block import Block
from moe_jax.model.layers import FeedForward
from moe_jax.model.moe import MoE
from moe_jax.model.transformer import Transformer
from moe_jax.runtime.leaves import path_name


def folded(config: ModelConfig, read: Read) -> tuple[ModelConfig, Read]:
    """The config of the same function without `model.scaling`, and a function that reads its weights.

    Config keys such as `residual_multiplier` stay as they are: only the factors of scaling become part of weights.
    A weight with another factor than 1 is multiplied in float32 and rounded to its dtype; the others keep their bits.

    Args:
        config: of the model.
        read: returns slices of its parameters.

    Raises:
        ValueError: no weight of the model can take one of the factors.
    """
    if config.scaling == ScalingConfig():
        return config, read
    _refuse(config)
    abstract = abstract_model(config)
    ones = jax.tree.map(lambda _: jnp.ones(()), (abstract.params, abstract.bias))
    model = nnx.merge(abstract.graphdef, *ones)
    _fold(model)
    leaves = jax.tree_util.tree_leaves_with_path({"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))})
    factors = {path_name(path): float(factor) for path, factor in leaves}

    def scaled(leaf: str, index: tuple[int, ...]) -> np.ndarray:
        value, factor = read(leaf, index), factors.get(leaf, 1.0)
        return value if factor == 1 else (np.float32(factor) * value.astype(np.float32)).astype(value.dtype)

    return dataclasses.replace(config, scaling=ScalingConfig()), scaled


def _refuse(config: ModelConfig) -> None:
    """Raise a ValueError if no weight can take a factor."""
    scaling = config.scaling
    if config.tied_embeddings and config.mtp_depth and logits_divisor(config) != config.logits_scaling:
        raise ValueError(
            f"model.scaling.base_width={scaling.base_width} divides logits, which no weight can do with "
            f"model.tied_embeddings=True and model.mtp_depth={config.mtp_depth}: multi-token prediction reads what the "
            "head reads; it cannot be exported."
        )
    after = config.norm_after or config.sandwich_norm
    if config.num_zero_experts and not after and residual_multiplier(config) != config.residual_multiplier:
        raise ValueError(
            f"model.scaling.base_depth={scaling.base_depth} multiplies what a layer adds, but zero-computation experts "
            f"(model.num_zero_experts={config.num_zero_experts}) have no weight that can do so; it cannot be exported."
        )


def _fold(model: Transformer) -> None:
    """Multiply the parameters, in place, by the factors."""
    c = model.config
    share = c.logits_scaling / logits_divisor(c)
    _scale(share, model.final_norm.scale if model.head is None else model.head)
    of_branches = residual_multiplier(c) / c.residual_multiplier if c.residual_multiplier else 1.0
    for stack in model.stacks:
        for block in stack.blocks:
            _fold_block(block, of_branches)
            _fold_attention(block.attention)
    if model.mtp is not None:
        _fold_attention(model.mtp.block.attention)


def _fold_block(block: Block, factor: float) -> None:
    """What the block adds to the residual stream, times the factor."""
    if block.norm_after:
        _scale(factor, block.attention_norm.scale, block.ffw_norm.scale)
    elif block.attention_after_norm is not None and block.ffw_after_norm is not None:
        _scale(factor, block.attention_after_norm.scale, block.ffw_after_norm.scale)
    else:
        _scale(factor, block.attention.out, getattr(block.attention, "out_bias", None))
        _fold_feed_forward(block.ffw, factor)


def _fold_feed_forward(layer: FeedForward | MoE, factor: float) -> None:
    if isinstance(layer, FeedForward):
        _scale(factor, layer.down)
        return
    if layer.latent_up is None:
        _scale(factor, layer.down, layer.down_bias)
    else:
        _scale(factor, layer.latent_up)
    if layer.shared is not None:
        _scale(factor, layer.shared.down)


def _fold_attention(attention: Attention | LatentAttention) -> None:
    """The logits of attention, times the factor, which queries take."""
    factor = attention_multiplier(attention.config)
    if isinstance(attention, LatentAttention):
        _scale(factor, attention.query if attention.query_up is None else attention.query_up)
    elif attention.query_norm is not None:
        _scale(factor, attention.query_norm.scale)
    else:
        _scale(factor, attention.query, attention.query_bias)


def _scale(factor: float, *weights: nnx.Param | None) -> None:
    for weight in weights:
        if weight is not None:
            weight[...] = weight[...] * factor
