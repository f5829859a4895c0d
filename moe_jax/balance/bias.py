"""Methods that move the selection bias against the last step's loads: state, without gradients.

E real experts come first, then Z zero-computation experts (`model.num_zero_experts`), whose target is the share
`model.zero_share` of the copies. Without them every expert's target is the mean load. The bias of a zero-computation
expert does not move, except by the common shift of `zero_mean`: when the real experts reach their targets, the
zero-computation experts together reach theirs. T tokens, S slots, N bins.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Shaped

from moe_jax.balance.protocol import Balancer, Seen, zeros
from moe_jax.balance.registry import register
from moe_jax.balance.wrappers import factor_at
from moe_jax.config import ModelConfig
from moe_jax.config.balance import (
    BiasMultiplicative,
    BiasOptions,
    BiasPi,
    BiasProportional,
    BiasRms,
    BiasSign,
    BiasSmebu,
    Quantile,
)
from moe_jax.routing import Routing

ROUNDING = 1e-6  # relative errors of loads below this come from float32
PARTS = 2**15  # the resolution of a share in integer arithmetic


@register(
    "bias_sign",
    equation="b_i += u sign(mean load - load_i)",
    source="arXiv 2408.15664, Algorithm 1; zero-mean as in Moonlight (`b += u (sign(e) - mean sign(e))`)",
)
def bias_sign(options: BiasSign, model: ModelConfig) -> Balancer:
    """Loss-Free Balancing: the bias moves after every step and affects the next.

    The bias of an overloaded expert falls. `zero_mean` subtracts the mean of the increments, which changes no
    selection but keeps all biases from drifting together.
    """

    def update(seen: Seen) -> tuple[Array, None]:
        sign = load_sign(seen.loads, model)
        return moved(options, seen, -sign if options.flipped else sign), None

    return Balancer(own_update=update, initial_bias=zeros)


@register(
    "bias_proportional",
    equation="b_i += u e_i; e_i = mean load - load_i",
    source="arXiv 2408.15664, Table 3 (u = 0.01 has the best balance) and Table 6 (u = 0.001 with softmax scores)",
)
def bias_proportional(options: BiasProportional, model: ModelConfig) -> Balancer:
    """Proportional rule: the bias moves by the error e_i = mean load - load_i, in the unit that `error` selects.

    The error is "relative" to the mean load, in [1 - E, 1]; a "fraction" of all copies, E times smaller; or a "count"
    of copies, which grows with the batch. The paper does not name the unit, but its rates of 1e-4 to 1e-2 for a batch
    of 2 million tokens fit only the relative one: with counts, an error of 10 % would move a bias by 2 or more in one
    step.
    """
    errors = {"relative": relative_error, "fraction": share_error, "count": copies_error}

    def update(seen: Seen) -> tuple[Array, None]:
        return moved(options, seen, errors[options.error](seen.loads, model)), None

    return Balancer(own_update=update, initial_bias=zeros)


@register(
    "bias_multiplicative",
    equation="select by s_i b_i; b_i += u sign(mean load - load_i)",
    source="arXiv 2408.15664, eq. 5 and Table 4",
)
def bias_multiplicative(options: BiasMultiplicative, model: ModelConfig) -> Balancer:
    """Multiplicative bias, which starts at 1.

    Selection depends on ratios of biases, not on differences, so `zero_mean` does change it: it holds their mean at 1.
    """

    def update(seen: Seen) -> tuple[Array, None]:
        return moved(options, seen, load_sign(seen.loads, model)), None

    def ones(num_experts: int) -> Float32[Array, "experts"]:
        return jnp.ones(num_experts, jnp.float32)

    return Balancer(own_update=update, initial_bias=ones, combine=jnp.multiply)


@register(
    "bias_rms",
    equation="b_i -= u (F_i - Q_i) / RMS(F - Q)",
    source="Su, kexue.fm/archives/10757 (the improved version)",
)
def bias_rms(options: BiasRms, model: ModelConfig) -> Balancer:
    """Normalised gradient descent, with F the shares of copies and Q their targets.

    A step is as long as that of `bias_sign` at the same rate, so rates carry over, but the bias of an expert near its
    target moves little. Errors that are all below `ROUNDING` of the load are rounding errors of float32, and move
    nothing.
    """

    def update(seen: Seen) -> tuple[Array, None]:
        error = relative_error(seen.loads, model)
        rms = jnp.sqrt((error**2).sum() / (seen.loads.shape[0] - model.num_zero_experts))
        return moved(options, seen, jnp.where(rms > ROUNDING, error / jnp.maximum(rms, ROUNDING), 0.0)), None

    return Balancer(own_update=update, initial_bias=zeros)


@register(
    "bias_pi",
    equation="b_i += mu ((K_e / K) (1 / N) - T_i / (K T_all))",
    source="arXiv 2509.01322 (LongCat-Flash), expert bias under 'computational budget control'; the P is ours",
)
def bias_pi(options: BiasPi, model: ModelConfig) -> Balancer:
    """LongCat-Flash's controller: the error is the target share of copies minus the actual share.

    The target of the N real experts is K_e of a token's K slots, which is the share `1 - model.zero_share`. The sum of
    these errors is the I term of a PID controller; `gain` adds the P term, gain x the last error, with the warmup and
    schedule of the rate. Own state: the P term, float32 [E + Z]. Errors are of order 1 / N, so a rate here acts as
    rate / N does in `bias_proportional`.
    """

    def update(seen: Seen) -> tuple[Array, Array]:
        error = share_error(seen.loads, model)
        last = seen.state
        factor = factor_at(options, seen.step)
        now = jnp.where(factor > 0, options.gain * factor * error, last)  # a frozen bias keeps its P term
        return moved(options, seen._replace(bias=seen.bias + (now - last)), error), now

    return Balancer(own_state=zeros, own_update=update, initial_bias=zeros)


@register(
    "bias_smebu",
    equation="m = beta m + (1 - beta) u (v - mean v); b += m; v_i = tanh(kappa e_i)",
    source="arXiv 2602.17004 (Arcee Trinity Large): u = 5e-4, kappa = 2, beta = 0.5",
)
def bias_smebu(options: BiasSmebu, model: ModelConfig) -> Balancer:
    """Soft-clamped momentum of the relative error e.

    Near balance the step shrinks, where that of a sign would oscillate. Own state: the momentum of v, float32
    [E + Z], in [-1, 1]. Rate and mean are applied when the bias moves rather than to v: the sum is the same, and the
    bias does not move once it is frozen.
    """

    def update(seen: Seen) -> tuple[Array, Array]:
        clamped = jnp.tanh(options.kappa * relative_error(seen.loads, model))
        momentum = options.beta * seen.state + (1.0 - options.beta) * clamped
        return moved(options, seen, momentum), momentum

    return Balancer(own_state=zeros, own_update=update, initial_bias=zeros)


@register(
    "quantile",
    equation="b_j <- quantile_{K/E}(r_j) - mean; r_tj = alpha_t - s_tj",
    source="Su, kexue.fm/archives/11619; range and bins as in Kimi K3 (arXiv 2607.24653), appendix D",
)
def quantile(options: Quantile, _: ModelConfig) -> Balancer:
    """Quantile balancing: computes the balanced bias directly, without a rate.

    alpha is a token's (K + 1)-th biased score, the best one that it did not select, so the token selects expert j
    where `s_j + b_j > alpha`, which is `r_j < b_j`. At balance, the share K / E of all tokens has r_j below b_j.
    Because alpha depends on the bias, this is one step of a descent that needs only a few; `damping` g makes it
    `b <- (1 - g) b + g quantile`.

    Statistics: a histogram of r, int32 [E, N]. With scores in (0, 1), r is in [min b - 1, max b + 1], which the bins
    divide evenly: a quantile is exact to (max b - min b + 2) / N, 0.002 for small biases, and linear within a bin.
    A token that selects every expert has no alpha and is not counted; an expert without a count keeps its bias.

    With `quantiles_of="sequence"` the quantile is instead the mean of those of the step's sequences, of which any sum
    is an integer: bins in 2^16 parts of the range. It is one of the estimators that marin-community/marin, issue 8033,
    compares; that of each device's tokens would depend on the mesh. Statistics: the sum, int32 [E], and the number of
    sequences, int32 [E], up to 2^15.
    """
    by_sequence = options.quantiles_of == "sequence"

    def histogram(routing: Routing) -> Any:
        if by_sequence:
            return sequence_quantiles(routing, options.bins)
        return needed_bias_histogram(routing, options.bins)

    def update(seen: Seen) -> tuple[Array, None]:
        if by_sequence:
            total, number = seen.own
            known = number > 0
            mean = total.astype(jnp.float32) / jnp.maximum(number, 1).astype(jnp.float32)
            low, width = bin_range(seen.bias, options.bins)
            target = low + width * mean / parts_of_bin(options.bins)
        else:
            known = seen.own.sum(1) > 0
            target = balanced_bias(seen.loads, seen.own, seen.bias)
        if options.zero_mean:
            target = target - jnp.where(known, target, 0.0).sum() / jnp.maximum(known.sum(dtype=jnp.float32), 1.0)
        share = options.damping * factor_at(options, seen.step)
        return jnp.where(known, (1.0 - share) * seen.bias + share * target, seen.bias), None

    return Balancer(own_statistics=histogram, own_update=update, initial_bias=zeros)


def needed_bias_histogram(routing: Routing, bins: int) -> Int32[Array, "experts bins"]:
    """For each expert, a histogram of r_tj: the bias at which a valid token t would just select expert j."""
    return _histograms(routing, bins, None, 1)[0]


def sequence_quantiles(routing: Routing, bins: int) -> tuple[Int32[Array, "experts"], Int32[Array, "experts"]]:
    """For each expert, the sum of its sequences' quantiles in parts of a bin, and the number of those sequences."""
    row, num_rows = routing.tokens.sequences(len(routing.scores))
    copies = (routing.expert_ids < routing.loads.shape[0]).sum(1, dtype=jnp.int32)
    totals = jnp.zeros(num_rows, jnp.int32).at[row].add(copies)
    counts = _histograms(routing, bins, row, num_rows)
    place, within = jax.vmap(_balanced_place)(totals, counts)
    parts = parts_of_bin(bins)
    places = place * parts + jnp.round(within * parts).astype(jnp.int32)
    known = counts.sum(-1, dtype=jnp.int32) > 0
    return jnp.where(known, places, 0).sum(0, dtype=jnp.int32), known.sum(0, dtype=jnp.int32)


