"""Colours, smoothing and ticks of the pictures of curves, and the picture of loads."""

from typing import Any

import numpy as np

# the palette of Okabe and Ito, which colour-blind readers can distinguish, without yellow and black, and two more
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5AA6", "#8C6D1F")
LONG_AXIS = 500  # a larger ratio of its ends leaves no room for ticks at 2 and 5


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over about `window` steps around each step, along the last axis; nan counts as absent.

    Windows are shorter at the ends: step n is never averaged with a step before n / 2, so that a steep start stays
    steep.
    """
    finite = np.isfinite(values)
    sums = _running(np.where(finite, values, 0.0))
    counts = _running(finite)
    at = np.arange(values.shape[-1])
    before = np.minimum(window // 2, at // 2)
    begin = at - before
    end = at + np.minimum(before, at[::-1]) + 1
    number = counts[..., end] - counts[..., begin]
    return np.where(number > 0, (sums[..., end] - sums[..., begin]) / np.maximum(number, 1), np.nan)


def _running(values: np.ndarray) -> np.ndarray:
    """[..., N] -> [..., N + 1]: element n is the sum of the first n."""
    zero = np.zeros((*values.shape[:-1], 1))
    return np.concatenate([zero, np.cumsum(values, axis=-1)], axis=-1)


def plain_log_ticks(axis: Any) -> None:
    """Put the ticks of a logarithmic axis at 1, 2 and 5, or only at powers of ten on a long axis, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    is_long = low > 0 and high / low > LONG_AXIS
    subs = (1.0,) if is_long else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def heat_map(loads: np.ndarray) -> np.ndarray:
    """The loads [L, E] over their mean, as a picture, uint8 [height, width, 3], with a row for each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    loads = np.asarray(loads, np.float64)
    share = loads / np.maximum(loads.mean(-1, keepdims=True), 1e-9)
    layers, experts = loads.shape
    figure = Figure(
        figsize=(2.5 + min(8.0, 0.15 * experts), 1.2 + min(8.0, 0.25 * layers)), dpi=100, layout="constrained"
    )
    axes = figure.subplots()
    drawn = axes.imshow(share, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, label="load / mean", extend="max")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
