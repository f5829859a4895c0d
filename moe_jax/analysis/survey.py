"""The experts of each held-out domain, and the routing that a run stores while it trains."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.analysis import specialisation
from moe_jax.analysis.specialisation import Survey
from moe_jax.config import Config, num_moe_layers
from moe_jax.data import Corpus
from moe_jax.runtime import processes
from moe_jax.runtime.signals import Stopped, never
from moe_jax.runtime.watchdog import Watchdog
from moe_jax.training.evaluation import held_out
from moe_jax.training.state import TrainState


def store_routing(
    config: Config,
    state: TrainState,
    corpus: Corpus,
    mesh: Mesh,
    workdir: Path,
    watchdog: Watchdog | None = None,
    stopped: Stopped = never,
) -> None:
    """Write the experts of the tokens of the first held-out batch to workdir/routing/<step>.npy, uint16 [L, T, S].

    The evaluate command computes router saturation from these files. Does nothing if `config.measure_every` is 0.
    Every process must call it; process 0 writes.
    """
    if not config.measure_every:
        return
    work = (watchdog or Watchdog(0)).watch("routing of evaluation", 0)
    choices_step = specialisation.make_choices_step(config, mesh)
    chosen = choices_step(state, next(held_out(config, corpus, mesh, stopped))).expert_ids
    work.result = chosen
    if processes.index() == 0:
        tokens = _fingerprint_of_first_batch(config, corpus)
        specialisation.store_ids(workdir, int(state.step), jax.device_get(chosen), tokens)


def _fingerprint_of_first_batch(config: Config, corpus: Corpus) -> str:
    """A hash of everything that determines the tokens of the first held-out batch."""
    rows = config.batch_size // config.micro_batches
    determinants = [corpus.fingerprint, config.data.eval_sequences, rows, config.sequence_length]
    return hashlib.sha256(json.dumps(determinants).encode()).hexdigest()[:16]


def survey(config: Config, state: TrainState, corpus: Corpus, mesh: Mesh, stopped: Stopped = never) -> Survey:
    """Count which experts each held-out domain uses, and which are used together."""
    step = specialisation.make_choices_step(config, mesh)
    layers = num_moe_layers(config.model)
    experts = config.model.num_experts
    loads = np.zeros((len(corpus.domains), layers, experts), np.int64)
    pairs = np.zeros((layers, experts, experts), np.int64)
    for batch in held_out(config, corpus, mesh, stopped):
        domain, row_loads, new = jax.device_get(step(state, batch)[1:])
        np.add.at(loads, domain[domain >= 0], row_loads[domain >= 0])
        pairs += new
    return Survey(corpus.domains, loads, pairs)
