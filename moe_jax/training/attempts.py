"""What earlier attempts at a run left in its workdir: whether it is finished, the time they spent, lines too many."""

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
    """A sentence if the run is finished and its checkpoints are gone; empty for every other."""
    if not is_finished(config, workdir) or checkpoint.committed(workdir / "checkpoints"):
        return ""
    return (
        f"the log of {workdir} ends with the evaluation after its last step, so the run is finished, though no "
        "checkpoint is there any more; to train it again, use another workdir or move metrics.jsonl away"
    )


class Before(NamedTuple):
    """ended: what run.json says of how the last attempt ended, to be kept until this one ends; remarks: lines."""

    ended: dict[str, Any]
    remarks: list[str]


def take_over(config: Config, workdir: Path, ledger: Ledger, first: int, saved: dict[str, float]) -> Before:
    """Carry over the time that earlier attempts spent, and set aside a log that no checkpoint accounts for.

    Args:
        config: of the run.
        workdir: the run's.
        ledger: of this attempt.
        first: the steps done by the checkpoint that it resumes from.
        saved: seconds by kind in that checkpoint.
    """
    ended = read_run(workdir)
    logged = newest(workdir / METRICS)
    ledger.carry(of_earlier_attempts(first, saved, ended, logged))
    done = logged.get("step", -1) + 1
    remarks = []
    if is_unaccounted(done, first, ended.get("step", 0), config.save_every):
        kept = set_aside(workdir, first)
        remarks.append(f"the log has {done} steps, but the newest checkpoint {first}: it is kept as {kept}")
    return Before({key: ended[key] for key in ("step", "seconds", "time", "goodput") if key in ended}, remarks)


def is_unaccounted(logged: int, first: int, ended: int, save_every: int) -> bool:
    """Whether a log has steps that a checkpoint must have held once, and which the newest one there is does not.

    A crash leaves lines after the newest checkpoint too, at most up to the next save.

    Args:
        logged: the steps done by its newest line.
        first: those of the newest checkpoint.
        ended: those that the last attempt that ended well had saved.
        save_every: of the config; 0 saves at the end only.
    """
    next_save = first // save_every * save_every + save_every if save_every else first
    return logged > first and (ended > first or logged > next_save)
