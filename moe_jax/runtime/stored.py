"""Arrays as they are stored in a checkpoint: where they are, and whether each can be opened."""

import collections
import glob
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from moe_jax.runtime.files import is_remote
from moe_jax.runtime.leaves import _leaf, path_name

T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20  # a leaf lies on disk in pieces of at most this: what reading a slice of it reads


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


def _handler(use_ocdbt: bool = True) -> ocp.PyTreeCheckpointHandler:
    """Orbax's tree handler, without replica-parallel saving: it blocks the first save for seconds."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, type_handler_registry=registry)


def _one_sentence(path: Path, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, which reads of a checkpoint; what Orbax and TensorStore raise becomes a ValueError."""
    try:
        return function(*args)
    except (jax.errors.JaxRuntimeError, MemoryError):  # of this machine, and no fault of the checkpoint
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({text[:200]}{'...' if text[200:] else ''}).") from error
