"""Router logits of a step, recorded for the simulator."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from moe_jax import balance
from moe_jax.analysis.interference import Measure, _first_micro_batch, _jitted
from moe_jax.config import Config, num_moe_layers
from moe_jax.data.batches import Batch
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.training.compile import compiled_by
from moe_jax.training.losses import row_nats
from moe_jax.training.state import TrainState


def make_recorder(config: Config, mesh: Mesh | None = None) -> Measure:
    """(state, batch, key) -> `Scores` of the step's first micro-batch, jitted, whole on every device."""
    return _jitted(record, compiled_by(config), mesh)


class Scores(NamedTuple):
    """A recorded piece of the router's stream: float16 logits [L, T, E], and which tokens are valid, and their ids.

    Layers of multi-token prediction, which see other tokens, are not in it.
    """

    logits: Float[Array, "layers tokens experts"]
    mask: Bool[Array, "tokens"]
    ids: Int32[Array, "tokens"]


def record(config: Config, state: TrainState, batch: Batch, key: Array, mesh: Mesh | None = None) -> Scores:
    """The router logits of the step's first micro-batch, as the train step is about to see them."""
    micro, key = _first_micro_batch(config, batch, key, state, mesh)
    balancer = balance.make(config.balance, config.model)
    fwd = Pass(inputs_of(micro), balancer, PerLayer(state.balance), key, train=True, mesh=mesh)
    report = row_nats(config, state.params, state.bias, fwd, micro)[1]
    assert report is not None  # only models with experts are recorded
    tokens = report.details.routing.tokens
    assert tokens.mask is not None and tokens.ids is not None
    logits = report.details.routing.logits[: num_moe_layers(config.model) - config.model.mtp_depth]
    return Scores(logits.astype(jnp.float16), tokens.mask[0], tokens.ids[0])
