"""One function, `attend`, with the best kernel of each platform.

B batch, S sequence, H query heads, G heads of keys and values, K width of queries and keys, V width of values.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.kernels import native, native_attention
from moe_jax.kernels.grouped import has_tokamax
from moe_jax.mesh import is_sharded, per_shard, platform, spec, ways
from moe_jax.runtime.defaults import jax_defaults

BLOCK = 512  # queries and keys in a block of the TPU kernel, at most
LANES = 128  # of a TPU's vectors: blocks are multiples of it
HOPPER = 9  # compute capability of H100 and H200; on B200 tokamax's gradient needs more shared memory than there is
MOSAIC_STEPS = (128, 64)  # of tokamax's kernel: the numbers that the length and the widths must be multiples of
CUDNN_WIDTH = 128  # the largest head width of cuDNN's kernel ...
CUDNN_STEP = 8  # ... and the number that it must be a multiple of
MOST_CPU_BLOCKS = 8  # of queries; few, because the program contains the code of each
LEAST_CPU_BLOCK = 64  # queries of a block
HEAD_DIMS = ("batch", "whole", "own_heads")  # the dims of queries, keys, values and results: how devices split them


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_ids: Int32[Array, "batch seq"],
    *,
    scale: float | None = None,
    mesh: Mesh | None = None,
    cpu_kernel: str = "auto",
) -> Float[Array, "batch seq heads value_dim"]:
    """The mean of the values of earlier tokens of the same segment, weighted by softmax(scale query . key).

    Args:
        query: [B, S, H, K].
        key: [B, S, G, K]; H is a multiple of G, and consecutive H / G query heads share one of them.
        value: [B, S, G, V]; V may differ from K.
        segment_ids: int32 [B, S], the document of each token, whose tokens are consecutive; 0 is padding, which sees
            padding only.
        scale: 1 / sqrt(K) if None.
        mesh: the devices of the arrays, split as HEAD_DIMS: rows over the batch axes, heads over the others. None is
            one device: a CPU, or another that computes by XLA's own code.
        cpu_kernel: on one CPU "native" is C++, "xla" is not, and "auto" is C++ if it can run.

    Returns:
        [B, S, H, V] in the query's dtype, softmax in float32.

    Raises:
        ValueError: `cpu_kernel="native"` on a CPU without a compiler, or with another dtype.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    kernel = kernel_for(query, key, value, mesh, cpu_kernel)
    if kernel == "native":
        return native_attention.attend(query, key, value, segment_ids, scale)
    if kernel == "splash":
        return splash(query, key, value, segment_ids, scale, mesh)
    if kernel == "mosaic":
        return mosaic(query, key, value, segment_ids, scale, mesh)
    if kernel == "blocks":
        return in_blocks(query, key, value, segment_ids, scale)
    return in_jax(query, key, value, segment_ids, scale, "cudnn" if kernel == "cudnn" else "xla")


