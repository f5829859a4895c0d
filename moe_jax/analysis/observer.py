"""What a run observes beside its steps, at the intervals of its config: measures for its log, files for commands."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_jax.analysis.survey import store_routing
from moe_jax.config import Config
from moe_jax.runtime import processes
from moe_jax.runtime.files import write_whole
from moe_jax.training.hooks import Context, Hook, Now

if TYPE_CHECKING:
    from moe_jax.training.state import TrainState


def observers(config: Config) -> list[Hook]:
    """The hooks of `record_scores_every` and `measure_every`; each is left out where its interval is 0."""
    return [hook for hook in (Record(config.record_scores_every), Measure(config.measure_every)) if hook.every]


class Measure(Hook):
    """Measures interference at a step, and stores at evaluations which experts held-out tokens have."""

    key = "measure_every"

    def __init__(self, every: int) -> None:
        self.every = every

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """Balancing's gradient against the language model's, at the parameters that the step starts from."""
        from moe_jax.analysis import interference
        from moe_jax.training.state import step_key

        with context.ledger("evaluation"):
            measure_step = interference.make_measure_step(context.config, context.mesh)
            return measure_step(now.state, now.batch, step_key(context.config))

    def evaluate(self, context: Context, state: "TrainState") -> Mapping[str, float]:
        """Write workdir/routing/<step>.npy."""
        where = context.config, state, context.corpus, context.mesh
        store_routing(*where, context.workdir, context.watchdog, stopped=context.stopped)
        return {}


class Record(Hook):
    """Writes the router logits of a step to workdir/scores, for the simulator."""

    key = "record_scores_every"

    def __init__(self, every: int) -> None:
        self.every = every

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """Write <step>.npz."""
        import jax
        import numpy as np

        from moe_jax.analysis.recording import make_recorder
        from moe_jax.training.state import step_key

        with context.ledger("evaluation"):
            scores = make_recorder(context.config, context.mesh)(now.state, now.batch, step_key(context.config))
            arrays = jax.device_get(scores)._asdict()
            if processes.index() == 0:
                folder = context.workdir / "scores"
                folder.mkdir(parents=True, exist_ok=True)
                packed = io.BytesIO()
                np.savez_compressed(packed, **arrays)
                write_whole(folder / f"{now.step:08d}.npz", packed.getvalue())
        return {}
