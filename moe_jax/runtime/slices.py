"""Checkpoints of weights only, written and read slice by slice, because memory may not hold all weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from moe_jax.runtime.checkpoint import is_gone, read_newest, shared_leaves
from moe_jax.runtime.leaves import compare_leaves, describe_leaves, path_name
from moe_jax.runtime.manifest import write_manifest
from moe_jax.runtime.stored import CHUNK_BYTES, array_spec, in_one_sentence, orbax_path, tree_handler


class OnDisk(NamedTuple):
    """An array of a checkpoint, read and written by slices along its first axes. Values are numpy arrays.

    A slice that cannot be read, or is not finite, raises a ValueError.
    """

    path: Path
    name: str
    store: Any

    def read(self, index: tuple[int, ...]) -> np.ndarray:
        """Read the slice at an index of the first axes; () for the whole array."""
        try:
            value = in_one_sentence(self.path, lambda: self._at(index).read().result())
        except ValueError:
            if not is_gone(self.path):
                raise
            raise ValueError(
                f"{self.path} was removed by its run while it was read; repeat the command, or raise the run's "
                "checkpoint.keep."
            ) from None
        return self._finite(value)

    def write(self, index: tuple[int, ...], value: np.ndarray) -> None:
        """Write the slice at an index of the first axes."""
        self._at(index).write(self._finite(value)).result()

    def _at(self, index: tuple[int, ...]) -> Any:
        return self.store[index] if index else self.store

    def _finite(self, value: np.ndarray) -> np.ndarray:
        if jax.numpy.issubdtype(value.dtype, jax.numpy.inexact) and not np.isfinite(value).all():
            raise ValueError(f"{self.path}: {self.name} is not finite.")
        return value


def create(path: Path, abstract: Mapping[str, Any], axes: Callable[[str], int]) -> dict[str, OnDisk]:
    """Create a checkpoint, which is complete once its arrays are written and `commit` is called.

    Orbax writes the tree, with a scalar in place of every array. The actual arrays are then created with tensorstore,
    as Orbax itself does. They are not in its database of small files, which would grow with every slice.

    Args:
        path: the checkpoint, which must not exist yet.
        abstract: tree of `jax.ShapeDtypeStruct`.
        axes: leaf's path -> number of leading axes that index its slices.

    Returns:
        leaf's path -> the array.
    """
    numbers = jax.tree.map(lambda leaf: jax.numpy.zeros((), leaf.dtype), dict(abstract))
    with _without_warnings(), ocp.Checkpointer(tree_handler(use_ocdbt=False)) as writer:
        writer.save(orbax_path(path), args=ocp.args.PyTreeSave(numbers))
    leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(dict(abstract))}
    arrays = {name: OnDisk(path, name, _make_array(path, name, leaf, axes(name))) for name, leaf in leaves.items()}
    for name in (name for name in leaves if name.startswith("bias/")):
        arrays[name].write((), np.zeros(leaves[name].shape, leaves[name].dtype))  # some families have none
    return arrays


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Orbax's warning that there is no database to merge; `create` makes none."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _make_array(path: Path, name: str, leaf: jax.ShapeDtypeStruct, axes: int) -> Any:
    """Create the zarr array of a leaf, in chunks of one slice, or of some rows of a slice."""
    rows = leaf.shape[axes:]
    row_bytes = int(np.prod(rows[1:])) * leaf.dtype.itemsize
    chunk = [1] * axes + [max(1, min(n, CHUNK_BYTES // row_bytes)) for n in rows[:1]] + list(rows[1:])
    metadata = {"shape": list(leaf.shape), "chunks": chunk, "compressor": None}
    # tensorstore skips chunks of zeros by default, and Orbax refuses an array with missing chunks
    whole = {"store_data_equal_to_fill_value": True}
    spec = array_spec(path, name) | {"metadata": metadata, "dtype": str(leaf.dtype)} | whole
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def commit(path: Path, abstract: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Write the manifest, which makes the result of `create` a checkpoint of step 0 with weights only."""
    extra = {"weights_only": True, **extra}
    write_manifest(path, {"step": 0, "leaves": describe_leaves(abstract), "extra": extra})


def open_newest(
    directory: Path, abstract: Mapping[str, Any], *, verify: str = "auto", fallback: bool = False
) -> tuple[int, dict[str, OnDisk]] | None:
    """Open the newest checkpoint, of a run or of weights only: its step and its weights; None if there is none.

    Args:
        directory: the checkpoint folder.
        abstract: "params" and "bias", as `jax.ShapeDtypeStruct`.
        verify: as in `restore`.
        fallback: as in `restore`.

    Raises:
        ValueError: as in `restore`.
    """
    wanted = describe_leaves(abstract)

    def compare(path: Path, manifest: Mapping[str, Any]) -> None:
        compare_leaves(path, *shared_leaves(manifest, wanted, abstract))

    found = read_newest(directory, compare, lambda path, _: _open_arrays(path, wanted), verify, fallback)
    return None if found is None else (found.step, found.value)


def _open_arrays(path: Path, names: Iterable[str]) -> dict[str, OnDisk]:
    """Open the arrays with a shared cache of chunks: a small slice shares a chunk with those that are read next."""
    memory = tensorstore.Context({"cache_pool": {"total_bytes_limit": CHUNK_BYTES}})
    strict = {"fill_missing_data_reads": False}  # a missing chunk is an error, not zeros
    stores = {name: tensorstore.open(array_spec(path, name) | strict, open=True, context=memory) for name in names}
    return {name: OnDisk(path, name, store.result()) for name, store in stores.items()}
