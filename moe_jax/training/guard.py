"""Skips a step whose loss or gradient is an outlier among those of the last steps that were kept.

Both are compared with the median of a window, in robust deviations: 1.4826 x the median distance from the median, which
for a normal distribution is its standard deviation. One spike does not move them, and a skipped step never enters the
window. Whether everything is finite is checked first, and is not this file's business.

W is `guard.window`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32

from moe_jax.config import GuardConfig
from moe_jax.mesh import AnyMesh, replicated

TO_DEVIATION = 1.4826  # of a normal distribution: its standard deviation over its median distance
LEAST_SHARE = 1e-3  # of the median, which a deviation counts at least: in a flat window everything would be an outlier


class Guard(NamedTuple):
    """The part of the train state that the guard needs.

    losses, norms: loss and gradient norm of the last kept steps, step n in place n % W. seen: kept steps so far.
    outliers: skipped steps so far. in_a_row: of them, those since the last kept step.
    """

    losses: Float32[Array, "window"]
    norms: Float32[Array, "window"]
    seen: Int32[Array, ""]
    outliers: Int32[Array, ""]
    in_a_row: Int32[Array, ""]


def initial(config: GuardConfig, mesh: Mesh | None = None) -> Guard | None:
    """The state before the first step, placed on the mesh; None if `guard.threshold` is 0."""
    if not config.threshold:
        return None

    def make() -> Guard:
        empty, zero = jnp.zeros(config.window, jnp.float32), jnp.zeros((), jnp.int32)
        return Guard(empty, empty, zero, zero, zero)

    return jax.jit(make, out_shardings=None if mesh is None else shardings(config, mesh))()


def shardings(config: GuardConfig, mesh: AnyMesh) -> Guard | None:
    """Every device has all of it; None as in `initial`."""
    if not config.threshold:
        return None
    whole: Any = replicated(mesh)
    return Guard(whole, whole, whole, whole, whole)


def is_outlier(config: GuardConfig, guard: Guard, loss: Array, norm: Array) -> Bool[Array, ""]:
    """Whether a step is to be skipped, given its loss and gradient norm; never before the window is full.

    After `guard.most` outliers in a row the next step is kept, because they are no outliers then but a new level.
    """
    above = _is_above(config, guard.losses, loss) | _is_above(config, guard.norms, norm)
    return above & (guard.seen >= config.window) & (guard.in_a_row < config.most)


def has_failed(config: GuardConfig, stuck: Any) -> Any:
    """Whether the run goes back, because enough steps in a row were not kept; given `TrainState.stuck`, here or there.

    From then on no step is kept, so that no number depends on how soon the run notices.
    """
    return (stuck >= config.rollback) & (config.rollback > 0)


def _is_above(config: GuardConfig, window: Float32[Array, "window"], value: Array) -> Bool[Array, ""]:
    median = jnp.median(window)
    deviation = TO_DEVIATION * jnp.median(jnp.abs(window - median))
    return value > median + config.threshold * jnp.maximum(deviation, LEAST_SHARE * jnp.abs(median))


def advance(
    config: GuardConfig,
    guard: Guard,
    finite: Bool[Array, ""],
    outlier: Bool[Array, ""],
    loss: Array,
    norm: Array,
) -> Guard:
    """The state after a step; one that is not finite changes nothing.

    A step that is kept after `guard.most` outliers begins the window anew, at the new level.
    """
    begins_anew = guard.in_a_row >= config.most
    seen = jnp.where(begins_anew, 0, guard.seen)
    place = seen % config.window
    kept = Guard(
        guard.losses.at[place].set(loss.astype(jnp.float32)),
        guard.norms.at[place].set(norm.astype(jnp.float32)),
        seen + 1,
        guard.outliers,
        jnp.zeros_like(guard.in_a_row),
    )
    skipped = guard._replace(outliers=guard.outliers + 1, in_a_row=guard.in_a_row + 1)
    after = jax.tree.map(lambda a, b: jnp.where(outlier, a, b), skipped, kept)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, guard)
