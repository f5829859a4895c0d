"""Claims 1 to 7: no balancing, the auxiliary loss and the bias, and the rules that move it."""

import math
from collections.abc import Iterable

from ..report.numbers import last, tail
from . import measures as m
from .arms import RULES, WEIGHTS
from .claims import SMALL, Claim, Published, above, below, within
from .measures import BALANCE, QUALITY, Measure, effect, level, log

LFB = "Loss-Free Balancing (2408.15664)"
INTERFERENCE = tail("interference/router_ratio")  # gradient norm of balancing over that of the language model
VIOLATION = "max violation"
RATIO = "log of the ratio of max violations"
GRADIENTS = "ratio of gradient norms at the router"
RANKS = "rank correlation"


def loss(arm: str, baseline: str) -> Measure:
    """The difference in loss of two arms."""
    return effect("arms", arm, baseline, last(QUALITY))


def violation(arm: str, baseline: str) -> Measure:
    """The log of the ratio of two arms' max violations on held-out text."""
    return effect("arms", arm, baseline, log(last(BALANCE)))


def levels(arms: Iterable[str], number: m.Number) -> dict[str, Measure]:
    """A number of each arm."""
    return {arm: level("arms", arm, number) for arm in arms}


def better(number: str, rule: str, source: str, published: str = "") -> Claim:
    """The claim that a rule balances better than the sign rule."""
    text = f"The rule {rule} has a smaller max violation than the sign rule."
    return Claim(
        number,
        text,
        Published(source, published),
        violation(rule, "sign"),
        below(unit=RATIO),
    )


CLAIMS = (
    Claim(
        "1a",
        "Trained without balancing, the load is uneven: some expert has more than twice the mean.",
        Published(LFB),
        level("systems", "unbalanced", last(BALANCE)),
        above(1.0, unit=VIOLATION),
    ),
    Claim(
        "1b",
        "Trained without balancing, experts die: some get no token of the held-out text.",
        Published(LFB),
        level("systems", "unbalanced", last("eval/dead_experts")),
        above(unit="experts"),
    ),
    Claim(
        "2a",
        "The bias has less than half the max violation of the auxiliary loss at 1e-3.",
        Published(f"{LFB}, Table 2", "0.04 against 0.72"),
        violation("bias", "aux_1e-3"),
        below(math.log(0.5), unit=RATIO),
    ),
    Claim(
        "2b",
        "The bias has a smaller max violation than the auxiliary loss at 1e-2.",
        Published(f"{LFB}, Figure 2"),
        violation("bias", "aux_1e-2"),
        below(unit=RATIO),
    ),
    Claim(
        "3a",
        "A larger weight of the auxiliary loss raises the loss: 1e-1 against 1e-3.",
        Published(f"{LFB}, Figure 2"),
        loss("aux_1e-1", "aux_1e-3"),
        above(),
    ),
    Claim(
        "3b",
        "A larger weight lowers max violation: 1e-1 against 1e-3.",
        Published(f"{LFB}, Figure 2"),
        violation("aux_1e-1", "aux_1e-3"),
        below(unit=RATIO),
    ),
    Claim(
        "3c",
        "The bias has a lower loss than the auxiliary loss at 1e-2.",
        Published(f"{LFB}, Table 2, at 1e-3", "perplexity 9.50 against 9.56, which is -0.006 nats"),
        loss("bias", "aux_1e-2"),
        below(),
    ),
    Claim(
        "3d",
        "The bias has a lower loss than no balancing.",
        Published("this project, a pilot", "-0.0024 bits per byte"),
        loss("bias", "none"),
        below(),
    ),
    Claim(
        "3e",
        "A rate of 1e-4 is too small: its max violation is above that of 5e-3.",
        Published(f"{LFB}, Figure 4"),
        violation("bias_1e-4", "bias"),
        above(unit=RATIO),
    ),
    Claim(
        "3f",
        "A rate of 1e-1 is too large: its max violation is above that of 5e-3.",
        Published(f"{LFB}, Figure 4"),
        violation("bias_1e-1", "bias"),
        above(unit=RATIO),
    ),
    Claim(
        "3g",
        "A rate that is too large raises the loss: 1e-1 against 5e-3.",
        Published(f"{LFB}, Figure 4", "perplexity 9.51 at 1e-2 against 9.50 at 1e-3"),
        loss("bias_1e-1", "bias"),
        above(),
    ),
    Claim(
        "4a",
        "With its weight adjusted to the bias's max violation, the auxiliary loss has a higher loss.",
        Published(f"{LFB}, Figure 2"),
        loss("aux_as_bias", "bias"),
        above(),
    ),
    Claim(
        "4b",
        "At 1e-1, where it balances about as well as the bias, the auxiliary loss has a higher loss.",
        Published(f"{LFB}, Figure 2"),
        loss("aux_1e-1", "bias"),
        above(),
    ),
    Claim(
        "4c",
        "A trunk favours the method that trained it: the bias against the auxiliary loss at 1e-2.",
        Published("this project, a pilot", "-0.001 bits per byte"),
        m.favour("arms", "bias", "aux_1e-2", last(QUALITY)),
        below(),
    ),
    Claim(
        "5a",
        "The balancing gradient grows with the weight, here tenfold or more from 1e-3 to 1e-1.",
        Published(f"{LFB}, section 3"),
        effect("arms", "aux_1e-1", "aux_1e-3", log(INTERFERENCE)),
        above(math.log(10.0), unit=f"log of the quotient of the {GRADIENTS}"),
    ),
    Claim(
        "5b",
        "The bias has no balancing gradient.",
        Published(f"{LFB}, section 3", "0"),
        level("arms", "bias", INTERFERENCE),
        within(1e-12, unit=GRADIENTS),
    ),
    Claim(
        "5c",
        "Interference predicts the loss: over four weights, both have the same order.",
        Published("this project"),
        m.rank_correlation(levels(WEIGHTS, INTERFERENCE), levels(WEIGHTS, last(QUALITY))),
        above(unit=RANKS),
    ),
    better("6a", "proportional", f"{LFB}, Table 3", "0.028 against 0.044"),
    Claim(
        "6b",
        "The proportional rule has the loss of the sign rule.",
        Published(f"{LFB}, Table 3", "perplexity 9.53 against 9.50"),
        loss("proportional", "sign"),
        within(SMALL),
    ),
    better("6c", "rms", "Su, kexue.fm/archives/10757"),
    better("6d", "pi", "LongCat-Flash (2509.01322)"),
    better("6e", "smebu", "Trinity (2602.17004)"),
    better("6f", "quantile", "Su, kexue.fm/archives/11619"),
    Claim(
        "6g",
        "The order of the rules' max violations is that of the simulator.",
        Published("this project"),
        m.rank_correlation(
            {arm: m.constant(value, level("arms", arm, last(BALANCE))) for arm, value in RULES.items()},
            levels(RULES, last(BALANCE)),
        ),
        above(unit=RANKS),
    ),
    Claim(
        "7a",
        "A multiplicative bias has the loss of an additive one.",
        Published(f"{LFB}, Table 4", "perplexity 9.52 against 9.50"),
        loss("multiplicative", "sign"),
        within(SMALL),
    ),
    Claim(
        "7b",
        "A multiplicative bias has the max violation of an additive one, within a third.",
        Published(f"{LFB}, Table 4", "0.041 against 0.044"),
        violation("multiplicative", "sign"),
        within(math.log(4 / 3), unit=RATIO),
    ),
)
