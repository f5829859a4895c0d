"""The runs of a sweep, each trained by whichever process is free, instead of by shares made beforehand."""

import shutil
import time
from pathlib import Path

from .branched import Job, trunk_is_pending, why_blocked
from .claims import Claims
from .runs import fit_devices, train

LOOK_SECONDS = 5.0  # between two looks at runs that other processes have


class Shared:
    """A sweep whose runs several processes train, as one of them sees it."""

    def __init__(self, folder: Path, jobs: list[Job], at: int, claims: Claims, discard_weights: bool = False) -> None:
        """Prepare.

        Args:
            folder: of the sweep.
            jobs: its runs, or some of them, in the order in which they are to be trained.
            at: the step of branching; 0 for a plain sweep.
            claims: on the runs.
            discard_weights: remove the checkpoints of finished branches.
        """
        self._folder = folder
        self._jobs = jobs
        self._at = at
        self._claims = claims
        self._discard_weights = discard_weights
        self._failed: dict[Path, str] = {}  # the folder of a run -> why this process does not train it

    def train(self, *, patient: bool) -> tuple[int | None, list[str]]:
        """Train the first run that nobody has, again and again; a run that fails is left to the other processes.

        Args:
            patient: wait for runs of other processes, whose owners may die, and on whose trunks branches depend;
                otherwise such a run counts as failed.

        Returns:
            the signal that stopped it, or None, and a sentence for every run that failed and is not finished.

        Raises:
            ValueError, OSError: as in `runs.execute`.
        """
        fit_devices([job.run for job in self._jobs])
        announced = False
        while left := [job for job in self._jobs if job.folder not in self._failed and not job.is_finished()]:
            for job in left:
                stopped, had = self._try(job, patient)
                if stopped:
                    return stopped, self._sentences()
                if had:
                    break  # look again from the first run on
            else:
                left = [job for job in left if job.folder not in self._failed]
                if left and not announced:
                    print(f"waiting for other processes, which have {len(left)} runs or their trunks", flush=True)
                    announced = True
                time.sleep(LOOK_SECONDS if left else 0.0)
        return None, self._sentences()

    def _sentences(self) -> list[str]:
        return [self._failed[job.folder] for job in self._jobs if job.folder in self._failed and not job.is_finished()]

    def _fail(self, job: Job, why: str) -> None:
        self._failed[job.folder] = f"{job.name} ({job.folder}): {why}"
        print(f"! {self._failed[job.folder]}", flush=True)

    def _try(self, job: Job, patient: bool) -> tuple[int | None, bool]:
        """Train a run if nobody has it; returns the signal that stopped it, and whether this process had it."""
        if job.part is not None:
            lost = {other.name for other in self._jobs if other.folder in self._failed}
            if why := why_blocked(job.part, self._folder, self._at, lost):
                if not (patient and trunk_is_pending(job.part, self._folder, lost)):
                    self._fail(job, why)
                return None, False
        name = job.folder.relative_to(self._folder).as_posix()
        with self._claims.taken(name) as mine:
            if mine:
                return self._train(job), True
        if not patient:
            self._fail(job, f"{self._claims.owner(name) or 'another process'} is training it.")
        return None, False

    def _train(self, job: Job) -> int | None:
        """Train a run, unless the process that had it has finished it; returns the signal that stopped it."""
        stopped, why = train(job.run.config, job.folder, f"[{self._jobs.index(job) + 1}/{len(self._jobs)}] {job.name}")
        if why:
            self._fail(job, why)
        elif not stopped and job.part is not None and self._discard_weights:
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        return stopped
