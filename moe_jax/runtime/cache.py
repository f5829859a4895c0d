"""Keep compiled programs for later processes: JAX's persistent cache, in the user's cache folder.

Does not import jax, which reads these settings from the environment when it is imported. Settings of the user take
precedence. Processes may share the folder, and it may be deleted at any time. JAX writes an entry in place: an entry
that a kill or a full disk truncated causes a warning and a new compilation at every start, until it is deleted.
"""

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from moe_jax.runtime.files import files_below

FOLDER = "JAX_COMPILATION_CACHE_DIR"
EVERYTHING: dict[str, float] = {  # keep programs however fast they compile and however small they are
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}
MAX_BYTES = 4 * 2**30


def keep_compiled() -> None:
    """Have JAX keep every program that it compiles; if the folder cannot be written, print one line instead."""
    for name, value in EVERYTHING.items():
        _set(name, value)
    if FOLDER in os.environ:
        return
    try:
        folder = user_folder("xla")
        prune(folder, MAX_BYTES)
        _set(FOLDER, str(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        print(f"compiled programs are not kept: {error}; set {FOLDER} to another folder.", file=sys.stderr)


def _set(name: str, value: Any) -> None:
    """Set a flag of JAX unless the user has set it, whether or not a config file has imported jax already."""
    if name not in os.environ:
        os.environ[name] = str(value)
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name.lower(), value)


def user_folder(kind: str) -> Path:
    """The folder for programs compiled on this kind of machine, created if absent; machines may share a home folder.

    Raises:
        OSError: it cannot be written.
        RuntimeError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "moe_jax" / kind / _machine()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write there can run code as this user
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


def _machine() -> str:
    """The CPU's architecture and a hash of its features: compiled code needs them, and JAX's own key may omit them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def prune(folder: Path, max_bytes: int) -> None:
    """Delete the least recently used files until at most `max_bytes` are left; other processes may do the same.

    JAX's own limit needs another package and a lock. On a file system without access times the oldest files are
    deleted.
    """
    entries = []
    for file in files_below(folder):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            entries.append((max(status.st_atime_ns, status.st_mtime_ns), status.st_size, file))
    left = 0
    for _, size, file in sorted(entries, reverse=True):
        left += size
        if left > max_bytes:
            file.unlink(missing_ok=True)
