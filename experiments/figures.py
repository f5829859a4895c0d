"""The pictures of a report: each is a function of a sweep, with a caption that says what to look for.

Colours are Okabe and Ito's, told apart by colour-blind readers; an arm keeps its colour and marker in every
picture. Figures are built without pyplot, so nothing global is touched and no display is needed.
"""

import math
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .statistics import (
    ArmSummary,
    Interval,
    Run,
    Sweep,
    curve,
    domain_keys,
    final,
    layer_arrays,
    noise_floor,
    t_quantile,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches; about 1000 pixels on the page, so that 10 points read as 14 pixels
MAX_LAYERS = 8  # columns of a layer picture
MAX_COLUMNS = 300  # time bins of a heatmap
START = 0.25  # part of the run that loss panels may cut off
LEGEND_CHARACTERS = 120  # that fit in one row below a figure
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5AA6", "#8C6D1F")
MARKERS = ("s", "^", "D", "v", "P", "p", "<", ">")
BASELINE = ("#222222", "o")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "moe_jax",  # the same runs give the same bytes
}


class Picture(NamedTuple):
    """A figure and its words.

    Attributes:
        name: file name without suffix.
        title: one line, says what is seen.
        caption: one sentence, says what to look for.
        alt: for readers who do not see it.
        figure: the matplotlib figure.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: "Figure"


def pictures(sweep: Sweep, summaries: list[ArmSummary]) -> list[Picture]:
    """Every picture that the logs of a sweep can fill; those without data are left out.

    Args:
        sweep: with at least one finished run.
        summaries: of the same sweep, in its order.

    Returns:
        The pictures in reading order.
    """
    import matplotlib

    makers: tuple[Callable[[Sweep, list[ArmSummary]], Picture | None], ...] = (
        trade_off,
        violation_curves,
        load_heatmaps,
        bias_trajectories,
        loss_curves,
        domain_bars,
    )
    with matplotlib.rc_context(STYLE):
        made = [picture for make in makers if (picture := make(sweep, summaries)) is not None]
        for picture in made:
            picture.figure.draw_without_rendering()
            picture.figure.set_layout_engine("none")  # laid out once, not again for every file format
    return made


# --- shared ---------------------------------------------------------------------------------------------


def looks(sweep: Sweep) -> dict[str, tuple[str, str]]:
    """Arm -> (colour, marker): the baseline is dark grey, the others take the palette in order."""
    others = [arm for arm in sweep.arms if arm != sweep.baseline]
    found = {arm: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, arm in enumerate(others)}
    return {sweep.baseline: BASELINE} | found


def literal(name: str) -> str:
    """A name as matplotlib text: `$` would start mathematics, a leading `_` hides a legend entry."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def new_figure(height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> "tuple[Figure, np.ndarray]":
    """A figure of the page's width, and its axes [rows, columns]; height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def arm_legend(figure: "Figure", sweep: Sweep, arms: Iterable[str], extra: Iterable[Any] = ()) -> None:
    """A legend below the panels, where it covers no data."""
    from matplotlib.lines import Line2D

    look = looks(sweep)
    handles = [
        Line2D([], [], color=look[arm][0], marker=look[arm][1], markersize=6, linewidth=2, label=literal(arm))
        for arm in arms
    ] + list(extra)
    longest = max(len(handle.get_label()) for handle in handles)
    one_row = sum(len(handle.get_label()) + 8 for handle in handles) <= LEGEND_CHARACTERS
    columns = len(handles) if one_row else max(1, LEGEND_CHARACTERS // (longest + 8))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def aligned(runs: Iterable[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """One value of several seeds on common steps.

    Returns:
        (steps int64[N], values float64[seeds, N]) over every step any run logged; nan where one did not.
    """
    curves = [found for found in (curve(run, key) for run in runs) if found[0].size]
    if not curves:
        return np.empty(0, dtype=np.int64), np.empty((0, 0))
    steps = np.unique(np.concatenate([found[0] for found in curves]))
    values = np.full((len(curves), steps.size), np.nan)
    for row, (own, numbers) in zip(values, curves, strict=True):
        row[np.searchsorted(steps, own)] = numbers
    return steps, values


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over the last axis, shorter at the ends; nan counts as absent."""
    half = window // 2
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0), axis=-1)
    counts = np.cumsum(finite, axis=-1)
    right = np.minimum(np.arange(values.shape[-1]) + half, values.shape[-1] - 1)
    left = np.arange(values.shape[-1]) - half - 1
    total = sums[..., right] - np.where(left >= 0, sums[..., left], 0.0)
    number = counts[..., right] - np.where(left >= 0, counts[..., left], 0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half-width of the t-interval, at each step; half-width 0 for one seed."""
    mean = values.mean(axis=0)
    n = len(values)
    half = t_quantile(n) * values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros_like(mean)
    return mean, half


def _with_runs(sweep: Sweep) -> list[str]:
    return [arm for arm in sweep.arms if sweep.runs[arm]]


def _first_run(sweep: Sweep, arm: str) -> Run:
    """The finished run with the lowest seed: the one that pictures of single experts show."""
    return sweep.runs[arm][min(sweep.runs[arm])]


def shown_layers(number: int) -> list[int]:
    """All layers when they fit, else MAX_LAYERS spread evenly, first and last among them."""
    if number <= MAX_LAYERS:
        return list(range(number))
    return sorted({round(i * (number - 1) / (MAX_LAYERS - 1)) for i in range(MAX_LAYERS)})


def _half(value: Interval) -> float:
    return value.half if value.half is not None else 0.0


# --- one figure each ------------------------------------------------------------------------------------


def trade_off(sweep: Sweep, summaries: list[ArmSummary]) -> Picture | None:
    """Held-out bits per byte against held-out max violation: a point a run, a cross of intervals an arm."""
    shown = [summary for summary in summaries if summary.max_violation.n]
    if sum(summary.max_violation.n for summary in shown) < 2:
        return None  # one point shows no trade-off
    compared = [summary for summary in shown if summary.difference.n]
    figure, axes = new_figure(4.6, 1, 2 if compared else 1)
    _absolute_panel(axes[0, 0], sweep, shown)
    if compared:
        _difference_panel(axes[0, 1], sweep, compared)
    arm_legend(figure, sweep, [summary.arm for summary in shown])
    return Picture(
        "trade_off",
        "Balance against quality",
        "Look whether an arm moves left (more even) without moving up (worse)"
        + (", and in the right panel whether its vertical bar, paired by seed, crosses zero" * bool(compared))
        + "; bars are 95 % t-intervals over seeds; one that would reach zero stops at a tenth of its mean.",
        "Scatter of held-out bits per byte against held-out max violation for every run, with mean and 95 % "
        "interval of each arm; beside it the paired difference to the baseline.",
        figure,
    )


def _absolute_panel(axes: "Axes", sweep: Sweep, shown: list[ArmSummary]) -> None:
    for summary in shown:
        colour, marker = looks(sweep)[summary.arm]
        runs = sweep.runs[summary.arm].values()
        x = [final(run, "eval/max_violation") for run in runs]
        y = [final(run, "eval/bits_per_byte") for run in runs]
        axes.plot(x, y, marker, color=colour, markersize=4.5, alpha=0.45, markeredgewidth=0)
        _cross(axes, summary.max_violation, summary.bits_per_byte, colour, marker)
    _violation_axis(axes, shown)
    axes.set(ylabel="held-out bits per byte", title="Every run (small) and arm mean")


def _difference_panel(axes: "Axes", sweep: Sweep, compared: list[ArmSummary]) -> None:
    for summary in compared:
        _cross(axes, summary.max_violation, summary.difference, *looks(sweep)[summary.arm])
    axes.axhline(0, color=BASELINE[0], linewidth=1.2, linestyle="--")
    _violation_axis(axes, compared)
    axes.set(ylabel="bits per byte minus baseline", title=_paired_title(sweep))


def _paired_title(sweep: Sweep) -> str:
    return _wrapped(f"Paired by seed; dashed: {sweep.baseline}")


def _wrapped(text: str, width: int = 46) -> str:
    return literal("\n".join(textwrap.wrap(text, width)))


def _cross(axes: "Axes", x: Interval, y: Interval, colour: str, marker: str) -> None:
    left = min(_half(x), 0.9 * x.mean) if x.mean > 0 else 0.0  # never below zero; a log axis has no zero
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


def _violation_axis(axes: "Axes", shown: list[ArmSummary]) -> None:
    """Log where every mean is positive and they differ much; plain numbers as ticks either way."""
    means = [summary.max_violation.mean for summary in shown]
    if min(means) > 0 and max(means) / min(means) > 3:
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
    axes.set_xlabel("held-out max violation (0 = even)")


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    subs = (1.0,) if low > 0 and high / low > 500 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def violation_curves(sweep: Sweep, summaries: list[ArmSummary]) -> Picture | None:
    """Max violation of the training batches over steps, seeds faint, above the floor of a uniform router."""
    from matplotlib.lines import Line2D

    key = "moe/max_violation"
    found = {arm: aligned(sweep.runs[arm].values(), key) for arm in _with_runs(sweep)}
    found = {arm: value for arm, value in found.items() if (value[1] > 0).any()}
    if not found:
        return None
    figure, axes = new_figure(4.4)
    for arm, (steps, values) in found.items():
        colour, _ = looks(sweep)[arm]
        positive = np.where(values > 0, values, np.nan)
        axes[0, 0].plot(steps, positive.T, color=colour, alpha=0.22, linewidth=0.7)
        centre = smooth(_mean_over_seeds(positive)[None], _window(steps))[0]
        axes[0, 0].plot(steps, centre, color=colour, linewidth=2.2, label=literal(arm))
    known = [noise_floor(_first_run(sweep, arm).config) for arm in found]
    floors = sorted({round(floor, 4) for floor in known if floor})
    for floor in floors:
        axes[0, 0].axhline(floor, color="#555555", linestyle="--", linewidth=1.3)
    axes[0, 0].set(yscale="log", xlabel="step", ylabel="max violation of a batch, mean over layers")
    axes[0, 0].set_title("Lower is more even; the dashed line is what chance alone gives")
    axes[0, 0].margins(x=0.01)
    _plain_log_ticks(axes[0, 0].yaxis)
    label = "uniform random router (" + ", ".join(f"{floor:.2g}" for floor in floors) + ")"
    line = Line2D([], [], color="#555555", linestyle="--", label=label)
    arm_legend(figure, sweep, found, [line] if floors else [])
    return Picture(
        "max_violation",
        "How uneven the experts' loads are, batch by batch",
        "Look how fast each arm comes down and where it settles: near the dashed line, which a perfectly "
        "uniform random router has by chance, differences mean little (thick: mean over seeds, smoothed; "
        "thin: each seed).",
        "Max violation over training steps on a log axis, a line an arm, with the noise floor of a uniform "
        "router dashed.",
        figure,
    )


def _window(steps: np.ndarray) -> int:
    return max(3, steps.size // 25)


def _mean_over_seeds(values: np.ndarray) -> np.ndarray:
    """Mean over the seeds that have a value; nan where none has."""
    finite = np.isfinite(values)
    sums = np.where(finite, values, 0.0).sum(axis=0)
    return np.where(finite.any(axis=0), sums / np.maximum(finite.sum(axis=0), 1), np.nan)


def load_heatmaps(sweep: Sweep, summaries: list[ArmSummary]) -> Picture | None:
    """Load of every expert over time: a row an arm, a column a layer, one colour scale for all."""
    from matplotlib.figure import Figure

    arrays = {arm: found for arm in _with_runs(sweep) if (found := layer_arrays(_first_run(sweep, arm)))}
    if not arrays:
        return None
    columns = max(len(shown_layers(loads.shape[1])) for _, loads, _ in arrays.values())
    heights = [1.75] * len(arrays) + [0.75]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (arm, (steps, loads, _)) in zip(rows, arrays.items(), strict=False):
        axes = _layer_row(row, sweep, arm, loads.shape[1], columns, sharey=True)
        for axis, layer in zip(axes, shown_layers(loads.shape[1]), strict=False):
            _heatmap(axis, steps, loads[:, layer])
        axes[0].set_ylabel("expert")
    _steps_below(rows[: len(arrays)])
    _load_scale(rows[-1])
    return Picture(
        "expert_loads",
        "Load of every expert over training",
        "Look for rows that stay red (overloaded), blue (starved) or black (dead: not one token): white is a "
        f"fair share; {_which_layers(arrays.values())}experts are numbered upwards, steps run to the right.",
        "Heatmaps of the load of each expert relative to the mean load over training steps, one row of "
        "panels an arm and one column a layer, on a diverging scale centred at a fair share.",
        figure,
    )


def _which_layers(arrays: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> str:
    most = max(loads.shape[1] for _, loads, _ in arrays)
    return f"{MAX_LAYERS} of {most} layers are shown; " if most > MAX_LAYERS else ""


def _layer_row(row: Any, sweep: Sweep, arm: str, layers: int, columns: int, sharey: bool) -> "list[Axes]":
    """A titled row of panels, one a shown layer; columns that this arm does not fill stay blank."""
    title = f"{arm} (seed {_first_run(sweep, arm).seed})"
    colour, _ = looks(sweep)[arm]
    row.suptitle(literal(title), x=0.008, ha="left", fontsize=11, fontweight="bold", color=colour)
    axes = list(row.subplots(1, columns, sharex=True, sharey=sharey, squeeze=False)[0])
    shown = shown_layers(layers)
    for axis, layer in zip(axes, shown, strict=False):
        axis.set_title(f"layer {layer}", fontsize=9, color="#444444")
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4, integer=True)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    return axes


def _steps_below(rows: Iterable[Any]) -> None:
    """Names the step axis once, in the last row."""
    for axis in list(rows)[-1].axes:
        axis.set_xlabel("step", fontsize=9)


def _heatmap(axes: "Axes", steps: np.ndarray, loads: np.ndarray) -> None:
    """One layer: loads float64[N, E] -> an image with experts upwards and steps to the right."""
    from matplotlib.ticker import MaxNLocator

    parts = np.array_split(loads, min(len(loads), MAX_COLUMNS))
    share = np.stack([part.mean(axis=0) for part in parts], axis=1)
    mean = share.mean(axis=0, keepdims=True)
    ratio = np.divide(share, mean, out=np.zeros_like(share), where=mean > 0)
    logarithm = np.log2(np.where(ratio > 0, ratio, 1.0))
    end = max(int(steps[-1]), int(steps[0]) + 1)
    axes.imshow(
        np.ma.masked_where(ratio <= 0, logarithm),
        cmap=_load_colours(),
        vmin=-2,
        vmax=2,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(float(steps[0]), float(end), -0.5, share.shape[0] - 0.5),
    )
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _load_colours() -> Any:
    """Blue, white, red, with black for an expert that got nothing; the ends stay clear of black."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    colours = matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256))
    return ListedColormap(colours).with_extremes(bad="#000000")


def _load_scale(row: Any) -> None:
    """The colour scale shared by all panels, and the meaning of black."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    dead, axes = row.subplots(1, 2, width_ratios=[1, 3])
    dead.axis("off")
    dead.legend(handles=[Patch(facecolor="#000000", label="not one token")], loc="center right")
    scale = ScalarMappable(norm=Normalize(-2, 2), cmap=_load_colours())
    bar = row.colorbar(scale, cax=axes, orientation="horizontal", ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_xticklabels(["≤ ¼", "½", "1 (fair share)", "2", "≥ 4"])
    bar.set_label("load / mean load of the layer (log scale)")


def bias_trajectories(sweep: Sweep, summaries: list[ArmSummary]) -> Picture | None:
    """Selection bias of every expert over time, for the arms that have one."""
    from matplotlib.figure import Figure

    arrays = {}
    for arm in _with_runs(sweep):
        found = layer_arrays(_first_run(sweep, arm))
        if found and found[2] is not None and (np.nan_to_num(found[2]) != 0).any():
            arrays[arm] = found
    if not arrays:
        return None
    columns = max(len(shown_layers(loads.shape[1])) for _, loads, _ in arrays.values())
    figure = Figure(figsize=(WIDTH, 2.1 * len(arrays)), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(arrays), 1, squeeze=False)[:, 0]
    for row, (arm, (steps, loads, bias)) in zip(rows, arrays.items(), strict=True):
        assert bias is not None  # chosen above
        axes = _layer_row(row, sweep, arm, loads.shape[1], columns, sharey=True)
        for axis, layer in zip(axes, shown_layers(loads.shape[1]), strict=False):
            _bias_panel(axis, steps, bias[:, layer])
        axes[0].set_ylabel("bias")
    _steps_below(rows)
    return Picture(
        "bias",
        "Selection bias of every expert",
        "Look whether the lines settle (the bias has found its place), keep climbing (the rate is too low to "
        f"catch up) or saw up and down (too high); {_which_layers(arrays.values())}darker lines end lower.",
        "Bias of each expert over training steps, one panel a layer and one row an arm with a bias.",
        figure,
    )


def _bias_panel(axes: "Axes", steps: np.ndarray, bias: np.ndarray) -> None:
    """One layer: bias float64[N, E], a line an expert, coloured by its rank at the end."""
    import matplotlib

    order = np.argsort(np.nan_to_num(bias[-1]))
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(order)))
    for colour, expert in zip(colours, order, strict=True):
        axes.plot(steps, bias[:, expert], color=colour, linewidth=1.0)
    axes.margins(x=0.01)


def loss_curves(sweep: Sweep, summaries: list[ArmSummary]) -> Picture | None:
    """Training loss, held-out bits per byte, and its paired difference to the baseline, over steps."""
    arms = _with_runs(sweep)
    compared = [summary.arm for summary in summaries if summary.difference.n]
    figure, axes = new_figure(4.2, 1, 3 if compared else 2)
    for arm in arms:
        _train_panel(axes[0, 0], sweep, arm)
        _held_out_panel(axes[0, 1], sweep, arm)
    for arm in compared:
        _paired_panel(axes[0, 2], sweep, arm)
    for axis, key in zip(axes[0], ("loss", "eval/bits_per_byte"), strict=False):
        _cut_start(axis, [aligned(sweep.runs[arm].values(), key) for arm in arms])
    for axis in axes[0]:
        axis.margins(x=0.01)
        axis.set_xlabel("step")
        axis.locator_params(axis="x", nbins=5, integer=True)
    axes[0, 0].set(ylabel="nats per token", title="Training loss, smoothed")
    axes[0, 1].set(ylabel="bits per byte", title="Held-out bits per byte")
    if compared:
        axes[0, 2].axhline(0, color=BASELINE[0], linewidth=1.2, linestyle="--")
        axes[0, 2].set(ylabel="bits per byte", title=_wrapped(f"Held out, minus {sweep.baseline}", 32))
    arm_legend(figure, sweep, arms)
    return Picture(
        "loss",
        "Training loss and held-out bits per byte",
        ("Look in the last panel, paired by seed, whether an arm's" if compared else "Look whether the")
        + " band (95 % t-interval over seeds) "
        + ("stays on one side of zero at the end" if compared else "is narrow at the end")
        + "; the first quarter of the run leaves the top of the panels with absolute values.",
        "Curves over training steps, a line an arm: training loss, held-out bits per byte with a band of the "
        "95 % interval over seeds, and the paired difference of the latter to the baseline.",
        figure,
    )


def _train_panel(axes: "Axes", sweep: Sweep, arm: str) -> None:
    colour, _ = looks(sweep)[arm]
    steps, values = aligned(sweep.runs[arm].values(), "loss")
    if not steps.size:
        return
    mean = _mean_over_seeds(values)
    axes.plot(steps, mean, color=colour, alpha=0.22, linewidth=0.7)
    axes.plot(steps, smooth(mean[None], _window(steps))[0], color=colour, linewidth=1.8)


def _held_out_panel(axes: "Axes", sweep: Sweep, arm: str) -> None:
    _banded(axes, sweep, arm, *aligned(sweep.runs[arm].values(), "eval/bits_per_byte"))


def _paired_panel(axes: "Axes", sweep: Sweep, arm: str) -> None:
    """Difference to the baseline at every evaluation both made, after the first quarter of the run."""
    common = sorted(sweep.runs[arm].keys() & sweep.runs[sweep.baseline].keys())
    runs = [sweep.runs[name][seed] for name in (arm, sweep.baseline) for seed in common]
    steps, values = aligned(runs, "eval/bits_per_byte")
    late = steps >= START * steps[-1]
    _banded(axes, sweep, arm, steps[late], (values[: len(common)] - values[len(common) :])[:, late])


def _banded(axes: "Axes", sweep: Sweep, arm: str, steps: np.ndarray, values: np.ndarray) -> None:
    """Mean of values[seeds, N] with its interval, at the steps where every seed has a value."""
    colour, marker = looks(sweep)[arm]
    everywhere = np.isfinite(values).all(axis=0)
    mean, half = _band(values[:, everywhere])
    axes.fill_between(steps[everywhere], mean - half, mean + half, color=colour, alpha=0.16, linewidth=0)
    axes.plot(steps[everywhere], mean, color=colour, linewidth=1.8, marker=marker, markersize=3.5)


def _cut_start(axes: "Axes", curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Lets the start of the run leave the top of the panel, or the end would be one flat line."""
    kept = [values[:, steps >= START * steps[-1]] for steps, values in curves if steps.size]
    numbers = np.concatenate([values[np.isfinite(values)] for values in kept]) if kept else np.empty(0)
    if numbers.size > 1 and numbers.max() > numbers.min():
        room = 0.06 * (numbers.max() - numbers.min())
        axes.set_ylim(numbers.min() - room, numbers.max() + room)


def domain_bars(sweep: Sweep, summaries: list[ArmSummary]) -> Picture | None:
    """Held-out bits per byte of each domain, and its paired difference to the baseline."""
    shown = [summary for summary in summaries if any(value.n for value in summary.domains.values())]
    if not shown or not domain_keys(sweep):
        return None
    domains = list(shown[0].domains)
    compared = [summary for summary in shown if any(value.n for value in summary.domain_differences.values())]
    height = 1.6 + len(domains) * max(0.45, 0.15 * len(shown))
    figure, axes = new_figure(height, 1, 2 if compared else 1, sharey=True)
    _bars(axes[0, 0], sweep, shown, domains)
    if compared:
        _differences(axes[0, 1], sweep, compared, domains)
    arm_legend(figure, sweep, [summary.arm for summary in shown])
    return Picture(
        "domains",
        "Which domains gain and which lose",
        _DOMAINS_COMPARED if compared else "Look which domains are hard: fewer bits per byte is better.",
        "Bars of held-out bits per byte for each domain and arm, and beside them the paired differences to "
        "the baseline with 95 % intervals.",
        figure,
    )


_DOMAINS_COMPARED = (
    "Look in the right panel for domains whose interval stays clear of zero: left of the dashed line the arm "
    "compresses that domain better than the baseline, right of it worse."
)


def _offsets(number: int) -> np.ndarray:
    """Vertical places of the arms within a domain's band of height 0.8, first arm on top."""
    return (np.arange(number) - (number - 1) / 2) * 0.8 / number


def _bars(axes: "Axes", sweep: Sweep, shown: list[ArmSummary], domains: list[str]) -> None:
    for offset, summary in zip(_offsets(len(shown)), shown, strict=True):
        values = [summary.domains[domain] for domain in domains]
        axes.barh(
            np.arange(len(domains)) + offset,
            [value.mean for value in values],
            height=0.72 / len(shown),
            xerr=[_half(value) for value in values],
            color=looks(sweep)[summary.arm][0],
            error_kw={"elinewidth": 1, "ecolor": "#555555"},
        )
    axes.set_yticks(range(len(domains)), [_wrapped(domain, 18) for domain in domains])
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set(xlabel="held-out bits per byte", title="Mean over seeds and 95 % interval")


def _differences(axes: "Axes", sweep: Sweep, compared: list[ArmSummary], domains: list[str]) -> None:
    for offset, summary in zip(_offsets(len(compared)), compared, strict=True):
        colour, marker = looks(sweep)[summary.arm]
        values = [summary.domain_differences[domain] for domain in domains]
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
    axes.set(xlabel="bits per byte minus baseline", title=_paired_title(sweep))
