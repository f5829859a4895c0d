"""Files that are written whole or not at all, on this machine or in a `gs://` bucket, and their hashes and locks.

A bucket has no folders, links, locks or appending, and its objects appear whole or not at all. Paths in a bucket are
etils' `epath`, which look like `pathlib`'s; the functions here cover the differences.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_jax.config.paths import path_of

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # the errors of a file system without locks
RETRY_SECONDS = 0.01  # between two attempts to remove a folder in use


def is_remote(path: Path) -> bool:
    """Whether the path is in a bucket."""
    return not isinstance(path, Path)


def size_of(path: Path) -> int:
    """The bytes of a file."""
    stat: Any = path.stat()
    return stat.length if is_remote(path) else stat.st_size


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """All files and links below a folder; links are not followed."""
    if is_remote(folder):
        for path in folder.iterdir():
            yield from files_below(path) if path.is_dir() else [path]
    else:
        yield from (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def read_json(path: Path, fix: str, name: str = "") -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file.

    Args:
        path: of the file.
        fix: the end of the error message: what to do about a damaged file.
        name: the subject of the error message; "" for the path.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name or path} is not valid JSON ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name or path} must hold a JSON object; {fix}")
    return value


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Write the value as JSON; see `write_whole`."""
    write_whole(path, json.dumps(value, indent=1) + "\n", durable)


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a file so that it appears whole or not at all; if `durable`, it survives a power cut."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder; True for a bucket, where only the attempt shows it."""
    return is_remote(folder) or os.access(folder, os.W_OK)


def output_of(text: str, flag: str) -> Path:
    """The path of a flag that names an output file, checked before the work whose result is written to it.

    Raises:
        ValueError: no file can be written there; or as in `path_of`.
    """
    path = path_of(text, flag)
    if path.is_dir() or not is_writable(path.absolute().parent):
        raise ValueError(f"{flag}={text} cannot be written; name a file in an existing folder that you may write to.")
    return path


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files below a folder to another folder, which is created if absent."""
    for file in files_below(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())


def remove_tree(folder: Path) -> None:
    """Delete a folder with everything in it."""
    remote: Any = folder
    if is_remote(folder):
        remote.rmtree()
    else:
        shutil.rmtree(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `target` when the block ends and is removed if the block fails.

    What a killed process left behind is removed by the next process with the same target.

    Raises:
        ValueError: the target is not empty, or another process is writing it.
    """
    if is_remote(target):
        raise ValueError(f"{target} is in a bucket; write to a folder of this machine and copy it.")
    target = target.absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ValueError(f"{target} exists already and is not an empty folder; name another.")
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        lock(descriptor, partial, f"{target} is being written by another process; wait for it, or name another.")
        for old in list(partial.iterdir()):
            remove_tree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        try:
            yield partial
            partial.rename(target)
        except BaseException:
            _remove_in_use(partial)
            raise
    finally:
        os.close(descriptor)


def _remove_in_use(folder: Path, tries: int = 1000) -> None:
    """Delete a folder into which threads of this process may still be writing.

    The limit is a number of attempts, not of seconds, because those threads do nothing while the process is stopped.
    """
    for last in range(tries - 1, -1, -1):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=last > 0)
        time.sleep(RETRY_SECONDS)


def lock(file: Any, path: Path, refusal: str) -> None:
    """Lock an open file or folder against other processes until it is closed; without locks, print a warning instead.

    Args:
        file: the open file, or its descriptor.
        path: its path.
        refusal: the error message for the second process.

    Raises:
        ValueError: `refusal`, where another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(refusal) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: the file system of {path} has no locks ({error.strerror}); run no other command that "
            "writes there.",
            file=sys.stderr,
        )