def parts_of_bin(bins: int) -> int:
    """How finely a place within a bin is counted: all bins together have at most 2^16 parts."""
    return max(1, 2**16 // bins)


def _histograms(
    routing: Routing, bins: int, row: Int32[Array, "tokens"] | None, num_rows: int
) -> Int32[Array, "rows experts bins"]:
    """`needed_bias_histogram` of the tokens of every row.

    One scatter of T x E ones; the comparison of shape [T, S, E] is fused and never held in memory.
    """
    num_experts = routing.scores.shape[1]
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=bool).any(1)
    alpha = jnp.where(chosen, -jnp.inf, routing.scores + routing.bias[None]).max(1, keepdims=True)
    low, width = bin_range(routing.bias, bins)
    place = jnp.clip((alpha - routing.scores - low) / width, 0, bins - 1).astype(jnp.int32) + bins * experts[None]
    counted = alpha > -jnp.inf
    if routing.tokens.mask is not None:
        counted &= routing.tokens.mask[:, None]
    if row is not None:
        place += num_experts * bins * row[:, None]
    empty = jnp.zeros(num_rows * num_experts * bins, jnp.int32)
    place = jnp.where(counted, place, len(empty))  # an index past the end, which the scatter drops
    return empty.at[place].add(1, mode="drop", wrap_negative_indices=False).reshape(num_rows, num_experts, bins)


