"""The hooks that observe a run beside its steps, at the intervals of its config.

Their methods import what they call, because the train command imports this file before it loads jax.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_jax.config import Config
from moe_jax.training.hooks import Context, Hook, Now

if TYPE_CHECKING:
    from moe_jax.training.state import TrainState


def observers(config: Config) -> list[Hook]:
    """The hooks of `record_scores_every` and `measure_every`, each only if its interval is not 0."""
    return [hook for hook in (Record(config.record_scores_every), Measure(config.measure_every)) if hook.every]


class Measure(Hook):
    """Measures interference at a step, and stores the routing of held-out tokens at evaluations."""

    key = "measure_every"

    def __init__(self, every: int) -> None:
        self.every = every

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """Compare balancing's gradient with the language model's, at the parameters before the step."""
        from moe_jax.analysis.interference import measure_next_step

        with context.ledger("evaluation"):
            return measure_next_step(context, now)

    def evaluate(self, context: Context, state: "TrainState") -> Mapping[str, float]:
        """Write workdir/routing/<step>.npy."""
        from moe_jax.analysis.survey import store_routing

        where = context.config, state, context.corpus, context.mesh
        store_routing(*where, context.workdir, context.watchdog, stopped=context.stopped)
        return {}


class Record(Hook):
    """Writes the router logits of a step to workdir/scores, for the simulator."""

    key = "record_scores_every"

    def __init__(self, every: int) -> None:
        self.every = every

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """Write workdir/scores/<step>.npz."""
        from moe_jax.analysis.recording import record_next_step

        with context.ledger("evaluation"):
            record_next_step(context, now)
        return {}
