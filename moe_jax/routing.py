"""Routing: scores -> selection -> gates, in one pure function. The bias affects the selection, not the gates.

T tokens, K top_k, S slots (= K for every selector that gives each token K experts), E experts, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int16, Int32, Key

from moe_jax.config import ModelConfig
from moe_jax.config.model_rules import check_groups

SOFTPLUS_IS_EXP = -20.0  # at and below it softplus(x) = e^x in float32

Select = Callable[..., Int32[Array, "tokens slots"]]
Combine = Callable[[Array, Array], Float32[Array, "tokens experts"]]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rows:
    """The number of sequences, all of one length, that the tokens consist of in order; static under jit."""

    count: int


class Tokens(NamedTuple):
    """What routing may know of each token, [T] each; None if it is not known.

    mask: bool, False for padding, which is neither routed nor counted.
    row: int32 in [0, T), the sequence of the batch that it belongs to (None: all to one).
    ids: int32, the token's id.
    kind: int32, its class.
    rows: the number of sequences; if known, sums by sequence need a reshape only.
    """

    mask: Bool[Array, "tokens"] | None = None
    row: Int32[Array, "tokens"] | None = None
    ids: Int32[Array, "tokens"] | None = None
    kind: Int32[Array, "tokens"] | None = None
    rows: Rows | None = None

    def sequences(self, num_tokens: int) -> tuple[Int32[Array, "tokens"], int]:
        """The sequence of each token, and a number that is at least that of sequences."""
        if self.rows is not None:
            return jnp.arange(num_tokens, dtype=jnp.int32) // (num_tokens // self.rows.count), self.rows.count
        return (jnp.zeros(num_tokens, jnp.int32), 1) if self.row is None else (self.row, num_tokens)

    def valid(self, num_tokens: int) -> Bool[Array, "tokens"]:
        """True for a token, False for padding."""
        return jnp.ones(num_tokens, bool) if self.mask is None else self.mask


class Routing(NamedTuple):
    """The experts and gates of every token. `expert_ids == E` is an empty slot: gate 0, neither sent nor counted."""

    expert_ids: Int32[Array, "tokens slots"]
    gates: Float32[Array, "tokens slots"]
    loads: Int32[Array, "experts"]
    logits: Float32[Array, "tokens experts"]
    scores: Float32[Array, "tokens experts"]
    bias: Float32[Array, "*classes experts"]
    tokens: Tokens

    @classmethod
    def dims(cls) -> Any:
        """The dims of each field, by which a mesh splits it; loads and bias are not split."""
        by_token: Any = ("tokens",)
        whole: Any = ()
        return cls(
            expert_ids=by_token,
            gates=by_token,
            loads=whole,
            logits=by_token,
            scores=by_token,
            bias=whole,
            tokens=by_token,
        )

    @property
    def is_token(self) -> Bool[Array, "tokens"]:
        """True for a token, False for padding."""
        return self.tokens.valid(self.scores.shape[0])


class RouterConfig(NamedTuple):
    """How experts are scored, chosen and weighted; the keys of `config.model` of the same names.

    top_k: experts per token, 1 to E.
    score: "sigmoid" | "softmax", the affinity in [0, 1], or "sqrt_softplus" | "relu", in [0, inf).
    num_groups: G, divides E; experts e of group g have e // (E / G) == g.
    top_groups: groups a token may use, ranked by the sum of their `group_top` best biased scores.
    group_top: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
    normalize_gates: divide the selected scores by their sum.
    gate_scale: factor on the gates, after normalisation.
    sparsemixer: above 0, gates are those of `gates_in_turn`.
    select_by: "scores" | "logits", what the bias is added to.
    """

    top_k: int
    score: str = "sigmoid"
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 2
    normalize_gates: bool = True
    gate_scale: float = 1.0
    sparsemixer: float = 0.0
    select_by: str = "scores"

    @classmethod
    def of(cls, model: ModelConfig) -> "RouterConfig":
        """The router of a model's layers."""
        return cls(**{name: getattr(model, name) for name in cls._fields})


