"""A run that begins with the whole state of a checkpoint of another run, its trunk, and continues from that step.

Parameters, moments, step and skipped steps are those of the trunk; the schedule and the batches continue from its step,
with the seed of the branch. The balance is the branch's own: a method that the trunk has too keeps its state, and the
bias is kept if both runs move one of the same kind. So an auxiliary loss that is branched from a run with a
bias is measured without that bias. L is the number of MoE layers.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from moe_jax import balance
from moe_jax.balance.wrappers import is_whole, taken_over
from moe_jax.config import BalanceEntry, Config, branch_point, changed_numbers, num_moe_layers, validate
from moe_jax.config.paths import workdir_of
from moe_jax.data import Corpus
from moe_jax.model.abstract import Tree, abstract_model
from moe_jax.runtime import checkpoint, manifest, processes
from moe_jax.runtime.files import is_remote
from moe_jax.runtime.workdir import Identity, identity_of, read_run
from moe_jax.training.attempts import is_finished
from moe_jax.training.optimizer import moved_by
from moe_jax.training.rollback import known, recorded
from moe_jax.training.state import (
    TrainState,
    abstract_state,
    initial_layers,
    read_bias,
    state_shardings,
    with_options,
    with_other_batches,
    write_bias,
)


class Branch(NamedTuple):
    """What a branched run begins with.

    state: before the step of the branch. extra: the trunk's valid tokens and rollbacks up to it. trunk: "step" and
    "fingerprint" of the trunk's checkpoint. known: labels of the methods whose state is the trunk's. remarks: lines to
    print.
    """

    state: TrainState
    extra: dict[str, Any]
    trunk: dict[str, Any]
    known: set[str]
    remarks: list[str]


def branch(config: Config, mesh: Mesh, corpus: Corpus) -> Branch:
    """Begin with the state of the checkpoint that `branch_from` names; its workdir is only read.

    Args:
        config: validated, with `branch_from`.
        mesh: of the state; the trunk may have been trained on another.
        corpus: of the branch.

    Raises:
        ValueError: no such checkpoint, a damaged one, or one of another model or with other moments.
    """
    folder, step = _checkpoints(config), branch_point(config)[1]
    with _listing_saved_steps(config):
        extra, fingerprint = processes.by_first(lambda: _about(manifest.of_step(folder, step)))
    there = _trunk(config, extra)
    with _listing_saved_steps(config):
        state = checkpoint.restore_step(folder, step, abstract_state(there, mesh), verify=config.checkpoint.verify)
    return Branch(
        _with_own_balance(config, there, state, mesh),
        {"tokens_seen": extra.get("tokens_seen", 0), **recorded(known(extra))},
        {"step": step, "fingerprint": fingerprint},
        {entry.label for entry, _ in _shared(config, there)},
        [f"branching from {config.branch_from}", *_differences(config, extra, corpus), *reset_notes(config, there)],
    )


# --- what is refused ------------------------------------------------------------------------------------------


def check_branch(config: Config, workdir: Path) -> None:
    """Raise a ValueError if a run that is about to begin in the workdir cannot begin as `branch_from` says.

    Reads no array and touches no device. A run that has a checkpoint of its own no longer needs its trunk.
    """
    if not config.branch_from:
        return
    folder, step = _checkpoints(config), branch_point(config)[1]
    if _is_same_folder(folder.parent, workdir):
        raise ValueError(
            f"branch_from={config.branch_from!r} names the --workdir={workdir} of this run, which a branch must leave "
            "as it is; use another workdir."
        )
    if checkpoint.committed(workdir / "checkpoints") or is_finished(config, workdir):
        return
    with _listing_saved_steps(config):
        extra, _ = _about(manifest.of_step(folder, step))
    _trunk(config, extra)


def refuse_other_trunk(workdir: Path, identity: Identity | None, config: Config) -> list[str]:
    """Check that `branch_from` still names the checkpoint that a run began with; return a line if it is gone.

    A run with a checkpoint of its own does not need it, so it may be gone, and `branch_from` may be empty.

    Raises:
        ValueError: `branch_from` names another checkpoint.
    """
    if not config.branch_from:
        return []
    step = branch_point(config)[1]
    began = identity.trunk if identity is not None else None
    if began is not None and began["step"] == step:
        now = manifest.fingerprint_at(_checkpoints(config), step)
        if now is None:
            return [f"branch_from={config.branch_from!r} no longer has the checkpoint of this run's start; not needed"]
        if now == began["fingerprint"]:
            return []
    raise ValueError(
        f"branch_from={config.branch_from!r} is another checkpoint than the run in --workdir={workdir} began with; use "
        "another workdir to branch from it, or branch_from='' to resume."
    )


def refuse_other_beginning(workdir: Path, trunk: Mapping[str, Any] | None) -> None:
    """Raise a ValueError if a run without a checkpoint of its own began with another one than the trunk's.

    Its log has lines of that run, which would be mixed with those of the new one.
    """
    began = identity_of(read_run(workdir))
    if began is not None and began.trunk != trunk:
        how = f"as a branch at step {began.trunk['step']}" if began.trunk else "without branch_from"
        raise ValueError(
            f"--workdir={workdir} holds a run that began {how}, and now branch_from names another beginning; set "
            "branch_from as it was, or use another workdir."
        )


def _checkpoints(config: Config) -> Path:
    return workdir_of(branch_point(config)[0], "branch_from") / "checkpoints"


def _is_same_folder(one: Path, other: Path) -> bool:
    if is_remote(one) or is_remote(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return one.resolve() == other.resolve()


def _about(path: Path) -> tuple[dict[str, Any], str]:
    """`extra` of a checkpoint, and its fingerprint."""
    return manifest.read_manifest(path)["extra"], manifest.fingerprint(path)


@contextmanager
def _listing_saved_steps(config: Config) -> Iterator[None]:
    """Add to the ValueError of a checkpoint that is missing or damaged its key, and the steps that could be named."""
    try:
        yield
    except ValueError as error:
        folder, step = _checkpoints(config), branch_point(config)[1]
        problem = f"{error} Restore the file, or name another step"
        if checkpoint.is_gone(manifest.of_step(folder, step)):
            problem = f"{folder.parent} has no finished checkpoint of step {step}; name another"
        saved = ", ".join(map(str, checkpoint.committed(folder))) or "none"
        raise ValueError(
            f"branch_from={config.branch_from!r} cannot be used: {problem} (saved are: {saved}; checkpoint.keep of the "
            "trunk says how many stay)."
        ) from None


def _trunk(config: Config, extra: Mapping[str, Any]) -> Config:
    """The branch's config with the balance and the optimizer of the trunk, from `extra` of its checkpoint.

    Raises:
        ValueError: the checkpoint holds no such state, or one of another model or with other moments.
    """
    key = f"branch_from={config.branch_from!r}"
    if extra.get("weights_only"):
        raise ValueError(f"{key} holds weights only, without moments; start from them with init_from.")
    try:
        there = validate(extra["config"])
    except ValueError as error:
        raise ValueError(f"{key} has a config that this version cannot read: {error}") from None
    if model := [line for line in changed_numbers(there, config) if line.startswith("model.")]:
        raise ValueError(
            f"{key} has another model than this run, and a branch must have that of its trunk; use the same (there -> "
            f"here: {'; '.join(model)})."
        )
    if there.optimizer.moment_dtype != config.optimizer.moment_dtype:
        raise ValueError(
            f"optimizer.moment_dtype={config.optimizer.moment_dtype!r} must be that of the moments in {key}; set "
            f"{there.optimizer.moment_dtype!r}."
        )
    if moved_by(there) != moved_by(config):
        raise ValueError(
            f"optimizer.method={config.optimizer.method!r}, optimizer.muon.parts and the frozen parts must give every "
            f"parameter the moments that it has in {key}; set them as there."
        )
    carried = "balance", "optimizer", "anticipation", "ema", "guard"
    return replace(config, **{name: getattr(there, name) for name in carried})


# --- the balance ----------------------------------------------------------------------------------------------


def _with_own_balance(config: Config, there: Config, state: TrainState, mesh: Mesh) -> TrainState:
    """The trunk's state in the structure of the branch, with the bias and the balancer state of the branch.

    Clipping and decay surround the moments in the optimizer's state, but hold no arrays, so its leaves are the same.
    Experts that the trunk chose ahead are not used, because a branch with another seed has other batches. The average
    of the weights continues if both have one; that of the bias begins anew under another balance. The window of a
    guard continues if its options are the same.
    """
    target = abstract_state(config)
    optimizer = jax.tree.unflatten(jax.tree.structure(target.optimizer), jax.tree.leaves(state.optimizer))
    average, watched = state.ema, state.guard
    state = state._replace(optimizer=optimizer, ema=None, guard=None)
    if config.balance != there.balance:
        places = state_shardings(config, mesh)
        make = jax.jit(functools.partial(own_balance, config, there), out_shardings=(places.bias, places.balance))
        bias, layers = make(state.step, state.bias, state.balance)
        state = state._replace(bias=bias, balance=layers)
    state = with_options(config, state, mesh)
    if config.guard == there.guard:
        state = with_other_batches(config, state._replace(guard=watched), mesh)
    if state.ema is None or average is None:
        return state
    return state._replace(ema=average if config.balance == there.balance else average._replace(bias=state.ema.bias))


def own_balance(config: Config, there: Config, step: Array, bias: Tree, layers: Tree) -> tuple[Tree, Tree]:
    """Bias and balancer state of the branch at a step, from those of the trunk."""
    own = initial_layers(config)
    if bias_kind(config) and bias_kind(config) == bias_kind(there):
        for name, old in (("bias", read_bias(bias)), ("direction", layers["direction"])):
            moved = _moved_layers(config).reshape(-1, *[1] * (old.ndim - 1))
            own[name] = jnp.where(moved, old, own[name])
    shared = [(e, old) for e, old in _shared(config, there) if e.label in layers]
    own |= {e.label: taken_over(own[e.label], layers[e.label]) for e, _ in shared if e.label in own}
    own |= jax.vmap(balance.make(config.balance, config.model).at_step, (0, None))(own, step)
    own |= {e.label: layers[e.label] for e, old in shared if e == old}
    return write_bias(abstract_model(config.model).bias, own.pop("bias")), own


def _shared(config: Config, there: Config) -> list[tuple[BalanceEntry, BalanceEntry]]:
    """(entry here, entry there) of every method that both balances have under the same label."""
    before = {(e.label, e.method): e for e in there.balance}
    return [(e, before[e.label, e.method]) for e in config.balance if (e.label, e.method) in before]


def _owner(config: Config) -> BalanceEntry | None:
    """The method that moves the bias."""
    return next((e for e in config.balance if e.options.moves_bias), None)


def bias_kind(config: Config) -> str:
    """What the bias does in the balance of a config; "" if no method moves it."""
    owner = _owner(config)
    if owner is None:
        return ""
    if owner.options.selects:
        return f"is the threshold of {owner.method}"
    return use_of_bias(config)


def use_of_bias(config: Config) -> str:
    """How selection combines scores with the bias, moved or not: as the end of a sentence about it."""
    is_added = balance.make(config.balance, config.model).combine is None
    return "is added to scores" if is_added else "multiplies scores"


def _moved_layers(config: Config) -> np.ndarray:
    """bool [L]: the MoE layers in which a method moves the bias."""
    owner = _owner(config)
    layers = np.arange(num_moe_layers(config.model))
    start, stop = owner.options.layers if owner is not None and owner.options.layers else (0, len(layers))
    return (layers >= start) & (layers < stop)


# --- what is printed ------------------------------------------------------------------------------------------


def _differences(config: Config, extra: Mapping[str, Any], corpus: Corpus) -> list[str]:
    """A line with all that makes the branch train to other numbers than its trunk would; none if nothing does."""
    trunk = validate(extra["config"])
    changed = changed_numbers(trunk, config)
    labels = [{e.label for e in c.balance} for c in (trunk, config)]
    for label in sorted(labels[0] ^ labels[1]):
        changed = [line for line in changed if not line.startswith(f"balance.{label}.")]
        changed.append(f"balance.{label}: only {'here' if label in labels[1] else 'there'}")
    there = identity_of(extra)
    if there is not None and there.corpus != corpus.fingerprint:
        changed.append(f"data: fingerprint {there.corpus[:16]} -> {corpus.fingerprint[:16]}")
    return [f"unlike its trunk (there -> here): {'; '.join(changed)}"] if changed else []


def reset_notes(config: Config, there: Config) -> list[str]:
    """A line if the bias is reset to its initial value, and one for every method whose state is reset in part."""
    kinds = bias_kind(there), bias_kind(config)
    lines = []
    if kinds[0] != kinds[1]:
        trunk, own = (kind or "is moved by no method" for kind in kinds)
        lines.append(f"the bias begins at its initial value, because in the trunk it {trunk}, and here it {own}")
    elif kinds[1] and not _moved_layers(config).all():
        where = np.flatnonzero(~_moved_layers(config)).tolist()
        lines.append(f"the bias begins at its initial value in the MoE layers {where}, in which no method moves it")
    before, now = (abstract_state(c).balance for c in (there, config))
    for entry, _ in _shared(config, there):
        if entry.label in now and not (entry.label in before and is_whole(now[entry.label], before[entry.label])):
            lines.append(f"balance.{entry.label} begins with a state that is in part new, because its options differ")
    return lines
