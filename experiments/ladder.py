"""`python -m experiments.ladder DIR [--json=FILE]`: fit a ladder of models, and check the next rung against the fit.

DIR is a sweep of models of several sizes, with experts and without, as of `configs/ablation/ladder.py`. For each kind a
line is fitted to the logarithms of held-out bits per byte and of the run's FLOPs, without the largest size, which it
then predicts with the 95 % interval of a single run. A line has no irreducible loss, so over a wide range the truth
lies above it; a rung outside the interval says so.

Then the two kinds are compared: paired by size and seed, which have equal FLOPs; and at equal time, where the line of
the dense runs over their seconds of training is read off at the seconds of each run with experts.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_jax.config import validate
from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of
from moe_jax.runtime.files import output_of, write_json

from .report import read_sweep
from .report.columns import QUALITY
from .report.numbers import for_programs, typical
from .report.sweep import Run, Sweep
from .statistics.intervals import CONFIDENCE, Interval, interval, t_quantile

if TYPE_CHECKING:
    from rich.console import Console

SPEED = typical("tokens_per_second")


class Rung(NamedTuple):
    """One run. bits: held-out bits per byte. flops, seconds: of the whole training, the latter at its typical speed."""

    kind: str
    arm: str
    seed: int
    bits: float
    flops: float
    seconds: float


class Line(NamedTuple):
    """log bits = intercept + slope x log FLOPs (or seconds), by least squares over n runs.

    half: of the slope's 95 % interval; None with fewer than three runs.
    """

    intercept: float
    slope: float
    half: float | None
    x: np.ndarray
    deviation: float

    def at(self, value: float) -> float:
        """Bits per byte at some FLOPs or seconds."""
        return math.exp(self.intercept + self.slope * math.log(value))

    def limits(self, value: float) -> tuple[float, float]:
        """The 95 % interval of a single run there; nan with fewer than three runs."""
        if self.half is None:
            return math.nan, math.nan
        away = math.log(value) - self.x.mean()
        spread = self.deviation * math.sqrt(1 + 1 / len(self.x) + away**2 / ((self.x - self.x.mean()) ** 2).sum())
        factor = math.exp(t_quantile(len(self.x) - 1) * spread)
        return self.at(value) / factor, self.at(value) * factor


class Prediction(NamedTuple):
    """The largest size of a kind. low, high: 95 % interval of a single run. measured: its runs' bits per byte."""

    kind: str
    arm: str
    line: Line
    predicted: float
    low: float
    high: float
    measured: Interval


class Comparison(NamedTuple):
    """Bits per byte with experts minus dense, over seeds: at a size's equal FLOPs, and at equal seconds."""

    arm: str
    other: str
    equal_flops: Interval
    equal_time: Interval


# --- arithmetic ---------------------------------------------------------------------------------------------


def rungs(sweep: Sweep) -> list[Rung]:
    """Every finished run of the sweep."""
    return [_rung(run) for run in sweep.finished]


def _rung(run: Run) -> Rung:
    from moe_jax.model.cost import train_flops

    config = validate(run.config)
    tokens = config.num_steps * config.batch_size * config.sequence_length
    kind = "experts" if config.model.num_experts else "dense"
    return Rung(kind, run.arm, run.seed, QUALITY.of(run), train_flops(config) * tokens, tokens / SPEED(run))


def line(x: Iterable[float], bits: Iterable[float]) -> Line:
    """Fit a line to logarithms."""
    from scipy import stats

    xs, ys = (np.log(np.asarray(list(values), np.float64)) for values in (x, bits))
    fit = stats.linregress(xs, ys)
    free = len(xs) - 2
    if free < 1:
        return Line(float(fit.intercept), float(fit.slope), None, xs, math.nan)
    residuals = ys - fit.intercept - fit.slope * xs
    deviation = math.sqrt(float((residuals**2).sum()) / free)
    return Line(float(fit.intercept), float(fit.slope), t_quantile(free + 1) * float(fit.stderr), xs, deviation)


def predictions(found: list[Rung]) -> list[Prediction]:
    """For each kind its largest size, predicted from the others.

    Raises:
        ValueError: a kind has fewer than three sizes.
    """
    predicted = []
    for kind, sizes in _by_size(found).items():
        *smaller, largest = sizes.values()
        if len(smaller) < 2:
            raise ValueError(
                f"DIR has finished {kind} models of {len(sizes)} sizes, and a fit and a prediction need three; "
                "train the others."
            )
        of_fit = [rung for runs in smaller for rung in runs]
        fitted = line((rung.flops for rung in of_fit), (rung.bits for rung in of_fit))
        flops = largest[0].flops
        low, high = fitted.limits(flops)
        measured = interval(rung.bits for rung in largest)
        predicted.append(Prediction(kind, largest[0].arm, fitted, fitted.at(flops), low, high, measured))
    return predicted


