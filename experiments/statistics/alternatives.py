"""Other intervals for an effect in a branched sweep, which reports do not offer: the simulation shows why.

Each is a function of (values, arm, baseline, generator) that returns (low, high), the ends of a 95 % interval.
"""

import warnings
from collections.abc import Callable

import numpy as np

from .blocks import Cells, Values, complete, effect, pairs
from .intervals import CONFIDENCE, Interval, interval, t_quantile

Ends = tuple[float, float]
Alternative = Callable[[Values, str, str, np.random.Generator], Ends]
RESAMPLES = 500


def ends(value: Interval) -> Ends:
    """The ends of an interval; infinite without a half-width."""
    half = np.inf if value.half is None else value.half
    return value.mean - half, value.mean + half


def every_pair(values: Values, arm: str, baseline: str, _: np.random.Generator) -> Ends:
    """The t-interval of all paired differences, as if the branches of a trunk were independent."""
    return ends(interval(d for cell in pairs(values, arm, baseline).values() for d in cell))


def bootstrap(values: Values, arm: str, baseline: str, generator: np.random.Generator) -> Ends:
    """The percentile bootstrap of the blocks (scipy)."""
    return _bootstrap(values, arm, baseline, generator, "percentile")


def bootstrap_bca(values: Values, arm: str, baseline: str, generator: np.random.Generator) -> Ends:
    """The bias-corrected and accelerated bootstrap of the blocks (scipy)."""
    return _bootstrap(values, arm, baseline, generator, "BCa")


def _bootstrap(values: Values, arm: str, baseline: str, generator: np.random.Generator, method: str) -> Ends:
    from scipy import stats

    blocks = list(effect(values, arm, baseline).blocks.values())
    if len(blocks) < 2:
        return np.nan, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # resamples of three blocks are often all the same
        found = stats.bootstrap(
            (blocks,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method=method, rng=generator
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def hierarchical_bootstrap(values: Values, arm: str, baseline: str, generator: np.random.Generator) -> Ends:
    """Resample trunk seeds, and the data seeds within each of their trunks; percentiles of the means."""
    cells, trunks, seeds = _whole(values, arm, baseline)
    if len(seeds) < 2:
        return np.nan, np.nan
    counts = np.asarray([[len(cells[trunk, seed]) for seed in seeds] for trunk in trunks])
    padded = np.zeros((*counts.shape, counts.max()))
    for i, j in np.ndindex(counts.shape):
        padded[i, j, : counts[i, j]] = cells[trunks[i], seeds[j]]
    method = np.arange(len(trunks))[None, :, None, None]
    seed = generator.integers(len(seeds), size=(RESAMPLES, 1, len(seeds), 1))
    count = counts[method, seed]
    place = np.floor(generator.random((RESAMPLES, *padded.shape)) * count).astype(int)
    kept = np.where(np.arange(padded.shape[2]) < count, padded[method, seed, place], 0.0)
    means = (kept.sum(axis=3) / count[..., 0]).mean(axis=(1, 2))
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def mixed_model(values: Values, arm: str, baseline: str, _: np.random.Generator) -> Ends:
    """A linear mixed model by REML (statsmodels), with the normal interval that statsmodels gives.

    Raises:
        ImportError: statsmodels is not installed.
    """
    from scipy import stats

    mean, error, _seeds = _mixed(values, arm, baseline)
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * error
    return mean - half, mean + half


def mixed_model_t(values: Values, arm: str, baseline: str, _: np.random.Generator) -> Ends:
    """The same model and standard error, with the t distribution of trunk seeds - 1 degrees of freedom.

    Raises:
        ImportError: statsmodels is not installed.
    """
    mean, error, seeds = _mixed(values, arm, baseline)
    half = t_quantile(seeds) * error
    return mean - half, mean + half


def _mixed(values: Values, arm: str, baseline: str) -> tuple[float, float, int]:
    """Mean, standard error and number of trunk seeds: trunk methods fixed, trunk seeds and trunks random effects.

    nan where the fit meets a singular matrix, which happens when a component is estimated as 0.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    cells, trunks, seeds = _whole(values, arm, baseline)
    rows = [(trunks.index(trunk), seed, d) for (trunk, seed), cell in sorted(cells.items()) for d in cell]
    method, group, observed = (np.asarray(column) for column in zip(*rows, strict=True))
    # a constant, and contrasts that sum to 0, so that the constant is the mean over methods
    sums = np.vstack([np.eye(len(trunks) - 1), -np.ones(len(trunks) - 1)])
    fixed = np.column_stack([np.ones(len(rows)), sums[method]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a component at 0 is on the edge of what the optimiser may choose
        unit = float(np.std(observed)) or 1.0
        model = MixedLM(observed / unit, fixed, group, exog_vc=_variance_of_trunks(method, group, len(trunks)))
        try:
            found = model.fit(reml=True)
        except np.linalg.LinAlgError:
            return np.nan, np.nan, len(seeds)
    return float(np.asarray(found.fe_params)[0]) * unit, float(np.asarray(found.bse_fe)[0]) * unit, len(set(group))


def _variance_of_trunks(method: np.ndarray, group: np.ndarray, num_trunks: int) -> object:
    """statsmodels' description of a random effect for every trunk within its trunk seed."""
    from statsmodels.regression.mixed_linear_model import VCSpec

    of_group = [np.eye(num_trunks)[method[group == seed]] for seed in np.unique(group)]
    names = [[f"trunk{i}" for i in range(num_trunks)] for _ in of_group]
    return VCSpec(["trunk"], [names], [of_group])


def _whole(values: Values, arm: str, baseline: str) -> tuple[Cells, list[str], list[int]]:
    cells = pairs(values, arm, baseline)
    trunks = sorted({trunk for trunk, _ in cells})
    return cells, trunks, complete(cells, trunks)


ALTERNATIVES: dict[str, Alternative] = {
    "t, every pair": every_pair,
    "bootstrap of blocks": bootstrap,
    "BCa bootstrap of blocks": bootstrap_bca,
    "hierarchical bootstrap": hierarchical_bootstrap,
    "mixed model": mixed_model,
    "mixed model, t": mixed_model_t,
}
