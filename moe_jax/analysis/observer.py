"""What a run looks at beside its steps, every so many of them: measures for the log, and scores for a file."""

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.analysis.interference import make_measure_step
from moe_jax.analysis.recording import make_recorder
from moe_jax.config import Config
from moe_jax.data.batches import Batch
from moe_jax.runtime import processes
from moe_jax.runtime.files import write_whole
from moe_jax.training.state import TrainState


class Observer:
    """What is measured or recorded of a step before it is done, at the intervals of the config."""

    def __init__(self, config: Config, mesh: Mesh, workdir: Path) -> None:
        self._config, self._folder = config, workdir / "scores"
        self._mesh = mesh

    def before(self, step: int, state: TrainState, batch: Batch, key: Any) -> dict[str, Any]:
        """The measures of the step that is due next, on the device; recorded scores go to a file."""
        c, done = self._config, step + 1
        if c.record_scores_every and done % c.record_scores_every == 0:
            self._write(step, make_recorder(c, self._mesh)(state, batch, key))
        if c.measure_every and done % c.measure_every == 0:
            return make_measure_step(c, self._mesh)(state, batch, key)
        return {}

    def _write(self, step: int, scores: Any) -> None:
        arrays = jax.device_get(scores)._asdict()
        if processes.index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            packed = io.BytesIO()
            np.savez_compressed(packed, **arrays)
            write_whole(self._folder / f"{step:08d}.npz", packed.getvalue())
