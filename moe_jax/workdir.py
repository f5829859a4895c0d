"""The folder of a run: one process has it at a time, and one config for good."""

import fcntl
import json
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_jax import distributed
from moe_jax.config import DROPLESS, Config, as_dict, differences, validate
from moe_jax.files import is_remote, write_json

TOKENIZER = "tokenizer"  # the folder of a workdir with what came with a converted model besides its weights


def check_workdir(workdir: Path, config: Config) -> None:
    """Raise a ValueError if the workdir is a file, or another config's run is in it (the differences are shown)."""
    file = workdir / "config.json"
    if file.is_file():
        refuse_another_config(workdir, "run", read_config(file), config)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file and must be a folder; name another.")


@contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Hold the workdir, made if absent, for this run; process 0 does, for all.

    Raises:
        ValueError: another command holds it, or some processes of this run see another folder under its name.
    """
    with ExitStack() as held:
        distributed.by_first(lambda: held.enter_context(_locked(workdir)))
        if distributed.count() > 1:
            token = distributed.by_first(lambda: _leave_token(workdir))
            distributed.by_all(lambda: _find_token(workdir, token))
        yield


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    if is_remote(workdir):  # a bucket has no locks: one command at a time is the user's to see to
        yield
        return
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--workdir={workdir} is in use by another process; wait for it, or use another workdir."
            ) from None
        yield


def _leave_token(workdir: Path) -> str:
    token = secrets.token_hex(8)
    (workdir / ".token").write_text(token)
    return token


def _find_token(workdir: Path, token: str, patience_seconds: float = 10.0) -> None:
    """Raise a ValueError unless process 0's token is seen in the workdir; network file systems take a while."""
    end = time.monotonic() + patience_seconds
    while not (workdir / ".token").is_file() or (workdir / ".token").read_text() != token:
        if time.monotonic() > end:
            raise ValueError(
                f"--workdir={workdir} is not the folder that process 0 sees; name one on a file system that all "
                "hosts share."
            )
        time.sleep(0.1)


def record(workdir: Path, config: Config, about: dict[str, Any]) -> None:
    """Write config.json, which claims the workdir for this config, and run.json."""
    write_json(workdir / "config.json", as_dict(config))
    write_run(workdir, about)


def write_run(workdir: Path, about: dict[str, Any]) -> None:
    """Write run.json: what made the run, and where its time went."""
    write_json(workdir / "run.json", about)


def read_run(workdir: Path) -> dict[str, Any]:
    """run.json; empty where there is none yet.

    Raises:
        ValueError: it is damaged.
    """
    file = workdir / "run.json"
    try:
        about = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); delete it.") from None
    return about if isinstance(about, dict) else {}


def refuse_another_config(workdir: Path, what: str, there: dict[str, Any], config: Config) -> None:
    """Raise a ValueError with the differences, unless `there` (read from JSON) is `config`."""
    # a key that is younger than the run has its default; as_dict of a file read back has lists for tuples
    there, here = (json.loads(json.dumps(as_dict(validate(c)))) for c in (there, config))
    if changed := differences(_what_makes_a_run(there), _what_makes_a_run(here)):
        raise ValueError(
            f"--workdir={workdir} holds a {what} of another config; use another workdir, or the same config. "
            "The differences (there -> here):\n  " + "\n  ".join(changed)
        )


def _what_makes_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that change no number of the training, or by rounding only: free when a run goes on."""
    free = {"mesh", "compiler_options", "checkpoint", "log_every", "eval_every", "save_every"}
    free |= {"heartbeat_seconds", "step_timeout_seconds", "measure_every", "record_scores_every"}
    model = {k: v for k, v in config.get("model", {}).items() if k not in ("remat", "unroll_layers")}
    if model.get("dispatch") in DROPLESS:
        model["dispatch"] = "auto"
    return {k: v for k, v in config.items() if k not in free} | {"model": model}


def versions() -> dict[str, Any]:
    """What made a run: library versions, and the git revision of this package if it lies in a clone."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    revision = None
    if shutil.which("git"):  # an installed package runs where there is no git, too
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in packages},
        "git": revision,
        "machine": f"{platform.machine()} {platform.system()}",
    }


def config_of_run(workdir: Path) -> Config:
    """The config a workdir's run was started with.

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
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it, or use another workdir.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no config; restore it, or use another workdir.")
    return config
