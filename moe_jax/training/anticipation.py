"""Anticipatory routing: the experts of a step are chosen by the parameters of D = `anticipation.delay` steps before.

Step t chooses the experts of batch t + D with its parameters, before it moves them, in a forward pass without gradient.
Step t + D uses them; scores, gates and all else come from its own parameters. Batches are a function of the step, so no
queue of them is kept, and the choices are part of the train state, so a run resumes with the numbers of one that was
not interrupted. With `anticipation.spike` the pass ahead runs only after a spike of the loss.

L MoE layers, T tokens of a step, K experts a token, N micro-batches.

Source: DeepSeek-V4 (arXiv 2606.19348) section 4.2.3, as summarised in public notes; when a spike is one is this
project's choice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float32, Int16, Int32

from moe_jax.config import AnticipationConfig, Config, num_moe_layers
from moe_jax.mesh import AnyMesh, replicated, spec

NOT_CHOSEN = -1  # the step that uses it chooses by its own parameters
DIMS = ("layers", "tokens")  # of the choices of one step; the slots of several are stacked in front


class LossWatch(NamedTuple):
    """What decides whether a loss is a spike: its running mean and variance over `seen` steps, in nats.

    until: the step at which the pass ahead is switched off again; 0 before the first spike.
    """

    mean: Float32[Array, ""]
    variance: Float32[Array, ""]
    seen: Int32[Array, ""]
    until: Int32[Array, ""]


class Anticipation(NamedTuple):
    """The part of the train state that anticipatory routing needs.

    ids: expert ids of later steps, int16, `NOT_CHOSEN` where there are none; those of step t are in slot t % D.
    watch: of the loss; the same whether or not `anticipation.spike` is set.
    """

    ids: Int16[Array, "delay layers tokens top_k"]
    watch: LossWatch


def initial(config: Config, mesh: Mesh | None = None) -> Anticipation | None:
    """The state in which nothing is chosen ahead, placed on the mesh; None if `anticipation.delay` is 0."""
    delay = config.anticipation.delay
    if not delay:
        return None
    tokens = config.batch_size * config.sequence_length
    shape = delay, num_moe_layers(config.model), tokens, config.model.top_k

    def make() -> Anticipation:
        scalars = jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0)
        return Anticipation(jnp.full(shape, NOT_CHOSEN, jnp.int16), LossWatch(*scalars))

    return jax.jit(make, out_shardings=None if mesh is None else shardings(config, mesh))()


def shardings(config: Config, mesh: AnyMesh) -> Anticipation | None:
    """The choices are split like the tokens; None as in `initial`."""
    if not config.anticipation.delay:
        return None
    whole: Any = replicated(mesh)
    by_token: Any = NamedSharding(mesh, spec("whole", *DIMS))
    return Anticipation(by_token, LossWatch(whole, whole, whole, whole))


def due(state: Anticipation, step: Int32[Array, ""]) -> Int16[Array, "layers tokens top_k"]:
    """The choices that were made for a step."""
    return jax.lax.dynamic_index_in_dim(state.ids, step % len(state.ids), keepdims=False)


def by_micro_batch(
    ids: Int16[Array, "layers tokens top_k"], batch_size: int, micro_batches: int
) -> Int16[Array, "micro layers tokens top_k"]:
    """The choices of each micro-batch, whose rows are those of `split_batch`: i, i + N, ..."""
    layers, _, top_k = ids.shape
    by_row = ids.reshape(layers, batch_size // micro_batches, micro_batches, -1, top_k)
    return jnp.moveaxis(by_row, 2, 0).reshape(micro_batches, layers, -1, top_k)


def of_step(ids: Int16[Array, "micro layers tokens top_k"], batch_size: int) -> Int16[Array, "layers tokens top_k"]:
    """The inverse of `by_micro_batch`."""
    micro_batches, layers, _, top_k = ids.shape
    by_row = ids.reshape(micro_batches, layers, batch_size // micro_batches, -1, top_k)
    return jnp.moveaxis(by_row, 0, 2).reshape(layers, -1, top_k)


def advance(
    config: AnticipationConfig,
    before: Anticipation,
    step: Int32[Array, ""],
    loss: Float32[Array, ""],
    choose_later: Callable[[], Int16[Array, "layers tokens top_k"]],
) -> Anticipation:
    """The state after a step, with the choices for step + D in the slot that this step has used.

    A skipped step advances it too, because a slot belongs to a step and not to an update.

    Args:
        before: the state before the step.
        step: 0-based.
        loss: of the step, in nats per token.
        choose_later: the choices for step + D; called, or compiled into a branch that is not taken.
    """
    watch = observe(config, before.watch, step, loss)
    if config.spike == 0:
        ids = choose_later()
    else:
        ids = jax.lax.cond(step < watch.until, choose_later, lambda: jnp.full_like(before.ids[0], NOT_CHOSEN))
    return Anticipation(jax.lax.dynamic_update_index_in_dim(before.ids, ids, step % config.delay, 0), watch)


def observe(
    config: AnticipationConfig, watch: LossWatch, step: Int32[Array, ""], loss: Float32[Array, ""]
) -> LossWatch:
    """The watch after a loss: a spike is one more than `spike` standard deviations above the mean.

    Mean and variance weigh the last `window` losses, exponentially; before as many were seen there is no spike. A loss
    that is not finite is no spike, because its step is skipped, and is not averaged.
    """
    above = loss - watch.mean
    is_spike = (watch.seen >= config.window) & (above > config.spike * jnp.sqrt(watch.variance))
    share = 1.0 / jnp.minimum(watch.seen + 1, config.window).astype(jnp.float32)
    after = LossWatch(
        mean=watch.mean + share * above,
        variance=(1.0 - share) * (watch.variance + share * above**2),
        seen=watch.seen + 1,
        until=jnp.where(is_spike, step + config.hold, watch.until),
    )
    return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(loss), new, old), after, watch)
