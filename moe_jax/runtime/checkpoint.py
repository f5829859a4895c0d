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

import collections
import concurrent.futures
import glob
import hashlib
import itertools
import json
import math
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from moe_jax.runtime import processes
from moe_jax.runtime.files import is_remote, remove_tree, sha256_of, size_of, tree, write_json, write_whole

MANIFEST = "manifest.json"


FULL_VERIFY_BYTES = 10 * 10**9  # "auto" hashes below this size, and compares sizes above


HASHES = "hashes.{}.json"  # of one process's files, until process 0 has put them into the manifest


CHUNK_BYTES = 64 * 2**20  # a leaf lies on disk in pieces of at most this: what reading a slice of it reads


NOT_HASHED = {MANIFEST, "_CHECKPOINT_METADATA"}  # the second holds Orbax's timestamps only


FOREIGN = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs\w+")  # systems put these where they please


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


def _one_sentence(path: Path, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, which reads of a checkpoint; what Orbax and TensorStore raise becomes a ValueError."""
    try:
        return function(*args)
    except (jax.errors.JaxRuntimeError, MemoryError):  # of this machine, and no fault of the checkpoint
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({text[:200]}{'...' if text[200:] else ''}).") from error


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


# --- slice by slice -------------------------------------------------------------------------------------------


class OnDisk(NamedTuple):
    """An array of a checkpoint, read and written by slices along its first axes. Values are numpy arrays.

    A slice that cannot be read, or is not finite, is a ValueError.
    """

    path: Path
    name: str
    store: Any

    def read(self, index: tuple[int, ...]) -> np.ndarray:
        """The slice at an index of the first axes; () is all of it."""
        try:
            value = _one_sentence(self.path, lambda: self._at(index).read().result())
        except ValueError:
            if not _is_gone(self.path):
                raise
            raise ValueError(
                f"{self.path} was removed by its run while it was read; give the command again, or raise the run's "
                "checkpoint.keep."
            ) from None
        return self._finite(value)

    def write(self, index: tuple[int, ...], value: np.ndarray) -> None:
        """Write such a slice."""
        self._at(index).write(self._finite(value)).result()

    def _at(self, index: tuple[int, ...]) -> Any:
        return self.store[index] if index else self.store

    def _finite(self, value: np.ndarray) -> np.ndarray:
        if jax.numpy.issubdtype(value.dtype, jax.numpy.inexact) and not np.isfinite(value).all():
            raise ValueError(f"{self.path}: {self.name} is not finite.")
        return value


def create(path: Path, abstract: Mapping[str, Any], axes: Callable[[str], int]) -> dict[str, OnDisk]:
    """A new checkpoint folder, whole when its arrays are written and `commit` is called; path -> array.

    Orbax writes the tree, with a number in the place of every array; the arrays proper are then made by what
    Orbax itself makes them with. They are not in its database of small files, which would grow with every slice.

    Args:
        path: the checkpoint, which is not there yet.
        abstract: tree of `jax.ShapeDtypeStruct`.
        axes: leaf's path -> how many of its first axes its slices have an index for.
    """
    numbers = jax.tree.map(lambda leaf: jax.numpy.zeros((), leaf.dtype), dict(abstract))
    with _without_warnings(), ocp.Checkpointer(_handler(use_ocdbt=False)) as writer:
        writer.save(_absolute(path), args=ocp.args.PyTreeSave(numbers))
    leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(dict(abstract))}
    arrays = {name: OnDisk(path, name, _make_array(path, name, leaf, axes(name))) for name, leaf in leaves.items()}
    for name in (name for name in leaves if name.startswith("bias/")):
        arrays[name].write((), np.zeros(leaves[name].shape, leaves[name].dtype))  # some families write none
    return arrays


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that there is no database to merge where none was asked for."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _make_array(path: Path, name: str, leaf: jax.ShapeDtypeStruct, axes: int) -> Any:
    """The zarr array of a leaf, in chunks of one slice, or of some rows of one."""
    import tensorstore

    rows = leaf.shape[axes:]
    row_bytes = int(np.prod(rows[1:])) * leaf.dtype.itemsize
    chunk = [1] * axes + [max(1, min(n, CHUNK_BYTES // row_bytes)) for n in rows[:1]] + list(rows[1:])
    metadata = {"shape": list(leaf.shape), "chunks": chunk, "compressor": None}
    # Orbax misses a chunk that is not stored, as one of zeros would not be
    whole = {"store_data_equal_to_fill_value": True}
    spec = _spec(path, name) | {"metadata": metadata, "dtype": str(leaf.dtype)} | whole
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def commit(path: Path, abstract: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Finish what `create` began: the manifest, which makes it a checkpoint of step 0 with weights only."""
    extra = {"weights_only": True, **extra}
    write_manifest(path, {"step": 0, "leaves": describe_leaves(abstract), "extra": extra})


def open_newest(
    directory: Path, abstract: Mapping[str, Any], *, verify: str = "auto", fallback: bool = False
) -> tuple[int, dict[str, OnDisk]] | None:
    """Step of the newest checkpoint, of whatever kind, and its arrays of weights for reading; None if there is none.

    Args:
        directory: the checkpoint folder.
        abstract: "params" and "bias" as they must be.
        verify: as in `restore`.
        fallback: as in `restore`.

    Raises:
        ValueError: as in `restore`.
    """
    wanted = describe_leaves(abstract)

    def compare(path: Path, manifest: Mapping[str, Any]) -> None:
        compare_leaves(path, *_shared(manifest, wanted, abstract))

    found = _read_newest(directory, compare, lambda path, _: _open_arrays(path, wanted), verify, fallback)
    return None if found is None else (found.step, found.value)


def _open_arrays(path: Path, names: Iterable[str]) -> dict[str, OnDisk]:
    """The arrays, with one memory of chunks: a small slice comes with its neighbours, which are read next."""
    import tensorstore

    memory = tensorstore.Context({"cache_pool": {"total_bytes_limit": CHUNK_BYTES}})
    strict = {"fill_missing_data_reads": False}  # a chunk that is gone is an error, and no zeros
    stores = {name: tensorstore.open(_spec(path, name) | strict, open=True, context=memory) for name in names}
    return {name: OnDisk(path, name, store.result()) for name, store in stores.items()}


def _spec(path: Path, name: str) -> dict[str, Any]:
    """Where tensorstore finds an array."""
    return {"driver": "zarr", "kvstore": _kvstore(path, f"{_stored_name(name)}/")}


def _stored_name(leaf: str) -> str:
    """What Orbax calls a leaf."""
    return leaf.replace("/", ".")


def _kvstore(path: Path, inside: str = "") -> dict[str, Any]:
    """Where tensorstore finds the keys of arrays: in Orbax's database where the checkpoint has one, else in folders."""
    if is_remote(path):
        bucket, _, folder = str(path).removeprefix("gs://").partition("/")
        place = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
    else:
        place = {"driver": "file", "path": f"{path.absolute()}/"}
    if (path / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": place, "path": inside}
    return place | {"path": place["path"] + inside}


def refuse_unreadable(path: Path, leaves: Mapping[str, list[Any]]) -> None:
    """Raise a ValueError unless every leaf can be opened, as what it should be, and all its chunks are stored.

    Nothing of the chunks is read: what is in them is what `save` and `OnDisk.write` were given.

    Args:
        path: the checkpoint, whose manifest need not be there yet.
        leaves: path -> [shape, dtype], as `describe_leaves` gives.
    """
    there = _one_sentence(path, _stored_leaves, path)
    for name, (shape, dtype) in leaves.items():
        stored = there.get(name)
        if stored is None or [list(stored.shape), str(stored.dtype)] != [shape, dtype]:
            found = None if stored is None else [list(stored.shape), str(stored.dtype)]
            raise ValueError(f"{path} cannot be read: {name} is {_leaf(found)} and should be {_leaf([shape, dtype])}.")
        if stored.num_chunks != stored.expected_chunks:
            raise ValueError(
                f"{path} cannot be read: of {name} {stored.num_chunks} of {stored.expected_chunks} chunks are stored."
            )


class _Stored(NamedTuple):
    """A leaf as it lies on disk."""

    shape: tuple[int, ...]
    dtype: Any
    num_chunks: int
    expected_chunks: int


def _stored_leaves(path: Path) -> dict[str, _Stored]:
    """Every leaf that Orbax finds in a checkpoint, by the path that `describe_leaves` gives it."""
    import tensorstore

    keys = tensorstore.KvStore.open(_kvstore(path)).result().list().result()
    chunk = re.compile(rb"(.+)/\d+(\.\d+)*")
    chunks = collections.Counter(found[1].decode() for key in keys if (found := chunk.fullmatch(key)))
    tree = _handler().metadata(epath.Path(_absolute(path))).tree
    stored = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, shape = path_name(key), leaf.shape
        expected = math.prod(-(-n // c) for n, c in zip(shape, leaf.storage.chunk_shape, strict=True))
        stored[name] = _Stored(shape, leaf.dtype, chunks[_stored_name(name)], expected)
    return stored


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


def write_manifest(path: Path, record: dict[str, Any], num_processes: int = 1) -> None:
    """Hash every file of the checkpoint and commit it, if it can be read: the manifest appears whole or not at all.

    Waits for the hashes of the other processes. One that dies before it hands them in ends this process, too.

    Raises:
        ValueError: a leaf of the record cannot be opened.
    """
    files = hash_files(path, 0)
    for number in range(1, num_processes):
        part = path / HASHES.format(number)
        _wait_for(part)
        files |= json.loads(part.read_text())
        part.unlink()
    refuse_unreadable(path, record["leaves"])
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
        ValueError: names the first file that is missing, linked, or differs.
    """
    manifest = _read_manifest(path)
    files = {name: file for name, file in manifest["files"].items() if not FOREIGN.fullmatch(Path(name).name)}
    there = {str(f.relative_to(path)) for f in _data_files(path)}
    for name in sorted(files.keys() - there):
        raise ValueError(f"{path}: {_linked(path, name) or f'{name} is missing'}.")
    full = verify == "full" or (verify == "auto" and sum(s for s, _ in files.values()) < FULL_VERIFY_BYTES)
    for name, (size, sha256) in sorted(files.items()):
        file = path / name
        if size_of(file) != size:
            raise ValueError(f"{path}: {name} has {size_of(file)} bytes, the manifest says {size}.")
        if full and sha256_of(file) != sha256:
            raise ValueError(f"{path}: {name} does not have the sha256 of the manifest.")
    return manifest


def strangers(path: Path, manifest: Mapping[str, Any], most: int = 5) -> list[str]:
    """What lies in a checkpoint and is not of it, by name; of many some."""
    ours = manifest["files"].keys() | NOT_HASHED
    names = sorted({str(f.relative_to(path)) for f in tree(path)} - ours)
    return names[:most] + ([f"and {len(names) - most} more"] if names[most:] else [])


def _linked(path: Path, name: str) -> str:
    """A word on the file, or the folder that leads to it, that is a link: it could point anywhere, we write none."""
    parts = Path(name).parts
    links = ("/".join(parts[: n + 1]) for n in range(len(parts)) if _is_link(path.joinpath(*parts[: n + 1])))
    return next((f"{link} is a symbolic link, which no checkpoint contains" for link in links), "")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        body = {k: v for k, v in manifest.items() if k != "sha256"}
        sound = manifest["sha256"] == _digest(body) and isinstance(body["step"], int)
        sound = sound and all(isinstance(body[k], dict) for k in ("leaves", "extra", "files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound, manifest = False, {}
    if not sound:
        raise ValueError(f"{path}: {MANIFEST} is damaged.")
    return manifest


def fingerprint(path: Path) -> str:
    """sha256 in hex of what a checkpoint holds, its leaves and the hashes of its files: equal for every copy of it.

    Raises:
        ValueError: its manifest is damaged or missing.
    """
    manifest = _read_manifest(path)
    return _digest({key: manifest[key] for key in ("leaves", "files")})


def _data_files(path: Path) -> list[Path]:
    """The files that a checkpoint may consist of."""
    found = (f for f in sorted(tree(path)) if not _is_link(f))
    return [f for f in found if f.name not in NOT_HASHED and f.suffix != ".tmp" and not FOREIGN.fullmatch(f.name)]


def _inside(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []  # a bucket has no empty folders


def _is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


class _Literal(type(epath.Path("/"))):  # type: ignore[misc]
    """A path on this machine as Orbax wants them, in which nothing is a pattern.

    Orbax looks for the files to put together with `glob`, which takes brackets in the folder's name for a choice of
    letters, finds nothing, and leaves a checkpoint that cannot be read.
    """

    def glob(self, pattern: str) -> Iterator[Any]:
        """What matches the pattern in this folder."""
        return super().glob(posixpath.join(glob.escape(str(self)), pattern))


def _absolute(path: Path) -> Any:
    return path if is_remote(path) else _Literal(path.absolute())


def describe_leaves(state: Any) -> dict[str, list[Any]]:
    """path -> [shape, dtype] of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(_as_dict(state))
    return {path_name(path): [list(a.shape), str(a.dtype)] for path, a in leaves}


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


def first_non_finite(state: Any) -> str | None:
    """The path of the first leaf with a NaN or an infinity, None if there is none: the same in all processes."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(_as_dict(state))}
    leaves = {name: leaf for name, leaf in leaves.items() if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)}
    if not leaves:
        return None
    sharding: Any = getattr(next(iter(leaves.values())), "sharding", None)
    on_mesh = isinstance(sharding, jax.sharding.NamedSharding)
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()) if on_mesh else None
    finite = jax.device_get(jax.jit(_are_finite, out_shardings=everywhere)(list(leaves.values())))
    return next((name for name, good in zip(leaves, finite, strict=True) if not good), None)


def _are_finite(leaves: list[jax.Array]) -> jax.Array:
    return jax.numpy.stack([jax.numpy.isfinite(leaf).all() for leaf in leaves])


def state_hash(state: Any) -> str:
    """sha256 over path, dtype, shape and bytes of every leaf: equal for equal states, bit by bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(_as_dict(state)):
        array = np.asarray(leaf)
        digest.update(f"{path_name(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _handler(use_ocdbt: bool = True) -> ocp.PyTreeCheckpointHandler:
    """Orbax's tree handler, without replica-parallel saving: it blocks the first save for seconds."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, type_handler_registry=registry)


def _in_chunks(leaf: Any) -> ocp.SaveArgs:
    """How a leaf lies on disk: in chunks, divided first along the axes of layers and experts."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(max(0, leaf.ndim - 2))))


def _as_dict(state: Any) -> dict[str, Any]:
    return state._asdict() if hasattr(state, "_asdict") else dict(state)


def path_name(path: tuple[Any, ...]) -> str:
    """What a leaf is called: the keys that lead to it, with slashes."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(p) for p in parts)


def _leaf(described: Any) -> str:
    return "nothing" if described is None else f"{described[1]}{described[0]}"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _advise(problem: str, path: Path, steps: list[int]) -> str:
    older = [s for s in steps if s < int(path.name)]
    if older:
        return f"{problem} Set checkpoint.fallback=True to go on from step {older[-1]}, or restore the file."
    return (
        f"{problem} There is no older checkpoint: restore the file, or use another workdir, or rename {path} to start "
        "again in this one."
    )
