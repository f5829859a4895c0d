"""Measures of balance, of the experts chosen and of the auxiliary loss: pure functions, the same for every method.

Loads are token copies per expert, any integer dtype, with experts last; leading dimensions (layers) are kept. Arrays
may be numpy's or jax's, so that training, evaluation and simulation report the same numbers under the same names.

Legend: T tokens, K top_k, S slots, E experts, L layers, B sequences, D domains.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.routing import Routing, normalized_scores

STARVED = 0.1  # of the mean load: an expert with less gets almost no gradient

# of `violation_floor`
BINS = 64  # ranges of loads over which the probabilities are summed
BINS_PER_STD = 6.0  # at most this many to a standard deviation, and never narrower than one copy
ROUNDING = 1e-6  # relative: a mean load that rounding puts just above an integer is not rounded up
SMALLEST_REST = 1e-6  # keeps a denominator above 0 where a load is all tokens


# --- loads ----------------------------------------------------------------------------------------------------


def of_loads(loads: Any, num_real_experts: int, num_tokens: Any = None, top_k: Any = None) -> dict[str, Any]:
    """Every measure that is computed from loads, under its name in the log.

    Means over layers, except for the names with `_worst` and `max_expert_share`, which are of the worst layer, and
    `dead_experts`, which is summed over layers.

    Args:
        loads: int [L, E].
        num_real_experts: only this many first columns are measured; zero-computation experts come after them.
        num_tokens: how many valid tokens were routed; adds `violation_floor`. Scalar; may be traced.
        top_k: copies per token; None computes it from the real experts' loads and the number of tokens.

    Returns:
        name -> scalar, float32, or int for dead_experts.
    """
    xp = loads.__array_namespace__()
    loads = loads[..., :num_real_experts]
    measured = {
        "load_cv": coefficient_of_variation(loads),
        "load_entropy": load_entropy(loads),
        "effective_experts": effective_experts(loads),
        "gini": gini(loads),
        "starved_experts": starved_experts(loads),
    }
    values = over_layers(violations(loads))
    values |= {name: xp.mean(value) for name, value in measured.items()}
    values["dead_experts"] = xp.sum(dead_experts(loads), dtype=jnp.int32)
    values["max_expert_share"] = xp.max(max_expert_share(loads))
    if num_tokens is not None:
        counts = xp.sum(loads, axis=-1), xp.maximum(xp.asarray(num_tokens), 1)
        copies, tokens = (xp.asarray(n, dtype=jnp.float32) for n in counts)
        copies = copies / tokens if top_k is None else top_k
        values["violation_floor"] = xp.mean(xp.asarray(violation_floor(num_tokens, copies, num_real_experts)))
    return values


def violations(loads: Any) -> dict[str, Any]:
    """MaxVio, MinVio and AvgVio by name: int [..., E] -> float32 [...] each."""
    return {
        "max_violation": max_violation(loads),
        "min_violation": min_violation(loads),
        "mean_violation": mean_violation(loads),
    }


def over_layers(values: dict[str, Any]) -> dict[str, Any]:
    """The mean of each value over the layers [L] and, with `_worst` added to its name, the value farthest from 0."""
    xp = next(iter(values.values())).__array_namespace__()
    means = {name: xp.mean(value) for name, value in values.items()}
    worst = {f"{name}_worst": (xp.min if "min_" in name else xp.max)(value) for name, value in values.items()}
    return means | worst


def max_violation(loads: Any) -> Any:
    """MaxVio: (max load - mean load) / mean load, 0 to E - 1; 0 at perfect balance or with no load at all.

    Args:
        loads: int [..., E].

    Returns:
        float32 [...].

    Source: Loss-Free Balancing (arXiv 2408.15664) eq. 4.
    """
    xp = loads.__array_namespace__()
    share = shares(loads)
    return xp.max(share, axis=-1) * loads.shape[-1] - 1.0


def min_violation(loads: Any) -> Any:
    """MinVio: (min load - mean load) / mean load, -1 (a dead expert) to 0. int [..., E] -> float32 [...]."""
    xp = loads.__array_namespace__()
    return xp.min(shares(loads), axis=-1) * loads.shape[-1] - 1.0


def mean_violation(loads: Any) -> Any:
    """AvgVio: the mean of |load - mean load| / mean load, 0 to 2 (E - 1) / E. int [..., E] -> float32 [...]."""
    xp = loads.__array_namespace__()
    return xp.mean(xp.abs(shares(loads) * loads.shape[-1] - 1.0), axis=-1)


def coefficient_of_variation(loads: Any) -> Any:
    """Standard deviation (of the population) over mean, 0 to sqrt(E - 1). int [..., E] -> float32 [...].

    Source: the CV of Shazeer et al. (arXiv 1701.06538) sec. 4, which squares it into a loss.
    """
    xp = loads.__array_namespace__()
    return xp.std(shares(loads) * loads.shape[-1], axis=-1)


def load_entropy(loads: Any) -> Any:
    """Entropy of the load shares, divided by log E: 1 if uniform, 0 if one expert has everything. float32 [...]."""
    xp = loads.__array_namespace__()
    if loads.shape[-1] == 1:
        return xp.ones(loads.shape[:-1], dtype=jnp.float32)
    entropy = _entropy(shares(loads))
    return entropy / xp.log(xp.asarray(loads.shape[-1], dtype=entropy.dtype))


def effective_experts(loads: Any) -> Any:
    """exp(entropy of the load shares): how many equally loaded experts have this entropy, 1 to E. float32 [...]."""
    xp = loads.__array_namespace__()
    return xp.exp(_entropy(shares(loads)))


def gini(loads: Any) -> Any:
    """The Gini coefficient sum_ij |F_i - F_j| / (2 E) of the shares F: 0 if uniform, 1 - 1 / E for one expert only.

    Computed from the sorted shares x_1 <= ... <= x_E as sum_i (2 i - E - 1) x_i / E. int [..., E] -> float32 [...].
    """
    xp = loads.__array_namespace__()
    num_experts = loads.shape[-1]
    rank = 2 * xp.arange(1, num_experts + 1, dtype=jnp.float32) - (num_experts + 1)
    return xp.sum(xp.broadcast_to(rank, loads.shape) * xp.sort(shares(loads), axis=-1), axis=-1) / num_experts


def dead_experts(loads: Any) -> Any:
    """The number of experts without a token: int [...]."""
    xp = loads.__array_namespace__()
    return xp.sum(loads == 0, axis=-1, dtype=jnp.int32)


def starved_experts(loads: Any) -> Any:
    """The share of experts with less than `STARVED` of the mean load, dead ones included: 0 to 1, float32 [...]."""
    xp = loads.__array_namespace__()
    return xp.mean(xp.astype(shares(loads) * loads.shape[-1] < STARVED, jnp.float32), axis=-1)


def max_expert_share(loads: Any) -> Any:
    """The busiest expert's share of all copies: 1 / E to 1, float32 [...]."""
    xp = loads.__array_namespace__()
    return xp.max(shares(loads), axis=-1)


