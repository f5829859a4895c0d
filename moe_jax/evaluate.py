"""`python -m moe_jax.evaluate --workdir=DIR`: the whole held-out set, per domain; nothing moves.

Uses the config the run was started with; `--config=FILE` evaluates its checkpoint under another, for other
data or another batch size, say. `--eval_sequences=N` takes only the first N sequences of each domain.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from moe_jax.command import define_config_flag, fail, parse_flags
from moe_jax.config import Config, validate

if TYPE_CHECKING:
    from moe_jax.data import Corpus
    from moe_jax.state import TrainState


def evaluate(config: Config, state: "TrainState", corpus: "Corpus") -> dict[str, float | int]:
    """Loss, bits per byte (all and per domain) and balance over the held-out documents.

    Bits per byte is nats / (ln 2 x UTF-8 bytes of the targets): comparable across tokenizers. Violations
    count loads over the whole set (MaxVio_global), per layer, then mean and worst over layers.

    Returns:
        eval/loss, eval/bits_per_byte, eval/bits_per_byte/<domain>; with experts also eval/max_violation,
        eval/max_violation_worst, eval/dead_experts.
    """
    import jax
    import numpy as np

    from moe_jax.data import evaluation_batches
    from moe_jax.step import make_eval_step

    eval_step = make_eval_step(config)
    batches = evaluation_batches(
        corpus,
        batch_size=config.batch_size // config.micro_batches,
        sequence_length=config.sequence_length,
        max_sequences_per_domain=config.data.eval_sequences,
    )
    nats, num_bytes = np.zeros(len(corpus.domains)), np.zeros(len(corpus.domains), np.int64)
    num_tokens, loads = 0, np.zeros((), np.int64)
    for batch in batches:
        sums = jax.device_get(eval_step(state, batch))
        real = batch.domain >= 0
        np.add.at(nats, batch.domain[real], sums.nats[real].astype(np.float64))
        np.add.at(num_bytes, batch.domain[real], batch.num_bytes[real])
        num_tokens += int(sums.tokens.sum())
        if sums.loads is not None:
            loads = loads + sums.loads
    result = {
        "eval/loss": float(nats.sum()) / num_tokens,
        "eval/bits_per_byte": float(nats.sum()) / (math.log(2) * int(num_bytes.sum())),
    }
    for name, n, b in zip(corpus.domains, nats, num_bytes, strict=True):
        if b:
            result[f"eval/bits_per_byte/{name}"] = float(n) / (math.log(2) * int(b))
    return result | (_balance(loads) if loads.ndim else {})


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


def restore_run(config: Config, workdir: Path) -> tuple["TrainState", dict[str, Any]] | None:
    """The newest checkpoint of the workdir as (state, extra), checked against the config; None if there is none."""
    from moe_jax import checkpoint
    from moe_jax.state import abstract_state

    options = config.checkpoint
    target = abstract_state(config)
    return checkpoint.restore(workdir / "checkpoints", target, verify=options.verify, fallback=options.fallback)


def print_table(result: Mapping[str, float | int]) -> None:
    """The evaluation as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out", "value")
    for name, value in result.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def main(_: list[str]) -> None:
    """Restore the newest checkpoint of the workdir, evaluate, print, and write evaluation.json."""
    flag = flags.FLAGS
    workdir = Path(flag.workdir)
    try:
        config = validate(flag.config) if flag.config is not None else config_of_run(workdir)
        if flag.eval_sequences < 0:
            raise ValueError(f"--eval_sequences={flag.eval_sequences} must be at least 0; 0 takes all.")
        config = replace(config, data=replace(config.data, eval_sequences=flag.eval_sequences))
        from moe_jax.data import open_corpus

        corpus = open_corpus(config.data.path, config.data.verify)
        found = restore_run(config, workdir)
        if found is None:
            raise ValueError(f"--workdir={workdir} has no finished checkpoint; train first.")
    except (ValueError, OSError) as error:
        fail(str(error))
    state = found[0]
    result = {"step": int(state.step), **evaluate(config, state, corpus)}
    print_table(result)
    (workdir / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_integer("eval_sequences", 0, "Held-out sequences per domain; 0 takes all.")
    define_config_flag("Another config to evaluate under.")
    app.run(main, flags_parser=parse_flags)
