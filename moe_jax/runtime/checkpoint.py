"""Checkpoints: asynchronous, complete, verified.

`checkpoints/00000020` is the state after 20 steps: Orbax's arrays, and a `manifest.json` of ours with the
sha256 of every file, the shape and dtype of every leaf, and further values that a run needs. The manifest is written
last, after every leaf was found to be finite and readable. So a folder without one is a save that did not finish: it is
never restored, and is removed when training resumes. Files that are not in the manifest are ignored.

With several processes each writes its shards and hashes the files that it wrote. Process 0 merges the hashes into the
manifest, and it alone decides, removes and verifies. All processes share the folder.

A checkpoint may hold only weights, that is parameters and bias; then `extra["weights_only"]` is set. It is written and
read slice by slice (see `slices`), because memory may not hold all weights of a converted model.
"""

import concurrent.futures
import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from moe_jax.runtime import processes
from moe_jax.runtime.files import remove_tree
from moe_jax.runtime.leaves import compare_leaves, describe_leaves, fields_of, first_non_finite
from moe_jax.runtime.manifest import MANIFEST, check, hand_in_hashes, is_link, of_step, other_files, write_manifest
from moe_jax.runtime.stored import CHUNK_BYTES, in_one_sentence, orbax_path, tree_handler

MOST_REMOVED = 20  # reading gives up after the run has removed the checkpoint that is being read this many times


class Checkpointer:
    """Writes the checkpoints of one run in the background, at most one at a time.

    The error of a background save is always raised, at the next `save` or at `close`.
    With several processes, each has a Checkpointer, and all call the same methods in the same order.
    """

    def __init__(self, directory: Path, keep: int, first: int | None = None) -> None:
        """Remove what earlier processes left unfinished in the folder.

        Args:
            directory: the run's checkpoint folder, created if absent.
            keep: number of newest checkpoints that are not removed.
            first: the step from which the run resumes. `restore` refused any newer checkpoints, which are renamed.
        """
        self._directory = directory
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(tree_handler())
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        processes.by_first(lambda: self._tidy(first))

    def _tidy(self, first: int | None) -> None:
        remove_unfinished(self._directory)
        for step in committed(self._directory):
            if first is not None and step > first:
                _rename_damaged(of_step(self._directory, step))

    def save(self, step: int, state: Any, extra: Mapping[str, Any], keep_all: bool = False) -> None:
        """Copy the state to the host, then write it in the background; the state may be donated at once.

        Args:
            step: steps done by the state; the folder's name.
            state: pytree of arrays.
            extra: JSON values stored in the manifest (config, tokens seen, versions).
            keep_all: whether no older checkpoint is removed.

        Raises:
            OSError, ValueError: the error of an earlier background save.
            FloatingPointError: a leaf is not finite; nothing is written, and earlier checkpoints stay.
        """
        self.wait()
        path = of_step(self._directory, step)
        if processes.by_first(lambda: _is_there(path)):
            return
        state = fields_of(state)
        if name := first_non_finite(state):
            raise FloatingPointError(f"{name} is not finite after {step} steps: {path} was not written.")
        self._orbax.save(orbax_path(path), args=ocp.args.PyTreeSave(state, save_args=jax.tree.map(_in_chunks, state)))
        record = {"step": step, "leaves": describe_leaves(state), "extra": dict(extra)}
        self._pending = self._worker.submit(self._commit, path, record, keep_all)

    def _commit(self, path: Path, record: dict[str, Any], keep_all: bool) -> None:
        self._orbax.wait_until_finished()
        if processes.index() > 0:
            hand_in_hashes(path, processes.index())
            return
        write_manifest(path, record, processes.count())
        earlier = [s for s in committed(self._directory) if s <= record["step"]]  # a later one may be damaged
        for old in () if keep_all else earlier[: -self._keep]:
            _remove(of_step(self._directory, old))

    def wait(self) -> None:
        """Wait until nothing is being written; raises the error of the background save."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the save that is under way, and free the threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()


def restore(
    directory: Path, target: Any, *, verify: str = "auto", fallback: bool = False
) -> tuple[Any, dict[str, Any]] | None:
    """Read the newest checkpoint: its state and `extra`, or None if there is none.

    Args:
        directory: the run's checkpoint folder.
        target: abstract state with `jax.ShapeDtypeStruct` leaves; the arrays get their shardings, if any.
        verify: "full" compares every file's sha256, "sizes" only sizes, "auto" is full below 10 GB.
        fallback: if the newest checkpoint is damaged, read the one before it, and print a warning.

    Raises:
        ValueError: a damaged checkpoint without fallback, or one whose leaves are not the target's.
    """
    leaves = describe_leaves(fields_of(target))

    def compare(path: Path, manifest: Mapping[str, Any]) -> None:
        if manifest["extra"].get("weights_only") and leaves.keys() - manifest["leaves"].keys():
            raise ValueError(
                f"{path} holds weights only, so no run can resume from it; start one in another workdir with "
                f"--config.init_from={directory.parent}."
            )
        compare_leaves(path, manifest["leaves"], leaves)

    found = read_newest(directory, compare, lambda path, _: _read(path, target), verify, fallback)
    return None if found is None else (found.value, found.extra)


def restore_step(directory: Path, step: int, target: Any, *, verify: str = "auto") -> Any:
    """Read the state of the checkpoint of one step, which need not be the newest; nothing is written.

    Args:
        directory: the checkpoint folder of a run, which may be under way.
        step: of the checkpoint.
        target: abstract state, as in `restore`.
        verify: as in `restore`.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or its leaves are not the target's.
    """
    path = of_step(directory, step)
    processes.by_first(lambda: compare_leaves(path, check(path, verify)["leaves"], describe_leaves(fields_of(target))))
    return processes.by_all(partial(in_one_sentence, path, _read, path, target))


def restore_weights(
    directory: Path, target: Mapping[str, Any], *, verify: str = "auto", fallback: bool = False, cast: bool = False
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read parameters and bias of the newest checkpoint, of a run or of weights only, and `extra` with its step.

    Args:
        directory: the checkpoint folder.
        target: "params" and "bias", abstract as in `restore`. Further fields of the state ("balance", "step") are
            read if the checkpoint has them, and missing from the result if it holds weights only.
        verify: as in `restore`.
        fallback: as in `restore`.
        cast: whether parameters of another floating dtype are converted instead of refused.

    Raises:
        ValueError: as in `restore`.
    """
    wanted = describe_leaves(target)

    def compare(path: Path, manifest: Mapping[str, Any]) -> None:
        saved, here = shared_leaves(manifest, wanted, target)
        compare_leaves(path, _cast(saved, here) if cast else saved, here)

    def read(path: Path, extra: Mapping[str, Any]) -> Any:
        fields = target if not extra.get("weights_only") else {name: target[name] for name in WEIGHTS}
        return _read(path, fields, partial_restore=True)

    found = read_newest(directory, compare, read, verify, fallback)
    return None if found is None else (found.value, found.extra | {"step": found.step})


