"""Context parallelism: sequences in pieces where the mesh has an axis that cuts them; elsewhere nothing is done.

A batch [B, S] is cut into [B C, S / C], so that every layer sees pieces as rows. Only attention needs whole sequences,
and it has them for some heads: an all-to-all exchanges C pieces of all heads for the whole of H / C heads. Keys and
values are gathered before they become as many as the queries.

B batch, S sequence, C pieces of a sequence, H heads of queries, G heads of keys and values, K width of a head.
Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.attention import HEAD_DIMS
from moe_jax.mesh import axes, constrain, part_index, per_shard, spec, varying_alike, ways

T = TypeVar("T")
PIECE_DIMS = ("pieces", "length", "all_heads")  # the dims of queries, keys and values outside of attention


def num_pieces(mesh: Mesh | None) -> int:
    """C, into how many pieces the mesh cuts every sequence."""
    return ways(mesh, "length")


def cut(arrays: T, mesh: Mesh | None) -> T:
    """Every array [B, S] of a pytree as pieces [B C, S / C], in the same order of tokens.

    A device holds the same columns of all its sequences, and gets consecutive pieces: whole sequences if it has many.
    """
    pieces = num_pieces(mesh)
    if pieces == 1:
        return arrays

    def on_shard(columns: Array) -> Array:
        rows = lax.all_gather(columns, axes("length"), axis=1, tiled=True)
        here = part_index(axes("length")) * len(columns)
        return lax.dynamic_slice_in_dim(rows.reshape(-1, columns.shape[1]), here, len(columns))

    one = per_shard(on_shard, mesh, spec("batch", "length"), spec("pieces"))
    return jax.tree.map(one, arrays)


def put_together(x: Int32[Array, "pieces length"], mesh: Mesh | None) -> Int32[Array, "batch seq"]:
    """Pieces [B C, S / C] as whole sequences [B, S], on every device that has a piece of them."""
    pieces = num_pieces(mesh)
    return x if pieces == 1 else constrain(x, mesh, spec("batch")).reshape(-1, pieces * x.shape[1])


def for_own_heads(
    x: Float[Array, "pieces length heads head_dim"], mesh: Mesh | None
) -> Float[Array, "batch seq heads head_dim"]:
    """Pieces of all heads [B C, S / C, H, K] as whole sequences [B, S, H, K], of which each device has some heads."""
    if num_pieces(mesh) == 1:
        return x
    return per_shard(lambda x: _exchanged(x, num_pieces(mesh)), mesh, spec(*PIECE_DIMS), spec(*HEAD_DIMS))(x)


def for_own_pieces(
    x: Float[Array, "batch seq heads head_dim"], mesh: Mesh | None
) -> Float[Array, "pieces length heads head_dim"]:
    """The inverse of `for_own_heads`."""
    pieces = num_pieces(mesh)
    if pieces == 1:
        return x

    def on_shard(x: Array) -> Array:
        rows = x.reshape(len(x) * pieces, -1, *x.shape[2:])
        return lax.all_to_all(rows, axes("length"), 0, 2, tiled=True)

    return per_shard(on_shard, mesh, spec(*HEAD_DIMS), spec(*PIECE_DIMS))(x)


def shared_for_own_heads(
    x: Float[Array, "pieces length kv_heads head_dim"], heads: int, mesh: Mesh | None
) -> Float[Array, "batch seq own_kv_heads head_dim"]:
    """Pieces of keys or values [B C, S / C, G, K] as whole sequences of those that each device's query heads read.

    If C does not divide a device's heads of keys, all of them are gathered, and heads that several devices read are
    repeated in the result, which has as many for each query head as each other.

    Args:
        heads: H, of the queries; H / G consecutive ones share one of x.
    """
    pieces = num_pieces(mesh)
    if pieces == 1:
        return x
    shared = heads // x.shape[2]

    def on_shard(x: Array) -> Array:
        if x.shape[2] % pieces == 0:
            return _exchanged(x, pieces)
        own = shared * x.shape[2] // pieces  # query heads of this device
        together = math.gcd(own, shared)  # consecutive ones that share a head of x
        first = part_index(axes("length")) * own + together * jnp.arange(own // together, dtype=jnp.int32)
        return jnp.take(_gathered(x, pieces), first // shared, axis=2)

    return per_shard(on_shard, mesh, spec(*PIECE_DIMS), spec(*HEAD_DIMS))(x)


def expanded_for_own_heads(
    expand: Callable[..., tuple[Array, Array]],
    narrow: Sequence[Float[Array, "pieces length ..."]],
    weights: Sequence[Float[Array, "latent heads _"]],
    mesh: Mesh | None,
) -> tuple[Float[Array, "batch seq heads key_dim"], Float[Array, "batch seq heads value_dim"]]:
    """Keys and values from arrays that no head owns: `expand(*narrow, *weights)` of whole sequences, by own heads.

    What is gathered are the narrow arrays; their gradient is scattered to the pieces.

    Args:
        expand: (arrays [B, S, ...], weights [R, H, K]) -> key and value [B, S, H, K], for any sequences and heads.
    """
    pieces = num_pieces(mesh)
    if pieces == 1:
        return expand(*narrow, *weights)

    def on_shard(narrow: Sequence[Array], weights: Sequence[Array]) -> tuple[Array, Array]:
        alike = varying_alike(*narrow, *weights)  # before the gather, so that gradients are summed after their scatter
        whole = (_gathered(x, pieces) for x in alike[: len(narrow)])
        own = (_own_part(w, pieces) for w in alike[len(narrow) :])
        return expand(*whole, *own)

    # a weight is used whole, and not as parts that the axis splits: from those XLA does not scatter its gradient
    in_specs = spec("pieces"), spec("whole", "all_heads")
    return per_shard(on_shard, mesh, in_specs, spec(*HEAD_DIMS))(tuple(narrow), tuple(weights))


def _exchanged(x: Array, pieces: int) -> Array:
    """A device's pieces of all heads for whole sequences of some, inside `per_shard`."""
    rows = lax.all_to_all(x, axes("length"), 2, 0, tiled=True)
    return rows.reshape(len(rows) // pieces, -1, *rows.shape[2:])


def _gathered(x: Array, pieces: int) -> Array:
    """The whole sequences of a device's pieces, inside `per_shard`."""
    rows = lax.all_gather(x, axes("length"), tiled=True)
    return rows.reshape(len(rows) // pieces, -1, *rows.shape[2:])


def _own_part(w: Array, pieces: int) -> Array:
    """A weight [R, H, K] of the heads that this device attends with, inside `per_shard`."""
    heads = w.shape[1] // pieces
    return lax.dynamic_slice_in_dim(w, part_index(axes("length")) * heads, heads, 1)