def attend_cached(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads value_dim"],
    positions: Int32[Array, "batch seq"],
    *,
    scale: float,
) -> Float[Array, "batch seq heads value_dim"]:
    """`attend` for decoding: a query sees every slot of its row up to its own position.

    Args:
        query: [B, N, H, K], N new tokens a row.
        key: [B, S, G, K], the cache; slot s holds position s.
        value: [B, S, G, V].
        positions: int32 [B, N]; -1 for padding, whose result is finite and has no meaning.
        scale: factor on query . key.

    Returns:
        [B, N, H, V] in the query's dtype, softmax in float32.
    """
    queries, keys, values = scale * _by_head(query, key.shape[2]), _by_key_head(key), _by_key_head(value)
    scores = jnp.einsum("bgrqk,bgsk->bgrqs", queries, keys)
    visible = _arange(key.shape[1])[None, None, None, None] <= jnp.maximum(positions, 0)[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return _as_heads(jnp.einsum("bgrqs,bgsv->bgrqv", weights, values), query.dtype)


Kernel = Literal["splash", "mosaic", "cudnn", "native", "blocks", "xla"]


def kernel_for(query: Array, key: Array, value: Array, mesh: Mesh | None, cpu_kernel: str = "auto") -> Kernel:
    """The kernel for these shapes on the mesh's devices; chosen only here.

    "splash" on TPU: Pallas' flash attention, which skips blocks that the causal mask hides. On NVIDIA, for 16-bit
    floats: "mosaic" on Hopper, tokamax's flash attention, which also skips blocks of other documents; else "cudnn",
    flash attention for equal widths, which reads documents as a bias [B, 1, S, S]. On CPU, where caches hold the scores
    of a block and none are stored: "native" in C++ on one device, "blocks" in XLA. "xla" everywhere else: it writes all
    scores to memory.
    """
    if (jax.default_backend() if mesh is None else platform(mesh)) == "cpu":
        return "native" if not is_sharded(mesh) and native.chosen(cpu_kernel, mesh, query.dtype) else "blocks"
    if mesh is None:
        return "xla"
    parts = ways(mesh, "own_heads")
    heads_divide = query.shape[2] % parts == key.shape[2] % parts == 0
    if platform(mesh) == "tpu" and heads_divide:
        return "splash"
    if "NVIDIA" not in mesh.devices.flat[0].device_kind or query.dtype not in (jnp.bfloat16, jnp.float16):
        return "xla"
    return _nvidia_kernel(query, value, mesh.devices.flat[0].compute_capability, heads_divide)


def _nvidia_kernel(query: Array, value: Array, capability: str, heads_divide: bool) -> Kernel:
    """The kernel of an NVIDIA GPU for 16-bit floats; its compute capability is such as "9.0"."""
    length, widths = query.shape[1], {query.shape[3], value.shape[3]}
    whole_tiles = length % MOSAIC_STEPS[0] == 0 and all(width % MOSAIC_STEPS[1] == 0 for width in widths)
    if heads_divide and whole_tiles and int(float(capability)) == HOPPER and has_tokamax():
        return "mosaic"
    fits = length % 2 == 0 and len(widths) == 1 and max(widths) <= CUDNN_WIDTH and max(widths) % CUDNN_STEP == 0
    return "cudnn" if fits else "xla"


def in_jax(
    query: Array, key: Array, value: Array, segment_ids: Array, scale: float, kernel: Literal["cudnn", "xla"]
) -> Array:
    """`attend` by `jax.nn.dot_product_attention`, which needs equal widths and a mask."""
    width = max(query.shape[-1], value.shape[-1])
    query, key, wide = (jnp.pad(a, [(0, 0)] * 3 + [(0, width - a.shape[-1])]) for a in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        wide,
        mask=visibility(segment_ids),
        is_causal=kernel == "cudnn",  # so that it skips scores that the mask hides
        scale=scale,
        implementation=kernel,
    )
    return mixed[..., : value.shape[-1]]


def visibility(segment_ids: Int32[Array, "batch seq"]) -> Bool[Array, "batch 1 seq seq"]:
    """[b, 0, q, k]: whether q may attend to k, of the same segment and not later. Padding (0) sees padding only."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones(2 * segment_ids.shape[1:], bool))
    return (same & causal[None])[:, None]


# --- TPU ------------------------------------------------------------------------------------------------------


def splash(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scale: float,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Array:
    """`attend` by Pallas' splash attention; every device has its own rows and heads. `interpret` runs it anywhere."""

    def on_shard(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        length = segment_ids.shape[1]
        block = _block(length)
        rest = -length % block  # padded with tokens of another segment
        segments = jnp.pad(segment_ids, ((0, 0), (0, rest)), constant_values=-1)
        query, key, value = (
            jnp.pad(a, ((0, 0), (0, rest), (0, 0), (0, 0))).swapaxes(1, 2) for a in (query * scale, key, value)
        )
        kernel = _splash_kernel(query.shape[1], length + rest, block, interpret)
        return kernel(query, key, value, segments).swapaxes(1, 2)[:, :length]

    heads = spec(*HEAD_DIMS)
    run = per_shard(on_shard, mesh, (heads, heads, heads, spec("batch")), heads, kernel=True)
    return run(query, key, value, segment_ids)


def _block(length: int) -> int:
    """A multiple of LANES, at most BLOCK, that covers the length in as few and even parts as possible."""
    parts = -(-length // BLOCK)
    return -(-length // (parts * LANES)) * LANES


def _splash_kernel(heads: int, length: int, block: int, interpret: bool) -> Callable[..., Array]:
    """Splash attention of [B, heads, length, width] arrays and their segments."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    names = "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([pallas.CausalMask((length, length))] * heads),
        block_sizes=pallas.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="attention",
    )
    return jax.vmap(lambda q, k, v, segments: kernel(q, k, v, pallas.SegmentIds(segments, segments)))


# --- NVIDIA's Hopper ------------------------------------------------------------------------------------------


def mosaic(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scale: float,
    mesh: Mesh | None = None,
    implementation: str = "mosaic",
) -> Array:
    """`attend` by tokamax's flash attention, if the tokens of a segment are consecutive; `implementation` is tokamax's.

    A token's window reaches back to the first token of its segment, so that no [S, S] array says what is visible. Every
    device has its own rows and heads.
    """
    import tokamax

    def on_shard(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        # one window for all heads; tokamax documents a number, and an array of one for each token passes through
        before = _places_in_segments(segment_ids)[:, None]
        with jax_defaults():
            return tokamax.dot_product_attention(
                query, key, value, scale=scale, local_window_size=(before, 0), implementation=implementation
            )

    heads = spec(*HEAD_DIMS)
    run = per_shard(on_shard, mesh, (heads, heads, heads, spec("batch")), heads, kernel=True)
    return run(query, key, value, segment_ids)


def _places_in_segments(segment_ids: Int32[Array, "batch seq"]) -> Int32[Array, "batch seq"]:
    """The number of tokens of the same segment before each, if those of a segment are consecutive."""
    places = jnp.broadcast_to(_arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


# --- CPU: blocks of queries -----------------------------------------------------------------------------------

# B batch, G heads of keys, R query heads for each, Q queries of a block, S keys up to the last of them


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def in_blocks(query: Array, key: Array, value: Array, segment_ids: Array, scale: float) -> Array:
    """`attend` block by block of queries, each with the keys up to its end only; in float32.

    The backward pass recomputes the scores, and their softmax from the stored logarithm of its sum.
    Source: arXiv 2205.14135.
    """
    return _blocks_forward(query, key, value, segment_ids, scale)[0]


def _blocks_forward(
    query: Array, key: Array, value: Array, segment_ids: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    queries, keys, values = scale * _by_head(query, key.shape[2]), _by_key_head(key), _by_key_head(value)
    outputs = []
    totals = []
    for first, last in _block_bounds(query.shape[1]):
        scores = jnp.einsum("bgrqk,bgsk->bgrqs", queries[..., first:last, :], keys[:, :, :last])
        scores = jnp.where(_visible(segment_ids, first, last), scores, -jnp.inf)  # at least a token itself is visible
        top = scores.max(-1, keepdims=True)
        powers = jnp.exp(scores - top)
        total = powers.sum(-1, keepdims=True)
        outputs.append(jnp.einsum("bgrqs,bgsv->bgrqv", powers, values[:, :, :last]) / total)
        totals.append(top + jnp.log(total))
    y = checkpoint_name(_as_heads(jnp.concatenate(outputs, 3), query.dtype), "attention")
    total = checkpoint_name(jnp.concatenate(totals, 3), "attention")
    return y, (query, key, value, segment_ids, y, total)


def _blocks_backward(scale: float, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, segment_ids, y, totals = residuals
    queries, keys, values = scale * _by_head(query, key.shape[2]), _by_key_head(key), _by_key_head(value)
    grads = _by_head(dy, key.shape[2])
    mean = (grads * _by_head(y, key.shape[2])).sum(-1, keepdims=True)
    d_queries, d_keys, d_values = [], jnp.zeros_like(keys), jnp.zeros_like(values)
    for first, last in _block_bounds(query.shape[1]):
        rows = queries[..., first:last, :]
        d = grads[..., first:last, :]
        scores = jnp.einsum("bgrqk,bgsk->bgrqs", rows, keys[:, :, :last])
        weights = jnp.exp(scores - totals[..., first:last, :])
        weights = jnp.where(_visible(segment_ids, first, last), weights, 0.0)
        d_scores = jnp.einsum("bgrqv,bgsv->bgrqs", d, values[:, :, :last])
        d_scores = weights * (d_scores - mean[..., first:last, :])
        d_queries.append(jnp.einsum("bgrqs,bgsk->bgrqk", d_scores, keys[:, :, :last]) * scale)
        d_keys = d_keys.at[:, :, :last].add(jnp.einsum("bgrqs,bgrqk->bgsk", d_scores, rows))
        d_values = d_values.at[:, :, :last].add(jnp.einsum("bgrqs,bgrqv->bgsv", weights, d))
    d_query = _as_heads(jnp.concatenate(d_queries, 3), query.dtype)
    return d_query, _as_heads(d_keys[:, :, None], key.dtype), _as_heads(d_values[:, :, None], value.dtype), None


in_blocks.defvjp(_blocks_forward, _blocks_backward)


def _block_bounds(length: int) -> list[tuple[int, int]]:
    """(first, last) of every block of queries."""
    block = max(LEAST_CPU_BLOCK, -(-length // MOST_CPU_BLOCKS))
    return [(first, min(first + block, length)) for first in range(0, length, block)]


def _by_head(x: Array, groups: int) -> Array:
    """[B, S, H, K] to float32 [B, G, R, S, K]."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4).astype(jnp.float32)


def _by_key_head(x: Array) -> Array:
    """[B, S, G, K] to float32 [B, G, S, K]."""
    return x.swapaxes(1, 2).astype(jnp.float32)


def _as_heads(x: Array, dtype: jnp.dtype) -> Array:
    """[B, G, R, S, K] to [B, S, G R, K]."""
    batch, groups, heads, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * heads, width).astype(dtype)


def _visible(segment_ids: Array, first: int, last: int) -> Array:
    """bool [B, 1, 1, Q, S]: whether a query of a block sees a key: of its segment and not later."""
    causal = _arange(last)[first:, None] >= _arange(last)[None]
    same = segment_ids[:, first:last, None] == segment_ids[:, None, :last]
    return (causal[None] & same)[:, None, None]


def _arange(length: int) -> Int32[Array, "length"]:
    return jnp.arange(length, dtype=jnp.int32)
