"""The pictures of a report that compare arms: each is a function of a sweep, with a caption that says what to look for.

To add a picture, add its function to `MAKERS`.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moe_jax.runtime.pictures import plain_log_ticks, smooth

from ..statistics.intervals import Interval, t_quantile
from .columns import BALANCE, QUALITY, Measured, domain_columns, measure
from .drawing import (
    BASELINE,
    CHANCE,
    HALF,
    STYLE,
    Picture,
    aligned,
    arm_legend,
    first_run,
    looks,
    mean_over_seeds,
    new_figure,
    plot_arm,
    window_of,
    with_runs,
    wrapped,
)
from .experts import bias_trajectories, load_heatmaps
from .sweep import EVALUATED, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

START = 0.25  # share of the run, from its start, that loss panels may cut off
LOG_RATIO = 3.0  # of the largest to the smallest mean, above which an axis is logarithmic
SAME_LEVEL = 0.01  # relative difference up to which two levels of chance are drawn as one


# --- the two pictures that support the answer -----------------------------------------------------------


def violation_curves(sweep: Sweep) -> Picture | None:
    """Max violation of the training batches over steps, seeds faint, with the floor of a uniform router."""
    from matplotlib.lines import Line2D

    found = {arm: aligned(sweep.runs[arm].values(), "moe/max_violation") for arm in with_runs(sweep)}
    found = {arm: value for arm, value in found.items() if (value[1] > 0).any()}
    if not found:
        return None
    figure, grid = new_figure(4.4, width=HALF)
    axes = grid[0, 0]
    for arm, (steps, values) in found.items():
        positive = np.where(values > 0, values, np.nan)
        plot_arm(axes, sweep, arm, steps, positive.T, alpha=0.22, linewidth=0.7)
        plot_arm(axes, sweep, arm, steps, smooth(mean_over_seeds(positive), window_of(steps)), linewidth=2.2)
    floors = chance_levels(sweep, list(found))
    for floor in floors:
        axes.axhline(floor, color=CHANCE, linestyle="--", linewidth=1.3)
    axes.set(yscale="log", xlabel="step", ylabel="max violation of a batch, mean over layers")
    axes.set_title("Lower is more even")
    axes.margins(x=0.01)
    plain_log_ticks(axes.yaxis)
    label = "chance alone (" + ", ".join(f"{floor:.2g}" for floor in floors) + ")"
    line = Line2D([], [], color=CHANCE, linestyle="--", label=label)
    arm_legend(figure, sweep, found, [line] if floors else [])
    return Picture(
        "max_violation",
        "How uneven the experts' loads are, batch by batch",
        "Look how fast each arm falls and where it settles; near the dashed line, the level of a perfectly "
        "uniform random router, differences mean little (thick: mean over seeds, smoothed; thin: each seed).",
        "Max violation over training steps on a log axis, one line per arm, with the noise floor of a uniform "
        "router dashed.",
        figure,
        leads=True,
    )


def chance_levels(sweep: Sweep, arms: list[str]) -> list[float]:
    """The logged max violation of a uniform random router; one value for arms that agree within `SAME_LEVEL`."""
    levels: list[float] = []
    for arm in arms:
        _, values = first_run(sweep, arm).curve("moe/violation_floor")
        known = values[np.isfinite(values) & (values > 0)]
        level = float(np.median(known)) if known.size else math.nan
        if math.isfinite(level) and not any(abs(level - other) <= SAME_LEVEL * other for other in levels):
            levels.append(level)
    return sorted(levels)


def trade_off(sweep: Sweep) -> Picture | None:
    """Held-out bits per byte, or their paired difference to the baseline, against held-out max violation.

    A point for each run, a cross for each arm.
    """
    balance = measure(sweep, BALANCE)
    quality = measure(sweep, QUALITY)
    paired = any(one.difference.n for one in quality.values())
    heights = _heights(sweep, quality) if paired else {arm: one.value for arm, one in quality.items()}
    shown = [arm for arm in sweep.arms if balance[arm].value.n and heights[arm].n]
    if sum(balance[arm].value.n for arm in shown) < 2:
        return None  # one point shows no trade-off
    figure, grid = new_figure(4.4, width=HALF)
    axes = grid[0, 0]
    for arm in shown:
        colour, marker = looks(sweep)[arm]
        axes.plot(*_points(sweep, arm, paired), marker, color=colour, markersize=4.5, alpha=0.45, markeredgewidth=0)
        _cross(axes, balance[arm].value, heights[arm], colour, marker)
    if paired:
        axes.axhline(0, color=BASELINE[0], linewidth=1.2, linestyle="--")
    _violation_axis(axes, [balance[arm].value.mean for arm in shown])
    axes.set(ylabel="bits per byte, held out" + " (paired)" * paired)
    axes.set_title(wrapped(f"Down is better than {sweep.baseline}, left is more even" if paired else "Left: more even"))
    arm_legend(figure, sweep, shown)
    words = f"minus {sweep.baseline}'s of the same seed " if paired else ""
    return Picture(
        "trade_off",
        "Quality against balance",
        f"Look whether an arm moves left (more even) without moving up (worse): held-out bits per byte {words}"
        "over held-out max violation; small marks are runs, large ones an arm's mean with 95 % t-intervals over seeds"
        + ("; a vertical bar that crosses the dashed line shows no difference in quality." if paired else "."),
        "Scatter of held-out bits per byte, as a paired difference to the baseline if there is one, against "
        "held-out max violation for every run, with mean and 95 % interval of each arm.",
        figure,
        leads=True,
    )


def _heights(sweep: Sweep, quality: dict[str, Measured]) -> dict[str, Interval]:
    """Arm -> paired difference in quality, which is 0 for the baseline."""
    own = {sweep.baseline: Interval(0.0, None, quality[sweep.baseline].value.n)}
    return {arm: one.difference for arm, one in quality.items()} | own


def _points(sweep: Sweep, arm: str, paired: bool) -> tuple[list[float], list[float]]:
    """Max violation and height of every run; if paired, only of runs whose seed the baseline has."""
    base = sweep.runs[sweep.baseline]
    seeds = [seed for seed in sweep.runs[arm] if seed in base or not paired]
    below = [QUALITY.of(base[seed]) if paired else 0.0 for seed in seeds]
    runs = [sweep.runs[arm][seed] for seed in seeds]
    heights = [QUALITY.of(run) - zero for run, zero in zip(runs, below, strict=True)]
    return [BALANCE.of(run) for run in runs], heights


def _cross(axes: "Axes", x: Interval, y: Interval, colour: str, marker: str) -> None:
    left = min(_half(x), 0.9 * x.mean) if x.mean > 0 else 0.0  # stays above zero, for a log axis
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=[[left], [_half(x)]],
        yerr=_half(y),
        fmt=marker,
        color=colour,
        markersize=9,
        markeredgecolor="white",
        elinewidth=1.6,
        capsize=3,
    )


def _half(value: Interval) -> float:
    return value.half if value.half is not None else 0.0


def _violation_axis(axes: "Axes", means: list[float]) -> None:
    """Label the x axis; it is logarithmic if the means are positive and their ratio is above `LOG_RATIO`."""
    if min(means) > 0 and max(means) / min(means) > LOG_RATIO:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    axes.set_xlabel("held-out max violation (0 = even)")


# --- loss -----------------------------------------------------------------------------------------------


def loss_curves(sweep: Sweep) -> Picture | None:
    """Training loss, held-out bits per byte, and their paired difference to the baseline, over steps."""
    arms = with_runs(sweep)
    compared = [arm for arm, one in measure(sweep, QUALITY).items() if one.difference.n]
    figure, grid = new_figure(4.2, 1, 3 if compared else 2)
    panels = grid[0]
    for arm in arms:
        _train_panel(panels[0], sweep, arm)
        _banded(panels[1], sweep, arm, *aligned(sweep.runs[arm].values(), EVALUATED))
    for arm in compared:
        _paired_panel(panels[2], sweep, arm)
    for axes, key in zip(panels, ("loss", EVALUATED), strict=False):
        _cut_start(axes, [aligned(sweep.runs[arm].values(), key) for arm in arms])
    for axes in panels:
        axes.margins(x=0.01)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=5, integer=True)
    panels[0].set(ylabel="nats per token", title="Training loss, smoothed")
    panels[1].set(ylabel="bits per byte", title="Held-out bits per byte")
    if compared:
        panels[2].axhline(0, color=BASELINE[0], linewidth=1.2, linestyle="--")
        panels[2].set(ylabel="bits per byte", title=wrapped(f"Held out, minus {sweep.baseline}", 32))
    arm_legend(figure, sweep, arms)
    return Picture(
        "loss",
        "Training loss and held-out bits per byte",
        ("Look in the last panel, paired by seed, whether an arm's" if compared else "Look whether the")
        + " band (95 % t-interval over seeds) "
        + ("stays on one side of zero at the end" if compared else "is narrow at the end")
        + "; in the panels with absolute values, the first quarter of the run may be cut off at the top.",
        "Curves over training steps, one line per arm: training loss, held-out bits per byte with a band of the "
        "95 % interval over seeds, and the paired difference of the latter to the baseline.",
        figure,
    )


def _train_panel(axes: "Axes", sweep: Sweep, arm: str) -> None:
    steps, values = aligned(sweep.runs[arm].values(), "loss")
    if not steps.size:
        return
    mean = mean_over_seeds(values)
    plot_arm(axes, sweep, arm, steps, mean, alpha=0.22, linewidth=0.7)
    plot_arm(axes, sweep, arm, steps, smooth(mean, window_of(steps)), linewidth=1.8)


def _paired_panel(axes: "Axes", sweep: Sweep, arm: str) -> None:
    """Draw the difference to the baseline at every evaluation of both, after the first `START` of the run."""
    common = sorted(sweep.runs[arm].keys() & sweep.runs[sweep.baseline].keys())
    runs = [sweep.runs[name][seed] for name in (arm, sweep.baseline) for seed in common]
    steps, values = aligned(runs, EVALUATED)
    late = steps >= START * steps[-1]
    _banded(axes, sweep, arm, steps[late], (values[: len(common)] - values[len(common) :])[:, late])


def _banded(axes: "Axes", sweep: Sweep, arm: str, steps: np.ndarray, values: np.ndarray) -> None:
    """Draw the mean of values[seeds, N] with its interval, at the steps where every seed has a value."""
    colour, marker = looks(sweep)[arm]
    everywhere = np.isfinite(values).all(axis=0)
    mean, half = _band(values[:, everywhere])
    axes.fill_between(steps[everywhere], mean - half, mean + half, color=colour, alpha=0.16, linewidth=0)
    axes.plot(steps[everywhere], mean, color=colour, linewidth=1.8, marker=marker, markersize=3.5)


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half-width of the t-interval, at each step; half-width 0 for one seed."""
    mean = values.mean(axis=0)
    n = len(values)
    half = t_quantile(n) * values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros_like(mean)
    return mean, half


