"""Methods that move the selection bias against the load just seen: state, and no gradient.

E real experts come first, then Z zero-computation experts (`model.num_zero_experts`), which are to get the share
`model.zero_share` of the copies; without them every expert's target is the mean load. The bias of a
zero-computation expert stays, but for the common shift of `zero_mean`: where the real ones have their targets, it
has its own. T tokens, S slots, N bins.
"""

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


@register(
    "bias_sign",
    equation="b_i += u sign(mean load - load_i)",
    source="arXiv 2408.15664, Algorithm 1; zero-mean as in Moonlight (`b += u (sign(e) - mean sign(e))`)",
)
def bias_sign(options: BiasSign, model: ModelConfig) -> Balancer:
    """Loss-Free Balancing, after every step and effective on the next.

    An overloaded expert's bias falls. `zero_mean` subtracts the mean of the increments, which changes no
    selection but keeps the biases from drifting together.
    """

    def update(seen: Seen) -> tuple[Array, None]:
        return moved(options, seen, load_sign(seen.loads, model)), None

    return Balancer(own_update=update, initial_bias=zeros)


@register(
    "bias_proportional",
    equation="b_i += u e_i; e_i = mean load - load_i",
    source="arXiv 2408.15664, Table 3 (u = 0.01 has the best balance) and Table 6 (u = 0.001 with softmax scores)",
)
def bias_proportional(options: BiasProportional, model: ModelConfig) -> Balancer:
    """Proportional rule, where e_i = mean load - load_i in the unit that `error` names.

    "relative" to the mean load, in [1 - E, 1]; a "fraction" of all copies, E times smaller; or a "count" of copies,
    which grows with the batch. The paper names no unit, but its rates of 1e-4 to 1e-2 for a batch of 2 million
    tokens leave only the relative one: by counts, an error of 10 % would move a bias by 2 or more in one step.
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

    Selection sees ratios of biases, not differences, so that `zero_mean` does change it: it holds their mean at 1.
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
    """Normalised gradient descent, with F the shares of copies, Q the targets.

    As long a step as the sign's at the same rate, so rates carry over, but an expert near its target moves little.
    Errors that are all below a millionth of the load are the rounding of float32, and move nothing.
    """

    def update(seen: Seen) -> tuple[Array, None]:
        error = relative_error(seen.loads, model)
        rms = jnp.sqrt((error**2).sum() / (seen.loads.shape[0] - model.num_zero_experts))
        return moved(options, seen, jnp.where(rms > 1e-6, error / jnp.maximum(rms, 1e-6), 0.0)), None

    return Balancer(own_update=update, initial_bias=zeros)


@register(
    "bias_pi",
    equation="b_i += mu ((K_e / K) (1 / N) - T_i / (K T_all))",
    source="arXiv 2509.01322 (LongCat-Flash), expert bias under 'computational budget control'; the P is ours",
)
def bias_pi(options: BiasPi, model: ModelConfig) -> Balancer:
    """LongCat-Flash's controller: a target share less the share had.

    N real experts are to get K_e of a token's K slots, `1 - model.zero_share` of all. The sum of such errors is the
    I of a PID controller; `gain` adds the P, gain x the last error, shaped over steps as the rate is. Own state:
    that P, float32 [E + Z]. Errors are of order 1 / N: rate / N is the rate of `bias_proportional`.
    """

    def update(seen: Seen) -> tuple[Array, Array]:
        error, last = share_error(seen.loads, model), seen.state
        factor = factor_at(options, seen.step)
        now = jnp.where(factor > 0, options.gain * factor * error, last)  # what is frozen keeps its P
        return moved(options, seen._replace(bias=seen.bias + (now - last)), error), now

    return Balancer(own_state=zeros, own_update=update, initial_bias=zeros)


@register(
    "bias_smebu",
    equation="m = beta m + (1 - beta) u (v - mean v); b += m; v_i = tanh(kappa e_i)",
    source="arXiv 2602.17004 (Arcee Trinity Large): u = 5e-4, kappa = 2, beta = 0.5",
)
def bias_smebu(options: BiasSmebu, model: ModelConfig) -> Balancer:
    """Soft-clamped momentum, e the relative error.

    Near balance the step shrinks, where a sign would chatter. Own state: the momentum of v, float32 [E + Z], in
    [-1, 1]; rate and mean are taken on the way to the bias, which is the same sum, and stands still when frozen.
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
    """Quantile balancing: no rate to choose.

    alpha is a token's (K + 1)-th biased score, the best one it did not select, so it selects expert j where
    `s_j + b_j > alpha`, or `r_j < b_j`. Balance is that of all tokens' r_j a share K / E lies below b_j. alpha depends
    on the bias, so this is one step of a descent that takes few; `damping` g goes `b <- (1 - g) b + g quantile`.

    Statistics: a histogram of r, int32 [E, N]. With scores in (0, 1), r lies in [min b - 1, max b + 1], which the
    bins divide: a quantile is exact to (max b - min b + 2) / N, 0.002 for small biases, and linear within a bin.
    A token that selects every expert has no alpha and is not counted; an expert never counted keeps its bias.
    """

    def histogram(routing: Routing) -> Int32[Array, "experts bins"]:
        return needed_bias_histogram(routing, options.bins)

    def update(seen: Seen) -> tuple[Array, None]:
        target = balanced_bias(seen.loads, seen.own, seen.bias)
        known = seen.own.sum(1) > 0
        if options.zero_mean:
            target = target - jnp.where(known, target, 0.0).sum() / jnp.maximum(known.sum(dtype=jnp.float32), 1.0)
        share = options.damping * factor_at(options, seen.step)
        return jnp.where(known, (1.0 - share) * seen.bias + share * target, seen.bias), None

    return Balancer(own_statistics=histogram, own_update=update, initial_bias=zeros)


