"""Checkpoints: asynchronous, everything in them, verified. The only file that imports Orbax.

`checkpoints/00000020` is the state after 20 steps: Orbax's arrays, and a `manifest.json` of ours with the
sha256 of every file, shape and dtype of every leaf, and what else a run needs. The manifest is written last, after
every leaf was found to be finite and to be readable, so a folder without one is a save that did not finish: never
restored, and removed when training goes on. What is not in the manifest is not of the checkpoint, and is ignored.

With several processes every one writes its shards and hashes the files it wrote; process 0 puts the hashes
together in the manifest, and it alone decides, removes and verifies. All of them see one folder.

A checkpoint may hold weights only, parameters and bias, which `extra["weights_only"]` says. It is then written and
read slice by slice (`create`, `commit`, `open_newest`), for no one who converts weights has room for all of them.
"""

import concurrent.futures
import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from moe_jax.runtime import processes
from moe_jax.runtime.files import remove_tree
from moe_jax.runtime.leaves import _as_dict, compare_leaves, describe_leaves, first_non_finite
from moe_jax.runtime.manifest import MANIFEST, _is_link, check, hand_in_hashes, strangers, write_manifest
from moe_jax.runtime.stored import CHUNK_BYTES, _absolute, _handler, _one_sentence

MOST_REMOVED = 20  # so often the run that is read may remove what is being read, before reading gives up


T = TypeVar("T")


class Checkpointer:
    """Writes the checkpoints of one run, at most one at a time, off the step path.

    A save that failed in the background raises at the next `save` or at `close`, never later and never not.
    With several processes, each has one of these, and they call the same methods in the same order.
    """

    def __init__(self, directory: Path, keep: int, first: int | None = None) -> None:
        """Clear the folder of what earlier processes left.

        Args:
            directory: the run's checkpoint folder, made if absent.
            keep: so many newest checkpoints stay.
            first: the step that the run goes on from. `restore` refused whatever is newer, which is set aside.
        """
        self._directory = directory
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(_handler())
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        processes.by_first(lambda: self._tidy(first))

    def _tidy(self, first: int | None) -> None:
        remove_unfinished(self._directory)
        for step in committed(self._directory):
            if first is not None and step > first:
                _set_aside(self._directory / f"{step:08d}")

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Copy the state to the host, then write in the background; the state may be donated at once.

        Args:
            step: steps the state has done; the folder's name.
            state: pytree of arrays.
            extra: JSON values stored beside it (config, tokens seen, versions).

        Raises:
            OSError, ValueError: whatever an earlier background save failed with.
            FloatingPointError: a leaf is not finite; nothing is written, and the checkpoints before it stay.
        """
        self.wait()
        path = self._directory / f"{step:08d}"
        if processes.by_first(lambda: _is_there(path)):
            return
        state = _as_dict(state)
        if name := first_non_finite(state):
            raise FloatingPointError(f"{name} is not finite after {step} steps: {path} was not written.")
        self._orbax.save(_absolute(path), args=ocp.args.PyTreeSave(state, save_args=jax.tree.map(_in_chunks, state)))
        record = {"step": step, "leaves": describe_leaves(state), "extra": dict(extra)}
        self._pending = self._worker.submit(self._commit, path, record)

    def _commit(self, path: Path, record: dict[str, Any]) -> None:
        self._orbax.wait_until_finished()
        if processes.index() > 0:
            hand_in_hashes(path, processes.index())
            return
        write_manifest(path, record, processes.count())
        upto = [s for s in committed(self._directory) if s <= record["step"]]  # a later one may be damaged
        for old in upto[: -self._keep]:
            _remove(self._directory / f"{old:08d}")

    def wait(self) -> None:
        """Until nothing is being written; raises what the background save raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the save under way and free the threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()


