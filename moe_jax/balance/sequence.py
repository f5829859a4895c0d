"""Balance within every sequence, without a loss and without looking ahead.

B sequences of S tokens, E experts, N bins, k `model.top_k`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from moe_jax.balance.protocol import Balancer
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.selector_options import MovingQuantile
from moe_jax.routing import Tokens, best


@register(
    "moving_quantile",
    equation="top-k of s_tj + b_j - strength beta_tj; beta_tj = quantile_{1-k/E}(s_j of tokens up to t)",
    source="Moving Quantile Balancing, Su, kexue.fm/archives/11760, as two summaries of it have it",
)
def moving_quantile(options: MovingQuantile, model: ModelConfig) -> Balancer:
    """Moving quantiles: lowers the scores of the experts that a sequence has scored highly so far.

    beta is expert j's 1 - k/E quantile of its scores within the sequence, over the tokens up to and including t, which
    weigh `ema`^distance. It is read from a histogram over [0, 1], as the centre of its bin. A `strength` of 1 makes
    every expert pass its threshold equally often in each sequence; 0.3 is said to cost no loss. A sequence is a row of
    the batch, and padding does not count. It is causal, and evaluation routes the same way; but because a token's
    experts depend on the tokens before it, no text can be generated token by token.

    A bias balances all sequences together, and adds to it. The histograms [B, E, N] follow the tokens one by one, so a
    layer takes S dependent steps. No gradient passes through beta; gates are the scores.
    """

    def select(scores: Array, biased: Array, *, top_k: int, tokens: Tokens, **_: Any) -> Int32[Array, "tokens slots"]:
        num_tokens, num_experts = scores.shape
        rows = 1 if tokens.rows is None else tokens.rows.count
        by_row = scores.reshape(rows, -1, num_experts)
        valid, first = (a.reshape(rows, -1) for a in (tokens.valid(num_tokens), begins(tokens, num_tokens)))
        level = 1.0 - top_k / num_experts
        quantiles = moving_quantiles(by_row, valid, first, level, options.ema, options.bins)
        return best(biased - options.strength * quantiles.reshape(scores.shape), top_k)

    return Balancer(select=select, by_token=False)


def begins(tokens: Tokens, num_tokens: int) -> Bool[Array, "tokens"]:
    """True for the first token of every sequence but that of a row, where rows are known."""
    if tokens.rows is not None or tokens.row is None:
        return jnp.zeros(num_tokens, bool)
    return jnp.concatenate([jnp.zeros(1, bool), tokens.row[1:] != tokens.row[:-1]])


def moving_quantiles(
    scores: Float32[Array, "rows seq experts"],
    valid: Bool[Array, "rows seq"],
    first: Bool[Array, "rows seq"],
    level: float,
    ema: float,
    bins: int,
) -> Float32[Array, "rows seq experts"]:
    """The quantile at `level` of each expert's scores over the tokens of a row so far, by a decaying histogram.

    Args:
        scores: in [0, 1].
        valid: False for tokens that are not counted.
        first: True where a sequence begins within a row.

    Returns:
        the centre of the first bin up to which the share `level` of the weight lies; the first bin's before any token.
    """
    place = jnp.clip((lax.stop_gradient(scores) * bins).astype(jnp.int32), 0, bins - 1)

    def step(histogram: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        place, valid, first = inputs
        kept = jnp.where(first, 0.0, jnp.where(valid, jnp.float32(ema), 1.0))[:, None, None]
        counted = jax.nn.one_hot(place, bins, dtype=jnp.float32) * valid[:, None, None].astype(jnp.float32)
        histogram = kept * histogram + counted
        below = jnp.cumsum(histogram, axis=-1)
        return histogram, (below >= level * below[..., -1:]).argmax(-1).astype(jnp.int32)

    empty = jnp.zeros((scores.shape[0], scores.shape[2], bins), jnp.float32)
    _, found = lax.scan(step, empty, (jnp.moveaxis(place, 1, 0), valid.T, first.T))
    return (jnp.moveaxis(found, 0, 1).astype(jnp.float32) + 0.5) / bins
