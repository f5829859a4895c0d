"""One function, `attend`, with the best kernel of each platform, and its counterpart with a cache.

B batch, S sequence, H query heads, G heads of keys and values, K width of queries and keys, V width of values.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32

from moe_jax.kernels import native, native_attention
from moe_jax.kernels.attention_blocks import as_heads, by_head, by_key_head, in_blocks
from moe_jax.kernels.grouped import has_tokamax
from moe_jax.mesh import is_sharded, per_shard, platform, spec, ways
from moe_jax.runtime.defaults import jax_defaults

BLOCK = 512  # queries and keys in a block of the TPU kernel, at most
LANES = 128  # of a TPU's vectors: blocks are multiples of it
HOPPER = 9  # compute capability of H100 and H200; on B200 tokamax's gradient needs more shared memory than there is
MOSAIC_STEPS = (128, 64)  # of tokamax's kernel: the numbers that the length and the widths must be multiples of
CUDNN_WIDTH = 128  # the largest head width of cuDNN's kernel ...
CUDNN_STEP = 8  # ... and the number that it must be a multiple of
HEAD_DIMS = ("batch", "whole", "own_heads")  # the dims of queries, keys, values and results: how devices split them


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_ids: Int32[Array, "batch seq"],
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Float32[Array, "heads"] | None = None,
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
        window: the number of tokens that a token sees, itself and those before it; 0 is no limit.
        sinks: float32 [H], for each head a logit of the softmax that belongs to no key: it takes weight and has no
            value. Source: gpt-oss (arXiv 2508.10925).
        mesh: the devices of the arrays, split as HEAD_DIMS: rows over the batch axes, heads over the others. None is
            one device: a CPU, or another that computes by XLA's own code.
        cpu_kernel: on one CPU "native" is C++, "xla" is not, and "auto" is C++ if it can run.

    Returns:
        [B, S, H, V] in the query's dtype, softmax in float32.

    Raises:
        ValueError: `cpu_kernel="native"` on a CPU without a compiler, or with another dtype.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    kernel = kernel_for(query, key, value, mesh, cpu_kernel, sinks is not None)
    if kernel == "native":
        return native_attention.attend(query, key, value, segment_ids, scale, window, sinks)
    if kernel == "splash":
        return splash(query, key, value, segment_ids, scale, mesh, window=window, sinks=sinks)
    if kernel == "blocks":
        return in_blocks(query, key, value, segment_ids, scale, window, sinks)
    if kernel == "mosaic":
        return mosaic(query, key, value, segment_ids, scale, mesh, window=window)
    return in_jax(query, key, value, segment_ids, scale, "cudnn" if kernel == "cudnn" else "xla", window)


def attend_cached(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads value_dim"],
    positions: Int32[Array, "batch seq"],
    *,
    scale: float,
    window: Int32[Array, ""] | int = 0,
    sinks: Float32[Array, "heads"] | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """`attend` for decoding: a query sees every slot of its row up to its own position.

    Args:
        query: [B, N, H, K], N new tokens a row.
        key: [B, S, G, K], the cache; slot s holds position s.
        value: [B, S, G, V].
        positions: int32 [B, N]; -1 for padding, whose result is finite and has no meaning.
        scale: factor on query . key.
        window: as for `attend`, and may be the value of an array.
        sinks: as for `attend`.

    Returns:
        [B, N, H, V] in the query's dtype, softmax in float32.
    """
    queries, keys, values = scale * by_head(query, key.shape[2]), by_key_head(key), by_key_head(value)
    scores = jnp.einsum("bgrqk,bgsk->bgrqs", queries, keys)
    slots = jnp.arange(key.shape[1], dtype=jnp.int32)[None, None]
    places = jnp.maximum(positions, 0)[:, :, None]
    visible = (slots <= places) & ((window == 0) | (slots > places - window))
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    if sinks is not None:
        of_queries = jnp.broadcast_to(sinks.reshape(1, *scores.shape[1:3], 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, of_queries], -1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : key.shape[1]]
    return as_heads(jnp.einsum("bgrqs,bgsv->bgrqv", weights, values), query.dtype)


Kernel = Literal["splash", "mosaic", "cudnn", "native", "blocks", "xla"]


def kernel_for(
    query: Array, key: Array, value: Array, mesh: Mesh | None, cpu_kernel: str = "auto", has_sinks: bool = False
) -> Kernel:
    """The kernel for these shapes on the mesh's devices; chosen only here.

    "splash" on TPU: Pallas' flash attention, which skips blocks that the causal mask hides. On NVIDIA, for 16-bit
    floats: "mosaic" on Hopper, tokamax's flash attention, which also skips blocks of other documents; else "cudnn",
    flash attention for equal widths, which reads documents as a bias [B, 1, S, S]. On CPU, where caches hold the scores
    of a block and none are stored: "native" in C++ on one device, "blocks" in XLA. "xla" everywhere else: it writes all
    scores to memory. Sinks need a kernel that has them in its backward pass, too: "splash", "native" or, elsewhere,
    "blocks", which computes in float32.
    """
    if (jax.default_backend() if mesh is None else platform(mesh)) == "cpu":
        return "native" if not is_sharded(mesh) and native.chosen(cpu_kernel, mesh, query.dtype) else "blocks"
    if mesh is None:
        return "blocks" if has_sinks else "xla"
    parts = ways(mesh, "own_heads")
    heads_divide = query.shape[2] % parts == key.shape[2] % parts == 0
    if platform(mesh) == "tpu" and heads_divide:
        return "splash"
    if has_sinks:
        return "blocks"
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
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scale: float,
    kernel: Literal["cudnn", "xla"],
    window: int = 0,
) -> Array:
    """`attend` by `jax.nn.dot_product_attention`, which needs equal widths and a mask."""
    width = max(query.shape[-1], value.shape[-1])
    query, key, wide = (jnp.pad(a, [(0, 0)] * 3 + [(0, width - a.shape[-1])]) for a in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        wide,
        mask=visibility(segment_ids, window),
        is_causal=kernel == "cudnn",  # so that it skips scores that the mask hides; beside a mask it knows no window
        scale=scale,
        implementation=kernel,
    )
    return mixed[..., : value.shape[-1]]


def visibility(segment_ids: Int32[Array, "batch seq"], window: int = 0) -> Bool[Array, "batch 1 seq seq"]:
    """[b, 0, q, k]: whether q may attend to k, of the same segment, not later, and within the window if there is one.

    Padding (0) sees padding only.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    square = jnp.ones(2 * segment_ids.shape[1:], bool)
    seen = jnp.tril(square) & jnp.triu(square, 1 - window) if window else jnp.tril(square)
    return (same & seen[None])[:, None]