def restore(
    directory: Path, target: Any, *, verify: str = "auto", fallback: bool = False
) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint's state and `extra`, or None if there is none.

    Args:
        directory: the run's checkpoint folder.
        target: abstract state, `jax.ShapeDtypeStruct` leaves; where they have shardings, arrays get those.
        verify: "full" compares every file's sha256, "sizes" sizes only, "auto" is full below 10 GB.
        fallback: if the newest is damaged, take the one before it, and say so.

    Raises:
        ValueError: a damaged checkpoint without fallback, or one whose leaves are not the target's.
    """
    leaves = describe_leaves(_as_dict(target))

    def compare(path: Path, manifest: Mapping[str, Any]) -> None:
        if manifest["extra"].get("weights_only") and leaves.keys() - manifest["leaves"].keys():
            raise ValueError(
                f"{path} holds weights only, and no run can go on from it; start one in another workdir with "
                f"--config.init_from={directory.parent}."
            )
        compare_leaves(path, manifest["leaves"], leaves)

    found = _read_newest(directory, compare, lambda path, _: _read(path, target), verify, fallback)
    return None if found is None else (found.value, found.extra)


def restore_weights(
    directory: Path, target: Mapping[str, Any], *, verify: str = "auto", fallback: bool = False, cast: bool = False
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Parameters and bias of the newest checkpoint, a run's or one of weights only, and its `extra` with its step.

    Args:
        directory: the checkpoint folder.
        target: "params" and "bias", abstract as in `restore`. Further fields of the state ("balance", "step") are
            read where the checkpoint has them, and are missing from the result where it holds weights only.
        verify: as in `restore`.
        fallback: as in `restore`.
        cast: parameters of another floating dtype are converted to the target's, not refused.

    Raises:
        ValueError: as in `restore`.
    """
    wanted = describe_leaves(target)

    def compare(path: Path, manifest: Mapping[str, Any]) -> None:
        saved, here = _shared(manifest, wanted, target)
        compare_leaves(path, _cast(saved, here) if cast else saved, here)

    def read(path: Path, extra: Mapping[str, Any]) -> Any:
        there = target if not extra.get("weights_only") else {name: target[name] for name in WEIGHTS}
        return _read(path, there, some_of_it=True)

    found = _read_newest(directory, compare, read, verify, fallback)
    return None if found is None else (found.value, found.extra | {"step": found.step})


WEIGHTS = ("params", "bias")


