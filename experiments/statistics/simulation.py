"""`python -m experiments.statistics.simulation`: which intervals are honest, by branched sweeps of known effects.

An interval is honest if at least 95 % of such sweeps give one that contains the true value, within the error of the
simulation. Seeds are fixed, so that the table is the same every time. With --alternatives the table also has the
intervals that reports do not offer (the mixed model only where statsmodels is installed).

Standard deviations are in bits per byte, and of the size that small models show: whole runs differ by 0.02, branches of
one trunk by a few thousandths.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from .alternatives import ALTERNATIVES, Alternative, Ends, ends
from .blocks import Branch, Values, effect, effect_on, favour, switching_cost

METHODS = ("none", "aux_loss", "bias_sign")  # of trunks and arms
ARM, BASELINE = "bias_sign", "none"
LEVELS = (0.010, 0.002, 0.0)  # what the trunks of each method leave behind
EFFECTS = (0.0, 0.001, -0.002)  # of each arm, on every trunk
OWN = -0.003  # what an arm gains on a trunk of its own method
TRUTH = {
    "effect": EFFECTS[2] - EFFECTS[0],  # what arm and baseline gain on their own trunks cancels in the mean
    "effect on one trunk": EFFECTS[2] - EFFECTS[0] - OWN,  # on the baseline's trunk, where the baseline gains OWN
    "favour": OWN - (0.0 - OWN) / 2,  # D on the own trunk has OWN, on the baseline's -OWN, on the third neither
    "switching cost": (LEVELS[0] + LEVELS[1]) / 2 - LEVELS[2] - OWN,
}


class Scenario(NamedTuple):
    """A branched sweep: its size, the standard deviation of each random part, and what goes wrong.

    Attributes:
        seed: of a trunk seed, shared by its trunks of all methods.
        trunk: of a trunk; the same for all its branches.
        suits: how much better a trunk suits one arm than another.
        block: the same, shared by all trunks of a trunk seed.
        data: of a data seed, shared by all arms.
        order: how much better a data seed suits one arm than another, on every trunk.
        noise: of a branch.
        shared: all trunk seeds have the same data seeds.
        missing: the share of branches that are missing, at random; half as large a share of trunks is missing whole.
        heavy: the random parts of branches have heavy tails (Student's t with 3 degrees of freedom).
    """

    trunk_seeds: int = 5
    data_seeds: int = 2
    seed: float = 0.01
    trunk: float = 0.015
    suits: float = 0.002
    block: float = 0.001
    data: float = 0.004
    order: float = 0.0
    noise: float = 0.002
    shared: bool = False
    missing: float = 0.0
    heavy: bool = False


SCENARIOS = {
    "3 trunk seeds x 2 data seeds": Scenario(trunk_seeds=3),
    "5 trunk seeds x 2": Scenario(),
    "8 trunk seeds x 3": Scenario(trunk_seeds=8, data_seeds=3),
    "5 x 2, no trunk suits any arm": Scenario(suits=0.0, block=0.0),
    "5 x 2, trunks suit arms strongly": Scenario(suits=0.006, block=0.004),
    "5 x 3, one branch of 10 missing": Scenario(data_seeds=3, missing=0.1),
    "5 x 2, heavy tails": Scenario(heavy=True),
    "5 x 2, data orders suit arms": Scenario(order=0.002),
    "5 x 2, the same for all trunk seeds": Scenario(order=0.002, shared=True),
}


def draw(scenario: Scenario, generator: np.random.Generator) -> dict[Branch, float]:
    """The numbers of one branched sweep with the effects of `TRUTH`, in bits per byte."""
    m, s, a, d = len(METHODS), scenario.trunk_seeds, len(METHODS), scenario.data_seeds
    normal = generator.standard_normal

    def local(size: tuple[int, ...]) -> np.ndarray:
        return generator.standard_t(3, size) / math.sqrt(3) if scenario.heavy else normal(size)

    per_data = (1, 1 if scenario.shared else s, 1, d)
    y = 1.5 + np.asarray(LEVELS).reshape(m, 1, 1, 1) + np.asarray(EFFECTS).reshape(1, 1, a, 1)
    y = y + OWN * np.eye(m).reshape(m, 1, a, 1)
    y = y + scenario.seed * normal((1, s, 1, 1)) + scenario.trunk * normal((m, s, 1, 1))
    y = y + scenario.suits * local((m, s, a, 1)) + scenario.block * local((1, s, a, 1))
    y = y + scenario.data * normal(per_data)
    y = y + scenario.order * normal((per_data[0], per_data[1], a, d))
    y = y + scenario.noise * local((m, s, a, d))
    gone = (generator.random(y.shape) < scenario.missing) | (generator.random((m, s, 1, 1)) < scenario.missing / 2)
    first = 0 if scenario.shared else 1000
    return {
        Branch(METHODS[i], j, METHODS[k], first * j + n): float(y[i, j, k, n])
        for i, j, k, n in np.ndindex(y.shape)
        if not gone[i, j, k, n]
    }


OFFERED: dict[str, Callable[[Values], Ends]] = {
    "effect": lambda values: ends(effect(values, ARM, BASELINE).interval),
    "effect on one trunk": lambda values: ends(effect_on(values, ARM, BASELINE, BASELINE).interval),
    "favour": lambda values: ends(favour(values, ARM, BASELINE).interval),
    "switching cost": lambda values: ends(switching_cost(values, ARM).interval),
}


class Honesty(NamedTuple):
    """Of an interval in simulated sweeps: the share that contains the true value, 0 to 1, and the median width."""

    coverage: float
    width: float


def honesty(
    scenario: Scenario, intervals: Mapping[str, Callable[[Values], Ends]], truth: Mapping[str, float], rounds: int
) -> dict[str, Honesty]:
    """How often each interval contains its true value, and how wide it is.

    Args:
        scenario: how the numbers of a sweep are drawn.
        intervals: name -> function of the numbers; ends that are not finite, for lack of blocks, are not counted.
        truth: name -> true value.
        rounds: number of sweeps; the standard error of a coverage of 0.95 is 0.22 / sqrt(rounds).
    """
    found: dict[str, list[Ends]] = {name: [] for name in intervals}
    for round_ in range(rounds):
        values = draw(scenario, np.random.default_rng(round_))
        for name, function in intervals.items():
            low, high = function(values)
            if math.isfinite(high - low):
                found[name].append((low, high))
    kept = {name: np.asarray(pairs).reshape(-1, 2) for name, pairs in found.items()}
    return {
        name: Honesty(_covers(pairs, truth[name]), float(np.median(np.ptp(pairs, 1)))) for name, pairs in kept.items()
    }


def _covers(pairs: np.ndarray, truth: float) -> float:
    return float(((pairs[:, 0] <= truth) & (truth <= pairs[:, 1])).mean())


def table(rounds: int, alternatives: bool) -> list[list[str]]:
    """Rows of text: a heading, then scenario by scenario each interval's coverage in percent, and relative widths."""
    intervals, truth = dict(OFFERED), dict(TRUTH)
    if alternatives:
        intervals |= {name: _seeded(function) for name, function in ALTERNATIVES.items()}
        truth |= dict.fromkeys(ALTERNATIVES, truth["effect"])
        there = importlib.util.find_spec("statsmodels") is not None
        kept = [name for name in ("effect", *ALTERNATIVES) if there or "mixed" not in name]
        intervals = {name: intervals[name] for name in kept}
    rows = [["branched sweep", *intervals]]
    for name, scenario in SCENARIOS.items():
        found = honesty(scenario, intervals, truth, rounds)
        relative = [f" ({one.width / found['effect'].width:.2f})" if alternatives else "" for one in found.values()]
        rows.append([name, *(f"{100 * one.coverage:.1f}{w}" for one, w in zip(found.values(), relative, strict=True))])
    return rows


def _seeded(function: Alternative) -> Callable[[Values], Ends]:
    generator = np.random.default_rng(0)
    return lambda values: function(values, ARM, BASELINE, generator)


def main(argv: list[str] | None = None) -> None:
    """Print the coverage of the intervals in each scenario as a table in Markdown."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4000, help="simulated sweeps per scenario (4000)")
    parser.add_argument("--alternatives", action="store_true", help="the intervals that reports do not offer, instead")
    options = parser.parse_args(argv)
    heading, *rows = table(options.rounds, options.alternatives)
    widths = "; in brackets the median width, relative to the effect's" * options.alternatives
    print(f"Share of {options.rounds} sweeps whose 95 % interval contains the true value, in percent{widths}:\n")
    for row in (heading, ["---"] * len(heading), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
