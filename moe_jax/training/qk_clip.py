"""QK-clip: after a step, heads of attention whose logits were above a threshold have their queries and keys shrunk.

A head whose largest logit S over the batch of the step exceeds tau = `optimizer.qk_clip` gets the factor tau / S on its
logits; the others keep their weights bit by bit. Which weights share the factor is decided in `model.shrinking`: those
of the head alone, never what several heads share.

Source: Kimi K2 (arXiv 2507.20534), section 2.1. Megatron-LM shrinks all query heads of a shared key by the factor of
the neediest; here the others keep their logits, as they do in the paper's latent attention.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32

from moe_jax.config import Config
from moe_jax.model.abstract import Tree, abstract_model
from moe_jax.model.forward import MaxLogits


def clipped(config: Config, params: Tree, bias: Tree, max_logits: MaxLogits) -> Tree:
    """The parameters, in their dtypes, with the heads shrunk whose largest logit exceeds `optimizer.qk_clip`."""

    def share(top: Float32[Array, "..."]) -> Float32[Array, "..."]:
        return jnp.where(top > config.optimizer.qk_clip, config.optimizer.qk_clip / top, 1.0)

    model = nnx.merge(abstract_model(config.model).graphdef, params, bias)
    model.shrink_logits(jax.tree.map(share, max_logits))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def largest(max_logits: MaxLogits) -> Float32[Array, ""]:
    """The largest of all logits."""
    return functools.reduce(jnp.maximum, (leaf.max() for leaf in jax.tree.leaves(max_logits)))
