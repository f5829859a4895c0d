"""The next token from logits: the likeliest, or one drawn from those that top-k and top-p allow.

A draw depends only on (key, row, position), so a row's text does not depend on the other rows of its batch.

Legend: B batch, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Key

TEMPERATURES = (1e-6, 1e6)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; hashable, because what is compiled depends on it.

    Args:
        temperature: divides the logits, 1e-6 to 1e6; 0 takes the likeliest token, the first of equals.
        top_k: draw from this many likeliest tokens, the first of equals; 0: from all.
        top_p: draw from the fewest likeliest tokens whose probability (after temperature and top_k) reaches it, 0 to 1.

    Raises:
        ValueError: one is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if self.temperature and not low <= self.temperature <= high:  # beyond these, logits in float32 become infinite
            raise ValueError(f"--temperature={self.temperature} must be 0, which is greedy, or from 1e-6 to 1e6.")
        if self.top_k < 0:
            raise ValueError(f"--top_k={self.top_k} must be at least 0; 0 leaves all tokens in.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p={self.top_p} must be above 0 and at most 1; 1 leaves all tokens in.")


def next_tokens(
    logits: Float32[Array, "batch vocab"],
    sampling: Sampling,
    key: Key[Array, ""],
    rows: Int32[Array, "batch"],
    positions: Int32[Array, "batch"],
) -> Int32[Array, "batch"]:
    """One token id for every row.

    Args:
        logits: float32 [B, V]; -inf is never drawn while another token is finite.
        sampling: how to choose.
        key: of the whole generation.
        rows: numbers that distinguish the texts of one key, int32 [B].
        positions: of each row's new token in its text, int32 [B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    keys = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows, positions)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, scaled.shape[1:], jnp.float32))(keys)
    return jnp.argmax(jnp.where(allowed(scaled, sampling), scaled + noise, -jnp.inf), -1).astype(jnp.int32)


def allowed(logits: Float32[Array, "batch vocab"], sampling: Sampling) -> Bool[Array, "batch vocab"]:
    """Which tokens may be drawn, by top_k and then top_p, from logits that are divided by the temperature already."""
    if not 0 < sampling.top_k < logits.shape[-1] and sampling.top_p == 1:
        return jnp.ones(logits.shape, bool)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    falling = jnp.take_along_axis(logits, order, axis=-1)
    place = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    falling = jnp.where(place < (sampling.top_k or logits.shape[-1]), falling, -jnp.inf)
    shares = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # 0 for the likeliest token, which is always allowed
    drawable = (falling > -jnp.inf) & ((before < sampling.top_p) | (place == 0))
    return jnp.take_along_axis(drawable, jnp.argsort(order, axis=-1), axis=-1)