def comparisons(found: list[Rung]) -> list[Comparison]:
    """For each size of the models with experts, the dense model of the same rank; none without both kinds."""
    by_size = _by_size(found)
    if len(by_size) < 2:
        return []
    dense = [rung for runs in by_size["dense"].values() for rung in runs]
    over_time = line((rung.seconds for rung in dense), (rung.bits for rung in dense))
    compared = []
    for sparse, other in zip(by_size["experts"].values(), by_size["dense"].values(), strict=False):
        bits = {rung.seed: rung.bits for rung in other}
        equal_flops = interval(rung.bits - bits[rung.seed] for rung in sparse if rung.seed in bits)
        equal_time = interval(rung.bits - over_time.at(rung.seconds) for rung in sparse)
        compared.append(Comparison(sparse[0].arm, other[0].arm, equal_flops, equal_time))
    return compared


def _by_size(found: list[Rung]) -> dict[str, dict[str, list[Rung]]]:
    """kind -> arm -> its runs with finite numbers, from the smallest FLOPs to the largest."""
    kinds: dict[str, dict[str, list[Rung]]] = defaultdict(lambda: defaultdict(list))
    for rung in sorted(found, key=lambda rung: (rung.kind, rung.flops, rung.seed)):
        if all(map(math.isfinite, (rung.bits, rung.flops, rung.seconds))):
            kinds[rung.kind][rung.arm].append(rung)
    return kinds


# --- output -------------------------------------------------------------------------------------------------


def print_all(predicted: list[Prediction], compared: list[Comparison], console: "Console") -> None:
    """Print a table of the fits, and one of the comparisons if there are any."""
    from rich.table import Table

    table = Table(title="the largest size, predicted from the smaller ones: bits per byte, held out")
    for header in ("kind", "exponent of FLOPs", "size", "predicted", "95 % of single runs", "measured", ""):
        table.add_column(header, justify="left" if header in ("kind", "size", "") else "right", overflow="fold")
    for one in predicted:
        half = "" if one.line.half is None else f" ± {one.line.half:.4f}"
        inside = "inside" if one.low <= one.measured.mean <= one.high else "outside"
        limits = f"{one.low:.4f} to {one.high:.4f}"
        numbers = (f"{one.line.slope:.4f}{half}", one.arm, f"{one.predicted:.4f}", limits, _shown(one.measured))
        table.add_row(one.kind, *numbers, inside)
    console.print(table)
    if not compared:
        return
    table = Table(title="with experts minus dense: bits per byte, held out")
    for header in ("with experts", "dense", "at equal FLOPs", "at equal time"):
        table.add_column(header, justify="left" if header in ("with experts", "dense") else "right", overflow="fold")
    for pair in compared:
        table.add_row(pair.arm, pair.other, _shown(pair.equal_flops, "+"), _shown(pair.equal_time, "+"))
    console.print(table)


def _shown(value: Interval, sign: str = "") -> str:
    if not value.n:
        return "-"
    return f"{value.mean:{sign}.4f}" + ("" if value.half is None else f" ± {value.half:.4f}")


def as_json(predicted: list[Prediction], compared: list[Comparison]) -> dict[str, Any]:
    """The same numbers for programs; null for a number that is not known."""

    fits = [
        {
            "kind": one.kind,
            "size": one.arm,
            "exponent": {"mean": one.line.slope, "half": one.line.half, "n": len(one.line.x)},
            "predicted": one.predicted,
            "low": one.low,
            "high": one.high,
            "measured": one.measured._asdict(),
        }
        for one in predicted
    ]
    pairs = [
        {
            "experts": one.arm,
            "dense": one.other,
            "equal_flops": one.equal_flops._asdict(),
            "equal_time": one.equal_time._asdict(),
        }
        for one in compared
    ]
    numbers = {"measure": QUALITY.title, "confidence": CONFIDENCE, "predictions": fits, "comparisons": pairs}
    return for_programs(numbers)


def main(argv: list[str] | None = None) -> None:
    """Run the command. Bad input ends it with a sentence on standard error and status 2."""
    from rich.console import Console

    options = _parser().parse_args(argv)
    print_any_name()
    try:
        directory = path_of(options.directory, "DIR")
        output = output_of(options.json, "--json") if options.json else None
        sweep = read_sweep(directory)
        found = rungs(sweep)
        predicted, compared = predictions(found), comparisons(found)
        if not predicted:
            raise ValueError(f"DIR={directory} has no finished run; train the sweep first.")
        if output is not None:
            write_json(output, as_json(predicted, compared))
    except (ValueError, OSError) as error:
        fail(str(error))
    console = Console(width=140)
    for problem in sweep.problems:
        console.print(problem)
    print_all(predicted, compared, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.ladder",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="folder with sweep.json and the runs")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to a file")
    return parser


if __name__ == "__main__":
    main()
