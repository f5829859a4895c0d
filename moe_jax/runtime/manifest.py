"""The manifest of a checkpoint: shape and dtype of its leaves, and the sha256 of every file."""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.runtime.files import files_below, is_remote, read_json, sha256_of, size_of, write_json, write_whole
from moe_jax.runtime.stored import refuse_unreadable

MANIFEST = "manifest.json"
FULL_VERIFY_BYTES = 10 * 10**9  # "auto" hashes below this size, and compares sizes above
HASHES = "hashes.{}.json"  # of one process's files, until process 0 has merged them into the manifest
POLL_SECONDS = 0.02  # between two checks for a file of another process
NOT_HASHED = {MANIFEST, "_CHECKPOINT_METADATA"}  # the second holds only Orbax's timestamps
# operating systems put these files into any folder
FOREIGN = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs\w+")


def of_step(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return checkpoints / f"{step:08d}"


def write_manifest(path: Path, record: dict[str, Any], num_processes: int = 1) -> None:
    """Hash every file of the checkpoint and commit it if it can be read: the manifest appears whole or not at all.

    Waits for the hashes of the other processes; if one of them dies, this process ends too.

    Raises:
        ValueError: a leaf of the record cannot be opened.
    """
    files = hash_files(path, 0)
    for number in range(1, num_processes):
        part = path / HASHES.format(number)
        _wait_for(part)
        files |= read_json(part, "the checkpoint is not finished.")
        part.unlink()
    refuse_unreadable(path, record["leaves"])
    body = {**record, "files": files}
    write_whole(path / MANIFEST, json.dumps({"sha256": _digest(body), **body}, indent=1), durable=True)


def hand_in_hashes(path: Path, process: int) -> None:
    """Contribute the hashes of a process other than 0 to the manifest; returns when the manifest is written."""
    write_json(path / HASHES.format(process), hash_files(path, process))
    _wait_for(path / MANIFEST)


def hash_files(path: Path, process: int) -> dict[str, list[Any]]:
    """name -> [size, sha256] of the files that a process wrote."""
    names = {str(f.relative_to(path)): f for f in _data_files(path) if not re.fullmatch(HASHES.format(r"\d+"), f.name)}
    return {name: [size_of(f), sha256_of(f)] for name, f in names.items() if writer(name) == process}


def writer(name: str) -> int:
    """The process that wrote a file: each has a folder for its shards, and process 0 writes all other files."""
    folder = re.match(r"ocdbt\.process_(\d+)/", name)
    return int(folder[1]) if folder else 0


def _wait_for(file: Path) -> None:
    while not file.is_file():
        time.sleep(POLL_SECONDS)


def check(path: Path, verify: str = "auto") -> dict[str, Any]:
    """The manifest of a checkpoint, after checking that its files are as they were written.

    Raises:
        ValueError: a file is missing, is a link, or differs; the first such file is named.
    """
    manifest = read_manifest(path)
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


def other_files(path: Path, manifest: Mapping[str, Any], most: int = 5) -> list[str]:
    """Names of the files in a checkpoint's folder that do not belong to it: the first `most`, and a count of others."""
    ours = manifest["files"].keys() | NOT_HASHED
    names = sorted({str(f.relative_to(path)) for f in files_below(path)} - ours)
    return names[:most] + ([f"and {len(names) - most} more"] if names[most:] else [])


def _linked(path: Path, name: str) -> str:
    """A message if the file, or a folder that leads to it, is a link, which no checkpoint contains; else ""."""
    parts = Path(name).parts
    links = ("/".join(parts[: n + 1]) for n in range(len(parts)) if is_link(path.joinpath(*parts[: n + 1])))
    return next((f"{link} is a symbolic link, which no checkpoint contains" for link in links), "")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, whose files are not looked at.

    Raises:
        ValueError: it is damaged or missing.
    """
    damaged = f"{path}: {MANIFEST} is damaged."
    try:
        manifest = read_json(path / MANIFEST, "")
    except (OSError, ValueError):
        raise ValueError(damaged) from None
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    kinds = {"step": int, "leaves": dict, "extra": dict, "files": dict}
    if manifest.get("sha256") != _digest(body) or not all(isinstance(body.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(damaged)
    return manifest


def fingerprint(path: Path) -> str:
    """sha256 in hex of a checkpoint's leaves and the hashes of its files: equal for every copy of it.

    Raises:
        ValueError: its manifest is damaged or missing.
    """
    manifest = read_manifest(path)
    return _digest({key: manifest[key] for key in ("leaves", "files")})


def fingerprint_at(checkpoints: Path, step: int) -> str | None:
    """The fingerprint of the finished checkpoint of a step; None if it is gone or damaged."""
    try:
        return fingerprint(of_step(checkpoints, step))
    except ValueError:
        return None


def _data_files(path: Path) -> list[Path]:
    """The files in the folder that may belong to the checkpoint."""
    found = (f for f in sorted(files_below(path)) if not is_link(f))
    return [f for f in found if f.name not in NOT_HASHED and f.suffix != ".tmp" and not FOREIGN.fullmatch(f.name)]


def is_link(path: Path) -> bool:
    """Whether a path is a symbolic link; a bucket has none."""
    return not is_remote(path) and path.is_symlink()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
