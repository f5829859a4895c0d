"""The angle between two gradients, and the ratio of their norms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


def cosine(a: Any, b: Any) -> Float32[Array, ""]:
    """The cosine of the angle between two gradients, -1 to 1; NaN, logged as null, where one of them is 0.

    At -1 a balancing loss undoes what the language model learns. The gradients are pytrees of the same structure.
    """
    a, norm_a = _scaled(a)
    b, norm_b = _scaled(b)
    product = sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    nothing = (norm_a == 0) | (norm_b == 0)
    return jnp.where(nothing, jnp.nan, product / jnp.where(nothing, 1.0, norm_a * norm_b))


def norm_ratio(a: Any, b: Any) -> Float32[Array, ""]:
    """|a| / |b|, as of the balancing gradient and the language model's: 0 where a is 0, infinite where only b is 0.

    Source: the ratio R_g that LongCat-Flash (arXiv 2509.01322) keeps below 0.1.
    """
    largest_a = _largest(a)
    largest_b = _largest(b)
    ratio = _scaled(a)[1] / jnp.where(largest_b > 0, _scaled(b)[1], 1.0) * (largest_a / largest_b)
    return jnp.where(largest_a == 0, 0.0, ratio)


def _scaled(tree: Any) -> tuple[Any, Array]:
    """The tree divided by its largest entry, and the norm of that: squares of small gradients underflow in float32."""
    largest = _largest(tree)
    scaled = jax.tree.map(lambda x: x.astype(jnp.float32) / jnp.where(largest > 0, largest, 1.0), tree)
    return scaled, jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(scaled)))


def _largest(tree: Any) -> Array:
    return functools.reduce(jnp.maximum, (jnp.abs(x).max().astype(jnp.float32) for x in jax.tree.leaves(tree)))
