"""What the pictures of curves have in common: colours, smoothing, ticks."""

from typing import Any

import numpy as np

# Okabe and Ito's, which colour-blind readers can distinguish, without yellow and black; and two more
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5AA6", "#8C6D1F")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over about `window` steps around each, over the last axis; nan counts as absent.

    Fewer at the ends: step n never has a part of one before n / 2, so that a steep start stays steep.
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
    """[..., N] -> [..., N + 1]: element n is the sum of the n first."""
    zero = np.zeros((*values.shape[:-1], 1))
    return np.concatenate([zero, np.cumsum(values, axis=-1)], axis=-1)


def plain_log_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, or at powers of ten where there are many, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    subs = (1.0,) if low > 0 and high / low > 500 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
