"""The answer of a sweep in a few sentences, each of which states no more than its interval allows."""

import math

from ..statistics.intervals import Interval
from .columns import BALANCE, QUALITY, Measured, measure, show
from .sweep import Run, Sweep, planned_steps

ONE_SEED = " One seed has no interval (n/a): its difference is a single observation, not a result."


def answer(sweep: Sweep) -> dict[str, str]:
    """The sweep's result: "Balance", "Quality" and "Certainty", a few sentences each, plain text.

    Args:
        sweep: must have at least one finished run.
    """
    quality = measure(sweep, QUALITY)
    return {
        "Balance": _balance(sweep),
        "Quality": _quality(sweep, quality),
        "Certainty": _certainty(sweep, quality),
    }


def _balance(sweep: Sweep) -> str:
    found = _comparison(sweep, measure(sweep, BALANCE), BALANCE.digits)
    return "Held-out max violation, where 0 is perfectly even: " + found


def _quality(sweep: Sweep, measured: dict[str, Measured]) -> str:
    text = "Held-out bits per byte, where lower is better: " + _comparison(sweep, measured, QUALITY.digits)
    intervals = [one.difference for one in measured.values() if one.difference.half is not None]
    if intervals and not any(value.excludes_zero and value.mean < 0 for value in intervals):
        text += f" No arm is shown to be better than {sweep.baseline}."
    return text


def _comparison(sweep: Sweep, measured: dict[str, Measured], digits: int) -> str:
    """One sentence that groups the arms by the verdict that their paired intervals allow."""
    groups: dict[str, list[str]] = {}
    for arm, (value, difference) in measured.items():
        if arm != sweep.baseline:
            text = f"{arm} ({_numbers(value, difference, digits)})" if value.n else arm
            groups.setdefault(_verdict(sweep.baseline, value, difference), []).append(text)
    base = measured[sweep.baseline].value
    parts = [f"{sweep.baseline} has {show(base, digits)}" if base.n else f"{sweep.baseline} has no value"]
    parts += [f"{verdict} {_listed(arms)}" for verdict, arms in groups.items()]
    return "; ".join(parts) + "."


def _verdict(baseline: str, value: Interval, difference: Interval) -> str:
    if value.n == 0:
        return "no value for"
    if difference.n == 0:
        return f"no seed in common with {baseline} for"
    if difference.half is None:
        return "one seed, so no interval, for"
    if not difference.excludes_zero:
        return f"not distinguishable from {baseline}:"
    return f"lower than {baseline}:" if difference.mean < 0 else f"higher than {baseline}:"


def _numbers(value: Interval, difference: Interval, digits: int) -> str:
    if difference.n == 0:
        return show(value, digits)
    return f"{value.mean:,.{digits}f}, difference {show(difference, digits, signed=True).removesuffix(' *')}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _certainty(sweep: Sweep, measured: dict[str, Measured]) -> str:
    pairs = {arm: one.difference.n for arm, one in measured.items() if arm != sweep.baseline}
    counts = set(pairs.values())
    if not pairs:
        n = len(sweep.runs[sweep.baseline])
        return f"There is one arm with {seeds_text(n)}, so nothing is compared." + (ONE_SEED if n == 1 else "")
    if counts == {0}:
        return f"No arm has a finished seed in common with {sweep.baseline}, so no difference is given."
    number = _listed([f"{seeds_text(n)} ({arm})" for arm, n in pairs.items()])
    if len(counts) == 1:
        number = seeds_text(counts.pop())
    text = f"Differences are arm minus {sweep.baseline}, paired by seed over {number}."
    if max(pairs.values()) > 1:
        text += " ± is the half-width of the 95 % t-interval over seeds."
    return text + (ONE_SEED if 1 in pairs.values() else "")


def seeds_text(n: int) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} seed" if n == 1 else f"{n} seeds"


# --- remarks and limits ---------------------------------------------------------------------------------


def remarks(sweep: Sweep) -> list[str]:
    """Sentences about irregularities: runs not counted, unequal lengths, steps skipped or undone, dropped tokens."""
    found = list(sweep.problems) + _unequal_lengths(sweep)
    for run in sweep.finished:
        name = f"{run.arm}, seed {run.seed}"
        outliers = _largest(run, "outliers")
        if (broken := _largest(run, "skipped") - outliers) > 0:
            found.append(f"{name}: {broken:g} steps skipped, because loss, gradient or update was not finite.")
        if outliers > 0:
            found.append(f"{name}: {outliers:g} steps skipped, because loss or gradient was an outlier.")
        for back in run.info.get("rollbacks", []):
            found.append(f"{name}: went back from step {back['at']} to {back['to']}, and on with other batches.")
        if _largest(run, "moe/dropped") > 0:
            found.append(f"{name}: tokens were dropped (moe/dropped is above 0).")
    return found


def _unequal_lengths(sweep: Sweep) -> list[str]:
    """A sentence if the arms were trained for different numbers of steps."""
    planned = {arm: {planned_steps(run.config) for run in runs.values()} for arm, runs in sweep.runs.items() if runs}
    if len(set().union(*planned.values())) < 2:
        return []
    lengths = ", ".join(f"{arm} {' or '.join(map(str, sorted(map(str, steps))))}" for arm, steps in planned.items())
    return [f"The arms plan different numbers of steps ({lengths}); each is compared at its own end."]


def _largest(run: Run, key: str) -> float:
    _, values = run.curve(key)
    return max((float(value) for value in values if math.isfinite(value)), default=0.0)


def limits(sweep: Sweep) -> dict[str, str]:
    """What the report does not show: subject -> a sentence or two."""
    finished = max(len(runs) for runs in sweep.runs.values())
    pairs = [one for one in measure(sweep, QUALITY).values() if one.difference.n]
    found = {
        "Scale": "this is one model, one data set and one length of training, as given below. An order of arms at "
        "this size may change with more experts, more steps or more data.",
        "Seeds": f"at most {seeds_text(finished)} per arm. With few seeds the t-interval is wide, and cannot show an "
        "effect smaller than its half-width: not distinguishable does not mean equal.",
        "Spread": "the intervals hold only for other seeds of this setting. They do not cover other settings, or "
        "arms whose options were not tuned equally well.",
        "Many comparisons": f"{len(pairs)} arms are compared with one baseline on several measures, without "
        "correction. If there is no effect, about 1 interval in 20 still excludes 0 by chance.",
        "Speed": "tokens per second depends on the machine and on what else ran on it; it is not paired.",
        "Noise": "even a perfectly uniform random router has some max violation in a finite batch (dashed in the "
        "picture) and on a finite held-out set; differences near that mean little.",
    }
    if len(pairs) < 2:
        del found["Many comparisons"]
    return found
