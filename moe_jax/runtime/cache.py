"""Compiled programs outlive the process: JAX's persistent cache is on, in the user's cache folder.

No jax: JAX reads these settings from the environment when it is imported, and what the user has set there wins.
Processes may share the folder, and anyone may delete it. JAX writes an entry in place: one cut short by a kill or a
full disk is told at every start, compiled anew, and not replaced until it is deleted.
"""

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from moe_jax.runtime.files import tree

FOLDER = "JAX_COMPILATION_CACHE_DIR"


EVERYTHING: dict[str, float] = {  # whatever it took to compile, and however small it is
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}


MAX_BYTES = 4 * 2**30


def keep_compiled() -> None:
    """Have JAX keep every program that it compiles; one line says so where the folder cannot be written."""
    for name, value in EVERYTHING.items():
        _set(name, value)
    if FOLDER in os.environ:
        return
    try:
        folder = user_folder("xla")
        prune(folder, MAX_BYTES)
        _set(FOLDER, str(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        print(f"compiled programs are not kept: {error}; {FOLDER}=... names another folder.", file=sys.stderr)


def _set(name: str, value: Any) -> None:
    """Unless the user has: for the jax that will be imported, and the one that a config file has imported already."""
    if name not in os.environ:
        os.environ[name] = str(value)
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name.lower(), value)


def user_folder(kind: str) -> Path:
    """Where what is compiled on this kind of machine lies, made if need be; homes are shared by several kinds.

    Raises:
        OSError, RuntimeError: it cannot be written; the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "moe_jax" / kind / _machine()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write there can run code as this user
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


def _machine() -> str:
    """The CPU's instruction set, which compiled code needs and the cache's own key does not promise to have."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def prune(folder: Path, max_bytes: int) -> None:
    """Delete what was used longest ago, until at most so many bytes are left; another process may do the same.

    JAX's own bound needs one package more and a lock. A file system that notes no reading goes by age.
    """
    entries = []
    for file in tree(folder):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            entries.append((max(status.st_atime_ns, status.st_mtime_ns), status.st_size, file))
    kept = 0
    for _, size, file in sorted(entries, reverse=True):
        kept += size
        if kept > max_bytes:
            file.unlink(missing_ok=True)
