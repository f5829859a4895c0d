"""Back to an earlier checkpoint after steps that were not kept, and on with the batches after theirs.

A session of a run ends at such steps. The next one resumes from the newest checkpoint from before them, as after a
kill, but the batches between are not used again: step n has the batch `batch_of(n)`.

`run.json` and every later checkpoint list the rollbacks of the run. Until `go_back` has written run.json, which is the
last that it does, a run that is killed resumes from a checkpoint that is left, repeats the steps, and goes back from
them again; afterwards it resumes with the batches after them. So a kill changes no number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import Config, branch_point
from moe_jax.runtime import checkpoint, manifest
from moe_jax.runtime.ledger import Ledger
from moe_jax.runtime.workdir import read_run, write_run


class Rollback(NamedTuple):
    """One rollback of a run.

    first: the first of the steps that were not kept. at: the step after the last of them. to: the step from which the
    run continued. offset: from then on step n has the batch n + offset of the data.
    """

    first: int
    at: int
    to: int
    offset: int


class GoBack(Exception):
    """Raised where a session ends because the steps from `first` to before `at` were not kept."""

    def __init__(self, first: int, at: int) -> None:
        super().__init__(not_kept(first, at))
        self.first = first
        self.at = at


def not_kept(first: int, at: int) -> str:
    """The beginning of a sentence about steps that were not kept."""
    return f"the steps {first} to {at - 1} were outliers or not finite"


def batch_of(rollbacks: Sequence[Rollback], step: int) -> int:
    """The number of the batch of a step: that of the last rollback to it or to an earlier step."""
    return step + next((r.offset for r in reversed(rollbacks) if r.to <= step), 0)


def known(*records: Mapping[str, Any]) -> tuple[Rollback, ...]:
    """The rollbacks of a run, from its run.json and its checkpoint, either of which may be older than the other."""
    lists = (record.get("rollbacks", []) for record in records)
    return tuple(Rollback(**entry) for entry in max(lists, key=len))


def recorded(rollbacks: Sequence[Rollback]) -> dict[str, Any]:
    """The entry of run.json and of a checkpoint; none for a run without a rollback."""
    return {"rollbacks": [r._asdict() for r in rollbacks]} if rollbacks else {}


def go_back(config: Config, workdir: Path, ledger: Ledger, steps: GoBack) -> str:
    """Remove the checkpoints after the first step that was not kept, and record the rollback to the newest other one.

    Without one the run goes back to its beginning. Process 0 calls it, when nothing is being saved or logged.

    Args:
        config: of the run.
        workdir: of the run.
        ledger: of the session that ended; the time of its steps is charged to "rolled_back".
        steps: those that were not kept.

    Returns:
        a line to print.
    """
    about = read_run(workdir)
    rollbacks = known(about)
    folder = workdir / "checkpoints"
    checkpoint.remove_after(folder, steps.first)
    to, spent = branch_point(config)[1], {}
    if saved := checkpoint.committed(folder):
        to = saved[-1]
        spent = manifest.read_manifest(manifest.of_step(folder, to))["extra"].get("seconds", {})
    ledger.roll_back(spent)
    rollback = Rollback(steps.first, steps.at, to, batch_of(rollbacks, steps.at - 1) + 1 - to)
    write_run(workdir, about | ledger.summary(to) | recorded([*rollbacks, rollback]))
    count = f"rollback {len(rollbacks) + 1} of {config.guard.rollbacks}"
    return f"{steps}: back to step {to}, and on with the batches after theirs ({count})"
