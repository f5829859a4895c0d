"""Functions shared by the pictures of a report: the look of an arm, figures, legends, curves on common steps.

An arm keeps its colour and marker in every picture. Figures are built without pyplot, so nothing global is touched and
no display is needed.
"""

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_jax.runtime.pictures import PALETTE

from .sweep import Run, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches; about 1000 pixels on the page, so that 10 points look like 14 pixels
HALF = 5.2  # width of a picture beside another; a phone shows it at the width of its screen
LEGEND_CHARACTERS = 11.5  # characters per inch of a legend's row
MARKERS = ("s", "^", "D", "v", "P", "p", "<", ">")
BASELINE = ("#222222", "o")
CHANCE = "#555555"  # colour of the line for a uniform random router
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
        title: one line that names what it shows.
        caption: one sentence that says what to look for.
        alt: a description for readers who do not see it.
        figure: the matplotlib figure.
        leads: whether it supports the answer and comes with it; such figures are `HALF` wide.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: "Figure"
    leads: bool = False


def looks(sweep: Sweep) -> dict[str, tuple[str, str]]:
    """Arm -> (colour, marker): dark grey for the baseline, the colours of the palette in order for the others."""
    others = [arm for arm in sweep.arms if arm != sweep.baseline]
    found = {arm: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, arm in enumerate(others)}
    return {sweep.baseline: BASELINE} | found


def literal(name: str) -> str:
    """A name as matplotlib text, escaped because `$` starts mathematics and a leading `_` hides a legend entry."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def wrapped(text: str, width: int = 46) -> str:
    """A title as matplotlib text, in lines of `width` characters."""
    return literal("\n".join(textwrap.wrap(text, width)))


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **kwargs: Any
) -> "tuple[Figure, np.ndarray]":
    """Create a figure and its axes [rows, columns]; width and height are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def arm_legend(figure: "Figure", sweep: Sweep, arms: Iterable[str], extra: Iterable[Any] = ()) -> None:
    """Add a legend below the panels, where it covers no data."""
    from matplotlib.lines import Line2D

    look = looks(sweep)
    handles = [
        Line2D([], [], color=look[arm][0], marker=look[arm][1], markersize=6, linewidth=2, label=literal(arm))
        for arm in arms
    ] + list(extra)
    room = LEGEND_CHARACTERS * figure.get_figwidth()
    longest = max(len(handle.get_label()) for handle in handles)
    one_row = sum(len(handle.get_label()) + 8 for handle in handles) <= room
    columns = len(handles) if one_row else max(1, int(room // (longest + 8)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def plot_arm(axes: "Axes", sweep: Sweep, arm: str, steps: np.ndarray, values: np.ndarray, **kwargs: Any) -> None:
    """Plot one or more curves in the arm's colour."""
    axes.plot(steps, values, color=looks(sweep)[arm][0], **kwargs)


def aligned(runs: Iterable[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The curves of several seeds on common steps.

    Returns:
        (steps int64[N], values float64[seeds, N]) over every step that any run logged; nan where a run did not.
    """
    curves = [found for found in (run.curve(key) for run in runs) if found[0].size]
    if not curves:
        return np.empty(0, dtype=np.int64), np.empty((0, 0))
    steps = np.unique(np.concatenate([found[0] for found in curves]))
    values = np.full((len(curves), steps.size), np.nan)
    for row, (own, numbers) in zip(values, curves, strict=True):
        row[np.searchsorted(steps, own)] = numbers
    return steps, values


def mean_over_seeds(values: np.ndarray) -> np.ndarray:
    """[seeds, N] -> [N]: mean over the seeds that have a value; nan where none has."""
    finite = np.isfinite(values)
    sums = np.where(finite, values, 0.0).sum(axis=0)
    return np.where(finite.any(axis=0), sums / np.maximum(finite.sum(axis=0), 1), np.nan)


def window_of(steps: np.ndarray) -> int:
    """The number of logged steps that a smoothed curve averages."""
    return max(3, steps.size // 25)


def with_runs(sweep: Sweep) -> list[str]:
    """The arms that have a finished run."""
    return [arm for arm in sweep.arms if sweep.runs[arm]]


def first_run(sweep: Sweep, arm: str) -> Run:
    """The finished run with the lowest seed, which the pictures of single experts show."""
    return sweep.runs[arm][min(sweep.runs[arm])]
