"""Methods that balance by a differentiable loss on the router, averaged over the valid tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.balance.base import register
from moe_jax.balance.method import Method
from moe_jax.config import ModelConfig
from moe_jax.options import AuxLoss, ZLoss
from moe_jax.routing import Routing, Tokens, best, count, counts_by_row, normalized_scores


@register("aux_loss")
def aux_loss(options: AuxLoss, model: ModelConfig) -> Method:
    """The expert-level auxiliary loss `weight x sum_i f_i P_i`: 1 x weight at perfect balance.

    f_i = E x (share of the chosen slots that went to expert i), no gradient, counted before any dropping;
    P_i = mean score of expert i over valid tokens, of scores normalised per token (`normalize=True`, as in
    DeepSeek-V3) or raw (as in Loss-Free Balancing eq. 2, where balance gives weight x sum of mean scores).
    `scope` says over which tokens f and P belong together: each `sequence` (averaged by token), the
    `microbatch`, or f over the whole step (`global`). `counts="unbiased"` counts the top-k of the scores
    without the bias, which is what DeepSeek-V3 eq. 18 writes.

    Source: DeepSeekMoE (arXiv 2401.06066) eq. 12-14; DeepSeek-V3 (2412.19437) eq. 17-20; global scope:
    arXiv 2501.11873.
    """

    def observe(routing: Routing) -> Int32[Array, "experts"] | None:
        if options.counts == "biased" or options.scope != "global":
            return None
        return count(_counted_ids(options, routing), routing.loads.shape[0])

    def loss(routing: Routing, loads: Array, own: Array | None, _: None, __: Array) -> Float32[Array, ""]:
        scores = normalized_scores(routing) if options.normalize else routing.scores
        if options.scope == "sequence":
            value = sequence_balance(routing, scores, _counted_ids(options, routing))
        elif options.scope == "microbatch":
            counts = count(_counted_ids(options, routing), routing.loads.shape[0])
            value = balance_value(counts, mean_over_tokens(scores, routing))
        else:
            counts = loads if own is None else own
            value = balance_value(counts, mean_over_tokens(scores, routing))
        return options.weight * value

    return Method(observe=observe, loss=loss)


@register("z_loss")
def z_loss(options: ZLoss, model: ModelConfig) -> Method:
    """The router z-loss `weight x mean_t (logsumexp_i logits_ti)^2`: keeps logits small, does not balance.

    Source: ST-MoE (arXiv 2202.08906) eq. 5.
    """

    def loss(routing: Routing, *_: object) -> Float32[Array, ""]:
        squared = jax.nn.logsumexp(routing.logits, axis=-1) ** 2
        return options.weight * mean_over_tokens(squared[:, None], routing)[0]

    return Method(loss=loss)


def balance_value(counts: Int32[Array, "experts"], mean_scores: Float32[Array, "experts"]) -> Float32[Array, ""]:
    """sum_i f_i P_i with f_i = E x counts_i / sum counts; 0 without any count."""
    total = counts.sum().astype(jnp.float32)
    frequency = counts.shape[0] * counts.astype(jnp.float32) / jnp.maximum(total, 1.0)
    return (frequency * mean_scores).sum()


def sequence_balance(
    routing: Routing,
    scores: Float32[Array, "tokens experts"],
    expert_ids: Int32[Array, "tokens slots"],
) -> Float32[Array, ""]:
    """sum_i f_i P_i within every sequence, averaged over sequences by their number of valid tokens."""
    scores = valid(routing)[:, None] * scores
    counts, score_sums = _by_row(routing.tokens, expert_ids, scores)
    num_experts = scores.shape[1]
    totals = counts.sum(-1, keepdims=True).astype(jnp.float32)
    frequency = num_experts * counts.astype(jnp.float32) / jnp.maximum(totals, 1.0)
    return (frequency * score_sums).sum() / jnp.maximum(valid(routing).sum(), 1.0)


def _by_row(tokens: Tokens, expert_ids: Array, scores: Array) -> tuple[Array, Array]:
    """For every row how often each expert was chosen, int32 [B, E], and the sum of its scores [B, E]."""
    num_tokens, num_experts = scores.shape
    if tokens.rows is not None:  # no scatter over the whole batch, which may lie on many devices
        num_rows = tokens.rows.count
        return counts_by_row(expert_ids, num_rows, num_experts), scores.reshape(num_rows, -1, num_experts).sum(1)
    row = jnp.zeros(num_tokens, jnp.int32) if tokens.row is None else tokens.row
    # a batch has at most as many rows as tokens, so [T, E] is always room enough
    counts = jnp.zeros((num_tokens, num_experts + 1), jnp.int32).at[row[:, None], expert_ids].add(1)[:, :-1]
    return counts, jax.ops.segment_sum(scores, row, num_segments=num_tokens)


def mean_over_tokens(values: Float32[Array, "tokens columns"], routing: Routing) -> Float32[Array, "columns"]:
    """The mean over valid tokens; 0 if there is none."""
    weight = valid(routing)
    return (weight[:, None] * values).sum(0) / jnp.maximum(weight.sum(), 1.0)


def valid(routing: Routing) -> Float32[Array, "tokens"]:
    """1 for a token, 0 for padding."""
    if routing.tokens.mask is None:
        return jnp.ones(routing.scores.shape[0], jnp.float32)
    return routing.tokens.mask.astype(jnp.float32)


def _counted_ids(options: AuxLoss, routing: Routing) -> Int32[Array, "tokens slots"]:
    """The ids that f counts: those chosen, or the top-k of the scores without the bias."""
    if options.counts == "biased":
        return routing.expert_ids
    ids = best(routing.scores, routing.expert_ids.shape[1])
    return jnp.where(valid(routing)[:, None] > 0, ids, routing.scores.shape[1])
