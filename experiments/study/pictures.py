"""The pictures of the page: quality against balance, interference by weight, dots of blocks, experts by domain."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.runtime.pictures import PALETTE, plain_log_ticks

from ..report.branched import Branched
from ..report.drawing import BASELINE as DARK
from ..report.drawing import CHANCE, HALF, MARKERS, Picture, aligned, literal, mean_over_seeds, new_figure
from ..statistics.intervals import Interval, interval
from .arms import BASELINE, CONTROLS, RATES, RULES, SCOPES, WEIGHTS, Point
from .labels import Label, place
from .measures import Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHT_COLOUR, RATE_COLOUR, CONTROL_COLOUR = PALETTE[1], PALETTE[0], "#555555"
RATIO = "interference/router_ratio"
DOTS = "Small dots are trunk seeds, marks their mean with the 95 % interval"
Looks = Mapping[str, tuple[str, str]]  # arm -> (colour, marker)


# --- quality against balance ------------------------------------------------------------------------------


def frontier(found: Mapping[str, Point]) -> Picture | None:
    """Weights, rates and controls: two joined lines, and points."""
    looks = dict.fromkeys(WEIGHTS, (WEIGHT_COLOUR, "s")) | dict.fromkeys(RATES, (RATE_COLOUR, "o"))
    looks |= dict(zip(CONTROLS, [(CONTROL_COLOUR, marker) for marker in ("X", "v", "D")], strict=True))
    shown = {arm: found[arm] for arm in looks if arm in found}
    if len(shown) < 2:
        return None
    figure, grid = new_figure(5.6)
    axes = grid[0, 0]
    labels, lines = [], []
    for family in (WEIGHTS, RATES):
        lines.append([_middle(shown[arm]) for arm in family if arm in shown])
        _join(axes, [shown[arm] for arm in family if arm in shown], looks)
        labels += [Label(*_middle(shown[arm]), text, looks[arm][0]) for arm, text in family.items() if arm in shown]
    labels += [Label(*_middle(shown[arm]), arm, CONTROL_COLOUR) for arm in CONTROLS if arm in shown]
    lines += [_bar(point) for point in shown.values()]
    _scatter(axes, shown, looks)
    _frame(axes, shown)
    _family_legend(axes)
    place(figure, axes, labels, lines)
    return Picture(
        "frontier",
        "What balance costs: weights of the auxiliary loss and rates of the bias",
        f"Left is more even, down is better than the bias at 5e-3, with which all are compared on the same trunks and "
        f"data. {DOTS}; labels are weights and rates, and the names of other arms. The controls forced "
        "and flipped are in the table only.",
        "Held-out bits per byte minus the bias's against held-out max violation on a log axis: the arms of the "
        "auxiliary loss joined along weights, those of the bias along rates, and controls, with a dot for every block.",
        figure,
    )


def rules(found: Mapping[str, Point]) -> Picture | None:
    """The rules that move the bias."""
    looks = {arm: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, arm in enumerate(RULES)}
    return _small(
        "rules", "Rules that move the bias", found, {BASELINE: DARK} | looks, (), "bias is the sign rule at 5e-3"
    )


def scopes(found: Mapping[str, Point]) -> Picture | None:
    """The scopes of the auxiliary loss, joined from the widest to the narrowest."""
    looks = dict(zip(SCOPES[1:], zip(PALETTE, MARKERS, strict=True), strict=False))
    lines = (("aux_1e-2", "sequence_1e-2"), ("aux_1e-1", "two_sequences_1e-1", "sequence_1e-1"))
    words = "lines join one weight, from the batch to the sequence"
    return _small("scope_points", "Scopes of the auxiliary loss", found, {BASELINE: DARK} | looks, lines, words)


def _small(
    name: str, title: str, found: Mapping[str, Point], looks: Looks, lines: Iterable[Sequence[str]], words: str
) -> Picture | None:
    shown = {arm: found[arm] for arm in looks if arm in found}
    if len(shown) < 2:
        return None
    figure, grid = new_figure(4.6, width=HALF)
    axes = grid[0, 0]
    for line in lines:
        joined = [shown[arm] for arm in line if arm in shown]
        if joined:
            axes.plot(*zip(*map(_middle, joined), strict=True), color="#999999", linewidth=1.2, zorder=1)
    _scatter(axes, shown, looks)
    _frame(axes, shown)
    handles = [_handle(*looks[arm], label=arm) for arm in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.0, handletextpad=0.3)
    return Picture(
        name,
        title,
        f"As above, with axes of their own; {words}.",
        f"{title}: held-out bits per byte minus the bias's against held-out max violation, a dot for every block.",
        figure,
        leads=True,
    )


def _middle(point: Point) -> tuple[float, float]:
    return point.violation.mean, point.difference.mean


def _bar(point: Point) -> list[tuple[float, float]]:
    """The ends of the interval of the difference."""
    x, (mean, half, _) = point.violation.mean, point.difference
    return [(x, mean - (half or 0.0)), (x, mean + (half or 0.0))]


def _join(axes: "Axes", joined: Sequence[Point], looks: Looks) -> None:
    if joined:
        axes.plot(*zip(*map(_middle, joined), strict=True), color=looks[joined[0].arm][0], linewidth=1.4, zorder=1)


def _scatter(axes: "Axes", shown: Mapping[str, Point], looks: Looks) -> None:
    for arm, point in shown.items():
        colour, marker = looks[arm]
        xs, ys = zip(*point.dots.values(), strict=True)
        axes.plot(xs, ys, "o", color=colour, markersize=3.6, alpha=0.5, markeredgewidth=0, zorder=2)
        mark(axes, *_middle(point), point.difference, colour, marker, vertical=True)


def _frame(axes: "Axes", shown: Mapping[str, Point]) -> None:
    axes.axhline(0, color=DARK[0], linewidth=1, linestyle="--", zorder=0)
    axes.set(xlabel="max violation, held out", ylabel=f"bits per byte minus {BASELINE}'s, held out")
    if all(x > 0 for point in shown.values() for x, _ in point.dots.values()):
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    axes.margins(x=0.07, y=0.1)


def _family_legend(axes: "Axes") -> None:
    handles = [
        _handle(WEIGHT_COLOUR, "s", label="auxiliary loss, by weight", linestyle="-"),
        _handle(RATE_COLOUR, "o", label="bias, by rate", linestyle="-"),
        _handle(CONTROL_COLOUR, "X", label="other arms"),
    ]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _handle(colour: str, marker: str, label: str, linestyle: Any = "") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, markersize=6, linestyle=linestyle, label=literal(label))


def mark(axes: "Axes", x: float, y: float, value: Interval, colour: str, marker: str, vertical: bool) -> None:
    """Draw a mean with its interval, which is vertical or horizontal."""
    half = value.half or None
    bars = {"yerr": half} if vertical else {"xerr": half}
    style = dict(color=colour, markersize=8, markeredgecolor="white", elinewidth=1.5, capsize=2.5, zorder=3)
    axes.errorbar(x, y, fmt=marker, **bars, **style)  # type: ignore[arg-type]


# --- interference -----------------------------------------------------------------------------------------


def interference(sweep: Branched) -> Picture | None:
    """The balancing gradient over that of the language model at the router: a panel for the trunks of each method."""
    trunks = [method for method in sweep.trunks.arms if _has(sweep, method)]
    if not trunks:
        return None
    figure, grid = new_figure(4.2, 1, len(trunks), sharex=True, sharey=True)
    colours = dict(zip(WEIGHTS, (PALETTE[5], PALETTE[4], PALETTE[1], PALETTE[3]), strict=True))
    for axes, method in zip(grid[0], trunks, strict=True):
        _line(axes, list(sweep.trunks.runs.get(method, {}).values()), CONTROL_COLOUR, "o")
        for (arm, colour), marker in zip(colours.items(), MARKERS, strict=False):
            _line(axes, _branches(sweep, method, arm), colour, marker)
        axes.axvline(sweep.at, color=CHANCE, linestyle=":", linewidth=1.2)
        axes.set(xlabel="step", yscale="log")
        axes.set_title(literal(f"Trunks of {method}"))
    grid[0, 0].set_ylabel("gradient norm, balancing / language")
    plain_log_ticks(grid[0, 0].yaxis)
    there = {branch.arm for branch in sweep.runs}
    handles = [_handle(CONTROL_COLOUR, "o", "trunk", "-")]
    for (arm, colour), marker in zip(colours.items(), MARKERS, strict=False):
        handles += [_handle(colour, marker, f"branches of {arm}", "-")] if arm in there else []
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return Picture(
        "interference",
        "How strongly balancing pulls at the router",
        "Ratio of gradient norms, of balancing over the language model's, at the routers; mean over runs, each run "
        "thin. Branches begin at the dotted line. The bias has no such gradient (0 is not on the axis).",
        "Curves of the ratio of gradient norms over steps on a log axis, one line per weight of the auxiliary loss.",
        figure,
    )


def _branches(sweep: Branched, method: str, arm: str) -> list[Any]:
    return [run for branch, run in sweep.runs.items() if (branch.trunk, branch.arm) == (method, arm)]


def _has(sweep: Branched, method: str) -> bool:
    runs = [*sweep.trunks.runs.get(method, {}).values()]
    runs += [run for arm in WEIGHTS for run in _branches(sweep, method, arm)]
    return any((run.curve(RATIO)[1] > 0).any() for run in runs)


def _line(axes: "Axes", runs: Sequence[Any], colour: str, marker: str) -> None:
    steps, values = aligned(runs, RATIO)
    if not (values > 0).any():
        return
    positive = np.where(values > 0, values, np.nan)
    axes.plot(steps, positive.T, color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(steps, mean_over_seeds(positive), color=colour, linewidth=2, marker=marker, markersize=4.5)


# --- dots of every block, by arm --------------------------------------------------------------------------


def strips(
    name: str,
    title: str,
    caption: str,
    panels: Mapping[str, Mapping[str, Found]],
    arms: Sequence[str],
    lines: Sequence[float | None],
) -> Picture | None:
    """A row for each arm and a panel for each number, with a dot for every block.

    Args:
        name, title, caption: of the picture.
        panels: label of the axis -> arm -> what was found.
        arms: the rows, from the top.
        lines: where each panel has a dashed line; None for none.
    """
    rows = [arm for arm in arms if any(arm in found for found in panels.values())]
    if not rows:
        return None
    figure, grid = new_figure(0.9 + 0.34 * len(rows), 1, len(panels), sharey=True)
    for axes, (label, found), line in zip(grid[0], panels.items(), lines, strict=True):
        for y, arm in enumerate(rows):
            if arm in found:
                values = list(found[arm].blocks.values())
                colour = DARK[0] if arm == BASELINE else RATE_COLOUR
                axes.plot(values, [y] * len(values), "o", color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
                mean = interval(values)
                mark(axes, mean.mean, y, mean, colour, "o", vertical=False)
        if line is not None:
            axes.axvline(line, color=DARK[0], linestyle="--", linewidth=1, zorder=0)
        axes.set_xlabel(label)
        axes.grid(False, axis="y")
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=4)
    grid[0, 0].set_yticks(range(len(rows)), [literal(arm) for arm in rows])
    grid[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    return Picture(name, title, caption, f"{title}: dots of every block with mean and interval, by arm.", figure)


DomainLoads = tuple[Sequence[str], np.ndarray]  # D domains, and the load of each expert over the mean [L, E, D]


def domains(found: Mapping[str, DomainLoads]) -> Picture:
    """Heat maps of the load of every expert on each domain: a row for each model, a column for each MoE layer.

    Args:
        found: at least one; name of a model -> its loads over the balanced load.
    """
    columns = max(len(loads) for _, loads in found.values())
    height = 0.8 + sum(0.6 + 0.2 * len(names) for names, _ in found.values())
    figure, grid = new_figure(height, len(found), columns)
    for row, (name, (names, loads)) in zip(grid, found.items(), strict=True):
        for axes, layer in zip(row, range(columns), strict=True):
            if layer >= len(loads):
                axes.axis("off")
                continue
            image = axes.imshow(loads[layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
            axes.set_title(f"{literal(name)}: layer {layer}", fontsize=9)
            axes.grid(False)
            axes.set_yticks(range(len(names)), names if layer == 0 else [], fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), extend="max", aspect=30)
    bar.set_label("load over the balanced load")
    return Picture(
        "domains",
        "Which experts each domain uses",
        "Red: more than the expert's share of a domain's tokens, twice as much where it is darkest; blue: less. "
        "A model that ignores domains is white. Experts are numbered from the left, each layer and model for itself.",
        "Heat maps with experts across and domains down, a panel for each MoE layer of each trunk.",
        figure,
    )