def _shared(
    manifest: Mapping[str, Any], wanted: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of the fields that are asked for, as saved and as wanted."""
    names = set(WEIGHTS if manifest["extra"].get("weights_only") else fields)
    saved, here = (
        {name: leaf for name, leaf in leaves.items() if name.split("/")[0] in names}
        for leaves in (manifest["leaves"], wanted)
    )
    return saved, here


def _cast(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The saved leaves, floating parameters with the wanted dtype: what reading makes of them."""

    def one(name: str, leaf: list[Any]) -> list[Any]:
        floating = name.startswith("params/") and jax.numpy.issubdtype(leaf[1], jax.numpy.floating)
        return [leaf[0], wanted[name][1]] if floating and name in wanted else leaf

    return {name: one(name, leaf) for name, leaf in saved.items()}


class Found(NamedTuple):
    """What was read of a checkpoint, its step, and its `extra`."""

    step: int
    value: Any
    extra: dict[str, Any]


def _read_newest(
    directory: Path,
    compare: Callable[[Path, Mapping[str, Any]], None],
    read: Callable[[Path, Mapping[str, Any]], Any],
    verify: str,
    fallback: bool,
) -> Found | None:
    """What `read` makes of the newest sound checkpoint, which `compare` may refuse; None if there is none.

    A run under way may remove the checkpoint that is being read: then there is a newer one, which is taken.
    """
    unreadable: dict[int, str] = {}
    for _ in range(MOST_REMOVED):
        found = processes.by_first(lambda: _newest(directory, compare, verify, fallback, unreadable))
        if found is None:
            return None
        step, extra = found
        path = directory / f"{step:08d}"
        try:
            return Found(step, processes.by_all(partial(_one_sentence, path, read, path, extra)), extra)
        except ValueError as error:
            problem = str(error)
        if not processes.by_first(partial(_is_gone, path)):
            unreadable[step] = problem
    raise ValueError(
        f"{directory}: the run removes its checkpoints faster than they can be read; raise its checkpoint.keep or "
        "save_every, or wait for its end."
    )


def _newest(
    directory: Path,
    compare: Callable[[Path, Mapping[str, Any]], None],
    verify: str,
    fallback: bool,
    unreadable: Mapping[int, str],
) -> tuple[int, dict[str, Any]] | None:
    """Step and `extra` of the newest sound checkpoint, which `compare` may refuse.

    Args:
        directory: the checkpoint folder.
        compare: raises a ValueError for a sound checkpoint of something else.
        verify: as in `restore`.
        fallback: as in `restore`.
        unreadable: step -> what is wrong with it, of those whose files are sound and could not be read.
    """
    steps = committed(directory)
    problems = []
    for step in reversed(steps):
        path = directory / f"{step:08d}"
        try:
            if step in unreadable:
                raise ValueError(unreadable[step])
            manifest = check(path, verify)
        except (ValueError, OSError) as error:
            if _is_gone(path):
                return _newest(directory, compare, verify, fallback, unreadable)
            if not fallback:
                raise ValueError(_advise(str(error), path, steps)) from None
            problems.append(str(error))
            continue
        compare(path, manifest)
        for problem in problems:
            print(f"warning: {problem} checkpoint.fallback=True: going on from step {step}.", flush=True)
        if ignored := strangers(path, manifest):
            print(f"note: ignoring what is not in the manifest of {path}: {', '.join(ignored)}", flush=True)
        return step, manifest["extra"]
    if problems:
        raise ValueError(f"{directory} has no sound checkpoint: {' '.join(problems)}")
    return None


def _is_gone(path: Path) -> bool:
    """Whether a checkpoint was removed since it was seen: its manifest goes first."""
    return not (path / MANIFEST).is_file()


def _read(path: Path, target: Any, some_of_it: bool = False) -> Any:
    abstract = _as_dict(target)
    args = ocp.args.PyTreeRestore(
        abstract, restore_args=jax.tree.map(_restore_args, abstract), partial_restore=some_of_it
    )
    with ocp.Checkpointer(_handler()) as reader:
        read = reader.restore(_absolute(path), args=args)
    if name := first_non_finite(read):
        raise ValueError(f"{name} is not finite")
    return type(target)(**read) if hasattr(target, "_asdict") else read


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    """Where and as what a leaf is read: the sharding of the mesh at hand, never the one it was saved with."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding or here, dtype=leaf.dtype)


def committed(directory: Path) -> list[int]:
    """The steps with a finished checkpoint, rising."""
    return sorted(
        int(f.name) for f in _inside(directory) if re.fullmatch(r"\d{8}", f.name) and (f / MANIFEST).is_file()
    )


def remove_unfinished(directory: Path) -> None:
    """Delete what killed saves left behind, and say so: folders of our own naming without a manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    for folder in _inside(directory):
        ours = re.fullmatch(r"\d{8}(\.orbax-checkpoint-tmp.*)?", folder.name)
        real = folder.is_dir() and not _is_link(folder)
        if ours and real and not (folder / MANIFEST).is_file():
            print(f"removing {folder}: a save that did not finish", flush=True)
            remove_tree(folder)


def _set_aside(folder: Path) -> None:
    """Give a damaged checkpoint another name, under which it is in nobody's way, and say so."""
    taken = {other.name for other in _inside(folder.parent)}
    names = (f"{folder.name}.damaged{n or ''}" for n in itertools.count())
    target = folder.with_name(next(name for name in names if name not in taken))
    print(f"setting {folder} aside as {target.name}, for it is damaged", flush=True)
    folder.rename(target)


def _remove(folder: Path) -> None:
    """The manifest goes first, so that a removal that is killed leaves an unfinished folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_tree(folder)


def _is_there(path: Path) -> bool:
    """Whether the step was saved by an earlier process: same seed, same step, same state. Makes room if not."""
    if not path.exists():
        return False
    if not (path / MANIFEST).is_file():
        remove_tree(path)
        return False
    try:
        check(path)
    except ValueError:
        _set_aside(path)
        return False
    return True


def _inside(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []  # a bucket has no empty folders


def _in_chunks(leaf: Any) -> ocp.SaveArgs:
    """How a leaf lies on disk: in chunks, divided first along the axes of layers and experts."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(max(0, leaf.ndim - 2))))


def _advise(problem: str, path: Path, steps: list[int]) -> str:
    older = [s for s in steps if s < int(path.name)]
    if older:
        return f"{problem} Set checkpoint.fallback=True to go on from step {older[-1]}, or restore the file."
    return (
        f"{problem} There is no older checkpoint: restore the file, or use another workdir, or rename {path} to start "
        "again in this one."
    )
