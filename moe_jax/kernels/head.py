"""The language model's loss: head and cross-entropy together, without all logits in memory.

B batch, S sequence, T = B S tokens, D embed, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32

from moe_jax.kernels import native
from moe_jax.mesh import (
    axes,
    axes_of,
    is_sharded,
    parameter_spec,
    part_index,
    per_shard,
    platform,
    spec,
    varying_alike,
    whole_of,
)

# of the logits in memory at a time: on a CPU they fit into caches, with enough rows for a fast product; on an
# accelerator each block reads the head, and reads and writes its gradient, so that a few large ones are faster
CPU_BLOCK_BYTES = 16 * 2**20
BLOCK_BYTES = 512 * 2**20
LEAST_ROWS = 128  # tokens of a block
WEIGHT_DIMS = ("embed", "vocab")

# how much each target counts: not or once, or any weight of at least 0
Mask = Bool[Array, "batch seq"] | Float32[Array, "batch seq"]


def row_nats(
    logits: Float32[Array, "batch seq vocab"], targets: Int32[Array, "batch seq"], mask: Mask
) -> Float32[Array, "batch"]:
    """The cross-entropy of every row in nats, summed over its targets as much as each counts, from all logits."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return _counted(mask, nats).sum(-1)


def summed_nats(
    x: Float[Array, "pieces length embed"],
    head: Float[Array, "embed vocab"],
    targets: Int32[Array, "pieces length"],
    mask: Mask,
    cpu_kernel: str = "auto",
    mesh: Mesh | None = None,
) -> Float32[Array, ""]:
    """The cross-entropy of `x head` in nats, summed over all targets as much as each counts, block by block of tokens.

    The backward pass only scales the gradient by a number, so the forward pass also computes the gradient while a
    block's logits are in memory: three products in all, and never [T, V].

    On a mesh every device has the blocks of its own tokens. It gathers the head once, and once scatters the gradient of
    it, which is kept for the backward pass as the head is split. Over an axis that splits the vocabulary but no tokens
    (`tensor`) the head is not gathered: the parts of a token's logits are reduced.

    Args:
        x: [B, S, D], the output of the final norm, in the compute dtype; logits are float32.
        head: [D, V], in the same dtype, split like a parameter with WEIGHT_DIMS.
        targets: int32 [B, S] in [0, V).
        mask: [B, S], how much each target counts: bool, or float32 of at least 0; 0 where there is no target.
        cpu_kernel: on CPUs "native" is C++, "xla" is not, and "auto" is C++ if it can run; a vocabulary that is split
            is not for C++.
        mesh: the devices that the program is compiled for; JAX's default device if None.

    Returns:
        float32 []. Source of the idea: Liger Kernel (arXiv 2410.10989), section 3.2.
    """
    on_cpu = (jax.default_backend() if mesh is None else platform(mesh)) == "cpu"
    in_cpp = native.chosen(cpu_kernel, mesh, x.dtype)
    return _summed_nats(x, head, targets, mask, _Way(in_cpp, CPU_BLOCK_BYTES if on_cpu else BLOCK_BYTES, mesh))