def _cut_start(axes: "Axes", curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Cut off the start of the run at the top of the panel, because the end would otherwise be a flat line."""
    kept = [values[:, steps >= START * steps[-1]] for steps, values in curves if steps.size]
    numbers = np.concatenate([values[np.isfinite(values)] for values in kept]) if kept else np.empty(0)
    if numbers.size > 1 and numbers.max() > numbers.min():
        room = 0.06 * (numbers.max() - numbers.min())
        axes.set_ylim(numbers.min() - room, numbers.max() + room)


# --- domains --------------------------------------------------------------------------------------------


def domain_bars(sweep: Sweep) -> Picture | None:
    """Held-out bits per byte of each domain, and its paired difference to the baseline."""
    domains = {column.title: measure(sweep, column) for column in domain_columns(sweep)}
    shown = [arm for arm in sweep.arms if any(found[arm].value.n for found in domains.values())]
    compared = [arm for arm in shown if any(found[arm].difference.n for found in domains.values())]
    if not shown:
        return None
    height = 1.6 + len(domains) * max(0.45, 0.15 * len(shown))
    figure, grid = new_figure(height, 1, 2 if compared else 1, sharey=True)
    _bars(grid[0, 0], sweep, shown, domains)
    if compared:
        _differences(grid[0, 1], sweep, compared, domains)
    arm_legend(figure, sweep, shown)
    return Picture(
        "domains",
        "Which domains gain and which lose",
        _DOMAINS_COMPARED if compared else "Look which domains are hard: fewer bits per byte is better.",
        "Bars of held-out bits per byte for each domain and arm, and beside them the paired differences to "
        "the baseline with 95 % intervals.",
        figure,
    )


BAND = 0.8  # height of a domain's band, of 1
BARS = 0.72  # of it, together, the bars of the arms
_DOMAINS_COMPARED = (
    "Look in the right panel for domains whose interval excludes zero: left of the dashed line the arm "
    "compresses that domain better than the baseline, right of it worse."
)


def _offsets(number: int) -> np.ndarray:
    """The vertical positions of the arms within a domain's band of height `BAND`, with the first arm on top."""
    return (np.arange(number) - (number - 1) / 2) * BAND / number


def _bars(axes: "Axes", sweep: Sweep, shown: list[str], domains: dict[str, dict[str, Measured]]) -> None:
    for offset, arm in zip(_offsets(len(shown)), shown, strict=True):
        values = [found[arm].value for found in domains.values()]
        axes.barh(
            np.arange(len(domains)) + offset,
            [value.mean for value in values],
            height=BARS / len(shown),
            xerr=[_half(value) for value in values],
            color=looks(sweep)[arm][0],
            error_kw={"elinewidth": 1, "ecolor": CHANCE},
        )
    axes.set_yticks(range(len(domains)), [wrapped(domain, 18) for domain in domains])
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set(xlabel="held-out bits per byte", title="Mean over seeds and 95 % interval")


def _differences(axes: "Axes", sweep: Sweep, compared: list[str], domains: dict[str, dict[str, Measured]]) -> None:
    for offset, arm in zip(_offsets(len(compared)), compared, strict=True):
        colour, marker = looks(sweep)[arm]
        values = [found[arm].difference for found in domains.values()]
        axes.errorbar(
            [value.mean for value in values],
            np.arange(len(domains)) + offset,
            xerr=[_half(value) for value in values],
            fmt=marker,
            color=colour,
            markersize=6,
            markeredgecolor="white",
            elinewidth=1.6,
            capsize=2.5,
        )
    for edge in np.arange(len(domains) - 1) + 0.5:
        axes.axhline(edge, color="#d0d0d0", linewidth=0.8)
    axes.axvline(0, color=BASELINE[0], linewidth=1.2, linestyle="--")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", left=False)
    axes.set(xlabel="bits per byte minus baseline", title=wrapped(f"Paired by seed; dashed: {sweep.baseline}"))


# --- all of them ----------------------------------------------------------------------------------------

MAKERS: tuple[Callable[[Sweep], Picture | None], ...] = (
    violation_curves,
    trade_off,
    load_heatmaps,
    bias_trajectories,
    loss_curves,
    domain_bars,
)


def pictures(sweep: Sweep) -> list[Picture]:
    """Draw every picture for which a sweep has data, in reading order.

    Args:
        sweep: must have at least one finished run.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        made = [picture for make in MAKERS if (picture := make(sweep)) is not None]
        for picture in made:
            picture.figure.draw_without_rendering()
            picture.figure.set_layout_engine("none")  # the layout is computed once, not for every file format
    return made
