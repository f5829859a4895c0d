"""The folder of a run: one command uses it at a time, and its numbers come from one config, one corpus and one start.

Keys of the config may change if that changes no number (`config.free_keys`). The corpus and the initial weights
are identified by fingerprints: the same data may be moved, and other data at the same path are refused.
"""

import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import moe_jax
from moe_jax.config import Config, as_dict, changed_numbers, validate
from moe_jax.runtime import processes
from moe_jax.runtime.files import is_remote, lock, read_json, write_json

TOKENIZER = "tokenizer"  # subfolder with the tokenizer files and configs of the model's original folder
LOOK_SECONDS = 0.1  # between two checks for a file of process 0


class Identity(NamedTuple):
    """Fingerprints of the data of a run and of its initial weights, stored in run.json and in every checkpoint.

    corpus: `data.Corpus.fingerprint`. weights: "step" and "fingerprint" of the checkpoint of `init_from` that the run
    started from; None if its parameters were drawn at random. trunk: the same of the checkpoint of `branch_from`.
    """

    corpus: str
    weights: dict[str, Any] | None = None
    trunk: dict[str, Any] | None = None


def identity_of(about: Mapping[str, Any]) -> Identity | None:
    """The identity in run.json or in a checkpoint; None if an earlier version wrote it without one."""
    return Identity(**about["identity"]) if "identity" in about else None


def check_workdir(workdir: Path, config: Config, corpus: str) -> None:
    """Raise a ValueError if the workdir is a file, or the run in it has another config or reads another corpus.

    Args:
        workdir: a folder; it need not exist.
        config: of the run that is about to start.
        corpus: fingerprint of the data of that run.
    """
    file = workdir / "config.json"
    if file.is_file():
        refuse_another_run(workdir, "run", read_config(file), identity_of(read_run(workdir)), config, corpus)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file and must be a folder; name another.")


@contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Create the workdir if absent and lock it for this run; process 0 does so for all processes.

    Raises:
        ValueError: another command has locked it, or a process of this run sees another folder under its name.
    """
    with ExitStack() as stack:
        processes.by_first(lambda: stack.enter_context(_locked(workdir)))
        if processes.count() > 1:
            token = processes.by_first(lambda: _leave_token(workdir))
            processes.by_all(lambda: _find_token(workdir, token))
        yield


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    if is_remote(workdir):  # a bucket has no locks; the user must run one command at a time
        yield
        return
    with open(workdir / ".lock", "w") as file:
        lock(file, workdir, f"--workdir={workdir} is in use by another process; wait for it, or use another workdir.")
        yield


def _leave_token(workdir: Path) -> str:
    token = secrets.token_hex(8)
    (workdir / ".token").write_text(token)
    return token


def _find_token(workdir: Path, token: str, tries: int = 100) -> None:
    """Raise a ValueError unless process 0's token appears in the workdir; network file systems take a while.

    The limit is a number of attempts, not of seconds, because a process makes none while it is stopped.
    """
    for _ in range(tries):
        if (workdir / ".token").is_file() and (workdir / ".token").read_text() == token:
            return
        time.sleep(LOOK_SECONDS)
    raise ValueError(
        f"--workdir={workdir} is not the folder that process 0 sees; name one on a file system that all hosts share."
    )


def record_run(workdir: Path, config: Config, about: dict[str, Any]) -> None:
    """Write config.json, which reserves the workdir for this config, and run.json."""
    write_json(workdir / "config.json", as_dict(config))
    write_run(workdir, about)


def write_run(workdir: Path, about: dict[str, Any]) -> None:
    """Write run.json: versions, identity, rollbacks, and where the time went."""
    write_json(workdir / "run.json", about, durable=True)


def read_run(workdir: Path) -> dict[str, Any]:
    """The content of run.json; empty if there is none yet.

    Raises:
        ValueError: it is damaged.
    """
    return read_json(workdir / "run.json", "delete it.")


def refuse_another_run(
    workdir: Path, what: str, there: dict[str, Any], identity: Identity | None, config: Config, corpus: str
) -> None:
    """Raise a ValueError, with the differences, unless the run in the workdir has the same numbers and the same data.

    Args:
        workdir: the folder of the run.
        what: "run" or "checkpoint".
        there: its config, as read from JSON.
        identity: its identity; if None, data.path is compared instead.
        config: of the run that is about to start.
        corpus: fingerprint of the data of that run.
    """
    before = validate(there)  # keys that are newer than the run get their defaults
    if changed := changed_numbers(before, config):
        raise ValueError(
            f"--workdir={workdir} holds a {what} of another config; use another workdir, or the same config. "
            "The differences (there -> here):\n  " + "\n  ".join(changed)
        )
    same = before.data.path == config.data.path if identity is None else identity.corpus == corpus
    if not same:
        known = f"{before.data.path!r}" if identity is None else f"the fingerprint {identity.corpus[:16]}"
        raise ValueError(
            f"data.path={config.data.path!r} has other data (fingerprint {corpus[:16]}) than the {what} in "
            f"--workdir={workdir} reads, which has {known}; name the folder with the data of the run, or use another "
            "workdir."
        )


def versions() -> dict[str, Any]:
    """Library versions, the machine, and the git revision of this package if it is in a clone."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = Path(moe_jax.__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    revision = None
    # an installed package may be inside a repository of another project
    if shutil.which("git") and (here.parent / ".git").exists():
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in packages},
        "git": revision,
        "machine": f"{platform.machine()} {platform.system()}",
    }


def config_of_run(workdir: Path) -> Config:
    """The config with which the run in a workdir was started.

    Raises:
        ValueError: the workdir holds no run.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(f"--workdir={workdir} holds no config.json, so no run; give the workdir of a training run.")
    return validate(read_config(file))


def read_config(file: Path) -> dict[str, Any]:
    """The config.json of a workdir.

    Raises:
        ValueError: it is damaged.
    """
    return read_json(file, "restore it, or use another workdir.")
