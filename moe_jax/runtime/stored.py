"""The arrays of a checkpoint on disk: their location, and whether each can be opened."""

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
import tensorstore
from etils import epath

from moe_jax.runtime.files import is_remote
from moe_jax.runtime.leaves import leaf_text, path_name

T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20  # the largest chunk of a leaf on disk; reading a slice reads whole chunks
MOST_CHARACTERS = 200  # the longest quotation of a library's error in ours


def array_spec(path: Path, name: str) -> dict[str, Any]:
    """The tensorstore spec of an array."""
    return {"driver": "zarr", "kvstore": _kvstore(path, f"{_stored_name(name)}/")}


def _stored_name(leaf: str) -> str:
    """Orbax's name of a leaf."""
    return leaf.replace("/", ".")


def _kvstore(path: Path, inside: str = "") -> dict[str, Any]:
    """The tensorstore key-value store of the arrays: Orbax's database if the checkpoint has one, else folders."""
    if is_remote(path):
        bucket, _, folder = str(path).removeprefix("gs://").partition("/")
        place = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
    else:
        place = {"driver": "file", "path": f"{path.absolute()}/"}
    if (path / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": place, "path": inside}
    return place | {"path": place["path"] + inside}


def refuse_unreadable(path: Path, leaves: Mapping[str, list[Any]]) -> None:
    """Raise a ValueError unless every leaf can be opened with its shape and dtype, and all its chunks are stored.

    The chunks are not read, because `save` and `OnDisk.write` checked that their numbers are finite.

    Args:
        path: the checkpoint, whose manifest may still be missing.
        leaves: path -> [shape, dtype], as from `describe_leaves`.
    """
    there = in_one_sentence(path, _stored_leaves, path)
    for name, (shape, dtype) in leaves.items():
        stored = there.get(name)
        if stored is None or [list(stored.shape), str(stored.dtype)] != [shape, dtype]:
            found = None if stored is None else [list(stored.shape), str(stored.dtype)]
            raise ValueError(
                f"{path} cannot be read: {name} is {leaf_text(found)} and should be {leaf_text([shape, dtype])}."
            )
        if stored.num_chunks != stored.expected_chunks:
            raise ValueError(
                f"{path} cannot be read: of {name} {stored.num_chunks} of {stored.expected_chunks} chunks are stored."
            )


class _Stored(NamedTuple):
    """A leaf on disk."""

    shape: tuple[int, ...]
    dtype: Any
    num_chunks: int
    expected_chunks: int


def _stored_leaves(path: Path) -> dict[str, _Stored]:
    """Every leaf that Orbax finds in a checkpoint, by its path in `describe_leaves`."""
    keys = tensorstore.KvStore.open(_kvstore(path)).result().list().result()
    chunk = re.compile(rb"(.+)/\d+(\.\d+)*")
    chunks = collections.Counter(found[1].decode() for key in keys if (found := chunk.fullmatch(key)))
    metadata = tree_handler().metadata(epath.Path(orbax_path(path))).tree
    stored = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(metadata):
        name = path_name(key)
        expected = math.prod(-(-n // c) for n, c in zip(leaf.shape, leaf.storage.chunk_shape, strict=True))
        stored[name] = _Stored(leaf.shape, leaf.dtype, chunks[_stored_name(name)], expected)
    return stored


class _Literal(type(epath.Path("/"))):  # type: ignore[misc]
    """A local path for Orbax, whose characters are never interpreted as a pattern.

    Orbax finds the files to merge with `glob`, which interprets brackets in the folder's name as a set of characters,
    finds nothing, and leaves a checkpoint that cannot be read.
    """

    def glob(self, pattern: str) -> Iterator[Any]:
        """The paths in this folder that match the pattern."""
        return super().glob(posixpath.join(glob.escape(str(self)), pattern))


def orbax_path(path: Path) -> Any:
    """The path as Orbax needs it: absolute, and not interpreted as a pattern."""
    return path if is_remote(path) else _Literal(path.absolute())


def tree_handler(use_ocdbt: bool = True) -> ocp.PyTreeCheckpointHandler:
    """Orbax's tree handler, without replica-parallel saving, which blocks the first save for seconds."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, type_handler_registry=registry)


def in_one_sentence(path: Path, function: Callable[..., T], *args: Any) -> T:
    """Call `function(*args)`, which reads from a checkpoint; errors of Orbax and TensorStore become a ValueError."""
    try:
        return function(*args)
    except (jax.errors.JaxRuntimeError, MemoryError):  # a failure of this machine, not of the checkpoint
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        more = "..." if text[MOST_CHARACTERS:] else ""
        raise ValueError(f"{path} cannot be read ({text[:MOST_CHARACTERS]}{more}).") from error
