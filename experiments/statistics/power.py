"""How many seeds resolve a difference: the power of the two-sided t-test of paired differences at 95 %.

A difference is resolved by n seeds (or blocks) if the 95 % t-interval excludes 0 in 80 % of such sweeps. Source:
the noncentral t distribution, as in J. Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988.
"""

import math

from .intervals import t_quantile

POWER = 0.8
MOST = 100_000  # seeds; above this a number is not given


def power(n: int, difference: float, sd: float) -> float:
    """The probability that the 95 % t-interval of n paired differences excludes 0.

    Args:
        n: number of differences, at least 2.
        difference: the true mean difference.
        sd: standard deviation of the differences, same unit, at least 0.
    """
    from scipy import stats

    if sd == 0:
        return float(difference != 0)
    shift = abs(difference) / sd * math.sqrt(n)
    limit = t_quantile(n)
    # beyond a shift of 5 the other tail is below 1e-8, and scipy computes it as nan here and there
    other = float(stats.nct.cdf(-limit, n - 1, shift)) if shift < 5 else 0.0
    return float(stats.nct.sf(limit, n - 1, shift)) + other


def needed(difference: float, sd: float) -> int | None:
    """The smallest number of paired differences that resolves a difference; None if above `MOST` or sd is not known."""
    if not math.isfinite(sd) or difference == 0:
        return None
    low, high = 1, 2  # power(low) is too small, power(high) suffices
    while power(high, difference, sd) < POWER:
        low, high = high, 2 * high
        if low >= MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, difference, sd) >= POWER else (middle, high)
    return high if high <= MOST else None


def smallest(n: int, sd: float) -> float:
    """The smallest true difference that n paired differences resolve; nan if n is below 2 or sd is not known."""
    from scipy import optimize

    if n < 2 or not math.isfinite(sd):
        return math.nan
    if sd == 0:
        return 0.0
    high = 1.0
    while power(n, high, 1.0) < POWER:
        high *= 2
    return sd * float(optimize.brentq(lambda size: power(n, size, 1.0) - POWER, 0.0, high))
