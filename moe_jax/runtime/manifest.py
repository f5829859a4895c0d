"""The manifest of a checkpoint: what its leaves are, and the sha256 of every file."""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.runtime.files import is_remote, sha256_of, size_of, tree, write_json, write_whole
from moe_jax.runtime.stored import refuse_unreadable

MANIFEST = "manifest.json"


FULL_VERIFY_BYTES = 10 * 10**9  # "auto" hashes below this size, and compares sizes above


HASHES = "hashes.{}.json"  # of one process's files, until process 0 has put them into the manifest


NOT_HASHED = {MANIFEST, "_CHECKPOINT_METADATA"}  # the second holds Orbax's timestamps only


FOREIGN = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs\w+")  # systems put these where they please


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


def _is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