def balanced_bias(
    loads: Int32[Array, "experts"], counts: Int32[Array, "experts bins"], bias: Float32[Array, "experts"]
) -> Float32[Array, "experts"]:
    """The bias below which each expert's histogram contains the mean load: exact ranks, linear within the bin."""
    place, within = _balanced_place(loads.sum(dtype=jnp.int32), counts)
    low, width = bin_range(bias, counts.shape[1])
    return low + width * (place.astype(jnp.float32) + within)


def _balanced_place(
    total: Int32[Array, ""], counts: Int32[Array, "experts bins"]
) -> tuple[Int32[Array, "experts"], Float32[Array, "experts"]]:
    """The bin of each expert's histogram where its equal share of `total` copies ends, and where within the bin."""
    num_experts = counts.shape[0]
    rank, rest = jnp.divmod(total, num_experts)  # the mean load, K / E of all tokens, without rounding
    below = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    place = (below >= rank + (rest > 0).astype(jnp.int32)).argmax(1)[:, None].astype(jnp.int32)
    in_bin = jnp.take_along_axis(counts, place, axis=1)
    whole = rank - (jnp.take_along_axis(below, place, axis=1) - in_bin)
    wanted = whole.astype(jnp.float32) + rest.astype(jnp.float32) / num_experts
    within = wanted / jnp.maximum(in_bin, 1).astype(jnp.float32)
    return place[:, 0], within[:, 0]