def route(
    logits: Float32[Array, "tokens experts"],
    router: RouterConfig,
    bias: Float32[Array, "*classes experts"] | None = None,
    *,
    expert_scale: Float32[Array, "experts"] | None = None,
    tokens: Tokens = Tokens(),
    select: Select | None = None,
    combine: Combine | None = None,
    chosen: Int16[Array, "tokens slots"] | None = None,
    key: Key[Array, ""] | None = None,
    train: bool = False,
) -> Routing:
    """Pick `router.top_k` experts for every token by `scores + bias`, and weight them by the unbiased scores.

    With `router.select_by="logits"` by `logits + bias`; what is said of biased scores below is then of that sum.

    Equal biased scores go to the lowest expert id (`lax.top_k`): with all-equal scores every token picks
    experts 0..K-1, which is why the router is initialised away from zero.

    Args:
        logits: float32 [T, E], any finite values.
        router: how many experts, by which scores, from which groups, with what gates.
        bias: float32 [E], selection only: no gradient, no effect on gates. None is zero. Or [C, E], one for each
            class of tokens, which `tokens.kind` names (0 where it is None).
        expert_scale: float32 [E], factors on the gates. None is one.
        tokens: mask and more, see `Tokens`.
        select: replaces top-k of the biased scores: (scores, biased, *, top_k, tokens, key, train) -> ids [T, S].
        combine: replaces scores + bias: (scores, bias) -> biased scores; the bias is [1, E] or [T, E].
        chosen: expert ids that were chosen before, which replace those of a token unless they are negative.
        key: randomness for `select`.
        train: True in training; selectors may choose differently in evaluation.

    Returns:
        `Routing`; gates sum to `router.gate_scale` over a token's experts when normalised, before `expert_scale`.

    Raises:
        ValueError: top_k, groups and experts do not fit together, or `score` is unknown.

    Source: DeepSeek-V3 (arXiv 2412.19437) eq. 13-16; Loss-Free Balancing (2408.15664) eq. 3.
    """
    num_experts = logits.shape[-1]
    check_groups(num_experts, router)
    logits = logits.astype(jnp.float32)
    scores = affinity(logits, router.score)
    bias = jnp.zeros(num_experts, jnp.float32) if bias is None else lax.stop_gradient(bias)
    own_bias = jnp.atleast_2d(bias)[:1] if bias.ndim == 1 or tokens.kind is None else bias[tokens.kind]
    ranked = logits if router.select_by == "logits" else scores
    biased = ranked + own_bias if combine is None else combine(ranked, own_bias)
    if select is None:
        allowed = limit_groups(biased, router.num_groups, router.top_groups, router.group_top)
        expert_ids = lax.top_k(allowed, router.top_k)[1]
    else:
        expert_ids = select(scores, biased, top_k=router.top_k, tokens=tokens, key=key, train=train)
    if chosen is not None:
        expert_ids = jnp.where(chosen < 0, expert_ids, chosen)
    if tokens.mask is not None:
        expert_ids = jnp.where(tokens.mask[:, None], expert_ids, num_experts)
    if router.sparsemixer:
        gates = router.gate_scale * gates_in_turn(logits, expert_ids, router.sparsemixer)
    else:
        log_scores = log_affinity(logits, router.score)
        gates = router.gate_scale * _gates(scores, log_scores, expert_ids, router.normalize_gates)
    if expert_scale is not None:
        gates = gates * expert_scale.at[expert_ids].get(mode="fill", fill_value=0)
    loads = count(expert_ids, num_experts)
    return Routing(expert_ids, gates, loads, logits, scores, bias, tokens)


def affinity(logits: Float32[Array, "tokens experts"], score: str) -> Float32[Array, "tokens experts"]:
    """The unbiased affinity of each token to each expert: sigmoid (V3), softmax (V2), sqrt-softplus (V4) or ReLU."""
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    if score == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if score == "sqrt_softplus":
        return jnp.exp(log_affinity(logits, score))  # the square root's own gradient is not finite at underflow
    if score == "relu":
        return jax.nn.relu(logits)
    raise ValueError(f"score={score!r} must be 'sigmoid', 'softmax', 'sqrt_softplus' or 'relu'; choose one of them.")


def log_affinity(logits: Float32[Array, "tokens experts"], score: str) -> Float32[Array, "tokens experts"]:
    """The logarithm of `affinity`, finite and, but for ReLU, with a gradient where the affinity itself underflows."""
    if score == "sigmoid":
        return jax.nn.log_sigmoid(logits)
    if score == "softmax":
        return jax.nn.log_softmax(logits, axis=-1)
    if score == "relu":
        return jnp.log(jnp.maximum(logits, jnp.finfo(jnp.float32).tiny))
    low = SOFTPLUS_IS_EXP
    return 0.5 * jnp.where(logits < low, logits, jnp.log(jax.nn.softplus(jnp.maximum(logits, low))))