def needed_bias_histogram(routing: Routing, bins: int) -> Int32[Array, "experts bins"]:
    """How many valid tokens would need which bias to be on the edge of selecting an expert: counts of r_tj.

    One scatter of T x E ones; the comparison with [T, S, E] is fused and never in memory.
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
    empty = jnp.zeros(num_experts * bins, jnp.int32)
    place = jnp.where(counted, place, len(empty))  # one past the end, which is dropped
    return empty.at[place].add(1, mode="drop", wrap_negative_indices=False).reshape(num_experts, bins)


def balanced_bias(
    loads: Int32[Array, "experts"], counts: Int32[Array, "experts bins"], bias: Float32[Array, "experts"]
) -> Float32[Array, "experts"]:
    """The bias below which each expert's histogram has the mean load: exact ranks, linear within the bin."""
    total, num_experts = loads.sum(dtype=jnp.int32), loads.shape[0]
    rank, rest = jnp.divmod(total, num_experts)  # the mean load, K / E of all tokens, without rounding
    below = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    place = (below >= rank + (rest > 0).astype(jnp.int32)).argmax(1)[:, None].astype(jnp.int32)
    in_bin = jnp.take_along_axis(counts, place, axis=1)
    whole = rank - (jnp.take_along_axis(below, place, axis=1) - in_bin)
    wanted = whole.astype(jnp.float32) + rest.astype(jnp.float32) / num_experts
    within = wanted / jnp.maximum(in_bin, 1).astype(jnp.float32)
    low, width = bin_range(bias, counts.shape[1])
    return (low + width * (place.astype(jnp.float32) + within))[:, 0]


def bin_range(bias: Float32[Array, "experts"], bins: int) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Where the histogram of `bias` starts, and how wide a bin is."""
    return bias.min() - 1.0, (bias.max() - bias.min() + 2.0) / bins


def moved(options: BiasOptions, seen: Seen, direction: Float32[Array, "experts"]) -> Float32[Array, "experts"]:
    """The bias after an increment of `rate x direction`, the rate shaped over steps, centred under `zero_mean`."""
    increment = jnp.float32(options.rate) * factor_at(options, seen.step) * direction
    return seen.bias + (increment - increment.mean() if options.zero_mean else increment)


def load_sign(loads: Shaped[Array, "experts"], model: ModelConfig = ModelConfig()) -> Float32[Array, "experts"]:
    """sign(target - load): -1 overloaded, +1 underloaded, 0 exactly at it, and for zero-computation experts.

    By integer arithmetic alone where loads are integers: float32 cannot tell 2^25 from 2^25 + 1, and E x load
    overflows int32 at the batch of DeepSeek-V3; a quotient and a remainder do neither. Loads sum to less than 2^31.
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
    """How many copies each expert is to have, float32 [E + Z]."""
    total = _total(loads)
    zero = model.num_zero_experts
    real = loads.shape[0] - zero
    if not zero:
        return jnp.full(real, total / real)
    share = model.zero_share
    return jnp.where(jnp.arange(real + zero) < real, total * (1.0 - share) / real, total * share / zero)


def relative_error(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """(target - load) / target for the real experts, 1 for one without load; 0 for zero-computation experts."""
    target = target_loads(loads, model)
    return jnp.where(target > 0, copies_error(loads, model) / jnp.where(target > 0, target, 1.0), 0.0)


def copies_error(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """target - load in copies; 0 for zero-computation experts."""
    real = jnp.arange(loads.shape[0]) < loads.shape[0] - model.num_zero_experts
    return jnp.where(real, target_loads(loads, model) - loads.astype(jnp.float32), 0.0)


def share_error(loads: Shaped[Array, "experts"], model: ModelConfig) -> Float32[Array, "experts"]:
    """The target's share of all copies less the load's; 0 for zero-computation experts."""
    return copies_error(loads, model) / jnp.maximum(_total(loads), 1.0)


def _total(loads: Shaped[Array, "experts"]) -> Float32[Array, ""]:
    """All copies; counts are summed as the integers they are."""
    counts = jnp.issubdtype(loads.dtype, jnp.integer)
    return loads.sum(dtype=jnp.int32 if counts else jnp.float32).astype(jnp.float32)


def _part(total: Array, share: float) -> Array:
    """A share, in parts of 2^15, of an int32 below 2^31, without overflow."""
    parts = round(2**15 * share)
    return total // 2**15 * parts + total % 2**15 * parts // 2**15