def device_violation(loads: Any, num_devices: int) -> Any:
    """MaxVio of groups of E / num_devices consecutive experts, as if each were on a device: 0 to num_devices - 1.

    Raises:
        ValueError: num_devices does not divide E.
    """
    num_experts = loads.shape[-1]
    if num_experts % num_devices:
        raise ValueError(f"num_devices={num_devices} must divide the {num_experts} experts; choose another.")
    grouped = loads.reshape(*loads.shape[:-1], num_devices, num_experts // num_devices)
    return max_violation(grouped.sum(-1))


def sequence_violations(row_loads: Any) -> dict[str, Any]:
    """The mean over sequences of each of their `violations`: float32 [...]; sequences without tokens do not count.

    Args:
        row_loads: int [..., B, E], the loads of each sequence.
    """
    return {name: _mean_of_rows(values, row_loads) for name, values in violations(row_loads).items()}


def sequence_floor(row_loads: Any, top_k: Any) -> Any:
    """The mean over sequences of the `violation_floor` of their tokens: their expected MaxVio under random choice."""
    xp = row_loads.__array_namespace__()
    copies, per_token = (xp.asarray(n, dtype=jnp.float32) for n in (xp.sum(row_loads, axis=-1), top_k))
    floor = violation_floor(copies / per_token, per_token, row_loads.shape[-1])
    return _mean_of_rows(xp.asarray(floor), row_loads)


def _mean_of_rows(values: Any, row_loads: Any) -> Any:
    xp = row_loads.__array_namespace__()
    real = row_loads.sum(-1) > 0
    count = xp.astype(xp.maximum(xp.sum(real, axis=-1), 1), values.dtype)
    return xp.sum(xp.where(real, values, 0.0), axis=-1) / count


def shares(loads: Any) -> Any:
    """Loads over their sum, float32; uniform where there is no load."""
    xp = loads.__array_namespace__()
    total = xp.sum(loads, axis=-1, keepdims=True)
    share = xp.astype(loads, jnp.float32) / xp.astype(xp.maximum(total, 1), jnp.float32)
    return xp.where(total > 0, share, xp.asarray(1.0 / loads.shape[-1], dtype=share.dtype))


def _entropy(share: Any) -> Any:
    """-sum p log p over the last axis, in nats."""
    xp = share.__array_namespace__()
    terms = xp.where(share > 0, share * xp.log(xp.where(share > 0, share, 1.0)), 0.0)
    return 0.0 - xp.sum(terms, axis=-1)


# --- the MaxVio of random choice ------------------------------------------------------------------------------


def violation_floor(num_tokens: Any, top_k: Any, num_experts: int) -> Float32[Array, "..."]:
    """The expected MaxVio of a uniform router: each token independently chooses K of E experts at random.

    A balanced router is not expected to do better on a batch of this many tokens, and real batches stay above it,
    because tokens of a text resemble each other. Each load is binomial(T, K / E), approximated by Camp and Paulson's
    normal score z. The loads add up to T K, so their scores have the correlation -1 / (E - 1), and all E loads are at
    most m with the probability Phi(z(m) sqrt((E - 1) / E))^E. The mean of the largest load is the sum over m of the
    probability that it is above m.

    Within 1 % of simulation for a mean load of 4 or more, 3 % at 1, 8 % at 1/4 (with 256 experts).

    Args:
        num_tokens: T, a number or array, may be traced; the result is 0 where it is 0.
        top_k: K, 1 to E, or the mean number of copies per token; broadcasts against T.
        num_experts: E.

    Returns:
        float32 of T's and K's joint shape, 0 to E - 1; 0 where K is E.

    Source: Camp (1951) and Paulson (1942) for the score; the rest is this project's.
    """
    tokens = jnp.asarray(num_tokens, jnp.float32)
    top_k = jnp.asarray(top_k, jnp.float32)
    if num_experts == 1:
        return jnp.zeros(jnp.broadcast_shapes(tokens.shape, top_k.shape), jnp.float32)
    return _violation_floor(tokens, top_k, num_experts)


@functools.partial(jax.jit, static_argnums=2)
def _violation_floor(tokens: Array, top_k: Array, num_experts: int) -> Array:
    chosen = top_k / num_experts
    some = (tokens > 0) & (top_k > 0) & (top_k < num_experts)
    tokens = jnp.where(some, tokens, 1.0)[..., None]
    p = jnp.where(some, chosen, 0.5)[..., None]
    mean = tokens * p
    first = jnp.ceil(mean * (1.0 - ROUNDING))  # the largest load is never below the mean
    width = jnp.maximum(1.0, jnp.sqrt(mean * (1.0 - p)) / BINS_PER_STD)  # several loads to a bin where they are many
    number = jax.lax.broadcasted_iota(jnp.float32, (*mean.shape[:-1], BINS), mean.ndim - 1)
    load = first + width * number + (width - 1.0) / 2.0
    score = _binomial_score(load, tokens, p) * math.sqrt(1.0 - 1.0 / num_experts)
    below = jnp.where(load < tokens, jax.scipy.special.ndtr(score) ** num_experts, 1.0)
    largest = first - mean + width * (1.0 - below).sum(-1, keepdims=True)
    return jnp.where(some, (largest / mean)[..., 0], 0.0)


def _binomial_score(load: Array, tokens: Array, p: Array) -> Array:
    """z with Phi(z) close to P(binomial(tokens, p) <= load), because the cube root of an F ratio is nearly normal."""
    rest = jnp.maximum(tokens - load, SMALLEST_REST)
    a = 1.0 / (9.0 * rest)
    b = 1.0 / (9.0 * (load + 1.0))
    root = jnp.cbrt((load + 1.0) * (1.0 - p) / (rest * p))
    return ((1.0 - b) * root - (1.0 - a)) / jnp.sqrt(b * root**2 + a)


# --- the bias -------------------------------------------------------------------------------------------------


def bias_range(bias: Any) -> Any:
    """The largest minus the smallest bias, float32 [...]; selection depends only on differences.

    With a bias for each class of tokens, [..., C, E], the result has one range per class.
    """
    xp = bias.__array_namespace__()
    return xp.max(bias, axis=-1) - xp.min(bias, axis=-1)


def bias_mean(bias: Any) -> Any:
    """Mean bias: float32 [...]. It changes no selection; where it drifts, `zero_mean` would hold it at 0."""
    xp = bias.__array_namespace__()
    return xp.mean(bias, axis=-1)


def bias_std(bias: Any) -> Any:
    """Standard deviation (of the population) of the biases: float32 [...]."""
    xp = bias.__array_namespace__()
    return xp.std(bias, axis=-1)


def flip_rate(direction_before: Any, direction_after: Any) -> Any:
    """Of the biases that moved in two consecutive steps, the share that changed direction.

    1 if every bias only oscillates, 0 if all move on in one direction or none moves.

    Args:
        direction_before, direction_after: signs of two consecutive moves, int8 [..., E].

    Returns:
        float32 [...], 0 to 1.
    """
    xp = direction_before.__array_namespace__()
    turned = xp.sum(direction_before * direction_after < 0, axis=-1)
    moved = xp.sum(direction_before * direction_after != 0, axis=-1)
    return xp.astype(turned, jnp.float32) / xp.astype(xp.maximum(moved, 1), jnp.float32)


# --- the chosen experts ---------------------------------------------------------------------------------------


def decisions_changed(ids: Any, other_ids: Any, num_experts: int, mask: Any = None) -> Any:
    """The share of the decisions `ids` that are not in `other_ids`: 0 to 1, float32 [...].

    With the biased ids against the best k unbiased scores, it measures how much the bias changes. With a step's ids
    against those under the next bias, it is churn. The order within a token does not matter. 0 if nothing is chosen.

    Args:
        ids: int [..., T, S]; num_experts or more is an empty slot.
        other_ids: int [..., T, S'], of the same tokens.
        num_experts: E.
        mask: bool [..., T], the tokens that count; None for all.
    """
    xp = ids.__array_namespace__()
    kept, chosen = decisions_kept(ids, other_ids, num_experts, mask)
    return xp.astype(chosen - kept, jnp.float32) / xp.astype(xp.maximum(chosen, 1), jnp.float32)


def decisions_kept(ids: Any, other_ids: Any, num_experts: int, mask: Any = None) -> tuple[Any, Any]:
    """How many of the decisions `ids` are also in `other_ids`, and how many there are: int [...] each, additive."""
    xp = ids.__array_namespace__()
    real = ids < num_experts if mask is None else (ids < num_experts) & mask[..., None]
    kept = real & xp.any(ids[..., :, None] == other_ids[..., None, :], axis=-1)
    return xp.sum(kept, axis=(-2, -1)), xp.sum(real, axis=(-2, -1))


def saturation(ids_then: Any, ids_now: Any, num_experts: int) -> Any:
    """Router saturation: the mean over tokens of |experts then and now| / K; 1 if the router no longer changes.

    Args:
        ids_then, ids_now: int [..., T, K], the same tokens routed early and at the end; num_experts is an empty slot.
        num_experts: E.

    Returns:
        float32 [...], 0 to 1; K / E for random choices.

    Source: OLMoE (arXiv 2409.02060) sec. 5.1, as its run_moe_analysis.py computes it.
    """
    return 1.0 - decisions_changed(ids_now, ids_then, num_experts)


def mutual_information(loads: Any) -> Any:
    """I(expert; domain) in bits, between the expert of a copy and its domain: 0 to log2 min(D, E), float32 [...].

    Biased upwards for few copies: if independent, it is about (D - 1)(E - 1) / (2 ln 2 N) bits for N copies.

    Args:
        loads: int [..., D, E], by domain.
    """
    xp = loads.__array_namespace__()
    total = xp.maximum(xp.sum(loads, axis=(-2, -1), keepdims=True), 1)
    joint = xp.astype(loads, jnp.float32) / xp.astype(total, jnp.float32)
    independent = xp.sum(joint, axis=-1, keepdims=True) * xp.sum(joint, axis=-2, keepdims=True)
    ratio = xp.where(joint > 0, joint / xp.where(joint > 0, independent, 1.0), 1.0)
    return xp.maximum(xp.sum(joint * xp.log2(ratio), axis=(-2, -1)), 0.0)


# --- the auxiliary loss ---------------------------------------------------------------------------------------


def aux_loss_value(routing: Routing, num_experts: int | None = None) -> Float32[Array, ""]:
    """The expert-level auxiliary loss of this micro-batch, with weight 1 and normalised scores: 1.0 at balance.

    Over the first `num_experts`, if zero-computation experts come after them. It is a measure, without
    back-propagation, by which methods that do not use the loss can be compared too.
    """
    logits, scores, loads = (a[..., :num_experts] for a in (routing.logits, routing.scores, routing.loads))
    routing = routing._replace(logits=logits, scores=scores, loads=loads)
    return (relative_counts(loads) * mean_over_tokens(normalized_scores(routing), routing)).sum()


def relative_counts(counts: Int32[Array, "*rows experts"]) -> Float32[Array, "*rows experts"]:
    """f_i = E x counts_i / sum of counts, 1 at balance; 0 if all counts are 0."""
    total = counts.sum(-1, keepdims=True).astype(jnp.float32)
    return counts.shape[-1] * counts.astype(jnp.float32) / jnp.maximum(total, 1.0)


def mean_over_tokens(values: Float32[Array, "tokens columns"], routing: Routing) -> Float32[Array, "columns"]:
    """The mean over the valid tokens; 0 if there is none."""
    weight = routing.is_token.astype(jnp.float32)
    return (weight[:, None] * values).sum(0) / jnp.maximum(weight.sum(), 1.0)
