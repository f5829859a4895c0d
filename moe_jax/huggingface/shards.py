"""The safetensors files of a folder, read and written one tensor at a time.

A folder may come from anywhere, so nothing in it is trusted: its index may name only plain files of the folder, every
header is checked by the safetensors library, and nothing is ever unpickled. Tensors are read without the library,
whose memory maps would count as memory used, and whose numpy interface lacks float8.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.runtime.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_JSON_BYTES = 256 * 2**20  # the index of 100,000 tensors has 10 MB
BLOCK_BYTES = 2**20  # read at once for a hash
DTYPES: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
}
NAMES = {str(dtype): name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Plan(NamedTuple):
    """A tensor to write: name, name of the numpy dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * DTYPES[NAMES[self.dtype]].itemsize


def open_folder(folder: Path) -> dict[str, Entry]:
    """name -> where it is, of every tensor in the folder's safetensors files; reads headers only.

    If one file holds all tensors, an index beside it is left from an older save; as in transformers, it is ignored.

    Raises:
        ValueError: there are no such files, or an index, a link or a header is not as it must be.
    """
    index = _index(folder)
    names = sorted(set(index.values())) if index is not None else [SINGLE]
    found: dict[str, Entry] = {}
    for name in names:
        for tensor, entry in _header(inside(folder, name)).items():
            if tensor in found:
                raise ValueError(
                    f"{folder}: tensor {tensor} is in {found[tensor].file.name} and in {name}; remove one of the files."
                )
            if index is not None and index.get(tensor) != name:
                raise ValueError(f"{folder}: {name} holds {tensor}, which {INDEX} does not place there; fix the index.")
            found[tensor] = entry
    for tensor, name in (index or {}).items():
        if tensor not in found:
            raise ValueError(f"{folder}: {INDEX} places {tensor} in {name}, which does not hold it; fetch it again.")
    return found


def _index(folder: Path) -> dict[str, str] | None:
    """tensor -> file, from the index; None for a single file, which needs none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with config.json and *.safetensors.")
    if (folder / SINGLE).is_file():
        return None
    if (folder / INDEX).exists():
        index = json_object(folder, INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{folder}: {INDEX} has no weight_map from tensors to files; fetch it again.")
        return index
    if os.path.lexists(folder / SINGLE):  # a broken link, which `inside` refuses
        return None
    if files := sorted(f.name for f in folder.iterdir() if f.suffix == ".safetensors"):
        raise ValueError(
            f"{folder} has {files[0]}{f' and {len(files) - 1} more such files' if files[1:] else ''}, but no {INDEX}, "
            f"which lists the tensors of each; fetch it, or rename a single file to {SINGLE}."
        )
    if pickles := sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES):
        raise ValueError(
            f"{folder}: {pickles[0]} is a pickle, which could run any program and is never opened; "
            "give the model's *.safetensors."
        )
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; give a folder with a model's safetensors.")


def inside(folder: Path, name: str, below: str = "") -> Path:
    """The path of a file in a folder, or in its subfolder `below`, after checking that it does not lead elsewhere.

    Links may lead to the blobs of a Hugging Face cache, because that cache builds its folders of such links.
    """
    if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"{folder}: the file name {name!r} leads out of the folder; only plain names are followed.")
    file = folder / below / name
    real = file.resolve()
    homes = [folder.resolve() / below]
    if folder.absolute().parent.name == "snapshots":
        homes.append(folder.absolute().parent.parent.resolve() / "blobs")
    if real.parent not in homes:
        raise ValueError(f"{folder}: {name} is a link to {real}, out of the folder; copy the file into it.")
    if not real.is_file():
        raise ValueError(f"{folder}: {name} is missing or not a file; fetch it again.")
    return file


def json_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder.

    Raises:
        ValueError: it is absent, too large, leads elsewhere, or is not a JSON object.
    """
    file = inside(folder, name)
    if file.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any such file has; fetch it again.")
    return read_json(file, "fetch it again.")