def bin_range(bias: Float32[Array, "experts"], bins: int) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The lower end of the histogram for a bias, and the width of a bin."""
    return bias.min() - 1.0, (bias.max() - bias.min() + 2.0) / bins


def moved(options: BiasOptions, seen: Seen, direction: Float32[Array, "experts"]) -> Float32[Array, "experts"]:
    """The bias after an increment of `rate x direction`, with the rate's schedule; centred if `zero_mean`."""
    increment = jnp.float32(options.rate) * factor_at(options, seen.step) * direction
    return seen.bias + (increment - increment.mean() if options.zero_mean else increment)


def load_sign(loads: Shaped[Array, "experts"], model: ModelConfig = ModelConfig()) -> Float32[Array, "experts"]:
    """sign(target - load): -1 overloaded, +1 underloaded, 0 exactly on target and for zero-computation experts.

    Uses only integer arithmetic where loads are integers: float32 does not distinguish 2^25 from 2^25 + 1, and E x load
    overflows int32 at DeepSeek-V3's batch size; a quotient and a remainder avoid both. Loads must sum to less than
    2^31.
    """
    zero = model.num_zero_experts
    real = loads.shape[0] - zero
    if not jnp.issubdtype(loads.dtype, jnp.integer):
        sign = jnp.sign(target_loads(loads, model) - loads)
    else:
        shared = _part(loads.sum(dtype=jnp.int32), 1.0 - model.zero_share if zero else 1.0)
        quotient, remainder = jnp.divmod(shared, real)
        at_quotient = jnp.sign(remainder)
        sign = jnp.where(loads > quotient, -1, jnp.where(loads < quotient, 1, at_quotient)).astype(jnp.float32)
    return jnp.where(jnp.arange(loads.shape[0]) < real, sign, 0.0)


def target_loads(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """The target number of copies of each expert, float32 [E + Z]."""
    total = _total(loads)
    zero = model.num_zero_experts
    real = loads.shape[0] - zero
    if not zero:
        return jnp.full(real, total / real)
    share = model.zero_share
    return jnp.where(jnp.arange(real + zero) < real, total * (1.0 - share) / real, total * share / zero)


def relative_error(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """(target - load) / target for the real experts, which is 1 without load; 0 for zero-computation experts."""
    target = target_loads(loads, model)
    return jnp.where(target > 0, copies_error(loads, model) / jnp.where(target > 0, target, 1.0), 0.0)


def copies_error(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """target - load in copies; 0 for zero-computation experts."""
    real = jnp.arange(loads.shape[0]) < loads.shape[0] - model.num_zero_experts
    return jnp.where(real, target_loads(loads, model) - loads.astype(jnp.float32), 0.0)


def share_error(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """The target share of all copies minus the actual share; 0 for zero-computation experts."""
    return copies_error(loads, model) / jnp.maximum(_total(loads), 1.0)


def _total(loads: Shaped[Array, "experts"]) -> Float32[Array, ""]:
    """The sum of the loads; integer loads are summed as integers."""
    counts = jnp.issubdtype(loads.dtype, jnp.integer)
    return loads.sum(dtype=jnp.int32 if counts else jnp.float32).astype(jnp.float32)


def _part(total: Array, share: float) -> Array:
    """The share of an int32 `total` below 2^31, computed in int32 without overflow; rounded to `PARTS` parts."""
    parts = round(PARTS * share)
    return total // PARTS * parts + total % PARTS * parts // PARTS