# --- TPU ------------------------------------------------------------------------------------------------------


def splash(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scale: float,
    mesh: Mesh | None = None,
    *,
    window: int = 0,
    sinks: Array | None = None,
    interpret: bool = False,
) -> Array:
    """`attend` by Pallas' splash attention; every device has its own rows and heads. `interpret` runs it anywhere."""

    def on_shard(query: Array, key: Array, value: Array, segment_ids: Array, *sinks: Array) -> Array:
        length = segment_ids.shape[1]
        block = _block(length)
        rest = -length % block  # padded with tokens of another segment
        segments = jnp.pad(segment_ids, ((0, 0), (0, rest)), constant_values=-1)
        query, key, value = (
            jnp.pad(a, ((0, 0), (0, rest), (0, 0), (0, 0))).swapaxes(1, 2) for a in (query * scale, key, value)
        )
        kernel = _splash_kernel(query.shape[1], length + rest, block, window, interpret)
        return kernel(query, key, value, segments, *sinks).swapaxes(1, 2)[:, :length]

    heads = spec(*HEAD_DIMS)
    of_heads = () if sinks is None else (sinks,)
    in_specs = heads, heads, heads, spec("batch"), *(spec("own_heads") for _ in of_heads)
    return per_shard(on_shard, mesh, in_specs, heads, kernel=True)(query, key, value, segment_ids, *of_heads)


def _block(length: int) -> int:
    """A multiple of LANES, at most BLOCK, that covers the length in as few and even parts as possible."""
    parts = -(-length // BLOCK)
    return -(-length // (parts * LANES)) * LANES


def _splash_kernel(heads: int, length: int, block: int, window: int, interpret: bool) -> Callable[..., Array]:
    """Splash attention of [B, heads, length, width] arrays and their segments, and of sinks if there are any."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    names = "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    square = length, length
    mask = pallas.LocalMask(square, (window - 1, 0), 0) if window else pallas.CausalMask(square)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * heads),
        block_sizes=pallas.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="attention",
    )

    def one(query: Array, key: Array, value: Array, segments: Array, *sinks: Array) -> Array:
        return kernel(query, key, value, pallas.SegmentIds(segments, segments), *sinks)

    return lambda *a: jax.vmap(one, (0, 0, 0, 0, *(None for _ in a[4:])))(*a)  # sinks are those of all rows


# --- NVIDIA's Hopper ------------------------------------------------------------------------------------------


def mosaic(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scale: float,
    mesh: Mesh | None = None,
    *,
    window: int = 0,
    implementation: str = "mosaic",
) -> Array:
    """`attend` by tokamax's flash attention, if the tokens of a segment are consecutive; `implementation` is tokamax's.

    tokamax's window of a token reaches back to the first token of its segment, at most by ours, so that no [S, S] array
    says what is visible. Every device has its own rows and heads.
    """
    import tokamax

    def on_shard(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        # one window for all heads; tokamax documents a number, and an array of one for each token passes through
        before = _places_in_segments(segment_ids)[:, None]
        before = jnp.minimum(before, window - 1) if window else before
        with jax_defaults():
            return tokamax.dot_product_attention(
                query, key, value, scale=scale, local_window_size=(before, 0), implementation=implementation
            )

    heads = spec(*HEAD_DIMS)
    run = per_shard(on_shard, mesh, (heads, heads, heads, spec("batch")), heads, kernel=True)
    return run(query, key, value, segment_ids)


def _places_in_segments(segment_ids: Int32[Array, "batch seq"]) -> Int32[Array, "batch seq"]:
    """The number of tokens of the same segment before each, if those of a segment are consecutive."""
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
