"""The results of a simulation as a table, a picture and JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.runtime.pictures import PALETTE, plain_log_ticks, smooth
from moe_jax.simulator.loop import Result
from moe_jax.simulator.settings import STREAMS, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


COLUMNS = {
    "settled": "settled after",
    "recovered": "recovered after",
    "peak": "peak after shift",
    "final": "final level",
    "chatter": "chatter",
    "bias_change": "bias change",
    "flips": "flips",
    "dead": "dead",
    "bias_range": "bias range",
}
STEPS = ("settled", "recovered")  # the columns with numbers of steps


def cell(values: Sequence[float | None], steps: bool, spread: bool = True) -> str:
    """The mean, its standard deviation over seeds, and the number of seeds with a value, if not all have one."""
    known = np.asarray([v for v in values if v is not None], float)
    if not known.size:
        return "never" if steps else "-"
    text = f"{known.mean():.0f}" if steps else f"{known.mean():.3g}"
    if spread and known.size > 1:
        text += f" ± {known.std(ddof=1):.{'0f' if steps else '1g'}}"
    if known.size < len(values):
        text += f" ({known.size} of {len(values)})"
    return text


def make_table(results: Sequence[Result], s: Settings, title: str) -> "Table":
    """A row for every arm."""
    from rich.table import Table

    keys = [key for key in COLUMNS if s.stream == "shift" or key not in ("recovered", "peak")]
    table = Table("balance", *(COLUMNS[key] for key in keys), title=title, title_justify="left")
    for result in results:
        values = {key: [getattr(summary, key) for summary in result.summaries] for key in keys}
        cells = (cell(v, key in STEPS, key in (*STEPS, "peak", "final")) for key, v in values.items())
        table.add_row(result.arm.name, *cells)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


MANY = 4  # with more arms, single steps are not drawn
LEGEND_CHARACTERS = 120  # in a row of the legend
DOTS_PER_INCH = 130


def draw(results: Sequence[Result], s: Settings, low: float, title: str, file: Path) -> None:
    """Draw max violation over steps: thick lines are means over a window and seeds, thin ones the first seed."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 4.8), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for i, result in enumerate(results):
            look = dict(color=PALETTE[i % len(PALETTE)], linestyle=("-", (0, (4, 1)))[i // len(PALETTE) % 2])
            _curve(axes, result, s, len(results) <= MANY, look)
        axes.axhline(low, color="#555555", linestyle="--", linewidth=1.3, label=f"uniform random router, {low:.2g}")
        if s.stream == "shift":
            axes.axvline(s.shift_step, color="#999999", linestyle=":", linewidth=1.3, label="shift")
        _label(figure, axes, title)
        figure.savefig(file, dpi=DOTS_PER_INCH)


def _curve(axes: "Axes", result: Result, s: Settings, single: bool, look: Mapping[str, Any]) -> None:
    seen = np.stack([trace.violation for trace in result.traces])
    if single:
        axes.plot(seen[0], color=look["color"], alpha=0.18, linewidth=0.7)
    # a mean after the shift must not include steps before it
    parts = np.split(seen.mean(0), [s.shift_step]) if s.stream == "shift" else [seen.mean(0)]
    mean = np.concatenate([smooth(part, s.window) for part in parts])
    axes.plot(mean, linewidth=1.9, label=result.arm.name, **look)


def _label(figure: "Figure", axes: "Axes", title: str) -> None:
    axes.set(yscale="log", xlabel="step", ylabel="max violation of a step's loads")
    axes.set_title(title, loc="left", fontsize=10)
    axes.margins(x=0.01)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    plain_log_ticks(axes.yaxis)
    labels = [str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")]
    columns = max(1, min(len(labels), LEGEND_CHARACTERS // (max(map(len, labels)) + 8)))
    figure.legend(loc="outside lower center", ncols=columns)


def describe_run(s: Settings, scores: str, seeds: int) -> str:
    """What is simulated, on one line."""
    what = f"E={s.experts}, top_k={s.top_k}, T={s.tokens}, {s.score}"
    numbers = ", ".join(f"{name}={getattr(s, name):g}" for name in STREAMS[s.stream])
    source = f"scores of {scores}" if scores else f"stream {s.stream} ({numbers}, noise={s.noise:g})"
    return f"{what}; {source}; {seeds} seed{'s' * (seeds > 1)}"


def as_json(results: Sequence[Result], s: Settings, scores: str) -> dict[str, Any]:
    """Settings and summaries as JSON values."""
    rows = [
        {"balance": r.arm.name, "sign": r.arm.sign, "seeds": [summary._asdict() for summary in r.summaries]}
        for r in results
    ]
    return {"settings": dataclasses.asdict(s), "scores": scores, "methods": rows}