class _Way(NamedTuple):
    """How the loss is computed: in C++ or not, with blocks of how many bytes of logits, and on which mesh."""

    in_cpp: bool
    block_bytes: int
    mesh: Mesh | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_nats(x: Array, head: Array, targets: Array, mask: Array, way: _Way) -> Array:
    split = _split(way.mesh, head)

    def on_shard(x: Array, part: Array, targets: Array, mask: Array) -> Array:
        whole = _gathered(part, split)

        def one(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
            return total + _nats(whole, *block, split.vocab)[0], None

        zero, _ = varying_alike(jnp.float32(0.0), targets)
        nats, _ = jax.lax.scan(one, zero, _blocks(x, targets, mask, whole.shape[1], way.block_bytes))
        return _over(split.tokens, jax.lax.psum, nats)

    return per_shard(on_shard, way.mesh, _in_specs(split), spec())(x, head, targets, mask)


def _forward(x: Array, head: Array, targets: Array, mask: Array, way: _Way) -> tuple[Array, tuple[Array, Array]]:
    split = _split(way.mesh, head)

    def on_shard(x: Array, part: Array, targets: Array, mask: Array) -> tuple[Array, Array, Array]:
        whole = _gathered(part, split)
        if way.in_cpp and not split.vocab:
            nats, dx, d_head = _gradient_in_cpp(x, whole, targets, mask, way.block_bytes)
        else:
            nats, dx, d_head = _gradient_in_xla(x, whole, targets, mask, way.block_bytes, split.vocab)
        d_part = _scattered(d_head.astype(head.dtype), split)
        return _over(split.tokens, jax.lax.psum, nats), dx.reshape(x.shape), d_part

    out_specs = spec(), spec("pieces"), split.place
    nats, *gradients = per_shard(on_shard, way.mesh, _in_specs(split), out_specs)(x, head, targets, mask)
    return nats, tuple(gradients)


class _Split(NamedTuple):
    """How a mesh splits the head and the tokens; no axes on one device.

    place: the spec of the head. gathered: the axes over which it is gathered, each with the dimension that it splits,
    outermost first. vocab: axes that split the vocabulary and no tokens. tokens: axes that split tokens.
    """

    place: P
    gathered: tuple[tuple[str, int], ...] = ()
    vocab: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


def _split(mesh: Mesh | None, head: Array) -> _Split:
    if not is_sharded(mesh):
        return _Split(spec())
    tokens = axes("tokens")
    place = parameter_spec(mesh, WEIGHT_DIMS, head.shape)
    dims = {axis: index for index, part in enumerate(place) for axis in axes_of(part)}
    gathered = tuple((axis, dims[axis]) for axis in tokens if axis in dims)
    return _Split(place, gathered, tuple(axis for axis in dims if axis not in tokens), tokens)


def _in_specs(split: _Split) -> tuple[P, P, P, P]:
    return spec("pieces"), split.place, spec("pieces"), spec("pieces")


def _gathered(part: Array, split: _Split) -> Array:
    """All rows of the head, and the columns of this device's part of the vocabulary, axis by axis, innermost first."""
    for axis, index in reversed(split.gathered):
        part = whole_of(part, (axis,), index)
    return part


def _scattered(d_head: Array, split: _Split) -> Array:
    """This device's part of the gradient, summed over all tokens."""
    for axis, index in split.gathered:
        d_head = jax.lax.psum_scatter(d_head, axis, scatter_dimension=index, tiled=True)
    gathered = [axis for axis, _ in split.gathered]
    return _over(tuple(axis for axis in split.tokens if axis not in gathered), jax.lax.psum, d_head)


def _over(names: tuple[str, ...], reduce: Callable[[Array, tuple[str, ...]], Array], x: Array) -> Array:
    """x reduced over mesh axes, if there are any."""
    return reduce(x, names) if names else x


def _gradient_in_xla(
    x: Array, head: Array, targets: Array, mask: Array, block_bytes: int, vocab_axes: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """The nats of a device's tokens, and their gradients: dx [T, D] in x's dtype, d_head [D, V] in float32."""

    def one(sums: tuple[Array, Array], block: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        nats, d_logits = _nats(head, *block, vocab_axes)
        d_logits = d_logits.astype(x.dtype)
        d_head = jnp.matmul(block[0].T, d_logits, preferred_element_type=jnp.float32)
        d_block = jnp.matmul(d_logits, head.T, preferred_element_type=jnp.float32)
        d_block = _over(vocab_axes, jax.lax.psum, d_block)
        return (sums[0] + nats, sums[1] + d_head), d_block.astype(x.dtype)

    zero, _ = varying_alike(jnp.float32(0.0), targets)
    zeros, *_ = varying_alike(jnp.zeros(head.shape, jnp.float32), x, head)
    (nats, d_head), dx = jax.lax.scan(one, (zero, zeros), _blocks(x, targets, mask, head.shape[1], block_bytes))
    return nats, dx.reshape(-1, x.shape[-1])[: targets.size], d_head


def _gradient_in_cpp(
    x: Array, head: Array, targets: Array, mask: Array, block_bytes: int
) -> tuple[Array, Array, Array]:
    """As `_gradient_in_xla`, by `cpp/head.cc`, which also refuses a target that counts outside of the vocabulary."""
    embed, vocab = head.shape
    block = _rows_of_block(targets.size, vocab, block_bytes)
    results = [
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((targets.size, embed), x.dtype),
        jax.ShapeDtypeStruct((embed, vocab), jnp.float32),
        jax.ShapeDtypeStruct((block, embed), jnp.float32),
        jax.ShapeDtypeStruct((block, vocab), jnp.float32),
    ]
    weights = mask.ravel().astype(jnp.float32)
    arrays = x.reshape(-1, embed), head.astype(x.dtype), targets.ravel().astype(jnp.int32), weights
    nats, dx, d_head, _, _ = native.call("head", "gradient", x.dtype, results, *arrays)
    return nats, dx, d_head


def _backward(way: _Way, gradients: tuple[Array, Array], d: Array) -> tuple[Array, Array, None, None]:
    dx, d_head = gradients
    return _times(d, dx), _times(d, d_head), None, None


_summed_nats.defvjp(_forward, _backward)


def _times(d: Array, gradient: Array) -> Array:
    """The product in float32, rounded once."""
    return (d * gradient.astype(jnp.float32)).astype(gradient.dtype)


def _rows_of_block(num_tokens: int, vocab: int, block_bytes: int) -> int:
    """The tokens of a block: as even as possible, with logits of about `block_bytes`."""
    blocks = -(-4 * vocab * num_tokens // block_bytes)
    return -(-num_tokens // max(1, min(blocks, num_tokens // LEAST_ROWS)))


def _blocks(x: Array, targets: Array, mask: Array, vocab: int, block_bytes: int) -> tuple[Array, Array, Array]:
    """x [N, block, D], targets and mask [N, block]: tokens in blocks of equal length, masked where they are padded."""
    num_tokens = targets.size
    block = _rows_of_block(num_tokens, vocab, block_bytes)

    def cut(flat: Array) -> Array:
        padded = jnp.pad(flat, ((0, -num_tokens % block), *[(0, 0)] * (flat.ndim - 1)))
        return padded.reshape(-1, block, *flat.shape[1:])

    return cut(x.reshape(num_tokens, -1)), cut(targets.ravel()), cut(mask.ravel())


def _nats(head: Array, x: Array, targets: Array, mask: Array, vocab_axes: tuple[str, ...]) -> tuple[Array, Array]:
    """The nats of a block, and their gradient in its logits [block, V] of this device's part of the vocabulary."""
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    shifted = logits - _over(vocab_axes, jax.lax.pmax, logits.max(-1, keepdims=True))
    powers = jnp.exp(shifted)
    total = _over(vocab_axes, jax.lax.psum, powers.sum(-1, keepdims=True))
    first = part_index(vocab_axes) * logits.shape[1] if vocab_axes else 0
    chosen = jax.nn.one_hot(targets - first, logits.shape[1], dtype=bool)
    nats = jnp.log(total[:, 0]) - _over(vocab_axes, jax.lax.psum, jnp.where(chosen, shifted, 0.0).sum(-1))
    d_logits = _counted(mask[:, None], powers / total - chosen.astype(jnp.float32))
    return _counted(mask, nats).sum(), d_logits


def _counted(mask: Array, values: Array) -> Array:
    """The values as much as each counts; exactly 0 where it does not, whatever the value."""
    if mask.dtype == bool:
        return jnp.where(mask, values, 0.0)
    return jnp.where(mask > 0, mask * values, 0.0)
