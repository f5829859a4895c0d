"""Record the router logits of a step for the simulator."""

import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.analysis.interference import Measure, first_micro_batch, jitted_on
from moe_jax.config import Config, num_moe_layers
from moe_jax.data.batches import Batch
from moe_jax.runtime import processes
from moe_jax.runtime.files import write_whole
from moe_jax.training.compile import compiled_by
from moe_jax.training.hooks import Context, Now
from moe_jax.training.micro_batches import report_of
from moe_jax.training.state import TrainState, step_key


def record_next_step(context: Context, now: Now) -> None:
    """Write the `Scores` of the step that is due to workdir/scores/<step>.npz; process 0 writes."""
    scores = make_recorder(context.config, context.mesh)(now.state, now.batch, step_key(context.config))
    arrays = jax.device_get(scores)._asdict()
    if processes.index() == 0:
        folder = context.workdir / "scores"
        folder.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        write_whole(folder / f"{now.step:08d}.npz", packed.getvalue())


def make_recorder(config: Config, mesh: Mesh | None = None) -> Measure:
    """A jitted (state, batch, key) -> `Scores` of the step's first micro-batch, whole on every device."""
    return jitted_on(record, compiled_by(config), mesh)


class Scores(NamedTuple):
    """Recorded router logits, float16 [L, T, E], with the mask of valid tokens and the tokens' ids.

    The layers of multi-token prediction are left out, because their tokens are different ones.
    """

    logits: Float[Array, "layers tokens experts"]
    mask: Bool[Array, "tokens"]
    ids: Int32[Array, "tokens"]


def record(config: Config, state: TrainState, batch: Batch, key: Array, mesh: Mesh | None = None) -> Scores:
    """The router logits of the step's first micro-batch, as the train step is about to see them."""
    routing = report_of(config, state, first_micro_batch(config, state, batch, key, mesh), mesh).details.routing
    tokens = routing.tokens
    assert tokens.mask is not None and tokens.ids is not None
    logits = routing.logits[: num_moe_layers(config.model) - config.model.mtp_depth]
    return Scores(logits.astype(jnp.float16), tokens.mask[0], tokens.ids[0])
