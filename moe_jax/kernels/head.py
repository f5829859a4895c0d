"""The language model's loss: head and cross-entropy together, without all logits in memory.

B batch, S sequence, T = B S tokens, D embed, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32

from moe_jax.kernels import native

BLOCK_BYTES = 16 * 2**20  # of the logits in memory at a time: they fit into caches, with enough rows for a fast product
LEAST_ROWS = 128  # tokens of a block

# how much each target counts: not or once, or any weight of at least 0
Mask = Bool[Array, "batch seq"] | Float32[Array, "batch seq"]


def row_nats(
    logits: Float32[Array, "batch seq vocab"], targets: Int32[Array, "batch seq"], mask: Mask
) -> Float32[Array, "batch"]:
    """The cross-entropy of every row in nats, summed over its targets as much as each counts, from all logits."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return _counted(mask, nats).sum(-1)


def summed_nats(
    x: Float[Array, "batch seq embed"],
    head: Float[Array, "embed vocab"],
    targets: Int32[Array, "batch seq"],
    mask: Mask,
    cpu_kernel: str = "auto",
    mesh: Mesh | None = None,
) -> Float32[Array, ""]:
    """The cross-entropy of `x head` in nats, summed over all targets as much as each counts, block by block of tokens.

    The backward pass only scales the gradient by a number, so the forward pass also computes the gradient while a
    block's logits are in memory: three products in all, and never [T, V]. For one device: on several, every block would
    need an exchange.

    Args:
        x: [B, S, D], the output of the final norm, in the compute dtype; logits are float32.
        head: [D, V], in the same dtype.
        targets: int32 [B, S] in [0, V).
        mask: [B, S], how much each target counts: bool, or float32 of at least 0; 0 where there is no target.
        cpu_kernel: on one CPU "native" is C++, "xla" is not, and "auto" is C++ if it can run.
        mesh: the one device that the program is compiled for; JAX's default device if None.

    Returns:
        float32 []. Source of the idea: Liger Kernel (arXiv 2410.10989), section 3.2.
    """
    return _summed_nats(x, head, targets, mask, native.chosen(cpu_kernel, mesh, x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_nats(x: Array, head: Array, targets: Array, mask: Array, in_cpp: bool) -> Array:
    blocks = _blocks(x, targets, mask, head.shape[1])
    return jax.lax.scan(lambda total, block: (total + _nats(head, *block)[0], None), jnp.float32(0.0), blocks)[0]


def _forward(x: Array, head: Array, targets: Array, mask: Array, in_cpp: bool) -> tuple[Array, tuple[Array, Array]]:
    gradient = _gradient_in_cpp if in_cpp else _gradient_in_xla
    nats, dx, d_head = gradient(x, head, targets, mask)
    return nats, (dx.reshape(x.shape), d_head.astype(head.dtype))


def _gradient_in_xla(x: Array, head: Array, targets: Array, mask: Array) -> tuple[Array, Array, Array]:
    """The nats, and their gradients: dx [T, D] in x's dtype, d_head [D, V] in float32."""

    def one(sums: tuple[Array, Array], block: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        nats, d_logits = _nats(head, *block)
        d_logits = d_logits.astype(x.dtype)
        d_head = jnp.matmul(block[0].T, d_logits, preferred_element_type=jnp.float32)
        d_block = jnp.matmul(d_logits, head.T, preferred_element_type=jnp.float32)
        return (sums[0] + nats, sums[1] + d_head), d_block.astype(x.dtype)

    zeros = jnp.float32(0.0), jnp.zeros(head.shape, jnp.float32)
    (nats, d_head), dx = jax.lax.scan(one, zeros, _blocks(x, targets, mask, head.shape[1]))
    return nats, dx.reshape(-1, x.shape[-1])[: targets.size], d_head


def _gradient_in_cpp(x: Array, head: Array, targets: Array, mask: Array) -> tuple[Array, Array, Array]:
    """As `_gradient_in_xla`, by `cpp/head.cc`, which also refuses a target that counts outside of the vocabulary."""
    embed, vocab = head.shape
    block = _rows_of_block(targets.size, vocab)
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


def _backward(in_cpp: bool, gradients: tuple[Array, Array], d: Array) -> tuple[Array, Array, None, None]:
    dx, d_head = gradients
    return _times(d, dx), _times(d, d_head), None, None


_summed_nats.defvjp(_forward, _backward)


def _times(d: Array, gradient: Array) -> Array:
    """The product in float32, rounded once."""
    return (d * gradient.astype(jnp.float32)).astype(gradient.dtype)


def _rows_of_block(num_tokens: int, vocab: int) -> int:
    """The tokens of a block: as even as possible, with logits of about BLOCK_BYTES."""
    blocks = -(-4 * vocab * num_tokens // BLOCK_BYTES)
    return -(-num_tokens // max(1, min(blocks, num_tokens // LEAST_ROWS)))


def _blocks(x: Array, targets: Array, mask: Array, vocab: int) -> tuple[Array, Array, Array]:
    """x [N, block, D], targets and mask [N, block]: tokens in blocks of equal length, masked where they are padded."""
    num_tokens = targets.size
    block = _rows_of_block(num_tokens, vocab)

    def cut(flat: Array) -> Array:
        padded = jnp.pad(flat, ((0, -num_tokens % block), *[(0, 0)] * (flat.ndim - 1)))
        return padded.reshape(-1, block, *flat.shape[1:])

    return cut(x.reshape(num_tokens, -1)), cut(targets.ravel()), cut(mask.ravel())


def _nats(head: Array, x: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
    """The nats of a block, and their gradient in its logits [block, V]."""
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    powers = jnp.exp(shifted)
    total = powers.sum(-1, keepdims=True)
    chosen = jax.nn.one_hot(targets, logits.shape[1], dtype=bool)
    nats = jnp.log(total[:, 0]) - jnp.where(chosen, shifted, 0.0).sum(-1)
    d_logits = _counted(mask[:, None], powers / total - chosen.astype(jnp.float32))
    return _counted(mask, nats).sum(), d_logits


def _counted(mask: Array, values: Array) -> Array:
    """The values as much as each counts; exactly 0 where it does not, whatever the value."""
    if mask.dtype == bool:
        return jnp.where(mask, values, 0.0)
    return jnp.where(mask > 0, mask * values, 0.0)
