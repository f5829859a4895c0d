"""`python -m moe_jax.evaluate --workdir=DIR`: the whole held-out set, per domain; nothing moves.

Uses the config the run was started with; `--config=FILE` evaluates its checkpoint under another, for other
data or another batch size, say. `--eval_sequences=N` takes only the first N sequences of each domain. On a
cluster the same command runs in every process, as training does; on other devices than the run's, the mesh is
data-parallel unless a config says otherwise.
"""

import contextlib
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from moe_jax import distributed
from moe_jax.command import define_config_flag, fail, parse_flags
from moe_jax.config import DROPLESS, Config, MeshConfig, resolve, validate
from moe_jax.files import workdir_of, write_json
from moe_jax.watchdog import Watchdog

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.data import Corpus
    from moe_jax.state import TrainState


def evaluate(
    config: Config,
    state: "TrainState",
    corpus: "Corpus",
    mesh: "Mesh | None" = None,
    watchdog: Watchdog | None = None,
) -> dict[str, float | int]:
    """Loss, bits per byte (all and per domain) and balance over the held-out documents.

    Bits per byte is nats / (ln 2 x UTF-8 bytes of the targets): comparable across tokenizers. Violations
    count loads over the whole set (MaxVio_global), per layer, then mean and worst over layers.

    Args:
        config: of the model and the batches.
        state: on the mesh.
        corpus: its "validation" streams are used.
        mesh: the config's on all devices if None. With several processes each loads only its rows, and all
            get the same numbers.
        watchdog: told of every batch.

    Returns:
        eval/loss, eval/bits_per_byte, eval/bits_per_byte/<domain>; with experts also eval/max_violation,
        eval/max_violation_worst, eval/dead_experts.
    """
    import jax
    import numpy as np

    from moe_jax.data import evaluation_batches
    from moe_jax.mesh import batch_sharding, make_mesh
    from moe_jax.step import make_eval_step

    mesh, watchdog = mesh or make_mesh(config.mesh), watchdog or Watchdog(0)
    eval_step = make_eval_step(config, mesh)
    batch_size = config.batch_size // config.micro_batches
    batches = evaluation_batches(
        corpus,
        batch_size=batch_size,
        sequence_length=config.sequence_length,
        max_sequences_per_domain=config.data.eval_sequences,
    )
    nats, num_bytes = np.zeros(len(corpus.domains)), np.zeros(len(corpus.domains), np.int64)
    num_tokens, loads = 0, np.zeros((), np.int64)
    for number in range(len(batches)):
        rows = functools.partial(batches.batch_at, number)
        work = watchdog.watch("evaluation batch", number)
        result = eval_step(state, distributed.from_rows(rows, batch_size, batch_sharding(mesh)))
        work.result = result.nats
        sums = jax.device_get(result)
        real = sums.domain >= 0
        np.add.at(nats, sums.domain[real], sums.nats[real].astype(np.float64))
        np.add.at(num_bytes, sums.domain[real], sums.num_bytes[real])
        num_tokens += int(sums.tokens.sum())
        if sums.loads is not None:
            loads = loads + sums.loads
    numbers = {
        "eval/loss": float(nats.sum()) / num_tokens,
        "eval/bits_per_byte": float(nats.sum()) / (math.log(2) * int(num_bytes.sum())),
    }
    for name, n, b in zip(corpus.domains, nats, num_bytes, strict=True):
        if b:
            numbers[f"eval/bits_per_byte/{name}"] = float(n) / (math.log(2) * int(b))
    return numbers | (_balance(loads) if loads.ndim else {})


def _balance(loads: Any) -> dict[str, float | int]:
    from moe_jax import metrics

    violation = metrics.max_violation(loads)
    return {
        "eval/max_violation": float(violation.mean()),
        "eval/max_violation_worst": float(violation.max()),
        "eval/dead_experts": int(metrics.dead_experts(loads).sum()),
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
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it, or use another workdir.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no config; restore it, or use another workdir.")
    return config


def restore_run(config: Config, workdir: Path, mesh: "Mesh") -> tuple["TrainState", dict[str, Any]] | None:
    """The newest checkpoint of the workdir as (state, extra), on this mesh; None if there is none."""
    from moe_jax import checkpoint
    from moe_jax.state import abstract_state

    options = config.checkpoint
    target = abstract_state(config, mesh)
    return checkpoint.restore(workdir / "checkpoints", target, verify=options.verify, fallback=options.fallback)


def print_table(result: Mapping[str, float | int]) -> None:
    """The evaluation as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out", "value")
    for name, value in result.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def on_these_devices(config: Config) -> Config:
    """The config with its mesh, or where that does not fit with a data-parallel one of as many devices as can be.

    Raises:
        ValueError: several processes, whose devices the mesh does not fit; or a platform without a collective.
    """
    import jax

    devices, platform = jax.device_count(), jax.devices()[0].platform
    if config.model.dispatch in DROPLESS:
        config = replace(config, model=replace(config.model, dispatch="auto"))
    try:
        return resolve(config, devices, platform)
    except ValueError:
        if jax.process_count() > 1:
            raise
    for data in range(devices, 1, -1):
        with contextlib.suppress(ValueError):
            return resolve(replace(config, mesh=MeshConfig(data=data)), devices, platform)
    return resolve(replace(config, mesh=MeshConfig(data=1)), devices, platform)


def run(config: Config, workdir: Path) -> None:
    """Restore the newest checkpoint, evaluate, print, and write evaluation.json.

    Raises:
        ValueError, OSError: no or a damaged checkpoint, bad data, or a mesh that does not fit.
    """
    from moe_jax.data import open_corpus
    from moe_jax.mesh import make_mesh

    corpus = distributed.by_all(lambda: open_corpus(config.data.path, config.data.verify))
    config = on_these_devices(config)
    mesh = make_mesh(config.mesh)
    found = restore_run(config, workdir, mesh)
    if found is None:
        raise ValueError(f"--workdir={workdir} has no finished checkpoint; train first.")
    state = found[0]
    result = {"step": int(state.step), **evaluate(config, state, corpus, mesh)}
    if distributed.index() == 0:
        print_table(result)
        write_json(workdir / "evaluation.json", result)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    flag = flags.FLAGS
    try:
        workdir = workdir_of(flag.workdir)
        config = validate(flag.config) if flag.config is not None else config_of_run(workdir)
        if flag.eval_sequences < 0:
            raise ValueError(f"--eval_sequences={flag.eval_sequences} must be at least 0; 0 takes all.")
        config = replace(config, data=replace(config.data, eval_sequences=flag.eval_sequences))
        with distributed.joined(config.heartbeat_seconds, lambda: "evaluation"):
            run(config, workdir)
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_integer("eval_sequences", 0, "Held-out sequences per domain; 0 takes all.")
    define_config_flag("Another config to evaluate under.")
    app.run(main, flags_parser=parse_flags)
