"""A step's batch in micro-batches, and the forward passes over them that need no gradient.

N micro-batches, B sequences, L MoE layers, T tokens of a step, K experts a token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int16, Key

from moe_jax import balance
from moe_jax.config import Config
from moe_jax.data.batches import Batch
from moe_jax.mesh import constrain, spec, specs
from moe_jax.model.forward import Pass, PerLayer, Report, inputs_of
from moe_jax.training import anticipation
from moe_jax.training.losses import model_row_nats
from moe_jax.training.state import TrainState


class Micro(NamedTuple):
    """One micro-batch, or all of a step with N in front: rows, key, and experts that were chosen before the step."""

    batch: Batch
    key: Key[Array, "*micro"]
    chosen: Int16[Array, "*micro layers tokens top_k"] | None = None


def micro_batches_of_step(
    config: Config, state: TrainState, batch: Batch, key: Key[Array, ""], mesh: Mesh | None
) -> Micro:
    """The micro-batches of the step that follows the state, with the experts that were chosen for it."""
    micro = micro_batches(config, batch, key, mesh)
    if state.anticipation is None:
        return micro
    ids = anticipation.due(state.anticipation, state.step)
    return micro._replace(chosen=anticipation.by_micro_batch(ids, config.batch_size, config.micro_batches))


def micro_batches(config: Config, batch: Batch, key: Key[Array, ""], mesh: Mesh | None) -> Micro:
    """A step's batch in micro-batches, each with its key; `key` is the step's."""
    rows = constrain(split_batch(batch, config.micro_batches), mesh, specs(Batch.dims(), "micro_batches"))
    numbers = jnp.arange(config.micro_batches, dtype=jnp.int32)
    return Micro(rows, jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers))


def split_batch(batch: Batch, micro_batches: int) -> Batch:
    """[B, ...] to [N, B / N, ...]; micro-batch i has the rows i, i + N, ..., so that rows stay on their device."""

    def split(a: Any) -> Array:
        a = jnp.asarray(a)
        return a.reshape(a.shape[0] // micro_batches, micro_batches, *a.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def report_of(config: Config, state: TrainState, micro: Micro, mesh: Mesh | None) -> Report:
    """What the layers report of a forward pass over one micro-batch, as in training; the config has MoE layers."""
    balancer = balance.make(config.balance, config.model)
    per_layer = PerLayer(state.balance, chosen=micro.chosen)
    fwd = Pass(inputs_of(micro.batch), balancer, per_layer, micro.key, train=True, mesh=mesh)
    report = model_row_nats(config, state.params, state.bias, fwd, micro.batch)[1]
    assert report is not None  # no caller has a dense model
    return report


def chosen_experts(
    config: Config, state: TrainState, micro: Micro, mesh: Mesh | None
) -> Int16[Array, "layers tokens top_k"]:
    """The experts of all tokens of a step's micro-batches, under the parameters and the bias of the state."""

    def one(micro: Micro) -> Int16[Array, "layers tokens top_k"]:
        return report_of(config, state, micro, mesh).details.routing.expert_ids.astype(jnp.int16)

    ids = anticipation.of_step(jax.lax.map(one, micro), config.batch_size)
    return constrain(ids, mesh, spec(*anticipation.DIMS))
