"""Attention layers: grouped-query and multi-head latent, rotary positions, and the cache of decoding.

B batch, S sequence, D embed, H heads, G heads of keys and values, K width of a head, R width of a latent.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from moe_jax.config import ModelConfig, YarnConfig, rotated_width
from moe_jax.kernels.attention import attend, attend_cached
from moe_jax.mesh import is_sharded
from moe_jax.model.layers import RMSNorm, normal
from moe_jax.model.pieces import (
    expanded_for_own_heads,
    for_own_heads,
    for_own_pieces,
    put_together,
    shared_for_own_heads,
)

# --- positions ------------------------------------------------------------------------------------------------


def rope(
    x: Float[Array, "batch seq heads head_dim"],
    positions: Int32[Array, "batch seq"],
    theta: float,
    yarn: YarnConfig = YarnConfig(),
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (i, i + head_dim / 2) by position x frequency; YaRN also scales their length.

    Source: arXiv 2104.09864; the length, `mscale` over `mscale_all_dim`, as in DeepSeek-V2's code.
    """
    half = x.shape[-1] // 2
    angle = positions[..., None, None].astype(jnp.float32) * frequencies(half, theta, yarn)[None, None, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if yarn.factor > 1:
        length = _yarn_scale(yarn, yarn.mscale) / _yarn_scale(yarn, yarn.mscale_all_dim)
        cos, sin = length * cos, length * sin
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def frequencies(half: int, theta: float, yarn: YarnConfig) -> Float[Array, "half"]:
    """theta^(-i / half), in radians a position; under YaRN slow pairs turn `factor` times slower.

    Between the pairs that turn `beta_fast` and `beta_slow` times over the original length, the share of the slowing
    rises linearly. Source: arXiv 2309.00071, section 3.2; its bounds are rounded outwards, as in its code.
    """
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if yarn.factor == 1:
        return frequency

    def pair_turning(turns: float) -> float:
        return half * math.log(yarn.original_length / (turns * 2 * math.pi)) / math.log(theta)

    low = max(0, math.floor(pair_turning(yarn.beta_fast)))
    high = min(2 * half - 1, math.ceil(pair_turning(yarn.beta_slow)))
    slowed = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
    return frequency * (slowed / yarn.factor + 1.0 - slowed)


def softmax_scale(width: int, yarn: YarnConfig) -> float:
    """The factor of query . key: 1 / sqrt(width), under YaRN times the square of the scale of `mscale_all_dim`."""
    return _yarn_scale(yarn, yarn.mscale_all_dim) ** 2 / math.sqrt(width)


def _yarn_scale(yarn: YarnConfig, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1.0


# --- attention ------------------------------------------------------------------------------------------------

Cache = tuple[Array, ...]  # what one layer stores of earlier tokens, [B, slots, ...] each


class Attention(nnx.Module):
    """Causal grouped-query attention with RoPE; optional biases, and RMSNorm of queries and keys.

    A token sees earlier tokens of its own segment (document) only. Source: GQA arXiv 2305.13245; biases of queries,
    keys and values as in Qwen2; the norm of each head as in Qwen3, of all heads together as in OLMoE; RoPE of a part
    of each head as in GPT-NeoX (arXiv 2204.06745).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, heads, kv_heads, head = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = normal(config, rngs, embed=width, heads=heads, head_dim=head)
        self.key = normal(config, rngs, embed=width, kv_heads=kv_heads, head_dim=head)
        self.value = normal(config, rngs, embed=width, kv_heads=kv_heads, head_dim=head)
        self.out = normal(config, rngs, heads=heads, head_dim=head, embed=width)
        self.query_bias = _bias_of_heads(config, heads)
        self.key_bias = _bias_of_heads(config, kv_heads)
        self.value_bias = _bias_of_heads(config, kv_heads)
        self.query_norm = _norm_of_heads(config, heads)
        self.key_norm = _norm_of_heads(config, kv_heads)
        self.config = nnx.static(config)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"],
        mesh: Mesh | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Attend within x [B, S, D], given each token's position in its segment, and its segment."""
        query, *shared = self._project(x, positions, mesh)
        key, value = (shared_for_own_heads(a, query.shape[2], mesh) for a in shared)
        mixed = attend_to_whole(query, key, value, segment_ids, self._scale, mesh, self.config.cpu_kernel)
        return jnp.einsum("bshk,hkd->bsd", mixed, self.out.astype(x.dtype))

    def extend(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        cache: Cache,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Attend in decoding: tokens also see those in the cache and are added to it; one document a row, -1 pads."""
        query, key, value = self._project(x, positions, mesh)
        keys, values = remember(cache, (key, value), positions)
        mixed = attend_cached(query, keys, values, positions, scale=self._scale)
        return jnp.einsum("bshk,hkd->bsd", mixed, self.out.astype(x.dtype)), (keys, values)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens a row: keys and values [B, length, G, K]."""
        c = self.config
        return (jnp.zeros((batch, length, c.num_kv_heads, c.head_dim), c.compute_dtype),) * 2

    @property
    def _scale(self) -> float:
        c = self.config
        return c.attention_multiplier or softmax_scale(c.head_dim, c.yarn)

    def _project(self, x: Array, positions: Array, mesh: Mesh | None) -> tuple[Array, Array, Array]:
        query, key, value = project(x, [self.query[...], self.key[...], self.value[...]], mesh)
        if self.query_bias is not None and self.key_bias is not None and self.value_bias is not None:
            query, key = plus_bias(query, self.query_bias), plus_bias(key, self.key_bias)
            value = plus_bias(value, self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = over_heads(self.query_norm, query), over_heads(self.key_norm, key)
        return self._rotate(query, positions), self._rotate(key, positions), value

    def _rotate(self, x: Array, positions: Array) -> Array:
        c = self.config
        width = rotated_width(c)
        if width == c.head_dim:
            return rope(x, positions, c.rope_theta, c.yarn)
        return jnp.concatenate([rope(x[..., :width], positions, c.rope_theta, c.yarn), x[..., width:]], -1)


class LatentAttention(nnx.Module):
    """Multi-head latent attention: keys and values of all heads from one narrow latent a token.

    `[c^Q] = norm(W^DQ x), q = [W^UQ c^Q; RoPE(W^QR c^Q)]; c = norm(W^DKV x), k = [W^UK c; RoPE(W^KR x)], v = W^UV c`.
    All heads share the part of the key with RoPE. With `q_lora_rank=0` queries are projected from x directly. Decoding
    caches c and the rotated part only, and attends in the absorbed form: `q . W^UK c = (W^UK^T q) . c`, so that all
    heads share one key and one value, the latent itself.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; the latents' norms have its code's epsilon.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, heads, rank = config.embed_dim, config.num_heads, config.kv_lora_rank
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        query_rank = config.q_lora_rank
        self.query_down = normal(config, rngs, embed=width, latent=query_rank) if query_rank else None
        self.query_latent_norm = RMSNorm(config, LATENT_EPS, latent=query_rank) if query_rank else None
        self.query_up = normal(config, rngs, latent=query_rank, heads=heads, head_dim=head) if query_rank else None
        self.query = None if query_rank else normal(config, rngs, embed=width, heads=heads, head_dim=head)
        self.latent_down = normal(config, rngs, embed=width, latent=rank)
        self.key_rope = normal(config, rngs, embed=width, head_dim=config.qk_rope_head_dim)
        self.latent_norm = RMSNorm(config, LATENT_EPS, latent=rank)
        self.key_up = normal(config, rngs, latent=rank, heads=heads, head_dim=config.qk_nope_head_dim)
        self.value_up = normal(config, rngs, latent=rank, heads=heads, head_dim=config.v_head_dim)
        self.out = normal(config, rngs, heads=heads, head_dim=config.v_head_dim, embed=width)
        self.config = nnx.static(config)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"],
        mesh: Mesh | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Attend within x [B, S, D], given each token's position in its segment, and its segment."""
        nope, rotated, latent, key_rope = self._project(x, positions, mesh)

        def expand(latent: Array, key_rope: Array, *up: Array) -> tuple[Array, Array]:
            key, value = project(latent, up, mesh)
            shared = jnp.broadcast_to(key_rope, (*key.shape[:3], key_rope.shape[-1]))
            return jnp.concatenate([key, shared], -1), value

        up = self.key_up[...], self.value_up[...]
        key, value = expanded_for_own_heads(expand, (latent, key_rope), up, mesh)
        query = jnp.concatenate([nope, rotated], -1)
        mixed = attend_to_whole(query, key, value, segment_ids, self._scale, mesh, self.config.cpu_kernel)
        return jnp.einsum("bshv,hvd->bsd", mixed, self.out.astype(x.dtype))

    def extend(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        cache: Cache,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Attend in decoding: tokens also see those in the cache and are added to it; one document a row, -1 pads."""
        nope, rotated, latent, key_rope = self._project(x, positions, mesh)
        cache = remember(cache, (latent[:, :, None], key_rope), positions)
        absorbed = jnp.einsum("bshk,rhk->bshr", nope, self.key_up.astype(x.dtype))
        query, key = jnp.concatenate([absorbed, rotated], -1), jnp.concatenate(cache, -1)
        mixed = attend_cached(query, key, cache[0], positions, scale=self._scale)
        values = jnp.einsum("bshr,rhv->bshv", mixed, self.value_up.astype(x.dtype))
        return jnp.einsum("bshv,hvd->bsd", values, self.out.astype(x.dtype)), cache

    def init_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens a row: latents [B, length, 1, R] and rotated keys [B, length, 1, K]."""
        c = self.config
        widths = c.kv_lora_rank, c.qk_rope_head_dim
        return tuple(jnp.zeros((batch, length, 1, width), c.compute_dtype) for width in widths)

    @property
    def _scale(self) -> float:
        c = self.config
        return softmax_scale(c.qk_nope_head_dim + c.qk_rope_head_dim, c.yarn)

    def _project(self, x: Array, positions: Array, mesh: Mesh | None) -> tuple[Array, Array, Array, Array]:
        """Queries without and with RoPE [B, S, H, K] each, the latent [B, S, R], the key with RoPE [B, S, 1, K]."""
        c = self.config
        first = self.query if self.query_down is None else self.query_down
        assert first is not None
        query, latent, key_rope = project(x, [first[...], self.latent_down[...], self.key_rope[...]], mesh)
        if self.query_latent_norm is not None and self.query_up is not None:
            query = project(self.query_latent_norm(query), [self.query_up[...]], mesh)[0]
        nope, rotated = jnp.split(query, [c.qk_nope_head_dim], -1)
        rotated = rope(rotated, positions, c.rope_theta, c.yarn)
        key_rope = rope(key_rope[:, :, None], positions, c.rope_theta, c.yarn)
        return nope, rotated, self.latent_norm(latent), key_rope


LATENT_EPS = 1e-6  # DeepSeek's code uses the default of its norm here, not the epsilon of the configuration


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> Attention | LatentAttention:
    """The attention that `model.attention` names."""
    return LatentAttention(config, rngs) if config.attention == "mla" else Attention(config, rngs)


def attend_to_whole(
    query: Float[Array, "pieces length heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_ids: Int32[Array, "pieces length"],
    scale: float,
    mesh: Mesh | None,
    cpu_kernel: str,
) -> Float[Array, "pieces length heads value_dim"]:
    """`attend` with queries, segments and results in the pieces of the mesh, and keys and values of whole sequences."""
    query, segments = for_own_heads(query, mesh), put_together(segment_ids, mesh)
    mixed = attend(query, key, value, segments, scale=scale, mesh=mesh, cpu_kernel=cpu_kernel)
    return for_own_pieces(mixed, mesh)


def project(
    x: Float[Array, "batch seq width"], weights: Sequence[Float[Array, "width ..."]], mesh: Mesh | None
) -> list[Float[Array, "batch seq ..."]]:
    """The products of x [B, S, D] with every weight [D, ...], each [B, S, ...]; on one device a single product.

    On several devices the products are separate, so that each weight keeps the layout in which it is split.
    """
    weights = [w.astype(x.dtype) for w in weights]
    if is_sharded(mesh):
        return [jnp.tensordot(x, w, 1) for w in weights]
    flat = [w.reshape(len(w), -1) for w in weights]
    ends = itertools.accumulate(w.shape[1] for w in flat[:-1])
    parts = jnp.split(x @ jnp.concatenate(flat, 1), list(ends), -1)
    return [part.reshape(*x.shape[:2], *w.shape[1:]) for part, w in zip(parts, weights, strict=True)]


def remember(cache: Cache, new: Cache, positions: Int32[Array, "batch seq"]) -> Cache:
    """The cache with each row's new tokens in the slots of their positions; padding, at -1, is not stored."""
    rows = jnp.arange(len(positions), dtype=jnp.int32)[:, None]

    def one(slots: Array, values: Array) -> Array:
        place = jnp.where(positions < 0, slots.shape[1], positions)
        return slots.at[rows, place].set(values.astype(slots.dtype), mode="drop")

    return jax.tree.map(one, cache, new)


def plus_bias(x: Float[Array, "batch seq heads head_dim"], bias: nnx.Param) -> Float[Array, "batch seq heads head_dim"]:
    """x plus a bias, which holds that of all heads in one vector."""
    return x + bias.astype(x.dtype).reshape(1, 1, *x.shape[2:])


def over_heads(norm: RMSNorm, x: Float[Array, "batch seq heads head_dim"]) -> Float[Array, "batch seq heads head_dim"]:
    """The norm of each head or, if it is as wide as all of them, of all together."""
    if norm.scale.shape[-1] == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def _bias_of_heads(config: ModelConfig, heads: int) -> nnx.Param | None:
    """A bias of 0; a vector, so that it neither decays nor is split."""
    if not config.qkv_bias:
        return None
    return nnx.Param(jnp.zeros(heads * config.head_dim, config.param_dtype), dims=("head_dim",))


def _norm_of_heads(config: ModelConfig, heads: int) -> RMSNorm | None:
    if config.qk_norm == "none":
        return None
    return RMSNorm(config, head_dim=config.head_dim * (heads if config.qk_norm == "projection" else 1))
