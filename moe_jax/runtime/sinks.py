"""Where the numbers of a run go besides its own files: TensorBoard, Weights & Biases, MLflow.

A library is imported only by a run that uses it, in process 0. The files of the run have all numbers in any case, so a
sink that fails is reported once and left alone.
"""

import importlib.util
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_jax.config import Config, as_dict, flatten
from moe_jax.runtime.files import is_remote, read_json, write_json

IDS = "tracking.json"  # in the workdir: the id of the run in each tracker, so that a resumed run continues its page
BOARD_SCALARS = 10**5  # in a bucket, the number of values after which TensorBoard's file is continued in another
MLFLOW_BATCH = 100  # the most parameters in a call
NOT_IN_MLFLOW = re.compile(r"[^\w./: -]")  # characters that its names of metrics cannot have


class Sink(Protocol):
    """Takes the numbers of a run under the names that they have in its own files."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of a step; None and texts are left out."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write a picture, uint8 [height, width, 3]."""

    def close(self) -> None:
        """Write what is left."""


def check_tracking(config: Config) -> None:
    """Raise a ValueError if a tracker is configured whose library is not installed."""
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        value = getattr(config.tracking, name)
        if value and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"tracking.{name}={value!r} needs the package {package}, which is not installed; run pip install "
                f"'moe_jax[{name}]', or set tracking.{name}=''."
            )


def open_trackers(config: Config, workdir: Path, about: Mapping[str, Any]) -> list[Sink]:
    """The trackers of `config.tracking`.

    Args:
        config: of the run.
        workdir: its name is that of the run, unless the config has one; it keeps IDS.
        about: the content of run.json: versions, git revision, identity.
    """
    sinks: list[Sink] = []
    if config.tracking.wandb:
        sinks.append(Careful("tracking.wandb", lambda: WandB(config, workdir, about)))
    if config.tracking.mlflow:
        sinks.append(Careful("tracking.mlflow", lambda: MLflow(config, workdir, about)))
    return sinks


class Careful:
    """A sink behind a service, whose first error is printed and ends its use, but not the run."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", make()))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """As `Sink`."""
        self._use(lambda sink: sink.write(step, values))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """As `Sink`."""
        self._use(lambda sink: sink.picture(step, name, pixels))

    def close(self) -> None:
        """As `Sink`."""
        self._use(lambda sink: sink.close())

    def _use(self, action: Callable[[Sink], None]) -> None:
        if (sink := self._sink) is not None:
            self._try(lambda: action(sink))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service raises
            self._sink = None
            reason = " ".join(str(error).split())[:200]
            print(f"{self._name} is no longer used: {type(error).__name__}: {reason}", flush=True)


def board(folder: Path, first_step: int, in_parts: bool) -> list[Sink]:
    """TensorBoard's file, if its package is installed; it hides what it has of `first_step` and later steps."""
    return [] if importlib.util.find_spec("tensorboardX") is None else [Board(folder, first_step, in_parts)]


class Board:
    """TensorBoard's file, in a bucket in parts."""

    def __init__(self, folder: Path, first_step: int, in_parts: bool) -> None:
        self._folder = folder
        self._in_parts = in_parts
        self._written = 0
        self._open(purge_step=first_step)

    def _open(self, **options: Any) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), **options)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """As `Sink`."""
        if self._in_parts and self._written > BOARD_SCALARS:
            self._writer.close()
            self._open()
            self._written = 0
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, step)
        self._written += len(values)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """As `Sink`."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """As `Sink`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the workdir, to be uploaded by `wandb sync`.

    Steps that are repeated after a kill appear twice: what is uploaded cannot be taken back.
    """

    def __init__(self, config: Config, workdir: Path, about: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        key = run_id(workdir, "wandb", config.tracking.wandb, lambda: uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=config.tracking.wandb,
            name=config.tracking.name or workdir.name,
            id=key,
            resume="allow",
            dir=tempfile.gettempdir() if is_remote(workdir) else str(workdir),
            config=as_dict(config) | {"made_by": dict(about)},
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # its own step could not go back to that of a checkpoint

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """As `Sink`."""
        self._run.log({"step": step, **numbers(values)})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """As `Sink`."""
        self._run.log({"step": step, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        """As `Sink`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI: a server, or a database on this machine."""

    def __init__(self, config: Config, workdir: Path, about: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow.entities import Param

        self._client = client = mlflow.MlflowClient()

        def create() -> str:
            experiment = client.get_experiment_by_name(config.tracking.mlflow)
            number = (
                client.create_experiment(config.tracking.mlflow) if experiment is None else experiment.experiment_id
            )
            run = client.create_run(number, run_name=config.tracking.name or workdir.name)
            params = [Param(key, str(value)) for key, value in flatten(as_dict(config)).items()]
            for first in range(0, len(params), MLFLOW_BATCH):
                client.log_batch(run.info.run_id, params=params[first : first + MLFLOW_BATCH])
            return run.info.run_id

        self._id = run_id(workdir, "mlflow", config.tracking.mlflow, create)
        client.update_run(self._id, status="RUNNING")
        for key, value in flatten(dict(about)).items():
            client.set_tag(self._id, key, str(value))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """As `Sink`."""
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6
        named = {NOT_IN_MLFLOW.sub("_", name): value for name, value in numbers(values).items()}
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in named.items()])

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """As `Sink`."""
        self._client.log_image(self._id, pixels, artifact_file=f"{name}/{step:08d}.png")

    def close(self) -> None:
        """As `Sink`."""
        self._client.set_terminated(self._id)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the values that are numbers; not None, which stands for what is not finite, and no texts."""
    return {name: float(value) for name, value in values.items() if value is not None and not isinstance(value, str)}


def run_id(workdir: Path, tracker: str, place: str, create: Callable[[], str]) -> str:
    """The id of the run in a project or experiment of a tracker: the one in IDS, or a new one, which is kept there."""
    known = read_json(workdir / IDS, "delete it to begin new pages")
    entry = known.get(tracker, {})
    if entry.get("place") != place:
        entry = {"place": place, "id": create()}
        write_json(workdir / IDS, known | {tracker: entry})
    return entry["id"]