def limit_groups(
    biased: Float32[Array, "tokens experts"], num_groups: int, top_groups: int, group_top: int
) -> Float32[Array, "tokens experts"]:
    """Set the biased scores outside each token's `top_groups` best groups to -inf.

    Never to 0: with negative biases a masked group would win over an allowed one.
    """
    if num_groups == 1 or top_groups == num_groups:
        return biased
    num_tokens, num_experts = biased.shape
    grouped = biased.reshape(num_tokens, num_groups, num_experts // num_groups)
    rank = lax.top_k(grouped, group_top)[0].sum(-1)
    best = lax.top_k(rank, top_groups)[1]
    allowed = jax.nn.one_hot(best, num_groups, dtype=bool).any(1)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(num_tokens, num_experts)


def best(values: Float32[Array, "tokens experts"], k: int) -> Int32[Array, "tokens slots"]:
    """Each token's `k` best columns in descending order, ties to the lowest: `lax.top_k`, by a sort.

    Of a batch that is split over devices, XLA sorts every row on its device; for top_k it would gather all rows.
    """
    return jnp.argsort(-lax.stop_gradient(values), axis=-1, stable=True)[:, :k].astype(jnp.int32)


def count(expert_ids: Int32[Array, "..."], num_experts: int) -> Int32[Array, "experts"]:
    """How often each expert id occurs: exact int32; ids equal to `num_experts` are not counted."""
    return jnp.zeros(num_experts + 1, jnp.int32).at[expert_ids.ravel()].add(1)[:num_experts]


def counts_by_row(
    expert_ids: Int32[Array, "tokens slots"], num_rows: int, num_experts: int
) -> Int32[Array, "rows experts"]:
    """`count` of every row of the batch, whose tokens are consecutive; no scatter, so rows stay on their device."""
    chosen = jax.nn.one_hot(expert_ids.reshape(num_rows, -1), num_experts, dtype=bool)
    return chosen.sum(1, dtype=jnp.int32)


def normalized_scores(routing: Routing) -> Float32[Array, "tokens experts"]:
    """Each token's scores divided by their sum.

    There is no epsilon in the denominator: with one, a router could shrink a loss by driving every score to zero.
    Where all scores of a token underflow, the softmax of its logits, which is the limit of normalised
    sigmoids, keeps both the value and the gradient.
    """
    smallest = jnp.finfo(jnp.float32).tiny
    lost = routing.scores.max(-1, keepdims=True) <= smallest
    log_scores = jnp.log(jnp.maximum(routing.scores, smallest))  # a zero has a gradient of 0, not of 0 x inf
    return jax.nn.softmax(jnp.where(lost, routing.logits, log_scores), axis=-1)


def drop_second(routing: Routing, key: Key[Array, ""]) -> Routing:
    """GShard's random second expert: keep it with probability min(1, 2 x its share of the two gates).

    The first gate keeps its value, as in GShard (arXiv 2006.16668) Algorithm 1. A dropped second expert is an
    empty slot: it is not sent, and the loads of the result do not count it. A layer's statistics are those of the
    routing before the drop.
    """
    num_experts = routing.loads.shape[0]
    total = routing.gates.sum(1)
    second = routing.gates[:, 1] / jnp.where(total > 0, total, 1.0)
    keep = 2.0 * second > jax.random.uniform(key, routing.gates.shape[:1], jnp.float32)
    expert_ids = routing.expert_ids.at[:, 1].set(jnp.where(keep, routing.expert_ids[:, 1], num_experts))
    gates = routing.gates.at[:, 1].multiply(keep.astype(jnp.float32))
    return routing._replace(expert_ids=expert_ids, gates=gates, loads=count(expert_ids, num_experts))


def gates_in_turn(
    logits: Float32[Array, "tokens experts"], expert_ids: Int32[Array, "tokens slots"], jitter: float
) -> Float32[Array, "tokens slots"]:
    """SparseMixer's gates: each is a softmax over the experts left for its slot, 0 in empty slots.

    Left are the experts that no slot before it holds and whose logit l is near the best of these, m:
    (m - l) / max(|l|, m) <= 2 jitter. A slot's own expert always is, if a bias chose one that is not near.

    Source: GRIN (arXiv 2409.12136) section 2, without its sampling in training; what is near, as in the code of
    Phi-3.5-MoE.
    """

    def gate(free: Array, ids: Array) -> tuple[Array, Array]:
        own = jax.nn.one_hot(ids, logits.shape[1], dtype=bool)
        best = jnp.where(free, logits, -jnp.inf).max(-1, keepdims=True)
        near = best - logits <= 2 * jitter * jnp.maximum(jnp.abs(logits), best)
        empty = ~own.any(-1, keepdims=True)  # a softmax needs something, even if its result is not read
        share = jax.nn.softmax(jnp.where((free & near) | own | empty, logits, -jnp.inf), axis=-1)
        return free & ~own, jnp.where(own, share, 0.0).sum(-1)

    every = logits < jnp.inf  # split over devices as the logits are
    return lax.scan(gate, every, expert_ids.T)[1].T


def _gates(scores: Array, log_scores: Array, expert_ids: Array, normalize: bool) -> Float32[Array, "tokens slots"]:
    """The unbiased scores at the selected experts, 0 in empty slots."""
    num_experts = scores.shape[-1]
    filled = expert_ids < num_experts
    index = jnp.minimum(expert_ids, num_experts - 1)
    if not normalize:
        return jnp.take_along_axis(scores, index, axis=-1) * filled.astype(scores.dtype)
    # a token without any expert would give softmax(-inf, ...) = NaN
    empty = jnp.where(filled.any(-1, keepdims=True), jnp.float32(-jnp.inf), 0.0)
    chosen = jnp.where(filled, jnp.take_along_axis(log_scores, index, axis=-1), empty)
    return jax.nn.softmax(chosen, axis=-1) * filled.astype(chosen.dtype)
