"""Pictures of single experts: the load and the bias of each over the run, for an arm's first seed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import WIDTH, Picture, first_run, literal, looks, with_runs
from .numbers import layer_arrays
from .sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS = 8  # columns of a layer picture
MAX_COLUMNS = 300  # time bins of a heatmap

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # as `layer_arrays` returns them


def load_heatmaps(sweep: Sweep) -> Picture | None:
    """The load of every expert over time: one row per arm, one column per layer, with a common colour scale."""
    from matplotlib.figure import Figure

    arrays = {arm: found for arm in with_runs(sweep) if (found := layer_arrays(first_run(sweep, arm)))}
    if not arrays:
        return None
    columns = max(len(shown_layers(loads.shape[1])) for _, loads, _ in arrays.values())
    heights = [1.75] * len(arrays) + [0.75]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (arm, (steps, loads, _)) in zip(rows, arrays.items(), strict=False):
        axes = _layer_row(row, sweep, arm, loads.shape[1], columns)
        for axis, layer in zip(axes, shown_layers(loads.shape[1]), strict=False):
            _heatmap(axis, steps, loads[:, layer])
        axes[0].set_ylabel("expert")
    _steps_below(rows[: len(arrays)])
    _load_scale(rows[-1])
    return Picture(
        "expert_loads",
        "Load of every expert over training",
        "Look for rows that stay red (overloaded), blue (starved) or black (dead: not one token); white is a "
        f"fair share; {_which_layers(arrays.values())}experts are numbered upwards, steps run to the right.",
        "Heatmaps of the load of each expert relative to the mean load over training steps, one row of "
        "panels per arm and one column per layer, on a diverging scale centred at a fair share.",
        figure,
    )


def bias_trajectories(sweep: Sweep) -> Picture | None:
    """The selection bias of every expert over time, for the arms that use one."""
    from matplotlib.figure import Figure

    arrays = {}
    for arm in with_runs(sweep):
        found = layer_arrays(first_run(sweep, arm))
        if found and found[2] is not None and (np.nan_to_num(found[2]) != 0).any():
            arrays[arm] = found
    if not arrays:
        return None
    columns = max(len(shown_layers(loads.shape[1])) for _, loads, _ in arrays.values())
    figure = Figure(figsize=(WIDTH, 2.1 * len(arrays)), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(arrays), 1, squeeze=False)[:, 0]
    for row, (arm, (steps, loads, bias)) in zip(rows, arrays.items(), strict=True):
        assert bias is not None  # only such arms are in `arrays`
        axes = _layer_row(row, sweep, arm, loads.shape[1], columns)
        for axis, layer in zip(axes, shown_layers(loads.shape[1]), strict=False):
            _bias_panel(axis, steps, bias[:, layer])
        axes[0].set_ylabel("bias")
    _steps_below(rows)
    return Picture(
        "bias",
        "Selection bias of every expert",
        "Look whether the lines settle (the bias has converged), keep climbing (the rate is too low) or oscillate "
        f"(it is too high); {_which_layers(arrays.values())}darker lines end lower.",
        "Bias of each expert over training steps, one panel per layer and one row per arm with a bias.",
        figure,
    )


# --- rows of panels, one per layer ----------------------------------------------------------------------


def shown_layers(number: int) -> list[int]:
    """All layers if they fit, else MAX_LAYERS evenly spread ones, including the first and the last."""
    if number <= MAX_LAYERS:
        return list(range(number))
    return sorted({round(i * (number - 1) / (MAX_LAYERS - 1)) for i in range(MAX_LAYERS)})


def _which_layers(arrays: Iterable[Arrays]) -> str:
    most = max(loads.shape[1] for _, loads, _ in arrays)
    return f"{MAX_LAYERS} of {most} layers are shown; " if most > MAX_LAYERS else ""


def _layer_row(row: Any, sweep: Sweep, arm: str, layers: int, columns: int) -> "list[Axes]":
    """A titled row of panels, one per shown layer; columns beyond the arm's layers stay blank."""
    title = f"{arm} (seed {first_run(sweep, arm).seed})"
    colour, _ = looks(sweep)[arm]
    row.suptitle(literal(title), x=0.008, ha="left", fontsize=11, fontweight="bold", color=colour)
    axes = list(row.subplots(1, columns, sharex=True, sharey=True, squeeze=False)[0])
    shown = shown_layers(layers)
    for axis, layer in zip(axes, shown, strict=False):
        axis.set_title(f"layer {layer}", fontsize=9, color="#444444")
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4, integer=True)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    return axes


def _steps_below(rows: Iterable[Any]) -> None:
    """Label the step axis once, in the last row."""
    for axis in list(rows)[-1].axes:
        axis.set_xlabel("step", fontsize=9)


def _heatmap(axes: "Axes", steps: np.ndarray, loads: np.ndarray) -> None:
    """Draw one layer's loads, float64[N, E], as an image with experts upwards and steps to the right."""
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
    """Blue, white and red, with black for an expert without tokens; the ends are not as dark as black."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    colours = matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256))
    return ListedColormap(colours).with_extremes(bad="#000000")


def _load_scale(row: Any) -> None:
    """Draw the colour scale shared by all panels, and the meaning of black."""
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


def _bias_panel(axes: "Axes", steps: np.ndarray, bias: np.ndarray) -> None:
    """Draw one layer's bias, float64[N, E], with a line per expert, coloured by its rank at the end."""
    import matplotlib

    order = np.argsort(np.nan_to_num(bias[-1]))
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(order)))
    for colour, expert in zip(colours, order, strict=True):
        axes.plot(steps, bias[:, expert], color=colour, linewidth=1.0)
    axes.margins(x=0.01)
