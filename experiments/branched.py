"""A branched sweep: trunks are trained first, and every arm then trains on from each (config key `branch_from`).

    DIR/sweep.json                                      what is below
    DIR/trunks/<method>/seed<k>/                        a plain sweep
    DIR/branches/<method>/seed<k>/<arm>/seed<j>/        a plain sweep for each trunk; j is the data seed

Shards: a machine trains the branches of its own trunks. With more machines than trunks some have none of their own,
and share the branches of others; such a branch is reported if its trunk is not finished yet, and nobody waits.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import as_dict
from moe_jax.runtime.files import write_json

from . import hyper
from .progress import Progress
from .runs import (
    SWEEP,
    Run,
    changes,
    check_claim,
    diverged,
    fit_devices,
    folder_of,
    override,
    plan,
    planned_steps,
    sweep_record,
    train,
)

STRIDE = 1000  # between the first data seeds of two trunk seeds


class Part(NamedTuple):
    """A trunk and its branches.

    Attributes:
        trunk: the run in DIR/trunks.
        base: the config that the branches override, as nested dicts; its `branch_from` names the trunk.
        branches: the runs in DIR/branches/<method>/seed<k>.
    """

    trunk: Run
    base: dict[str, Any]
    branches: list[Run]

    @property
    def name(self) -> str:
        """`aux_loss, seed 0`."""
        return f"{self.trunk.arm}, seed {self.trunk.seed}"


def trunks_in(workdir: Path) -> Path:
    """The plain sweep of the trunks."""
    return workdir / "trunks"


def branches_in(workdir: Path, method: str, seed: int) -> Path:
    """The plain sweep of the branches of one trunk."""
    return workdir / "branches" / method / f"seed{seed}"


# --- the plan -----------------------------------------------------------------------------------------------


def plan_branched(base: dict[str, Any], listed: hyper.Branches, workdir: Path) -> list[Part]:
    """Every trunk with its branches, validated before the first one starts.

    Args:
        base: the config that the settings override, as nested dicts.
        listed: what `get_hyper` returned.
        workdir: of the sweep; the branches' `branch_from` names trunks below it.

    Raises:
        ValueError: a step of branching below 1, a trunk of another length, a data seed outside of its range, an empty
            list, or what `plan` refuses, such as a branch that ends before it begins.
    """
    at = listed.at
    if isinstance(at, bool) or not isinstance(at, int) or at < 1:
        raise ValueError(f"get_hyper branches at={at!r}, which must be a whole number of steps, at least 1.")
    for name, settings in (("trunks", listed.trunks), ("arms", listed.arms)):
        if not settings:
            raise ValueError(f"get_hyper lists no {name}; give h.branches at least one setting of each.")
    trunks = plan(base, [{"num_steps": at, **setting} for setting in listed.trunks])
    for trunk in trunks:
        if trunk.config.num_steps != at:
            raise ValueError(
                f"get_hyper sets num_steps={trunk.config.num_steps} of the trunk {trunk.arm!r}, which must be at={at}, "
                "so that the checkpoint its branches begin with is its last, which is kept; leave num_steps out."
            )
    return [_part(base, listed, workdir, trunk) for trunk in trunks]


def _part(base: dict[str, Any], listed: hyper.Branches, workdir: Path, trunk: Run) -> Part:
    origin = f"{folder_of(trunks_in(workdir), trunk).absolute()}@{listed.at}"
    own = override(base, {"branch_from": origin})
    runs = plan(own, [_with_data_seed(setting, base, trunk, listed.own_data) for setting in listed.arms])
    return Part(trunk, own, runs)


def _with_data_seed(setting: hyper.Setting, base: dict[str, Any], trunk: Run, own_data: bool) -> hyper.Setting:
    seed = setting.get("seed", base["seed"])
    if not own_data:
        return setting
    if not isinstance(seed, int) or not 0 <= seed < STRIDE:
        raise ValueError(
            f"seed={seed!r} of the arm {setting.get('arm')!r} must be from 0 to {STRIDE - 1}, because trunk seed k has "
            f"the data seeds from {STRIDE} k; lower it, or pass own_data=False to h.branches."
        )
    return setting | {"seed": STRIDE * trunk.seed + seed}


# --- the folder ---------------------------------------------------------------------------------------------


def claim_branched(
    workdir: Path, parts: list[Part], base: dict[str, Any], at: int, source: Any, command: str
) -> list[str]:
    """Write every sweep.json; return a line for every trunk method and arm that is no longer in the sweep.

    Raises:
        ValueError: as `runs.claim`; then nothing was written.
    """
    trunks = [part.trunk for part in parts]
    records = [
        (workdir, _record(parts, base, at, source, command), []),
        (trunks_in(workdir), sweep_record(trunks, base, source, command), trunks),
    ]
    for part in parts:
        folder = branches_in(workdir, part.trunk.arm, part.trunk.seed)
        records.append((folder, sweep_record(part.branches, part.base, source, command), part.branches))
    corpora: dict[str, str] = {}
    lines = [line for folder, record, runs in records for line in check_claim(folder, record, runs, corpora)]
    for folder, record, _ in records:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SWEEP, record)
    return list(dict.fromkeys(lines))


def _record(parts: list[Part], base: dict[str, Any], at: int, source: Any, command: str) -> dict[str, Any]:
    """The content of DIR/sweep.json: that of a plain sweep of the arms, and the trunks."""
    first = {part.trunk.arm: part.trunk.config for part in reversed(parts)}
    methods = list(dict.fromkeys(part.trunk.arm for part in parts))
    # every trunk's arms change the same keys of the base, except for the trunk and the data seed
    record = sweep_record(parts[0].branches, parts[0].base, source, command)
    return record | {
        "config": base,
        "seeds": sorted({run.seed for part in parts for run in part.branches}),
        "at": at,
        "trunks": methods,
        "trunk_seeds": sorted({part.trunk.seed for part in parts}),
        "parts": [[part.trunk.arm, part.trunk.seed] for part in parts],
        "trunks_config": {method: changes(base, as_dict(first[method])) for method in methods},
    }


# --- training -----------------------------------------------------------------------------------------------


def share_of(parts: list[Part], index: int, count: int) -> list[Part]:
    """The parts of a shard, each with the branches that this shard trains.

    Trunk t is trained by shard t % count, and so are its branches. With more shards than trunks its branches are
    dealt to the shards t, t + T, t + 2 T and so on, T being the number of trunks.
    """
    found = []
    for number, part in enumerate(parts):
        shards = [number % count] if count <= len(parts) else list(range(number, count, len(parts)))
        if index in shards:
            found.append(part._replace(branches=part.branches[shards.index(index) :: len(shards)]))
    return found


def execute_branched(
    parts: list[Part],
    workdir: Path,
    at: int,
    shard: tuple[int, int] = (0, 1),
    discard_weights: bool = False,
    progress: Progress | None = None,
    restore: Callable[["Job"], Any] = lambda job: None,
) -> tuple[int | None, list[str]]:
    """Train the trunks of a shard that are not finished, then its branches.

    Args:
        parts: of the whole sweep.
        workdir: of the sweep.
        at: the step of branching.
        shard: (i, n) as in --shard=i/n.
        discard_weights: remove the checkpoints of finished branches; those of trunks are kept.
        progress: of all runs of which these are the next ones; None for these alone.
        restore: called for every branch before it is trained, which it may finish.

    Returns:
        the signal that stopped them, or None, and a sentence for every trunk and branch that failed, now or earlier,
        and for all branches of a trunk that cannot begin.

    Raises:
        ValueError: a run does not fit the devices; no run was started.
        OSError: the disk is full or not writable.
    """
    jobs = jobs_of(parts, workdir, at, shard)
    fit_devices([job.run for job in jobs])
    progress = progress or Progress([job.steps for job in jobs])
    failed: list[str] = []
    lost: set[str] = set()  # the names of trunks that failed
    blocked: dict[str, str] = {}  # trunk -> why its branches cannot begin
    for number, job in enumerate(jobs, 1):
        part = job.part
        if part is not None and job.steps and part.name not in blocked:
            blocked[part.name] = why_blocked(part, workdir, at, lost)
            if blocked[part.name]:
                _fail(failed, f"every unfinished branch of {part.name}: {blocked[part.name]}")
        if part is None or not job.steps or not blocked[part.name]:
            if part is not None and job.steps:
                restore(job)
            stopped, why = train(job.run.config, job.folder, f"[{number}/{len(jobs)}] {job.name}")
            if stopped:
                return stopped, failed
            if why:
                lost.add(job.name)
                _fail(failed, f"{job.name} ({job.folder}): {why}")
            elif part is not None and discard_weights:
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        progress.next()
    return None, failed


def _fail(failed: list[str], sentence: str) -> None:
    failed.append(sentence)
    print(f"! {sentence}", flush=True)


class Job(NamedTuple):
    """A run with its name in sentences, its folder, the steps it has to train, and its part if it is a branch."""

    name: str
    folder: Path
    run: Run
    steps: int
    part: Part | None

    def is_finished(self) -> bool:
        """Whether it is, by now."""
        from moe_jax.training import attempts

        return attempts.is_finished(self.run.config, self.folder)


def jobs_of(parts: list[Part], workdir: Path, at: int, shard: tuple[int, int] = (0, 1)) -> list[Job]:
    """The runs of a shard in the order in which they are trained; arguments as of `execute_branched`.

    Trunks are first. Then the first arm is trained on every trunk, then the second, and so on, so that a sweep that is
    interrupted has whole comparisons.
    """
    index, count = shard
    trunks, branches = [], []
    for trunk in (part.trunk for part in parts[index::count]):
        folder = folder_of(trunks_in(workdir), trunk)
        trunks.append(Job(f"trunk {trunk.arm}, seed {trunk.seed}", folder, trunk, planned_steps(trunk, folder), None))
    for part in share_of(parts, index, count):
        for run in part.branches:
            folder = folder_of(branches_in(workdir, part.trunk.arm, part.trunk.seed), run)
            name = f"trunk {part.name}, arm {run.arm}, seed {run.seed}"
            branches.append(Job(name, folder, run, planned_steps(run, folder, at), part))
    arms = list(dict.fromkeys(job.run.arm for job in branches))
    return trunks + sorted(branches, key=lambda job: arms.index(job.run.arm))


def trunk_is_pending(part: Part, workdir: Path, lost: set[str]) -> bool:
    """Whether a trunk is neither finished nor failed; arguments as of `why_blocked`."""
    from moe_jax.training import attempts

    folder = folder_of(trunks_in(workdir), part.trunk)
    failed = f"trunk {part.name}" in lost or diverged(folder)
    return not failed and not attempts.is_finished(part.trunk.config, folder)


def why_blocked(part: Part, workdir: Path, at: int, lost: set[str]) -> str:
    """Why no branch can begin with a trunk, as a sentence; "" if one can.

    Args:
        part: the trunk and its branches.
        workdir: of the sweep.
        at: the step of branching.
        lost: the names of trunks that this process has seen fail.
    """
    from moe_jax.runtime import checkpoint

    folder = folder_of(trunks_in(workdir), part.trunk)
    if f"trunk {part.name}" in lost or diverged(folder):
        return f"its trunk failed ({folder})."
    if trunk_is_pending(part, workdir, lost):
        return f"its trunk is not finished yet ({folder}); repeat the command when it is."
    if at not in checkpoint.committed(folder / "checkpoints"):
        return f"its trunk is finished, but its checkpoint of step {at} is gone; delete {folder} to train it again."
    return ""
