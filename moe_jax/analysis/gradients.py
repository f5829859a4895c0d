"""Angle and size of one gradient against another."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


def cosine(a: Any, b: Any) -> Float32[Array, ""]:
    """The cosine of the angle between two gradients, -1 to 1; NaN, logged as null, where one of them is 0.

    -1 is a balancing loss that undoes what the language model learns. Any two pytrees of the same structure.
    """
    (a, norm_a), (b, norm_b) = _scaled(a), _scaled(b)
    product = sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    nothing = (norm_a == 0) | (norm_b == 0)
    return jnp.where(nothing, jnp.nan, product / jnp.where(nothing, 1.0, norm_a * norm_b))


def norm_ratio(a: Any, b: Any) -> Float32[Array, ""]:
    """|a| / |b|, say of the balancing gradient over the language model's: 0 where a is 0, infinite where only b is.

    Source: the ratio R_g that LongCat-Flash (arXiv 2509.01322) keeps below 0.1.
    """
    largest_a, largest_b = _largest(a), _largest(b)
    ratio = _scaled(a)[1] / jnp.where(largest_b > 0, _scaled(b)[1], 1.0) * (largest_a / largest_b)
    return jnp.where(largest_a == 0, 0.0, ratio)


def _scaled(tree: Any) -> tuple[Any, Array]:
    """The tree over its largest entry, and its norm then: squares of small gradients are 0 in float32."""
    largest = _largest(tree)
    scaled = jax.tree.map(lambda x: x.astype(jnp.float32) / jnp.where(largest > 0, largest, 1.0), tree)
    return scaled, jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(scaled)))


def _largest(tree: Any) -> Array:
    return functools.reduce(jnp.maximum, (jnp.abs(x).max().astype(jnp.float32) for x in jax.tree.leaves(tree)))
