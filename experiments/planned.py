"""A sweep as a config file lists it, plain or branched: planned as a whole, then claimed and trained alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import hyper
from .branched import Job, Part, claim_branched, execute_branched, jobs_of, plan_branched
from .claimed import Shared
from .claims import Claims
from .progress import Progress
from .runs import CLAIMS, Run, claim, execute, folder_of, plan, planned_steps, sweep_record


class Planned(NamedTuple):
    """A sweep with its runs, validated.

    Attributes:
        folder: of the sweep.
        source: the module of its config.
        base: the config that the settings override, as nested dicts.
        runs: of a plain sweep; empty for a branched one.
        parts: trunks with their branches; empty for a plain sweep.
        at: the step of branching; 0 for a plain sweep.
    """

    folder: Path
    source: Any
    base: dict[str, Any]
    runs: list[Run]
    parts: list[Part]
    at: int

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    def share(self, shard: tuple[int, int]) -> list[Run]:
        """The runs of a shard (i, n) of a plain sweep."""
        return self.runs[shard[0] :: shard[1]]

    def claim(self, command: str) -> list[str]:
        """Write every sweep.json of the sweep; returns and raises what `runs.claim` does."""
        if self.parts:
            return claim_branched(self.folder, self.parts, self.base, self.at, self.source, command)
        return claim(self.folder, sweep_record(self.runs, self.base, self.source, command), self.runs)

    def work(self, shard: tuple[int, int]) -> list[int]:
        """The tokens that every run of a shard has yet to train, in the order of `train`; 0 if it is done."""
        if self.parts:
            return [job.steps * _tokens(job.run) for job in jobs_of(self.parts, self.folder, self.at, shard)]
        return [planned_steps(run, folder_of(self.folder, run)) * _tokens(run) for run in self.share(shard)]

    def train(
        self,
        shard: tuple[int, int],
        progress: Progress | None = None,
        discard_weights: bool = False,
        restore: Callable[[Job], Any] = lambda job: None,
    ) -> tuple[int | None, list[str]]:
        """Train a shard's runs, as `runs.execute` and `execute_branched` do."""
        if self.parts:
            return execute_branched(self.parts, self.folder, self.at, shard, discard_weights, progress, restore)
        return execute(self.share(shard), self.folder, progress)

    def jobs(self) -> dict[str, Job]:
        """Every run in the order of `train`, by its folder within the sweep's, such as `bias/seed0`."""
        if self.parts:
            jobs = jobs_of(self.parts, self.folder, self.at)
        else:
            folders = [folder_of(self.folder, run) for run in self.runs]
            jobs = [
                Job(f"{run.arm}, seed {run.seed}", folder, run, planned_steps(run, folder), None)
                for run, folder in zip(self.runs, folders, strict=True)
            ]
        return {job.folder.relative_to(self.folder).as_posix(): job for job in jobs}

    def train_free(self, only: str, dead_seconds: float, discard_weights: bool = False) -> tuple[int | None, list[str]]:
        """Train runs that no other process has, and return what `train` does.

        Args:
            only: the name of one run in `jobs`, which is not waited for if another process has it; "" for all runs.
            dead_seconds: seconds without a sign of life after which a process is dead, and its run is free.
            discard_weights: as in `train`.

        Raises:
            ValueError: there is no such run.
        """
        jobs = self.jobs()
        if only and only not in jobs:
            raise ValueError(f"--only={only} is no run of the sweep; choose one that --list prints.")
        mine = [jobs[only]] if only else list(jobs.values())
        claims = Claims(self.folder / CLAIMS, dead_seconds)
        return Shared(self.folder, mine, self.at, claims, discard_weights).train(patient=not only)

    @property
    def every_run(self) -> list[Run]:
        """Trunks and branches, or the runs of a plain sweep, of all shards."""
        return self.runs + [run for part in self.parts for run in (part.trunk, *part.branches)]


def _tokens(run: Run) -> int:
    """In a step."""
    return run.config.batch_size * run.config.sequence_length


def plan_sweep(
    source: Any, base: dict[str, Any], listed: list[hyper.Setting] | hyper.Branches, folder: Path
) -> Planned:
    """Plan a sweep before anything is trained.

    Args:
        source: the module of its config.
        base: the config that the settings override, as nested dicts.
        listed: what `get_hyper` returned.
        folder: of the sweep.

    Raises:
        ValueError: what `runs.plan` and `branched.plan_branched` refuse.
    """
    if isinstance(listed, hyper.Branches):
        return Planned(folder, source, base, [], plan_branched(base, listed, folder), listed.at)
    return Planned(folder, source, base, plan(base, listed), [], 0)
