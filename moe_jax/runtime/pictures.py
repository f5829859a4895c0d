"""Colours, smoothing and ticks of the pictures of curves."""

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
