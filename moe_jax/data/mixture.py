"""Which domain supplies each row of the batches, by exact shares."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

# grain does arithmetic on the length, so "endless" must stay well inside 64 bits
_ENDLESS = 2**60


class Interleave:
    """k -> (domain, index in the domain) of element k: grain's selection map, with exact shares.

    Of the first k elements, ceil(k * share / total) come from the first domain; the others divide the rest in the same
    way. So of every `total` elements each domain supplies exactly its share. (`MapDataset.mix` does the same after
    rounding weights to about 1 %, which would repeat some windows before others were seen.)
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = shares

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> tuple[int, int]:
        rest = sum(self._shares)
        for domain, share in enumerate(self._shares):
            before = ceil_divide(k * share, rest)  # elements of this domain among the first k
            if ceil_divide((k + 1) * share, rest) > before:
                return domain, before
            k -= before
            rest -= share
        raise AssertionError("the last domain supplies whatever is left")


def shares_of(domains: Sequence[str], weights: Mapping[str, float]) -> list[int]:
    """Integer shares of the domains, exactly proportional to the weights as written in decimal.

    Raises:
        ValueError: as `check_weights`.
    """
    check_weights(domains, weights)
    fractions = [Fraction(repr(float(weights[domain]))) for domain in domains]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def check_weights(domains: Sequence[str], weights: Mapping[str, float]) -> None:
    """Raises a ValueError unless `weights` names every domain, and no other, with a share of 0 or more."""
    names = f"the domains are {', '.join(domains)}"
    for domain, weight in weights.items():
        if domain not in domains:
            raise ValueError(f"data.weights has {domain}={weight}, but the corpus has no such domain; {names}.")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"data.weights.{domain}={weight!r} must be a finite number of at least 0.")
    missing = [domain for domain in domains if domain not in weights]
    if missing:
        raise ValueError(
            f"data.weights does not name {missing[0]} and must name every domain ({names}); give 0 to leave one out."
        )
    if not any(weights.values()):
        raise ValueError(f"data.weights are all 0 and at least one must be positive; {names}.")


def ceil_divide(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b
