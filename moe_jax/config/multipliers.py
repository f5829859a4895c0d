"""What `model.scaling` multiplies: initial weights, learning rates, weight decay, Adam's epsilon, and the forward pass.

A size of the model divided by that of the base is a ratio, and all multipliers are products of powers of ratios; where
the sizes are equal they are exactly 1. A weight is known by its dimensions and its part of the model.

m ratio of embed_dim, r of what a weight reads (fan-in), c of what it writes (fan-out), L ratio of the number of layers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_jax.config.optimizer import Part
from moe_jax.config.schema import ModelConfig


class Multipliers(NamedTuple):
    """The factors of one parameter: of init_std, of the learning rate under AdamW and under Muon, of Adam's epsilon.

    The weight decay's factor is 1 / that of the learning rate, so that their product is that of the base.
    """

    std: float = 1.0
    adamw: float = 1.0
    muon: float = 1.0
    epsilon: float = 1.0


# --- of the forward pass --------------------------------------------------------------------------------------


def logits_divisor(m: ModelConfig) -> float:
    """What the head's logits are divided by: `logits_scaling`, times m."""
    return m.logits_scaling * _width(m)


def residual_multiplier(m: ModelConfig) -> float:
    """The factor of what attention and feed-forward add to the residual stream: `residual_multiplier`, times L^-alpha.

    Source: CompleteP (arXiv 2505.01618), Table 1.
    """
    return m.residual_multiplier * _depth(m) ** -m.scaling.depth_exponent


def attention_multiplier(m: ModelConfig) -> float:
    """The factor of logits of attention, besides 1 / sqrt(width of a head): together they fall with the width itself.

    Source: Tensor Programs V (arXiv 2203.03466), Definition 4.1.
    """
    return _head(m) ** -0.5


def without_depth(m: ModelConfig) -> ModelConfig:
    """The config for layers outside of the stack, whose number does not grow with the depth."""
    scaling = dataclasses.replace(m.scaling, base_depth=0, depth_exponent=1.0)
    return m if scaling == m.scaling else dataclasses.replace(m, scaling=scaling)


# --- of parameters --------------------------------------------------------------------------------------------


def of_matrix(m: ModelConfig, part: Part, dims: Mapping[str, int]) -> Multipliers:
    """The multipliers of a matrix, or of one for every expert: `of_matrix(m, "dense", dict(embed=8, ffw=32))`.

    Hidden weights, and embeddings, of which r is 1: std r^-1/2, learning rate 1 / r. Routers and other weights of
    which the outputs stay few: std 1 / r, learning rate 1 / r, which equals an output weight of the paper with its
    forward multiplier multiplied in. The head keeps std and learning rate, because its logits are divided by m.

    Muon's update has the spectral norm rms sqrt(max(rows, columns)); the wanted one is in proportion to
    sqrt(columns / rows). Source: A Spectral Condition for Feature Learning (arXiv 2310.17813), condition 1.
    """
    rows, columns = _sides(list(dims))
    r = _ratio(m, part, dims, rows)
    c = _ratio(m, part, dims, columns)
    if part == "head":
        return Multipliers(epsilon=1 / _width(m))
    by_depth = _depth(m) ** (m.scaling.depth_exponent - 1)
    few = set(columns) <= FEW
    height, width = (math.prod(dims[name] for name in names) for names in (rows, columns))
    return Multipliers(
        std=1 / r if few else r**-0.5,
        adamw=by_depth / r,
        muon=by_depth * _spectral(height, width) / _spectral(height / r, width / c),
        epsilon=_epsilon(m, c),
    )


def of_vector(m: ModelConfig, part: Part, dims: Mapping[str, int]) -> Multipliers:
    """The multipliers of a scale or a bias, or of one for every expert, which the width leaves alone."""
    names = [name for name in dims if name != "experts"]
    by_depth = _depth(m) ** (m.scaling.depth_exponent - 1)
    return Multipliers(adamw=by_depth, muon=by_depth, epsilon=_epsilon(m, _ratio(m, part, dims, names)))


FEW = {"experts", "one"}  # outputs whose number does not grow with the width


def _epsilon(m: ModelConfig, c: float) -> float:
    """Adam's epsilon as small as the gradient: of each of c times as many outputs, through a branch of L^-alpha."""
    return _depth(m) ** -m.scaling.depth_exponent / c


def _spectral(rows: float, columns: float) -> float:
    """The wanted spectral norm of an update over that of Muon, up to a constant."""
    return math.sqrt(columns / (rows * max(rows, columns)))


def _sides(names: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The dimensions that a weight sums over, and those that it writes; without that of stacked experts."""
    names = names[1:] if names[0] == "experts" else names
    inputs = 2 if names[0] in ("heads", "kv_heads") else 1
    return names[:inputs], names[inputs:]


# --- ratios ---------------------------------------------------------------------------------------------------


def _ratio(m: ModelConfig, part: Part, dims: Mapping[str, int], names: Sequence[str]) -> float:
    """The product of these dimensions over that of the base."""
    if list(names) in (["heads", "head_dim"], ["kv_heads", "head_dim"]):
        return _heads(m) * _head(m)
    return math.prod(_ratio_of(m, part, dims, name) for name in names)


def _ratio_of(m: ModelConfig, part: Part, dims: Mapping[str, int], name: str) -> float:
    s = m.scaling
    if name == "embed":
        routed = "experts" in dims and part == "experts"
        return _against(m, m.latent_dim, s.base_latent_dim) if routed and m.latent_dim else _width(m)
    if name == "ffw":
        return _hidden(m, part)
    if name == "latent":
        if part == "experts":
            return _against(m, m.latent_dim, s.base_latent_dim)
        return _against(m, m.kv_lora_rank, s.base_kv_lora_rank)
    if name == "query_latent":
        return _against(m, m.q_lora_rank, s.base_q_lora_rank)
    if name == "mixed":
        return _width(m)
    if name in ("heads", "kv_heads"):
        return _heads(m)
    if name == "head_dim":  # a bias, and a norm of all heads, has them in one vector
        return _head(m) * (_heads(m) if dims[name] > _head_dim(m) else 1)
    return 1.0


def _hidden(m: ModelConfig, part: Part) -> float:
    """The ratio of the hidden width of a feed-forward layer."""
    if part == "dense":
        return _against(m, m.ffw_dim, m.scaling.base_ffw_dim)
    if part == "shared" and m.shared_ffw_dim:
        return _against(m, m.shared_ffw_dim, m.scaling.base_shared_ffw_dim)
    return _against(m, m.expert_ffw_dim, m.scaling.base_expert_ffw_dim)


def _against(m: ModelConfig, size: int, base: int) -> float:
    return size / base if base else _width(m)


def _width(m: ModelConfig) -> float:
    return m.embed_dim / m.scaling.base_width if m.scaling.base_width else 1.0


def _depth(m: ModelConfig) -> float:
    return m.num_layers / m.scaling.base_depth if m.scaling.base_depth else 1.0


def _head_dim(m: ModelConfig) -> int:
    return m.head_dim if m.attention == "gqa" else m.qk_nope_head_dim + m.qk_rope_head_dim


def _head(m: ModelConfig) -> float:
    return _head_dim(m) / m.scaling.base_head_dim if m.scaling.base_head_dim else 1.0


def _heads(m: ModelConfig) -> float:
    """Of the number of heads; without one for the base all heads together were in proportion to embed_dim."""
    return m.num_heads / m.scaling.base_num_heads if m.scaling.base_num_heads else _width(m) / _head(m)