def _header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. The library checks that offsets, shapes and the file's size agree."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as checked:
            names = set(checked.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a sound safetensors file ({error}); fetch it again.") from None
    with open(file, "rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        header = json.loads(raw.read(length))
    entries = {name: _entry(file, name, header[name], 8 + length) for name in names}
    return dict(sorted(entries.items(), key=lambda item: item[1].begin))


def _entry(file: Path, name: str, described: Mapping[str, Any], start: int) -> Entry:
    dtype = described["dtype"]
    shape = tuple(described["shape"])
    if not name.isprintable():  # a message with it would control the terminal
        raise ValueError(f"{file}: the tensor's name {name!r} has unprintable characters; fetch it again.")
    if dtype not in DTYPES:
        raise ValueError(f"{file}: tensor {name} is {dtype}; known are {', '.join(DTYPES)}.")
    begin, end = described["data_offsets"]
    return Entry(file, dtype, shape, start + begin, start + end)


def read(entry: Entry) -> np.ndarray:
    """The tensor as stored."""
    count = math.prod(entry.shape)
    return np.fromfile(entry.file, DTYPES[entry.dtype], count, offset=entry.begin).reshape(entry.shape)


def digest(entry: Entry) -> str:
    """sha256 of dtype, shape and bytes: equal for equal tensors."""
    found = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
    left = entry.end - entry.begin
    with open(entry.file, "rb") as raw:
        raw.seek(entry.begin)
        while left:
            block = raw.read(min(left, BLOCK_BYTES))
            left -= len(block)
            found.update(block)
    return found.hexdigest()


def write_folder(
    folder: Path, plans: Sequence[Plan], value: Callable[[str], np.ndarray], shard_bytes: int = 5 * 10**9
) -> Iterator[Plan]:
    """Write the tensors in order, and yield each after it was written; only one is in memory at a time.

    The library's own `save_file` would hold all tensors of a file. A file has at most `shard_bytes`, unless a single
    tensor is larger; several files get an index.

    Args:
        folder: where to write.
        plans: the tensors.
        value: name -> the tensor, called once for each.
        shard_bytes: 5 GB by default, as in transformers.

    Raises:
        OSError: the disk refuses, or does not return what was written.
    """
    shards = _split(plans, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        yield from _write_file(folder / name, shard, value)
    if len(shards) > 1:
        places = {plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard}
        total = sum(plan.num_bytes for plan in plans)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _read_back(folder, plans)


def _read_back(folder: Path, plans: Sequence[Plan]) -> None:
    """Raise an OSError unless the folder's headers list every tensor, in files of the right size."""
    try:
        found = {name: (entry.dtype, entry.shape) for name, entry in open_folder(folder).items()}
    except ValueError as error:
        raise OSError(f"what was written cannot be read ({error}); check the disk and write it again.") from None
    if found != {plan.name: (NAMES[plan.dtype], plan.shape) for plan in plans}:
        raise OSError(f"{folder} does not hold the tensors that were written; check the disk and write it again.")


def _split(plans: Sequence[Plan], shard_bytes: int) -> list[list[Plan]]:
    shards: list[list[Plan]] = [[]]
    room = shard_bytes
    for plan in plans:
        if plan.num_bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(plan)
        room -= plan.num_bytes
    return shards


def _write_file(file: Path, plans: Sequence[Plan], value: Callable[[str], np.ndarray]) -> Iterator[Plan]:
    """Write one safetensors file: the header's length, the header, the data; wide dtypes first, so all are aligned."""
    ordered = sorted(plans, key=lambda plan: -DTYPES[NAMES[plan.dtype]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in ordered:
        header[plan.name] = {
            "dtype": NAMES[plan.dtype],
            "shape": plan.shape,
            "data_offsets": [offset, offset + plan.num_bytes],
        }
        offset += plan.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as raw:
        raw.write(struct.pack("<Q", len(text)) + text)
        for plan in ordered:
            array = value(plan.name)
            assert (str(array.dtype), array.shape) == (plan.dtype, plan.shape), plan
            raw.write(
                np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            )  # tofile() hides the error of a full disk
            yield plan
        raw.flush()
        os.fsync(raw.fileno())
