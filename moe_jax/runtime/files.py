"""Files that are whole or not there, on this machine or in a `gs://` bucket, and how their bytes are told apart.

A bucket has no folders, links, locks or appending, and an object is there whole or not at all. Its paths are
etils' `epath`, which look like `pathlib`'s; where the two differ, a function here knows it.
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

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of a file system without them


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


def tree(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder itself; links are not followed."""
    if is_remote(folder):
        for path in folder.iterdir():
            yield from tree(path) if path.is_dir() else [path]
    else:
        yield from (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object that a file holds; empty where there is no file.

    Args:
        path: of the file.
        fix: what to do about a damaged one, the end of a sentence.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; {fix}")
    return value


def write_json(path: Path, value: Any) -> None:
    """The file with the value, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole(path: Path, content: str | bytes, durable: bool = False) -> None:
    """The file with the content, whole or not at all; `durable` survives a power cut."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # shards of a sweep write sweep.json at the same time
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
    """Whether files can be made in a folder; of a bucket that is known when one is."""
    return is_remote(folder) or os.access(folder, os.W_OK)


def output_of(text: str, flag: str) -> Path:
    """The file that a flag names to be written, as `path_of`; checked before what is to be written costs time.

    Raises:
        ValueError: no file can be written there.
    """
    path = path_of(text, flag)
    if path.is_dir() or not is_writable(path.absolute().parent):
        raise ValueError(f"{flag}={text} cannot be written; name a file in a folder that is there, and yours.")
    return path


def copy_tree(source: Path, target: Path) -> None:
    """The files below a folder also below another, folders that are missing made."""
    for file in tree(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())


def remove_tree(folder: Path) -> None:
    """Delete a folder with all that is in it."""
    remote: Any = folder
    if is_remote(folder):
        remote.rmtree()
    else:
        shutil.rmtree(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which is `target` once the block ends, and gone if the block fails.

    What a killed process left of one is removed by the next that wants the same target.

    Raises:
        ValueError: the target holds something, or another process is making it.
    """
    if is_remote(target):
        raise ValueError(f"{target} is in a bucket; write to a folder of this machine and copy it.")
    target = target.absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ValueError(f"{target} is there already and is no empty folder; name another.")
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY)
    try:
        lock(held, partial, f"{target} is being written by another process; wait for it, or name another.")
        for old in list(partial.iterdir()):
            remove_tree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        try:
            yield partial
            partial.rename(target)
        except BaseException:
            _remove_in_use(partial)
            raise
    finally:
        os.close(held)


def _remove_in_use(folder: Path, tries: int = 1000) -> None:
    """Delete a folder in which threads of this process may still be writing: what they began comes to an end.

    Tries are counted, not seconds: those threads do nothing while the process is stopped.
    """
    for last in range(tries - 1, -1, -1):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=last > 0)
        time.sleep(0.01)


def lock(file: Any, path: Path, refusal: str) -> None:
    """Keep other processes off an open file or folder until it is closed; where there are no locks, say so and go on.

    Args:
        file: the open file, or its number.
        path: where it is.
        refusal: the sentence for whoever comes second.

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
            f"warning: the file system of {path} has no locks ({error.strerror}); let no other command write there "
            "meanwhile.",
            file=sys.stderr,
        )
