"""Checkpoints: asynchronous, everything in them, verified. The only file that imports Orbax.

`checkpoints/00000020` is the state after 20 steps: Orbax's arrays, and a `manifest.json` of ours with the
sha256 of every file, shape and dtype of every leaf, and what else a run needs. The manifest is written last,
so a folder without one is a save that did not finish: never restored, and removed when training goes on.

With several processes every one writes its shards and hashes the files it wrote; process 0 puts the hashes
together in the manifest, and it alone decides, removes and verifies. All of them see one folder.
"""

import concurrent.futures
import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import distributed
from moe_jax.files import is_remote, remove_tree, sha256_of, size_of, tree, write_json, write_whole

MANIFEST = "manifest.json"
FULL_VERIFY_BYTES = 10 * 10**9  # "auto" hashes below this size, and compares sizes above
HASHES = "hashes.{}.json"  # of one process's files, until process 0 has put them into the manifest
NOT_HASHED = {MANIFEST, "_CHECKPOINT_METADATA"}  # the second holds Orbax's timestamps only


class Checkpointer:
    """Writes the checkpoints of one run, at most one at a time, off the step path.

    A save that failed in the background raises at the next `save` or at `close`, never later and never not.
    With several processes, each has one of these, and they call the same methods in the same order.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(_handler())
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        distributed.by_first(lambda: remove_unfinished(directory))

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Copy the state to the host, then write in the background; the state may be donated at once.

        Args:
            step: steps the state has done; the folder's name.
            state: pytree of arrays.
            extra: JSON values stored beside it (config, tokens seen, versions).

        Raises:
            OSError, ValueError: whatever an earlier background save failed with.
        """
        self.wait()
        path = self._directory / f"{step:08d}"
        if distributed.by_first(lambda: _is_there(path)):
            return
        state = _as_dict(state)
        self._orbax.save(_absolute(path), args=ocp.args.PyTreeSave(state))
        record = {"step": step, "leaves": describe_leaves(state), "extra": dict(extra)}
        self._pending = self._worker.submit(self._commit, path, record)

    def _commit(self, path: Path, record: dict[str, Any]) -> None:
        self._orbax.wait_until_finished()
        if distributed.index() > 0:
            hand_in_hashes(path, distributed.index())
            return
        write_manifest(path, record, distributed.count())
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
    found = distributed.by_first(lambda: _newest(directory, leaves, verify, fallback))
    if found is None:
        return None
    step, extra = found
    return _read(directory / f"{step:08d}", target), extra


def _newest(directory: Path, leaves: Mapping[str, Any], verify: str, fallback: bool) -> tuple[int, dict] | None:
    """Step and `extra` of the checkpoint to restore."""
    steps = committed(directory)
    problems = []
    for step in reversed(steps):
        path = directory / f"{step:08d}"
        try:
            manifest = check(path, verify)
        except ValueError as error:
            if not fallback:
                raise ValueError(_advise(str(error), directory, steps, step)) from None
            problems.append(str(error))
            continue
        compare_leaves(path, manifest["leaves"], leaves)
        for problem in problems:
            print(f"warning: {problem} checkpoint.fallback=True: going on from step {step}.", flush=True)
        return step, manifest["extra"]
    if problems:
        raise ValueError(f"{directory} has no sound checkpoint: {' '.join(problems)}")
    return None


def _read(path: Path, target: Any) -> Any:
    abstract = _as_dict(target)
    restore_args = jax.tree.map(_restore_args, abstract)
    with ocp.Checkpointer(_handler()) as reader:
        read = reader.restore(_absolute(path), args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args))
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


