"""The state that a run begins with: from its checkpoint, from another run's state or weights, or drawn at random."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import dispatch
from moe_jax.balance.selectors import balanced_table
from moe_jax.config import Config, as_dict, differences, keys_that_change, validate
from moe_jax.config.paths import workdir_of
from moe_jax.data import Corpus, token_frequencies
from moe_jax.runtime import checkpoint, manifest, processes
from moe_jax.runtime.signals import can_be_noted
from moe_jax.runtime.workdir import Identity, config_of_run, identity_of, read_run, refuse_another_run
from moe_jax.training.branch import branch, refuse_other_beginning, refuse_other_trunk, use_of_bias
from moe_jax.training.optimizer import cost_of_rounding
from moe_jax.training.restore import restore_run
from moe_jax.training.rollback import Rollback, batch_of, known
from moe_jax.training.state import TrainState, abstract_state, init_state, state_around, with_other_batches
from moe_jax.training.tokenizer import carry_tokenizer


class Start(NamedTuple):
    """What a run begins with: its state, `extra` of its checkpoint, its identity, lines to print, and its rollbacks."""

    state: TrainState
    extra: dict[str, Any]
    identity: Identity
    remarks: list[str]
    rollbacks: tuple[Rollback, ...] = ()


def start(config: Config, mesh: Mesh, workdir: Path, corpus: Corpus) -> Start:
    """Begin from the newest checkpoint of the workdir, else as `branch_from` or `init_from` says, else at random.

    Args:
        config: validated.
        mesh: of the state.
        workdir: of the run; gets the tokenizer of a new run, unless it is that of bytes.
        corpus: of the run.

    Raises:
        ValueError: a damaged checkpoint, one of another run or another model, or weights that this run cannot use.
    """
    begun = _resumed(config, mesh, workdir, corpus) or _fresh(config, mesh, workdir, corpus)
    return _after_rollbacks(config, mesh, workdir, begun._replace(remarks=[*begun.remarks, *_remarks(config, mesh)]))


def _after_rollbacks(config: Config, mesh: Mesh, workdir: Path, begun: Start) -> Start:
    """The beginning with the rollbacks of the run, of which its checkpoint does not know the last one to it."""
    there = known(begun.extra)
    rollbacks = known(begun.extra, processes.by_first(lambda: read_run(workdir)))
    step = int(begun.state.step)
    if batch_of(rollbacks, step) == batch_of(there, step):
        return begun._replace(rollbacks=rollbacks)
    return begun._replace(rollbacks=rollbacks, state=with_other_batches(config, begun.state, mesh))


def _remarks(config: Config, mesh: Mesh) -> list[str]:
    """Lines to print about a run of this config on this mesh."""
    lines = []
    if not can_be_noted():
        lines.append("not in the main thread: signals are left to the surrounding program, and do not save the run")
    m = config.model
    if m.num_experts and (line := dispatch.kernel_note(m.cpu_kernel, mesh, m.compute_dtype, m.quantization)):
        lines.append(line)
    if line := cost_of_rounding(config):
        lines.append(line)
    if unused := jax.device_count() - mesh.size:
        lines.append(f"{unused} of {jax.device_count()} devices are not in the mesh and are not used")
    return lines


# --- resumed --------------------------------------------------------------------------------------------------


def _resumed(config: Config, mesh: Mesh, workdir: Path, corpus: Corpus) -> Start | None:
    """Begin from the newest checkpoint of the workdir, which needs no other workdir; None if there is none."""
    found = restore_run(config, workdir, mesh)
    if found is None:
        return None
    state, extra = found
    there = identity_of(extra)

    def check() -> list[str]:
        refuse_another_run(workdir, "checkpoint", extra["config"], there, config, corpus.fingerprint)
        weights = _refuse_other_weights(workdir, there, validate(extra["config"]), config)
        return [*weights, *refuse_other_trunk(workdir, there, config)]

    remarks = [*processes.by_first(check), f"resuming from step {int(state.step)}"]
    return Start(state, extra, there or Identity(corpus.fingerprint), remarks)


def _refuse_other_weights(workdir: Path, identity: Identity | None, there: Config, config: Config) -> list[str]:
    """Check that `init_from` still names the weights that the run started from; return a line if they are gone.

    A run no longer needs these weights once it has a checkpoint, so they may be moved or deleted, and `init_from` may
    be empty.

    Raises:
        ValueError: `init_from` names other weights than those that the run started from.
    """
    if not config.init_from:
        return []
    if identity is None:  # recorded by an earlier version: its weights are those that its config names
        same = config.init_from == there.init_from
    elif identity.weights is None:
        same = False
    else:
        checkpoints = workdir_of(config.init_from, "init_from") / "checkpoints"
        now = manifest.fingerprint_at(checkpoints, identity.weights["step"])
        if now is None:
            return [f"init_from={config.init_from!r} no longer has the weights that this run started from; not needed"]
        same = now == identity.weights["fingerprint"]
    if not same:
        raise ValueError(
            f"init_from={config.init_from!r} has other weights than the run in --workdir={workdir} started from; use "
            "another workdir to start from them, or init_from='' to resume."
        )
    return []


# --- fresh ----------------------------------------------------------------------------------------------------


def _fresh(config: Config, mesh: Mesh, workdir: Path, corpus: Corpus) -> Start:
    """Begin a new run: with random parameters, with those of `init_from`, or with the whole state of `branch_from`."""
    weights = None
    trunk = None
    extra: dict[str, Any] = {}
    labels: set[str] = set()
    branching: list[str] = []
    if config.branch_from:
        state, extra, trunk, labels, branching = branch(config, mesh, corpus)
    elif config.init_from:
        state, weights = _weights_of(config, mesh)
    else:
        state = init_state(config, mesh)
    processes.by_first(lambda: refuse_other_beginning(workdir, trunk))
    state = _with_hash_tables(config, state, corpus, labels)
    remarks = processes.by_first(lambda: [*_changes_of_model(config), *carry_tokenizer(config, workdir, corpus)])
    return Start(state, extra, Identity(corpus.fingerprint, weights, trunk), [*branching, *remarks])


def _weights_of(config: Config, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
    """The state before step 0 with parameters and bias from the newest checkpoint of `config.init_from`.

    A bias that is zero everywhere carries no information, so the run's own initial bias is used instead.

    Returns:
        the state; "step" and "fingerprint" of that checkpoint, which identify it.

    Raises:
        ValueError: no such checkpoint, a damaged one, of another model, or with a bias that this run cannot use.
    """
    target = abstract_state(config, mesh)
    folder = workdir_of(config.init_from, "init_from") / "checkpoints"
    found = checkpoint.restore_weights(
        folder,
        {"params": target.params, "bias": target.bias},
        verify=config.checkpoint.verify,
        fallback=config.checkpoint.fallback,
        cast=True,
    )
    if found is None:
        raise ValueError(f"init_from={config.init_from!r} has no finished checkpoint; name the workdir of one.")
    weights, extra = found
    has_bias = any(np.asarray(leaf).any() for leaf in jax.device_get(jax.tree.leaves(weights["bias"])))
    if has_bias:
        _refuse_bias_of_another_kind(config, validate(extra["config"]))
    step = extra["step"]
    path = manifest.of_step(folder, step)
    known = {"step": step, "fingerprint": processes.by_first(lambda: manifest.fingerprint(path))}
    return state_around(config, weights["params"], weights["bias"] if has_bias else None, mesh), known


def _changes_of_model(config: Config) -> list[str]:
    """A line if the model of `init_from` has the same shapes as this one and computes something else."""
    if not config.init_from:
        return []
    there = as_dict(config_of_run(workdir_of(config.init_from, "init_from")))["model"]
    here = as_dict(config)["model"]
    binding = keys_that_change("model")
    changed = [line for line in differences(there, here) if f"model.{line.partition(':')[0]}" in binding]
    return [f"the weights were trained in another model: {'; '.join(changed)}"] if changed else []


def _refuse_bias_of_another_kind(config: Config, there: Config) -> None:
    """Raise a ValueError if one run adds the bias to scores and the other multiplies scores by it."""
    then, now = use_of_bias(there), use_of_bias(config)
    if then != now:
        raise ValueError(
            f"init_from={config.init_from!r} has a bias that {then}, but in this run's balance it {now}; "
            "choose a balance of the same kind."
        )


def _with_hash_tables(config: Config, state: TrainState, corpus: Corpus, known: set[str]) -> TrainState:
    """The state with the tables of the method `hash`, except `known` labels, balanced for the corpus's frequencies.

    Every layer has the same groups of tokens, assigned to its experts in an order of its own.
    """
    labels = [e.label for e in config.balance if e.method == "hash" and e.label not in known]
    if not labels:
        return state
    m = config.model
    frequencies = token_frequencies(corpus, m.vocab_size, config.data.weights)
    table = balanced_table(frequencies, m.num_experts, m.top_k, config.seed)

    def filled(path: Any, leaf: Any) -> Any:
        if path[-1] != jax.tree_util.DictKey("table"):
            return leaf
        orders = (np.random.default_rng((config.seed, layer)).permutation(m.num_experts) for layer in range(len(leaf)))
        return jax.device_put(np.stack([order[table] for order in orders]).astype(np.int32), leaf.sharding)

    own = {label: jax.tree_util.tree_map_with_path(filled, state.balance[label]) for label in labels}
    return state._replace(balance=state.balance | own)