WEIGHTS = ("params", "bias")


def shared_leaves(
    manifest: Mapping[str, Any], wanted: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(saved, wanted) leaves to compare: those of all fields, or only of weights if the checkpoint has no others."""
    names = set(WEIGHTS if manifest["extra"].get("weights_only") else fields)
    saved, here = (
        {name: leaf for name, leaf in leaves.items() if name.split("/")[0] in names}
        for leaves in (manifest["leaves"], wanted)
    )
    return saved, here


def _cast(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The saved leaves, with floating parameters in the dtype to which reading casts them."""

    def one(name: str, leaf: list[Any]) -> list[Any]:
        floating = name.startswith("params/") and jax.numpy.issubdtype(leaf[1], jax.numpy.floating)
        return [leaf[0], wanted[name][1]] if floating and name in wanted else leaf

    return {name: one(name, leaf) for name, leaf in saved.items()}


class Found(NamedTuple):
    """The step of a checkpoint, the value that was read from it, and its `extra`."""

    step: int
    value: Any
    extra: dict[str, Any]


def read_newest(
    directory: Path,
    compare: Callable[[Path, Mapping[str, Any]], None],
    read: Callable[[Path, Mapping[str, Any]], Any],
    verify: str,
    fallback: bool,
) -> Found | None:
    """Read the newest undamaged checkpoint, which `compare` may refuse; None if there is none.

    A run under way may remove the checkpoint that is being read; then a newer one exists, which is read instead.

    Args:
        directory: the checkpoint folder.
        compare: raises a ValueError for an undamaged checkpoint of something else.
        read: (path, `extra`) -> value.
        verify: as in `restore`.
        fallback: as in `restore`.
    """
    unreadable: dict[int, str] = {}
    for _ in range(MOST_REMOVED):
        found = processes.by_first(lambda: _newest(directory, compare, verify, fallback, unreadable))
        if found is None:
            return None
        step, extra = found
        path = of_step(directory, step)
        try:
            return Found(step, processes.by_all(partial(in_one_sentence, path, read, path, extra)), extra)
        except ValueError as error:
            problem = str(error)
        if not processes.by_first(partial(is_gone, path)):
            unreadable[step] = problem
    raise ValueError(
        f"{directory}: the run removes its checkpoints faster than they can be read; raise its checkpoint.keep or "
        "save_every, or wait until it ends."
    )


def _newest(
    directory: Path,
    compare: Callable[[Path, Mapping[str, Any]], None],
    verify: str,
    fallback: bool,
    unreadable: Mapping[int, str],
) -> tuple[int, dict[str, Any]] | None:
    """Step and `extra` of the newest undamaged checkpoint, which `compare` may refuse.

    Args:
        directory: the checkpoint folder.
        compare: raises a ValueError for an undamaged checkpoint of something else.
        verify: as in `restore`.
        fallback: as in `restore`.
        unreadable: step -> problem, of checkpoints that match their manifest and could not be read.
    """
    steps = committed(directory)
    problems = []
    for step in reversed(steps):
        path = of_step(directory, step)
        try:
            if step in unreadable:
                raise ValueError(unreadable[step])
            manifest = check(path, verify)
        except (ValueError, OSError) as error:
            if is_gone(path):
                return _newest(directory, compare, verify, fallback, unreadable)
            if not fallback:
                raise ValueError(_with_advice(str(error), path, steps)) from None
            problems.append(str(error))
            continue
        compare(path, manifest)
        for problem in problems:
            print(f"warning: {problem} checkpoint.fallback=True: resuming from step {step}.", flush=True)
        if ignored := other_files(path, manifest):
            print(f"note: ignoring files that are not in the manifest of {path}: {', '.join(ignored)}", flush=True)
        return step, manifest["extra"]
    if problems:
        raise ValueError(f"{directory} has no sound checkpoint: {' '.join(problems)}")
    return None


def is_gone(path: Path) -> bool:
    """Whether a checkpoint was removed after it was listed; its manifest is removed first."""
    return not (path / MANIFEST).is_file()


def _read(path: Path, target: Any, partial_restore: bool = False) -> Any:
    abstract = fields_of(target)
    args = ocp.args.PyTreeRestore(
        abstract, restore_args=jax.tree.map(_restore_args, abstract), partial_restore=partial_restore
    )
    with ocp.Checkpointer(tree_handler()) as reader:
        read = reader.restore(orbax_path(path), args=args)
    if name := first_non_finite(read):
        raise ValueError(f"{name} is not finite")
    return type(target)(**read) if hasattr(target, "_asdict") else read


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    """The sharding and dtype with which a leaf is read: those of the present mesh, not those of the save."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding or here, dtype=leaf.dtype)


def committed(directory: Path) -> list[int]:
    """The steps with a finished checkpoint, in ascending order."""
    return sorted(
        int(f.name) for f in _inside(directory) if re.fullmatch(r"\d{8}", f.name) and (f / MANIFEST).is_file()
    )


def remove_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps, the newest first, so that a kill leaves none without those before it."""
    for later in reversed([s for s in committed(directory) if s > step]):
        _remove(of_step(directory, later))


def remove_unfinished(directory: Path) -> None:
    """Delete what killed saves left behind: folders with our names and without a manifest. Print their names."""
    directory.mkdir(parents=True, exist_ok=True)
    for folder in _inside(directory):
        ours = re.fullmatch(r"\d{8}(\.orbax-checkpoint-tmp.*)?", folder.name)
        real = folder.is_dir() and not is_link(folder)
        if ours and real and not (folder / MANIFEST).is_file():
            print(f"removing {folder}: a save that did not finish", flush=True)
            remove_tree(folder)


def _rename_damaged(folder: Path) -> None:
    """Rename a damaged checkpoint, so that its step can be saved again, and print its new name."""
    taken = {other.name for other in _inside(folder.parent)}
    names = (f"{folder.name}.damaged{n or ''}" for n in itertools.count())
    target = folder.with_name(next(name for name in names if name not in taken))
    print(f"renaming {folder} to {target.name}, because it is damaged", flush=True)
    folder.rename(target)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a removal that is killed leaves an unfinished folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_tree(folder)


def _is_there(path: Path) -> bool:
    """Whether an earlier process saved this step, whose state is the same; if not, clears the path."""
    if not path.exists():
        return False
    if not (path / MANIFEST).is_file():
        remove_tree(path)
        return False
    try:
        check(path)
    except ValueError:
        _rename_damaged(path)
        return False
    return True


def _inside(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []  # a bucket has no empty folders


def _in_chunks(leaf: Any) -> ocp.SaveArgs:
    """The chunks in which a leaf is stored: it is divided along the axes of layers and experts first."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(max(0, leaf.ndim - 2))))


def _with_advice(problem: str, path: Path, steps: list[int]) -> str:
    older = [s for s in steps if s < int(path.name)]
    if older:
        return f"{problem} Set checkpoint.fallback=True to resume from step {older[-1]}, or restore the file."
    return (
        f"{problem} There is no older checkpoint: restore the file, or use another workdir, or rename {path} to start "
        "again in this one."
    )
