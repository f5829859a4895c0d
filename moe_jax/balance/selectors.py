"""Methods that choose experts other than by the k best biased scores.

A selector's ids are int32 [T, S]; id == E is an empty slot. Padding is never chosen and never affects a choice.
"""

import heapq
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from moe_jax.balance.protocol import Balancer, Seen, zeros
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.selector_options import Bip, ExpertChoice, ExpertThreshold, Forced, Hash, Random, Sinkhorn
from moe_jax.routing import Routing, Tokens, best, count


@register(
    "expert_choice",
    equation="expert j takes its C = round(capacity_factor k T / E) tokens of highest s_tj",
    source="arXiv 2202.09368 eq. 1, whose c is capacity_factor k; the leak: arXiv 2408.15664, section 5.2",
)
def expert_choice(options: ExpertChoice, model: ModelConfig) -> Balancer:
    """Expert Choice: each expert takes its C best tokens.

    T is the number of valid tokens from which an expert chooses: those of the micro-batch, or of each sequence
    separately. Loads are equal from the first step; a token has 0 to E experts (so S = E), and of equal scores the
    earlier token wins. It is not causal: whether a token is chosen depends on later ones (`leak_bits`), so evaluation
    routes by top-k instead.
    """

    def choose(scores: Array, valid: Array, row: Array, num_rows: int, top_k: int) -> Bool[Array, "tokens experts"]:
        num_experts = scores.shape[1]
        sizes = count(jnp.where(valid, row, num_rows), num_rows)
        share = options.capacity_factor * top_k / num_experts
        capacity = jnp.round(share * sizes.astype(jnp.float32)).astype(jnp.int32)
        group = jnp.where(valid, row, num_rows)[:, None] * num_experts + _ids(num_experts)
        rank = rank_in_group(scores.ravel(), group.ravel(), (num_rows + 1) * num_experts)
        return valid[:, None] & (rank.reshape(scores.shape) < capacity[row][:, None])

    def select(scores: Array, biased: Array, *, top_k: int, tokens: Tokens, **_: Any) -> Int32[Array, "tokens experts"]:
        scores = lax.stop_gradient(scores)
        valid = tokens.valid(len(scores))
        if options.scope == "sequence" and tokens.rows is not None:  # a vmap, so that sharded rows stay in place
            rows = tokens.rows.count
            alone = jnp.zeros(len(scores) // rows, jnp.int32)
            split = scores.reshape(rows, -1, scores.shape[1]), valid.reshape(rows, -1)
            chosen = jax.vmap(lambda s, v: choose(s, v, alone, 1, top_k))(*split).reshape(scores.shape)
        elif options.scope == "sequence" and tokens.row is not None:
            chosen = choose(scores, valid, tokens.row, len(scores), top_k)
        else:
            chosen = choose(scores, valid, jnp.zeros(len(scores), jnp.int32), 1, top_k)
        return jnp.where(chosen, _ids(scores.shape[1]), scores.shape[1])

    return Balancer(select=select, inference="top_k")


@register(
    "sinkhorn",
    equation="top-k of u_t s_tj v_j",
    source=(
        "Megatron-LM's `sinkhorn`, which iterates until v converges; Sinkhorn-BASE (arXiv 2202.01169), which "
        "relaxes the linear assignment of BASE layers (2103.16716)"
    ),
)
def sinkhorn(options: Sinkhorn, model: ModelConfig) -> Balancer:
    """Sinkhorn: factors u and v give every token the mass 1/T and every expert the mass 1/E.

    Starting from v = 1, each of `iterations` rounds computes u, then v, as logarithms. The factor u_t does not affect
    the ranking, so the choice is the top-k of log s_tj + log v_j. The matrix s is exp(logits), recovered from the
    scores (up to u, for softmax). It is not causal, because v is computed from the whole micro-batch, so evaluation
    routes by top-k instead. No gradient passes through u and v; gates are the scores.
    """

    def select(scores: Array, biased: Array, *, top_k: int, tokens: Tokens, **_: Any) -> Int32[Array, "tokens slots"]:
        num_tokens, num_experts = scores.shape
        log_scores = logits_of(lax.stop_gradient(scores), model.score)
        valid = tokens.valid(num_tokens)

        def balance(_: Any, v: Float32[Array, "experts"]) -> Float32[Array, "experts"]:
            u = jnp.where(valid, -jax.nn.logsumexp(log_scores + v[None], axis=1), -jnp.inf)
            mass = jax.nn.logsumexp(log_scores + u[:, None], axis=0)
            return jnp.where(valid.any(), -mass, 0.0)  # up to a constant, which does not affect the ranking

        v = lax.fori_loop(0, options.iterations, balance, jnp.zeros(num_experts, jnp.float32))
        return best(log_scores + v[None], top_k)

    return Balancer(select=select, inference="top_k")


def logits_of(scores: Float32[Array, "tokens experts"], score: str) -> Float32[Array, "tokens experts"]:
    """The logits that gave these scores, for softmax up to a constant per token.

    Limited by float32: a sigmoid of 17 or more is 1, and a score below 1e-38 counts as 1e-38.
    """
    scores = jnp.maximum(scores, jnp.finfo(jnp.float32).tiny)
    if score == "sigmoid":
        return jnp.log(scores) - jnp.log(jnp.maximum(1.0 - scores, 2.0**-25))
    if score == "sqrt_softplus":
        return jnp.log(jnp.expm1(jnp.clip(scores**2, 1e-30, 80.0)))  # so that expm1 is neither 0 nor infinite
    return jnp.log(scores)


@register(
    "bip",
    equation="top-k of s_tj - q_j",
    source="arXiv 2502.15451; the update as kexue.fm 11619 restates it",
)
def bip(options: Bip, model: ModelConfig) -> Balancer:
    """BIP: q is the vector of prices of a binary integer program over the micro-batch.

    From q = 0, `iterations` times: p_t = max(0, (k+1)-th largest_j of s_tj - q_j), then
    q_j = max(0, (kT/E + 1)-th largest_t of s_tj - p_t), with T the number of valid tokens and kT/E rounded down. This
    is coordinate descent in the dual of "the highest sum of scores with at most k experts per token and at most kT/E
    tokens per expert". Prices are never negative, so they lower crowded experts but cannot raise starved ones. They are
    computed from the whole micro-batch, so the method is not causal, and evaluation routes by top-k instead.
    """

    def select(scores: Array, biased: Array, *, top_k: int, tokens: Tokens, **_: Any) -> Int32[Array, "tokens slots"]:
        num_experts = scores.shape[1]
        scores = lax.stop_gradient(scores)
        valid = tokens.valid(len(scores))
        room = top_k * valid.sum(dtype=jnp.int32) // num_experts

        def prices(_: Any, q: Float32[Array, "experts"]) -> Float32[Array, "experts"]:
            p = nth_largest((scores - q[None]).T, top_k)
            return nth_largest(jnp.where(valid[:, None], scores - p[:, None], -jnp.inf), room)

        q = lax.fori_loop(0, options.iterations, prices, jnp.zeros(num_experts, jnp.float32))
        return best(scores - q[None], top_k)

    def nth_largest(values: Float32[Array, "items columns"], n: Array | int) -> Float32[Array, "columns"]:
        """The (n + 1)-th largest value of each column, or 0 if it is negative or there are at most n values."""
        falling = -jnp.sort(-values, axis=0)
        return jnp.maximum(jnp.take(falling, n, axis=0, mode="fill", fill_value=-jnp.inf), 0.0)

    return Balancer(select=select, inference="top_k")


@register(
    "expert_threshold",
    equation="token t uses expert j iff s_tj > c_j",
    source="arXiv 2603.11535; kexue.fm 11626, whose decay is 0.9",
)
def expert_threshold(options: ExpertThreshold, model: ModelConfig) -> Balancer:
    """Expert Threshold: c_j is a moving average of expert choice's cutoffs.

    The cutoff of a step is the score that k T / E of expert j's scores exceed, read from a histogram over [0, 1]. It
    moves the threshold for the next step, so this is causal expert choice: k experts per token on average, 0 to E (or
    `slots`) for each, and evaluation routes the same way. The bias is -c. While it is all zero, no cutoff has been
    computed yet: a token uses its k best scores, and the first cutoff becomes the threshold as it is. (The paper
    instead warms up by expert choice, which is not causal.)
    """

    def select(scores: Array, biased: Array, *, top_k: int, **_: Any) -> Int32[Array, "tokens slots"]:
        num_experts = scores.shape[1]
        slots = min(options.slots or num_experts, num_experts)
        ids = best(biased, slots)
        unseen = (biased == scores).all(-1, keepdims=True)
        over = jnp.take_along_axis(biased, ids, axis=-1) > 0
        return jnp.where(jnp.where(unseen, _ids(slots) < top_k, over), ids, num_experts)

    def histogram(routing: Routing) -> Int32[Array, "experts bins"]:
        num_experts = routing.scores.shape[1]
        bins = jnp.clip(jnp.floor(routing.scores * options.bins).astype(jnp.int32), 0, options.bins - 1)
        place = jnp.where(routing.is_token[:, None], bins, options.bins)
        empty = jnp.zeros((num_experts, options.bins + 1), jnp.int32)
        return empty.at[_ids(num_experts), place].add(1)[:, :-1]

    def update(seen: Seen) -> tuple[Array, None]:
        target = -cutoffs(seen.own, model.top_k)
        new = jnp.where((seen.bias == 0).all(), target, options.ema * seen.bias + (1.0 - options.ema) * target)
        frozen = False if options.freeze_step is None else seen.step >= options.freeze_step
        return jnp.where(frozen, seen.bias, new), None

    return Balancer(own_statistics=histogram, own_update=update, initial_bias=zeros, select=select)


def cutoffs(histogram: Int32[Array, "experts bins"], top_k: int) -> Float32[Array, "experts"]:
    """The 1 - k/E quantile of each expert's T scores: the score, 0 to 1, that k T / E of them exceed.

    Scores are assumed to be uniform within a bin, so the result is exact to a bin's width.
    """
    num_experts, bins = histogram.shape
    target = top_k / num_experts * histogram.sum(1).astype(jnp.float32)
    at_least = jnp.cumsum(histogram[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]  # counts of this bin and above
    reaches = at_least.astype(jnp.float32) >= target[:, None]
    place = jnp.maximum(reaches.sum(1, dtype=jnp.int32) - 1, 0)  # the highest bin that reaches the target
    here = (jnp.take_along_axis(a, place[:, None], axis=1)[:, 0] for a in (histogram, at_least))
    in_bin, reached = (a.astype(jnp.float32) for a in here)
    return (place.astype(jnp.float32) + (reached - target) / jnp.maximum(in_bin, 1.0)) / bins


@register(
    "hash",
    equation="experts of token t = table[id_t]",
    source="Hash Layers (arXiv 2106.04426); DeepSeek-V4's `tid2eid` in the first layers",
)
def hash_routing(options: Hash, model: ModelConfig) -> Balancer:
    """Hash: a fixed table from token ids to k experts; gates are still learned.

    The table int32 [V, K] is state under "table". `init` gives each layer a different one, in which the experts occur
    equally often (to within 1), which suits tokens of equal frequency; `balanced_table` makes one for given
    frequencies. Ids from V on are taken modulo V. Without a state, expert i of a token is (id k + i) mod E. It is
    causal, and evaluation routes the same way.

    Raises:
        ValueError: the tokens have no ids.
    """

    def table(num_experts: int, layer: Any) -> dict[str, Array]:
        return {"table": _uniform_table(model.vocab_size, num_experts, model.top_k, layer)}

    def select(
        scores: Array, biased: Array, *, top_k: int, tokens: Tokens, state: dict[str, Array] | None = None, **_: Any
    ) -> Int32[Array, "tokens slots"]:
        if tokens.ids is None:
            raise ValueError("hash chooses experts by token id, but tokens.ids is None; give the ids of the tokens.")
        if state is None:
            return _in_turn(tokens.ids, top_k, scores.shape[1])
        experts = state["table"]
        assert experts.shape[1] == top_k
        return experts[tokens.ids % experts.shape[0]]

    return Balancer(own_state=table, select=select)


def balanced_table(frequencies: Any, num_experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """A table int32 [V, K] for `hash` whose experts have nearly equal loads at these token frequencies.

    Greedy: tokens are taken in order of falling frequency, and each gets the K experts with the least load so far.
    Tokens that never occur are assigned as if each occurred half as often as the rarest. If a token's share of all
    tokens is above K / E, no table can balance the loads.

    Args:
        frequencies: [V], counts or shares, at least 0.
        seed: breaks ties, so that layers may have different tables; the same seed gives the same table.

    Raises:
        ValueError: a frequency is negative or not finite, or top_k is not from 1 to num_experts.

    Source: kexue.fm 11681.
    """
    weights = np.asarray(frequencies, np.float64)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("frequencies must be one finite number of at least 0 for every token id; count them again.")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be from 1 to num_experts={num_experts}; change one.")
    seen = weights[weights > 0]
    weights = np.where(weights > 0, weights, seen.min() / 2 if len(seen) else 1.0)
    ties = np.random.default_rng(seed).random((len(weights), top_k))
    table = np.zeros((len(weights), top_k), np.int32)
    least = [(0.0, float(expert), expert) for expert in range(num_experts)]  # a heap of (load, tie-break, expert)
    for token in np.argsort(-weights, kind="stable"):
        experts = [heapq.heappop(least) for _ in range(top_k)]
        table[token] = [expert for *_, expert in experts]
        for (load, _, expert), tie in zip(experts, ties[token], strict=True):
            heapq.heappush(least, (load + weights[token], tie, expert))
    return table


@register(
    "random",
    equation="k distinct experts, uniformly",
    source="a control, as Megatron-LM's --moe-router-force-load-balancing",
)
def random(options: Random, model: ModelConfig) -> Balancer:
    """Random experts for every token: the control without a router.

    Loads are those of a uniform router, the noise floor of max_violation. It is causal, and evaluation draws too, with
    the key that it gets.
    """

    def select(scores: Array, biased: Array, *, top_k: int, key: Any, **_: Any) -> Int32[Array, "tokens slots"]:
        if key is None:
            raise ValueError("random draws experts, but key is None; give a key.")
        return best(jax.random.uniform(key, scores.shape, jnp.float32), top_k)

    return Balancer(select=select, by_token=False)  # one draw for the whole batch


@register(
    "forced",
    equation="expert i of valid token n = (n k + i) mod E",
    source="a control of our own",
)
def forced(options: Forced, model: ModelConfig) -> Balancer:
    """Forced: the control with perfect balance, which ignores the scores.

    Loads differ by at most 1. It is causal, and evaluation routes the same way.
    """

    def select(scores: Array, biased: Array, *, top_k: int, tokens: Tokens, **_: Any) -> Int32[Array, "tokens slots"]:
        number = jnp.cumsum(tokens.valid(len(scores)), dtype=jnp.int32) - 1
        return _in_turn(number, top_k, scores.shape[1])

    return Balancer(select=select, by_token=False)  # it counts the tokens before a token


def rank_in_group(
    values: Float32[Array, "items"], group: Int32[Array, "items"], num_groups: int
) -> Int32[Array, "items"]:
    """Each item's rank in its group by falling value, from 0; equal values keep their order."""
    order = jnp.lexsort((-values, group))
    place = jnp.zeros_like(group).at[order].set(jnp.arange(len(group), dtype=group.dtype))
    sizes = count(group, num_groups)
    return place - (jnp.cumsum(sizes, dtype=jnp.int32) - sizes)[group]


def leak_bits(num_experts: int, top_k: int, num_layers: int = 1) -> float:
    """A lower bound on the bits per token that expert choice can leak about the future.

    It is the information in the experts' choice of tokens: `layers x K log2((1 - R) / R)` with R = K/E; 0 for R of a
    half or more, where the bound is void.

    Source: Loss-Free Balancing (arXiv 2408.15664) eq. 7: 16 experts, 2 per token and 9 layers leak more than 50 bits.
    """
    share = top_k / num_experts
    if share >= 1.0:
        return 0.0
    return num_layers * top_k * max(0.0, math.log2((1.0 - share) / share))


def _in_turn(number: Int32[Array, "tokens"], top_k: int, num_experts: int) -> Int32[Array, "tokens slots"]:
    """Experts in rotation: number n gets experts n k to n k + k - 1, modulo E."""
    return (number[:, None] * top_k + _ids(top_k)) % num_experts


def _ids(number: int) -> Int32[Array, "1 ids"]:
    """0, 1, ... as one row."""
    return jnp.arange(number, dtype=jnp.int32)[None]


def _uniform_table(vocab_size: int, num_experts: int, top_k: int, layer: Any) -> Int32[Array, "vocab slots"]:
    """Experts in rotation, in an order that is drawn again each time all have had the same number of ids."""
    ids = jnp.arange(vocab_size, dtype=jnp.int32)
    period = num_experts // math.gcd(num_experts, top_k)
    key = jax.random.fold_in(jax.random.key(0), layer)
    order = best(jax.random.uniform(key, (-(-vocab_size // period), num_experts), jnp.float32), num_experts)
    return order[ids[:, None] // period, _in_turn(ids % period, top_k, num_experts)]