def _remove(folder: Path) -> None:
    """The manifest goes first, so that a removal that is killed leaves an unfinished folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_tree(folder)


def _is_there(path: Path) -> bool:
    """Whether the step was saved by an earlier process: same seed, same step, same state. Makes room if not."""
    if not path.exists():
        return False
    try:
        check(path)
    except ValueError:
        _remove(path)  # damaged, and the reason that this step was done again
        return False
    return True


def write_manifest(path: Path, record: dict[str, Any], num_processes: int = 1) -> None:
    """Hash every file of the checkpoint and commit it: the manifest appears whole or not at all.

    Waits for the hashes of the other processes. One that dies before it hands them in ends this process, too.
    """
    files = hash_files(path, 0)
    for number in range(1, num_processes):
        part = path / HASHES.format(number)
        _wait_for(part)
        files |= json.loads(part.read_text())
        part.unlink()
    body = {**record, "files": files}
    write_whole(path / MANIFEST, json.dumps({"sha256": _digest(body), **body}, indent=1), durable=True)


def hand_in_hashes(path: Path, process: int) -> None:
    """What the processes other than 0 do for a manifest; ends when it is written."""
    write_json(path / HASHES.format(process), hash_files(path, process))
    _wait_for(path / MANIFEST)


def hash_files(path: Path, process: int) -> dict[str, list[Any]]:
    """name -> [size, sha256] of the files that a process wrote."""
    names = {str(f.relative_to(path)): f for f in _data_files(path) if not re.fullmatch(HASHES.format(r"\d+"), f.name)}
    return {name: [size_of(f), sha256_of(f)] for name, f in names.items() if writer(name) == process}


def writer(name: str) -> int:
    """The process that wrote a file: Orbax gives each a folder for its shards; process 0 writes the rest."""
    folder = re.match(r"ocdbt\.process_(\d+)/", name)
    return int(folder[1]) if folder else 0


def _wait_for(file: Path) -> None:
    while not file.is_file():
        time.sleep(0.02)


def check(path: Path, verify: str = "auto") -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as they were written.

    Raises:
        ValueError: names the first file that is missing, unexpected, linked, or differs.
    """
    manifest = _read_manifest(path)
    files = manifest["files"]
    there = {str(f.relative_to(path)) for f in _data_files(path)}
    for name in sorted(there ^ files.keys()):
        raise ValueError(f"{path}: {name} is {'not in the manifest' if name in there else 'missing'}.")
    full = verify == "full" or (verify == "auto" and sum(s for s, _ in files.values()) < FULL_VERIFY_BYTES)
    for name, (size, sha256) in sorted(files.items()):
        file = path / name
        if size_of(file) != size:
            raise ValueError(f"{path}: {name} has {size_of(file)} bytes, the manifest says {size}.")
        if full and sha256_of(file) != sha256:
            raise ValueError(f"{path}: {name} does not have the sha256 of the manifest.")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        body = {k: v for k, v in manifest.items() if k != "sha256"}
        sound = manifest["sha256"] == _digest(body) and isinstance(body["step"], int)
        sound = sound and all(isinstance(body[k], dict) for k in ("leaves", "extra", "files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound, manifest = False, {}
    if not sound:
        raise ValueError(f"{path}: {MANIFEST} is damaged.")
    return manifest


def _data_files(path: Path) -> list[Path]:
    """The checkpoint's files; a link could point anywhere, and we write none."""
    found = sorted(tree(path))
    for f in found:
        if _is_link(f):
            raise ValueError(f"{path}: {f.relative_to(path)} is a symbolic link, which no checkpoint contains.")
    return [f for f in found if f.name not in NOT_HASHED and f.suffix != ".tmp"]


def _inside(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []  # a bucket has no empty folders


def _is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


def _absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def describe_leaves(state: Any) -> dict[str, list[Any]]:
    """path -> [shape, dtype] of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(_as_dict(state))
    return {_path_name(path): [list(a.shape), str(a.dtype)] for path, a in leaves}


def compare_leaves(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], most: int = 8) -> None:
    """Refuse a checkpoint of another shape or kind, with the list of differences.

    Orbax would cast dtypes silently, and load 16 layers into 12.
    """
    names = [n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n)]
    names.sort(key=lambda n: (not n.startswith("params/"), n))  # moments differ wherever parameters do
    if not names:
        return
    lines = [f"  {n}: saved {_leaf(saved.get(n))}, wanted {_leaf(wanted.get(n))}" for n in names[:most]]
    more = f"\n  and {len(names) - most} more" if len(names) > most else ""
    raise ValueError(
        f"{path} holds another state than this config makes ({len(names)} leaves differ); "
        "use the config it was trained with, or another workdir:\n" + "\n".join(lines) + more
    )


def state_hash(state: Any) -> str:
    """sha256 over path, dtype, shape and bytes of every leaf: equal for equal states, bit by bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(_as_dict(state)):
        array = np.asarray(leaf)
        digest.update(f"{_path_name(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's tree handler, without replica-parallel saving: it blocks the first save for seconds."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _as_dict(state: Any) -> dict[str, Any]:
    return state._asdict() if hasattr(state, "_asdict") else dict(state)


def _path_name(path: tuple[Any, ...]) -> str:
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(p) for p in parts)


def _leaf(described: Any) -> str:
    return "nothing" if described is None else f"{described[1]}{described[0]}"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _advise(problem: str, directory: Path, steps: list[int], step: int) -> str:
    older = [s for s in steps if s < step]
    if older:
        return f"{problem} Set checkpoint.fallback=True to go on from step {older[-1]}, or restore the file."
    return f"{problem} It is the only checkpoint: restore the file, or remove {directory} to start again."
