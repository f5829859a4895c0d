"""What earlier attempts at a run left in its workdir: a finished log, the time they spent, surplus log lines."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import Config
from moe_jax.runtime import checkpoint
from moe_jax.runtime.ledger import Ledger, of_earlier_attempts
from moe_jax.runtime.log import METRICS, has_evaluation, newest, set_aside
from moe_jax.runtime.workdir import read_run


def is_finished(config: Config, workdir: Path) -> bool:
    """Whether the log ends with the evaluation after the last step."""
    return has_evaluation(newest(workdir / METRICS), config.num_steps)


def why_finished(config: Config, workdir: Path) -> str:
    """A sentence if the run is finished and its checkpoints are gone; "" for every other run."""
    if not is_finished(config, workdir) or checkpoint.committed(workdir / "checkpoints"):
        return ""
    return (
        f"the log of {workdir} ends with the evaluation after its last step, so the run is finished, although its "
        "checkpoints are gone; to train it again, use another workdir or move metrics.jsonl away"
    )


class Before(NamedTuple):
    """ended: how the last attempt ended, kept in run.json until this one ends. remarks: lines to print."""

    ended: dict[str, Any]
    remarks: list[str]


def take_over(
    config: Config, workdir: Path, ledger: Ledger, first: int, saved: dict[str, float], rollbacks: int = 0
) -> Before:
    """Carry over the time that earlier attempts spent, and rename a log whose checkpoints are gone.

    Args:
        config: of the run.
        workdir: of the run.
        ledger: of this attempt.
        first: the steps done by the checkpoint that this attempt resumes from.
        saved: seconds by kind in that checkpoint.
        rollbacks: of the run so far; lines from before the last one are kept under another name too.
    """
    ended = read_run(workdir)
    logged = newest(workdir / METRICS)
    ledger.carry(of_earlier_attempts(first, saved, ended, logged))
    done = logged.get("step", -1) + 1
    remarks = []
    if done > first and logged.get("rollbacks", rollbacks) < rollbacks:
        kept = set_aside(workdir, first)
        remarks.append(f"the log with the steps from {first} on, which no longer count, is kept as {kept}")
    elif is_unaccounted(done, first, ended.get("step", 0), config.save_every, config.save_every_seconds):
        kept = set_aside(workdir, first)
        remarks.append(f"the log has {done} steps, but the newest checkpoint has {first}: the log is kept as {kept}")
    return Before({key: ended[key] for key in ("step", "seconds", "time", "goodput") if key in ended}, remarks)


def is_unaccounted(logged: int, first: int, ended: int, save_every: int, save_every_seconds: float = 0.0) -> bool:
    """Whether a log has steps that were in a checkpoint once, and are not in the newest one that still exists.

    A crash also leaves lines after the newest checkpoint, but at most up to the next save.

    Args:
        logged: the steps done by the newest line.
        first: the steps done by the newest checkpoint.
        ended: the steps done by the last attempt that ended normally.
        save_every: of the config; 0 saves at the end only ...
        save_every_seconds: ... or after seconds, in which any number of steps may be done.
    """
    without_steps = math.inf if save_every_seconds else first
    next_save = first // save_every * save_every + save_every if save_every else without_steps
    return logged > first and (ended > first or logged > next_save)
