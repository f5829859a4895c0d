"""What the reliability drills share: one small config, commands as subprocesses, and ways to read a run."""

import fcntl
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from state_hash import state_hash

from conftest import HANG_SECONDS, tiny_config
from moe_jax.config import Config, as_dict
from moe_jax.runtime import checkpoint
from moe_jax.runtime import manifest as manifest_
from moe_jax.runtime.log import read_jsonl
from moe_jax.training.state import TrainState, abstract_state

REPO = Path(__file__).parent.parent.parent
DRIVER = Path(__file__).parent / "driver.py"
BALANCE = dict(bias_sign=dict(rate=1e-2), aux_loss=dict(weight=1e-2))
NUM_STEPS = 20


def drill_config(**overrides: Any) -> Config:
    """20 steps, saved every 5. Overrides that no step reads share its one compilation."""
    settings: dict[str, Any] = dict(num_steps=NUM_STEPS, save_every=5, balance=BALANCE, data=dict(eval_sequences=4))
    return tiny_config(**(settings | overrides))


def write_config(file: Path, config: Config) -> Path:
    """A config file that returns `config`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"from moe_jax.config import default\n\n\ndef get_config(arg=''):\n    return default(**{as_dict(config)!r})\n"
    )
    return file


class Command:
    """A command running in another process, pinned to one core."""

    def __init__(
        self,
        name: str,
        log: Path,
        *flags: str,
        accident: str = "",
        environ: Mapping[str, str] | None = None,
        folder: Path = REPO,
    ) -> None:
        """Args: accident: see driver.py; folder: the working directory of the command."""
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        environment = {**os.environ, "DRILL": accident, "DRILL_CORE": worker, "PYTHONUNBUFFERED": "1"}
        environment |= {"PYTHONPATH": str(REPO)} | dict(environ or {})
        self._log = log
        command = [sys.executable, str(DRIVER), name, *flags]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        with open(log, "w") as out:  # written by `cat`, so that a limit on the size of files does not apply to it
            self._writer = subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=out)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait(self) -> int:
        """The exit status; negative for a signal."""
        try:
            return self.process.wait(HANG_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL if it still runs, and wait, so that all its output is in the log."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._writer.wait()

    @property
    def text(self) -> str:
        """Its output so far."""
        return self._log.read_text()

    @property
    def compilations(self) -> list[int]:
        """How often each train step it made was compiled."""
        return json.loads(re.findall(r"train step compilations: (.*)", self.text)[-1])


def start_training(file: Path, workdir: Path, *flags: str, accident: str = "") -> Command:
    """`python -m moe_jax.train` in another process."""
    number = len(list(workdir.parent.glob(f"{workdir.name}.*.log")))
    log = workdir.parent / f"{workdir.name}.{number}.log"
    return Command("moe_jax.train", log, f"--config={file}", f"--workdir={workdir}", *flags, accident=accident)


def cluster_of(processes: int) -> dict[str, str]:
    """The environment of several processes on this machine, without their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}


class Processes:
    """The same command in several processes of one run; `with` leaves none behind."""

    def __init__(
        self,
        file: Path,
        workdir: Path,
        *flags: str,
        devices: tuple[int, ...],
        accident: str = "",
        shared: bool = True,
        folders: Sequence[Path] = (),
        environs: Sequence[Mapping[str, str]] = (),
        name: str = "moe_jax.train",
    ) -> None:
        """Start them.

        Args:
            devices, folders, environs: of each process.
            accident: happens in every one.
            shared: they have one workdir.
        """
        workdir.parent.mkdir(parents=True, exist_ok=True)
        start = len(list(workdir.parent.glob(f"{workdir.name}.*.log")))
        cluster = cluster_of(len(devices))
        xla = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count="
        self.all = [
            Command(
                name,
                workdir.parent / f"{workdir.name}.{start + number}.log",
                f"--config={file}",
                f"--workdir={workdir if shared else workdir / str(number)}",
                *flags,
                accident=accident,
                environ=cluster
                | {"JAX_PROCESS_ID": str(number), "DRILL_CORE": str(number), "XLA_FLAGS": f"{xla}{count}"}
                | (dict(environs[number]) if environs else {}),
                folder=folders[number] if folders else REPO,
            )
            for number, count in enumerate(devices)
        ]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for command in self.all:
            command.kill()

    def __getitem__(self, number: int) -> Command:
        return self.all[number]

    def wait(self) -> list[int]:
        """The exit status of each."""
        return [command.wait() for command in self.all]

    @property
    def text(self) -> str:
        """Their output so far, one after the other."""
        return "\n".join(f"--- process {i}:\n{command.text}" for i, command in enumerate(self.all))


