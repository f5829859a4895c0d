"""Keep compiled programs for later processes: JAX's persistent cache, in the user's cache folder.

The processes of a run keep them in its workdir, which they share: JAX has only process 0 write, so that a folder on
every host would serve process 0 alone.

On a plain host this does not import jax, which reads these settings from the environment when it is imported. Settings
of the user take precedence. Processes may share the folder, and it may be deleted at any time. JAX writes an entry in
place: an entry that a kill or a full disk truncated causes a warning and a new compilation at every start, until it is
deleted.
"""

import contextlib
import functools
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from moe_jax.runtime import processes
from moe_jax.runtime.files import files_below, is_remote

FOLDER = "JAX_COMPILATION_CACHE_DIR"
EVERYTHING: dict[str, float] = {  # keep programs however fast they compile and however small they are
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}
MAX_BYTES = 4 * 2**30


def keep_compiled(workdir: Path | None = None) -> None:
    """Have JAX keep every program that it compiles; if the folder cannot be written, print one line instead.

    Args:
        workdir: of the run, to be given after its processes have joined. With several of them, programs are kept in its
            folder `xla`, and process 0 prints a line that names the folder.
    """
    for name, value in EVERYTHING.items():
        _set(name, value)
    several = processes.count() > 1
    if FOLDER not in os.environ:
        try:
            folder = _shared_folder(workdir) if several and workdir is not None else user_folder("xla")
            if processes.index() == 0 and not is_remote(folder):
                prune(folder, MAX_BYTES)
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            print(f"compiled programs are not kept: {error}; set {FOLDER} to another folder.", file=sys.stderr)
            return
        _set(FOLDER, str(folder))
    if several and sys.modules["jax"].config.jax_enable_compilation_cache:
        _have_every_process_write()
        if processes.index() == 0:
            print(f"compiled programs are kept in {os.environ[FOLDER]}", flush=True)


def _shared_folder(workdir: Path) -> Path:
    """The folder in a workdir for programs compiled on this kind of machine, created if absent."""
    folder = workdir / "xla" / _machine()
    if is_remote(folder):
        _set("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # XLA's own caches are files that C++ opens
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write there can run code as this user
    return folder


def _have_every_process_write() -> None:
    """On CPUs, have every process write its programs, because it finds none of those that process 0 writes.

    The key of a program has a description of the machine. On TPUs and GPUs that is the whole machine, and the same in
    every process. On CPUs it is the devices of one process. JAX itself has no option for this.
    """
    jax = sys.modules["jax"]
    compiler, state = jax._src.compiler, jax._src.distributed.global_state
    write = compiler._cache_write

    @functools.wraps(write)
    def write_as_first(*args: Any) -> None:
        number = state.process_id
        state.process_id = 0
        try:
            write(*args)
        finally:
            state.process_id = number

    if jax.default_backend() == "cpu":
        compiler._cache_write = write_as_first


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
