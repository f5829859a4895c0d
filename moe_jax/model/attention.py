"""Attention layers: grouped-query and multi-head latent, and the cache of decoding.

B batch, S sequence, D embed, H heads, G heads of keys and values, K width of a head, R width of a latent.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32

from moe_jax.config import LongRopeConfig, ModelConfig, YarnConfig, local_rotated_width, rotated_width
from moe_jax.config.multipliers import attention_multiplier
from moe_jax.kernels.attention import attend, attend_cached
from moe_jax.kernels.max_logits import largest_logits
from moe_jax.mesh import is_sharded
from moe_jax.model.kinds import Local, by_kind
from moe_jax.model.layers import RMSNorm, filled, normal
from moe_jax.model.pieces import (
    expanded_for_own_heads,
    for_own_heads,
    for_own_pieces,
    put_together,
    shared_for_own_heads,
)
from moe_jax.model.rope import rope, softmax_scale

Cache = tuple[Array, ...]  # what one layer stores of earlier tokens, [B, slots, ...] each


class _Attends(nnx.Module):
    """Both kinds of attention; each has `observed`."""

    observed: Callable[..., tuple[Array, Array | None]]

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"],
        mesh: Mesh | None = None,
        local: Local = False,
    ) -> Float[Array, "batch seq embed"]:
        """Attend within x [B, S, D], given each token's position in its segment, its segment, and the layer's kind."""
        return self.observed(x, positions, segment_ids, mesh, local)[0]


class Attention(_Attends):
    """Causal grouped-query attention with RoPE; optional biases, sinks, a gate, and RMSNorm of queries and keys.

    A token sees earlier tokens of its own segment (document) only, and in a local layer those within a window. Source:
    GQA arXiv 2305.13245; biases of queries, keys and values as in Qwen2; the norm of each head as in Qwen3, of all
    heads together as in OLMoE; RoPE of a part of each head as in GPT-NeoX (arXiv 2204.06745); sinks as in gpt-oss
    (arXiv 2508.10925); the gate as in arXiv 2505.06708.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, heads, kv_heads, head = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = normal(config, rngs, "attention", embed=width, heads=heads, head_dim=head)
        self.key = normal(config, rngs, "attention", embed=width, kv_heads=kv_heads, head_dim=head)
        self.value = normal(config, rngs, "attention", embed=width, kv_heads=kv_heads, head_dim=head)
        self.out = normal(config, rngs, "attention", heads=heads, head_dim=head, embed=width)
        self.query_bias = _bias_of_heads(config, heads)
        self.key_bias = _bias_of_heads(config, kv_heads)
        self.value_bias = _bias_of_heads(config, kv_heads)
        self.out_bias = filled(config, 0.0, "attention", config.param_dtype, embed=width) if config.out_bias else None
        self.sinks = filled(config, 0.0, "attention", "float32", heads=heads) if config.attention_sinks else None
        self.gate = _gate_of_heads(config, rngs)
        self.query_norm = _norm_of_heads(config, heads)
        self.key_norm = _norm_of_heads(config, kv_heads)
        self.config = nnx.static(config)

    def observed(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"],
        mesh: Mesh | None = None,
        local: Local = False,
        max_logits: bool = False,
    ) -> tuple[Float[Array, "batch seq embed"], Float32[Array, "heads"] | None]:
        """As a call, and on request also the largest logit of every head [H], else None."""
        query, key, value, gate = self._project(x, positions, mesh, local)
        key, value = (shared_for_own_heads(a, query.shape[2], mesh) for a in (key, value))
        mixed, top = attend_to_whole(
            query, key, value, segment_ids, self._scale, mesh, self.config, local, self._sinks, max_logits
        )
        return self._output(mixed, gate), top

    def extend(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        cache: Cache,
        mesh: Mesh | None = None,
        local: Local = False,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Attend in decoding: tokens also see those in the cache and are added to it; one document a row, -1 pads."""
        query, key, value, gate = self._project(x, positions, mesh, local)
        keys, values = remember(cache, (key, value), positions)
        window = window_of(self.config, local)
        mixed = attend_cached(query, keys, values, positions, scale=self._scale, window=window, sinks=self._sinks)
        return self._output(mixed, gate), (keys, values)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens a row: keys and values [B, length, G, K]."""
        c = self.config
        return (jnp.zeros((batch, length, c.num_kv_heads, c.head_dim), c.compute_dtype),) * 2

    @property
    def _scale(self) -> float:
        c = self.config
        return c.attention_multiplier or attention_multiplier(c) * softmax_scale(c.head_dim, c.yarn)

    @property
    def _sinks(self) -> Array | None:
        return None if self.sinks is None else self.sinks[...]

    def _project(
        self, x: Array, positions: Array, mesh: Mesh | None, local: Local
    ) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys, values, and what the gate is computed from: [B, S, H, K] or [B, S, H], or None without one."""
        weights = [self.query[...], self.key[...], self.value[...]]
        query, key, value, *gates = project(x, weights + ([] if self.gate is None else [self.gate[...]]), mesh)
        if self.query_bias is not None and self.key_bias is not None and self.value_bias is not None:
            query, key = plus_bias(query, self.query_bias), plus_bias(key, self.key_bias)
            value = plus_bias(value, self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = over_heads(self.query_norm, query), over_heads(self.key_norm, key)
        c = self.config
        alike = c.rope_layers == "all" and c.local_rope.theta == 0
        query, key = by_kind(False if alike else local, self._rotate, query, key, positions)
        return query, key, value, gates[0] if gates else None

    def _rotate(self, local: bool, query: Array, key: Array, positions: Array) -> tuple[Array, Array]:
        """Queries and keys with the RoPE of a kind of layers."""
        c = self.config
        if c.rope_layers == "local" and not local:
            return query, key
        how, width = (c.rope_theta, c.yarn, c.longrope), rotated_width(c)
        if local and c.local_rope.theta:
            how, width = (c.local_rope.theta, YarnConfig(), LongRopeConfig()), local_rotated_width(c)

        def rotate(x: Array) -> Array:
            if width == c.head_dim:
                return rope(x, positions, *how)
            return jnp.concatenate([rope(x[..., :width], positions, *how), x[..., width:]], -1)

        return rotate(query), rotate(key)

    def _output(self, mixed: Array, gate: Array | None) -> Array:
        """The layer's result of every head's, behind the gate."""
        if gate is not None:
            share = GATES[self.config.gate_activation](gate.astype(jnp.float32)).astype(mixed.dtype)
            mixed = mixed * (share if share.ndim == mixed.ndim else share[..., None])
        y = jnp.einsum("bshk,hkd->bsd", mixed, self.out.astype(mixed.dtype))
        return y if self.out_bias is None else y + self.out_bias.astype(y.dtype)


GATES: dict[str, Callable[[Array], Array]] = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}


class LatentAttention(_Attends):
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
        matrix = functools.partial(normal, config, rngs, "attention")
        self.query_down = matrix(embed=width, query_latent=query_rank) if query_rank else None
        self.query_latent_norm = RMSNorm(config, LATENT_EPS, query_latent=query_rank) if query_rank else None
        self.query_up = matrix(query_latent=query_rank, heads=heads, head_dim=head) if query_rank else None
        self.query = None if query_rank else matrix(embed=width, heads=heads, head_dim=head)
        self.latent_down = matrix(embed=width, latent=rank)
        self.key_rope = matrix(embed=width, head_dim=config.qk_rope_head_dim)
        self.latent_norm = RMSNorm(config, LATENT_EPS, latent=rank)
        self.key_up = matrix(latent=rank, heads=heads, head_dim=config.qk_nope_head_dim)
        self.value_up = matrix(latent=rank, heads=heads, head_dim=config.v_head_dim)
        self.out = matrix(heads=heads, head_dim=config.v_head_dim, embed=width)
        self.config = nnx.static(config)

    def observed(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"],
        mesh: Mesh | None = None,
        local: Local = False,
        max_logits: bool = False,
    ) -> tuple[Float[Array, "batch seq embed"], Float32[Array, "heads"] | None]:
        """As a call, and on request also the largest logit of every head [H], else None."""
        nope, rotated, latent, key_rope = self._project(x, positions, mesh)

        def expand(latent: Array, key_rope: Array, *up: Array) -> tuple[Array, Array]:
            key, value = project(latent, up, mesh)
            shared = jnp.broadcast_to(key_rope, (*key.shape[:3], key_rope.shape[-1]))
            return jnp.concatenate([key, shared], -1), value

        up = self.key_up[...], self.value_up[...]
        key, value = expanded_for_own_heads(expand, (latent, key_rope), up, mesh)
        query = jnp.concatenate([nope, rotated], -1)
        mixed, top = attend_to_whole(
            query, key, value, segment_ids, self._scale, mesh, self.config, local, max_logits=max_logits
        )
        return jnp.einsum("bshv,hvd->bsd", mixed, self.out.astype(x.dtype)), top

    def extend(
        self,
        x: Float[Array, "batch seq embed"],
        positions: Int32[Array, "batch seq"],
        cache: Cache,
        mesh: Mesh | None = None,
        local: Local = False,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        """Attend in decoding: tokens also see those in the cache and are added to it; one document a row, -1 pads."""
        nope, rotated, latent, key_rope = self._project(x, positions, mesh)
        cache = remember(cache, (latent[:, :, None], key_rope), positions)
        absorbed = jnp.einsum("bshk,rhk->bshr", nope, self.key_up.astype(x.dtype))
        query, key = jnp.concatenate([absorbed, rotated], -1), jnp.concatenate(cache, -1)
        window = window_of(self.config, local)
        mixed = attend_cached(query, key, cache[0], positions, scale=self._scale, window=window)
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
        return attention_multiplier(c) * softmax_scale(c.qk_nope_head_dim + c.qk_rope_head_dim, c.yarn)

    def _project(self, x: Array, positions: Array, mesh: Mesh | None) -> tuple[Array, Array, Array, Array]:
        """Queries without and with RoPE [B, S, H, K] each, the latent [B, S, R], the key with RoPE [B, S, 1, K]."""
        c = self.config
        first = self.query if self.query_down is None else self.query_down
        assert first is not None
        query, latent, key_rope = project(x, [first[...], self.latent_down[...], self.key_rope[...]], mesh)
        if self.query_latent_norm is not None and self.query_up is not None:
            query = project(self.query_latent_norm(query), [self.query_up[...]], mesh)[0]
        nope, rotated = jnp.split(query, [c.qk_nope_head_dim], -1)
        rotated = rope(rotated, positions, c.rope_theta, c.yarn, c.longrope)
        key_rope = rope(key_rope[:, :, None], positions, c.rope_theta, c.yarn, c.longrope)
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
    config: ModelConfig,
    local: Local,
    sinks: Float32[Array, "heads"] | None = None,
    max_logits: bool = False,
) -> tuple[Float[Array, "pieces length heads value_dim"], Float32[Array, "heads"] | None]:
    """`attend` with queries, segments and results in the pieces of the mesh, and keys and values of whole sequences.

    Returns:
        the result, and the largest logit of every head if `max_logits`, else None.
    """

    def of_kind(
        local: bool, query: Array, key: Array, value: Array, segments: Array, sinks: Array | None
    ) -> tuple[Array, Array | None]:
        window = config.window if local else 0
        mixed = attend(
            query,
            key,
            value,
            segments,
            scale=scale,
            window=window,
            sinks=sinks,
            mesh=mesh,
            cpu_kernel=config.cpu_kernel,
        )
        return mixed, largest_logits(query, key, segments, scale, window) if max_logits else None

    whole = for_own_heads(query, mesh), key, value, put_together(segment_ids, mesh)
    mixed, top = by_kind(local, of_kind, *whole, sinks)
    return for_own_pieces(mixed, mesh), top


def window_of(config: ModelConfig, local: Local) -> Int32[Array, ""] | int:
    """The window of a layer, 0 if it is global."""
    if isinstance(local, bool):
        return config.window if local else 0
    return jnp.where(local, config.window, 0)


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
    return filled(config, 0.0, "attention", config.param_dtype, head_dim=heads * config.head_dim)


def _gate_of_heads(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Param | None:
    if config.attention_gate == "none":
        return None
    if config.attention_gate == "head":
        return normal(config, rngs, "attention", embed=config.embed_dim, heads=config.num_heads)
    return normal(config, rngs, "attention", embed=config.embed_dim, heads=config.num_heads, head_dim=config.head_dim)


def _norm_of_heads(config: ModelConfig, heads: int) -> RMSNorm | None:
    if config.qk_norm == "none":
        return None
    return RMSNorm(config, head_dim=config.head_dim * (heads if config.qk_norm == "projection" else 1))