def train_together(
    file: Path, workdir: Path, *flags: str, devices: tuple[int, ...], environs: Sequence[Mapping[str, str]] = ()
) -> Processes:
    """Run a training command in several processes until they end; each must succeed."""
    with Processes(file, workdir, *flags, devices=devices, environs=environs) as processes:
        statuses = processes.wait()
    assert statuses == [0] * len(devices), processes.text
    return processes


def train(file: Path, workdir: Path, *flags: str, accident: str = "") -> Command:
    """Run a training command until it ends; it must succeed."""
    command = start_training(file, workdir, *flags, accident=accident)
    assert command.wait() == 0, command.text
    return command


def wait_until(condition: Callable[[], bool], command: Command) -> None:
    """Poll every few milliseconds until the condition holds or the command has ended."""
    end = time.monotonic() + HANG_SECONDS
    while not condition() and command.process.poll() is None:
        assert time.monotonic() < end, f"nothing happened within {HANG_SECONDS} s:\n{command.text}"
        time.sleep(0.003)


def steps_logged(workdir: Path) -> int:
    """How many steps metrics.jsonl holds."""
    return len(read_jsonl(workdir / "metrics.jsonl"))


def restored(config: Config, workdir: Path) -> TrainState:
    """The newest checkpoint's state."""
    found = checkpoint.restore(workdir / "checkpoints", abstract_state(config))
    assert found is not None
    return found[0]


def final_hash(config: Config, workdir: Path) -> str:
    """The state hash of the newest checkpoint."""
    return state_hash(restored(config, workdir))


def curve(workdir: Path) -> list[dict[str, Any]]:
    """Every number that was logged, per step, without those that measure time."""
    return [untimed(record) for record in read_jsonl(workdir / "metrics.jsonl")]


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without its times, which differ between runs."""
    timed = ("tokens_per_second", "gflops_per_second", "mfu", "data_wait", "goodput")
    return {k: v for k, v in record.items() if k not in timed and not k.startswith(("time/", "hosts/"))}


def layers(workdir: Path) -> list[dict[str, Any]]:
    """The lines of layers.jsonl."""
    return read_jsonl(workdir / "layers.jsonl")


def folders(workdir: Path) -> list[str]:
    """The content of the run's checkpoint folder."""
    return sorted(f.name for f in (workdir / "checkpoints").iterdir())


def made_once(tmp_path_factory: Any, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test worker creates; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


def flip_bit(file: Path, position: int) -> None:
    """Change one bit of a file; `position` wraps around."""
    data = bytearray(file.read_bytes())
    byte, bit = divmod(position % (8 * len(data)), 8)
    data[byte] ^= 1 << bit
    file.write_bytes(bytes(data))


def data_files(folder: Path) -> list[Path]:
    """The files of a checkpoint whose bytes its manifest vouches for."""
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in manifest_.NOT_HASHED]


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """A manifest with other values and a matching checksum, as an attacker would write it."""
    manifest = json.loads((folder / manifest_.MANIFEST).read_text())
    body: Mapping[str, Any] = {k: v for k, v in manifest.items() if k != "sha256"} | changes
    (folder / manifest_.MANIFEST).write_text(json.dumps({"sha256": manifest_._digest(body), **body}))


def uninterrupted(tmp_path_factory: Any, config: Config) -> Path:
    """A folder with `config.py`, and with `run`, the workdir of an undisturbed command."""
    return made_once(
        tmp_path_factory,
        "uninterrupted",
        lambda folder: train(write_config(folder / "config.py", config), folder / "run"),
    )


def assert_close_curves(workdir: Path, reference: Path, relative: float = 1e-5) -> None:
    """Every loss within rounding of the reference's, step by step."""
    ours, theirs = curve(workdir), curve(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["tokens_seen"] == other["tokens_seen"]
        for key in ("loss", "total_loss", "bits_per_byte"):
            assert abs(one[key] - other[key]) <= relative * abs(other[key]), (one["step"], key, one[key], other[key])


def assert_same_numbers(config: Config, workdir: Path, reference: Path) -> None:
    """Every logged number and the final state are the same, bit by bit."""
    assert curve(workdir) == curve(reference)
    assert layers(workdir) == layers(reference)
    assert final_hash(config, workdir) == final_hash(config, reference)


def steps_reported(command: Command) -> int:
    """The number of steps that this start of a run has printed."""
    return max(map(int, re.findall(r"train step (\d+)/", command.text)), default=0)


def kill_until_done(file: Path, workdir: Path, kills: int, draw: random.Random, accident: str = "") -> None:
    """Repeatedly start the command and kill it after a random number of steps and milliseconds; then let it end.

    The accident happens in every start.
    """
    for _ in range(kills):
        last = draw.randrange(NUM_STEPS)
        command = start_training(file, workdir, accident=f"pace=0.05,{accident}")

        def far_enough(command: Command = command, last: int = last) -> bool:
            return steps_reported(command) > last

        wait_until(far_enough, command)
        time.sleep(draw.random() * 0.3)
        command.kill()
    train(file, workdir, accident=accident)
