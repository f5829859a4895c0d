"""Which experts each held-out domain uses, and the routing that a run stores as it trains."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.config import Config, num_moe_layers
from moe_jax.runtime import processes
from moe_jax.runtime.signals import Stopped, never
from moe_jax.runtime.watchdog import Watchdog
from moe_jax.training.evaluation import held_out

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.analysis.specialisation import Survey
    from moe_jax.data import Corpus
    from moe_jax.training.state import TrainState


def store_routing(
    config: Config,
    state: "TrainState",
    corpus: "Corpus",
    mesh: "Mesh",
    workdir: Path,
    watchdog: Watchdog | None = None,
    stopped: Stopped = never,
) -> None:
    """Write which experts the tokens of the first held-out batch have now, to workdir/routing/<step>.npy.

    uint16 [L, T, S], by process 0, if `config.measure_every` > 0; every process must call it. What the evaluate
    command computes router saturation from.
    """
    import jax

    from moe_jax.analysis.specialisation import make_choices_step, store_ids

    if not config.measure_every:
        return
    work = (watchdog or Watchdog(0)).watch("routing of evaluation", 0)
    chosen = make_choices_step(config, mesh)(state, next(held_out(config, corpus, mesh, stopped))).expert_ids
    work.result = chosen
    if processes.index() == 0:
        store_ids(workdir, int(state.step), jax.device_get(chosen), _name_of_first_batch(config, corpus))


def _name_of_first_batch(config: Config, corpus: "Corpus") -> str:
    """A name that is another wherever the first held-out batch may have other tokens: all that decides them."""
    rows = config.batch_size // config.micro_batches
    decides = [corpus.fingerprint, config.data.eval_sequences, rows, config.sequence_length]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def survey(config: Config, state: "TrainState", corpus: "Corpus", mesh: "Mesh", stopped: Stopped = never) -> "Survey":
    """Which experts each held-out domain uses, and which are used together."""
    import jax
    import numpy as np

    from moe_jax.analysis.specialisation import Survey, make_choices_step

    step, layers, experts = make_choices_step(config, mesh), num_moe_layers(config.model), config.model.num_experts
    loads = np.zeros((len(corpus.domains), layers, experts), np.int64)
    pairs = np.zeros((layers, experts, experts), np.int64)
    for batch in held_out(config, corpus, mesh, stopped):
        domain, row_loads, new = jax.device_get(step(state, batch)[1:])
        np.add.at(loads, domain[domain >= 0], row_loads[domain >= 0])
        pairs += new
    return Survey(corpus.domains, loads, pairs)
