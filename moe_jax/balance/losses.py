"""Balancing methods that add an auxiliary loss: a differentiable loss on the router, averaged over the valid tokens.

The language model's own loss is in `training/losses.py`. T tokens, S slots of a token, E experts that compute, which
come before the zero-computation experts, D logical devices. Without a valid token every loss and its gradient are 0.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Shaped

from moe_jax.balance.measures import max_violation, mean_over_tokens, relative_counts
from moe_jax.balance.protocol import Balancer, Seen
from moe_jax.balance.registry import register
from moe_jax.config import ModelConfig
from moe_jax.config.balance import (
    AuxLoss,
    ImportanceLoss,
    LoadLoss,
    OrthogonalLoss,
    SimilarityLoss,
    TargetViolation,
    ZLoss,
)
from moe_jax.routing import Routing, Tokens, best, count, counts_by_row, normalized_scores

SMALLEST_SQUARE = 1e-20  # the squared length of a row below which its normalisation would have an infinite gradient
SMALLEST_MEAN = 1e-30  # a mean gate below this counts as 0: dividing by it would have an infinite gradient


@register(
    "aux_loss",
    equation="weight x sum_i f_i P_i",
    source=(
        "DeepSeekMoE (arXiv 2401.06066) eq. 12-17; DeepSeek-V2 (2405.04434) eq. 23-31; DeepSeek-V3 (2412.19437) "
        "eq. 17-20; global scope: arXiv 2501.11873"
    ),
)
def aux_loss(options: AuxLoss, model: ModelConfig) -> Balancer:
    """Auxiliary loss over experts, over devices, or over visits to devices.

    P_i is the mean over valid tokens of the score of expert i, or of the summed scores of the experts of device i.
    Scores are divided by each token's sum (`normalize=True`, as in DeepSeek-V3), or raw (as in Loss-Free Balancing
    eq. 2). f has no gradient and is counted before any copy is dropped:

    - `level="expert"`: f_i = E x (share of the chosen slots that went to expert i);
    - `level="device"`: f_i = mean f of the experts of device i, that is D x (its share of the chosen slots);
    - `level="communication"`: f_i = D / (M T) x (number of tokens sent to device i). M is the largest number of devices
      to which a token may be sent: `model.top_groups` if the devices are the model's groups, otherwise min(S, D).

    The D devices (`num_devices`, by default `model.num_groups`) are groups of consecutive experts, independent of the
    mesh. At perfect balance the loss is weight x 1 for experts and for devices, and weight x m / M for communication
    where a token visits m devices on average; with raw scores, it is multiplied by the sum of the mean scores.

    `scope` selects the tokens over which f and P are computed: each `sequence` (averaged by token); the `microbatch`;
    or the micro-batch for P and the optimizer step for f, either the whole step (`global`) or its micro-batches up to
    and including this one (`global_running`). `counts="unbiased"` counts the top-k of the scores without the bias and
    without a group limit, as in DeepSeek-V3 eq. 18. Zero-computation experts are left out of f and P, and scores are
    normalised without theirs.
    """
    of_step = options.scope in ("global", "global_running")
    from_loads = options.counts == "biased" and options.level != "communication"

    def counted(routing: Routing) -> Int32[Array, "counts"]:
        groups = _groups(options, model, routing)
        return count(_counted_ids(options, groups, routing), groups.num_counts)

    def statistics(routing: Routing) -> Int32[Array, "counts"] | None:
        return counted(routing) if of_step and not from_loads else None

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        groups = _groups(options, model, routing)
        scores = _summed(groups, _real_scores(options, groups, routing))
        if options.scope == "sequence":
            return options.weight * _sequence_value(groups, routing, scores, _counted_ids(options, groups, routing))
        if from_loads:
            counts = _summed(groups, (seen.loads if of_step else routing.loads)[: groups.num_experts])
        else:
            counts = counted(routing) if seen.own is None else seen.own
        return options.weight * (_frequencies(groups, counts) * mean_over_tokens(scores, routing)).sum()

    return Balancer(own_statistics=statistics, own_loss=loss)


@register(
    "z_loss",
    equation="weight x mean_t (logsumexp_i logits_ti)^2",
    source="ST-MoE (arXiv 2202.08906) eq. 5",
)
def z_loss(options: ZLoss, model: ModelConfig) -> Balancer:
    """Router z-loss: keeps logits small; does not balance."""

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        squared = jax.nn.logsumexp(routing.logits, axis=-1) ** 2
        return options.weight * mean_over_tokens(squared[:, None], routing)[0]

    return Balancer(own_loss=loss)


@register(
    "importance_loss",
    equation="weight x CV(sum_t g_t)^2",
    source="Shazeer et al. (arXiv 1701.06538) eq. 6-7",
)
def importance_loss(options: ImportanceLoss, model: ModelConfig) -> Balancer:
    """Importance loss: equalises the experts' summed gates.

    g_ti is the gate of expert i for token t, 0 where it was not chosen; CV is the standard deviation over experts
    divided by their mean, so a factor on the gates cancels. CV^2 is 0 if all experts have the same sum and E - 1 if one
    has everything. Equal importance can still be unequal load: a few large gates sum to as much as many small ones.

    The loss is not linear in the gates. Under accumulation, the values of the micro-batches are averaged by tokens, so
    the result depends on the number of micro-batches: small ones look less balanced than their union. Zero-computation
    experts are left out.
    """

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        num_experts = routing.loads.shape[0] - model.num_zero_experts
        # a comparison instead of a scatter over the whole batch, which may be sharded over many devices
        chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=bool)
        at_experts = jnp.where(chosen, routing.gates[:, :, None], 0.0)
        return options.weight * squared_variation(at_experts.sum((0, 1)))

    return Balancer(own_loss=loss)


@register(
    "load_loss",
    equation="weight x CV(sum_t Phi((x_ti - kth_excluding(x_t, k, i)) / noise_std))^2",
    source="Shazeer et al. (arXiv 1701.06538) eq. 8-11; V-MoE (2106.05974) appendix A.2",
)
def load_loss(options: LoadLoss, model: ModelConfig) -> Balancer:
    """Load loss: equalises a smooth estimate of the loads.

    Phi(...) is the probability that expert i would be among the k largest logits x of token t if noise were added to
    its logit alone; kth_excluding is the k-th largest of the other logits, and k is the number of slots. With noisy
    logits, as in the paper, it is the probability that the expert stays chosen when its noise is drawn again. Our
    routing adds no noise, so `noise_std` (0 means 1 / number of choices, as in V-MoE) only sets the distance from the
    threshold within which a token counts partly. As it approaches 0, the sums become the loads of top-k routing by
    logits, without a gradient. The loss ignores the bias and any group limit.

    The loss is not linear in the probabilities. Under accumulation, the values of the micro-batches are averaged by
    tokens, so the result depends on the number of micro-batches. Zero-computation experts compete for slots, but are
    left out of the sums. V-MoE's threshold is instead the k-th largest of all logits, including that of expert i.
    """

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        choices = routing.logits.shape[1]
        slots = routing.expert_ids.shape[1]
        if slots >= choices:  # every expert is certain
            return jnp.zeros((), jnp.float32)
        distance = routing.logits - _kth_excluding(routing.logits, slots)
        chance = jax.scipy.special.ndtr(distance / (options.noise_std or 1.0 / choices))
        sums = (routing.is_token.astype(jnp.float32)[:, None] * chance).sum(0)
        return options.weight * squared_variation(sums[: choices - model.num_zero_experts])

    return Balancer(own_loss=loss)


@register(
    "orthogonal_loss",
    equation="weight x sum_ij (w_i . w_j - delta_ij)^2",
    source=(
        "ERNIE 4.5 technical report (2025), router orthogonalisation loss. Its published code takes the mean over "
        "the E^2 pairs, with a weight of 1e-2; here it is the sum"
    ),
)
def orthogonal_loss(options: OrthogonalLoss, model: ModelConfig) -> Balancer:
    """Router orthogonalisation: makes the router's normalised rows w orthogonal.

    The more the rows differ in direction, the fewer experts have high scores for the same token. The loss ignores
    loads. A diagonal term is 0, or 1 for a row of zeros. A loss of 0 needs as many dimensions as experts: E unit rows
    in d < E dimensions cost at least E^2 / d - E. Only the router's weight enters, so the loss does not depend on how
    a batch is split.
    """

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        squared = (router_weight**2).sum(0, keepdims=True)
        rows = router_weight * jax.lax.rsqrt(jnp.maximum(squared, SMALLEST_SQUARE))
        return _unless_no_token(routing, options.weight * (_gram_minus_identity(rows) ** 2).sum())

    return Balancer(own_loss=loss)


@register(
    "similarity_loss",
    equation="weight x ||R^T R - I||_1",
    source="SimBal (arXiv 2506.14038), the loss L_orth and its listing in the appendix; weight 0.1",
)
def similarity_loss(options: SimilarityLoss, model: ModelConfig) -> Balancer:
    """SimBal: makes the router's weight R orthonormal; ||.||_1 is the sum of absolute entries.

    An orthonormal router preserves the angles between tokens, so that similar tokens go to similar experts, and favours
    no expert by the length of its row. The loss ignores loads. The paper starts from an orthogonal router, and finds
    little difference between weights of 0.01, 0.1 and 1. Only the router's weight enters, so the loss does not depend
    on how a batch is split.
    """

    def loss(routing: Routing, seen: Seen, router_weight: Array) -> Float32[Array, ""]:
        return _unless_no_token(routing, options.weight * jnp.abs(_gram_minus_identity(router_weight)).sum())

    return Balancer(own_loss=loss)


@register(
    "target_violation",
    equation="log factor += rate x clip(MaxVio / target - 1, -1, 1)",
    source="this project, after ReMoE (arXiv 2412.14711) eq. 7; MaxVio: Loss-Free Balancing (2408.15664) eq. 4",
)
def target_violation(options: TargetViolation, model: ModelConfig) -> Balancer:
    """Holds balance at a target by a factor on the weight of another loss.

    It lets losses be compared at the same balance. After every step, the weight of the loss labelled `controls` rises
    if the step's MaxVio over the experts that compute was above the target, and falls if it was below. The factor
    starts at 1 and stays between 1 / limit and limit. A target below the MaxVio that random sampling alone causes
    cannot be held: the factor then stays at its limit.

    Similar to ReMoE's adaptive coefficient, lambda x alpha^sign(target sparsity - sparsity), but with the size of the
    error instead of only its sign, so that the weight converges, and with balance instead of sparsity.
    """
    limit = math.log(options.limit)

    def zero(num_experts: int, layer: Any) -> Float32[Array, ""]:
        return jnp.zeros((), jnp.float32)

    def update(seen: Seen) -> tuple[Array, Float32[Array, ""]]:
        real = seen.loads[: seen.loads.shape[0] - model.num_zero_experts]
        error = jnp.clip(max_violation(real) / options.target - 1.0, -1.0, 1.0)
        log_factor = jnp.clip(seen.state + options.rate * error, -limit, limit)
        return seen.bias, jnp.where(real.sum(dtype=jnp.int32) > 0, log_factor, seen.state)

    def factors(log_factor: Array) -> dict[str, Float32[Array, ""]]:
        return {options.controls: jnp.exp(log_factor)}

    return Balancer(own_state=zero, own_update=update, factors=factors)


def squared_variation(sums: Float32[Array, "experts"]) -> Float32[Array, ""]:
    """The square of the standard deviation over the mean; 0 where the mean is 0."""
    mean = sums.mean()
    some = mean > SMALLEST_MEAN
    relative = sums / jnp.where(some, mean, 1.0)
    return jnp.where(some, ((relative - 1.0) ** 2).mean(), 0.0)


def of_real_experts(routing: Routing, num_experts: int) -> Routing:
    """The routing with the scores and logits of the first `num_experts` only, without zero-computation experts."""
    return routing._replace(scores=routing.scores[:, :num_experts], logits=routing.logits[:, :num_experts])


class Groups(NamedTuple):
    """The groups that an auxiliary loss balances: `number` groups of consecutive experts of `num_experts` that compute.

    most: where visits are balanced, the largest number of groups that a token may visit; 0 where slots are balanced.
    """

    num_experts: int
    number: int
    most: int

    @property
    def num_counts(self) -> int:
        """The number of counts; for visits one more than groups, the count of tokens to which f is relative."""
        return self.number + (self.most > 0)


def _groups(options: AuxLoss, model: ModelConfig, routing: Routing) -> Groups:
    num_experts = routing.loads.shape[0] - model.num_zero_experts
    if options.level == "expert":
        return Groups(num_experts, num_experts, 0)
    devices = options.num_devices or model.num_groups
    if options.level == "device":
        return Groups(num_experts, devices, 0)
    limited = devices == model.num_groups and model.top_groups < devices and options.counts == "biased"
    return Groups(num_experts, devices, model.top_groups if limited else min(routing.expert_ids.shape[1], devices))


def _counted_ids(options: AuxLoss, groups: Groups, routing: Routing) -> Int32[Array, "tokens slots"]:
    """The ids of the groups that f counts for every token; `groups.num_counts` is counted nowhere."""
    ids = routing.expert_ids
    if options.counts == "unbiased":
        ids = best(routing.scores, ids.shape[1])
        ids = jnp.where(routing.is_token[:, None], ids, groups.num_experts)
    group_ids = jnp.minimum(ids, groups.num_experts) // (groups.num_experts // groups.number)
    return _visits(groups, group_ids, routing.is_token) if groups.most else group_ids


def _visits(groups: Groups, group_ids: Array, is_token: Array) -> Int32[Array, "tokens columns"]:
    """The ids of the groups that a token visits, each once, then id `groups.number` to count the token itself."""
    each = jnp.arange(groups.number, dtype=jnp.int32)[None]
    visited = jax.nn.one_hot(group_ids, groups.number, dtype=bool).any(1)
    ids = jnp.where(visited, each, groups.num_counts)
    token = jnp.where(is_token, groups.number, groups.num_counts).astype(jnp.int32)
    return jnp.concatenate([ids, token[:, None]], axis=1)


def _real_scores(options: AuxLoss, groups: Groups, routing: Routing) -> Float32[Array, "tokens experts"]:
    real = of_real_experts(routing, groups.num_experts)
    return normalized_scores(real) if options.normalize else real.scores


def _summed(groups: Groups, values: Shaped[Array, "*rest experts"]) -> Shaped[Array, "*rest groups"]:
    if groups.number == groups.num_experts:
        return values
    return values.reshape(*values.shape[:-1], groups.number, -1).sum(-1, dtype=values.dtype)


def _frequencies(groups: Groups, counts: Int32[Array, "*rows counts"]) -> Float32[Array, "*rows groups"]:
    """f: slots relative to an equal share of all, or visits relative to an equal share of the most possible."""
    if not groups.most:
        return relative_counts(counts)
    visits = counts[..., :-1].astype(jnp.float32)
    tokens = counts[..., -1:].astype(jnp.float32)
    return groups.number * visits / (groups.most * jnp.maximum(tokens, 1.0))


def _sequence_value(
    groups: Groups,
    routing: Routing,
    scores: Float32[Array, "tokens groups"],
    ids: Int32[Array, "tokens slots"],
) -> Float32[Array, ""]:
    """sum_i f_i P_i within every sequence, averaged over sequences by their number of valid tokens."""
    is_token = routing.is_token.astype(jnp.float32)
    counts, score_sums = _by_row(routing.tokens, ids, is_token[:, None] * scores, groups.num_counts)
    return (_frequencies(groups, counts) * score_sums).sum() / jnp.maximum(is_token.sum(), 1.0)


def _by_row(tokens: Tokens, ids: Array, scores: Array, num_counts: int) -> tuple[Array, Array]:
    """For every row, the count of each id, int32 [B, C], and the sum of its scores, float32 [B, G]."""
    num_tokens = scores.shape[0]
    if tokens.rows is not None:  # no scatter over the whole batch, which may be sharded over many devices
        num_rows = tokens.rows.count
        return counts_by_row(ids, num_rows, num_counts), scores.reshape(num_rows, -1, scores.shape[1]).sum(1)
    row, _ = tokens.sequences(num_tokens)
    # a batch has at most as many rows as tokens, so [T, C] is always large enough
    counts = jnp.zeros((num_tokens, num_counts + 1), jnp.int32).at[row[:, None], ids].add(1)[:, :-1]
    return counts, jax.ops.segment_sum(scores, row, num_segments=num_tokens)


def _kth_excluding(values: Float32[Array, "tokens choices"], k: int) -> Float32[Array, "tokens choices"]:
    """For every column of a row, the k-th largest value of the other columns.

    That is the row's k-th largest value, or the next one for a column which is itself among the k largest.
    """
    order = best(values, k + 1)
    kth, following = (_at(values, order[:, i])[:, None] for i in (k - 1, k))
    return jnp.where(values >= kth, following, kth)


def _at(values: Float32[Array, "tokens choices"], ids: Int32[Array, "tokens"]) -> Float32[Array, "tokens"]:
    """Each row's value at its id, as a sum, because its gradient keeps the sharding of the rows; a gather's may not."""
    return jnp.where(jax.nn.one_hot(ids, values.shape[1], dtype=bool), values, 0.0).sum(1)


def _gram_minus_identity(columns: Float32[Array, "embed choices"]) -> Float32[Array, "choices choices"]:
    gram = jnp.matmul(columns.T, columns, precision=jax.lax.Precision.HIGHEST)
    return gram - jnp.eye(columns.shape[1], dtype=jnp.float32)


def _unless_no_token(routing: Routing, value: Float32[Array, ""]) -> Float32[Array, ""]:
    return jnp.where(routing.is_token.any(), value, 0.0)
