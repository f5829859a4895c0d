"""The runs of a plain sweep, arms x seeds: planned as a whole, its folder claimed, then trained one after the other."""

import copy
import errno
import inspect
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import Config, as_dict, flatten, resolve, validate
from moe_jax.config.command import run_own
from moe_jax.data import check_corpus
from moe_jax.runtime import processes
from moe_jax.runtime.files import read_json, write_json
from moe_jax.runtime.workdir import check_workdir, read_run

from . import hyper
from .progress import Progress


class Run(NamedTuple):
    """One training run of a sweep."""

    arm: str
    seed: int
    config: Config


SWEEP = "sweep.json"  # the file that says what is in a folder of runs
CLAIMS = "claims"  # the folder that says which process trains which run
OURS = (SWEEP, CLAIMS, "report.html", "figures")  # what a sweep's folder holds beside the folders of its arms


def read_settings(file: Path, source: Any, argument: Sequence[str]) -> list[hyper.Setting] | hyper.Branches:
    """What get_hyper of a config file lists; an exception in it ends the command with the file and the line.

    Args:
        file: the config file.
        source: its module.
        argument: what get_config was given, one string or none; get_hyper gets it too if it takes a second argument.
    """
    takes_argument = len(inspect.signature(source.get_hyper).parameters) > 1
    listed: list[hyper.Setting] | hyper.Branches
    listed = run_own(file, lambda: source.get_hyper(hyper, *(argument if takes_argument else ())))
    return listed


def plan(base: dict[str, Any], settings: list[hyper.Setting]) -> list[Run]:
    """Every run of the sweep, validated before the first one starts.

    Args:
        base: the config that the settings override, as nested dicts.
        settings: the list that `get_hyper` returned.

    Raises:
        ValueError: a setting without an arm, an invalid config, or two runs of one arm and seed.
    """
    runs = []
    for setting in settings:
        overrides = dict(setting)
        if "arm" not in overrides:
            raise ValueError(f"get_hyper returned {setting!r} without an 'arm'; name arms with h.arms(name={{...}}).")
        arm = overrides.pop("arm")
        if not re.fullmatch(r"\w[\w.-]*", str(arm)):
            raise ValueError(f"get_hyper names an arm {arm!r}, which cannot be a folder; use letters, digits, _ . -")
        if arm in OURS:
            raise ValueError(f"get_hyper names an arm {arm!r}, like a file of the sweep; choose another name.")
        config = validate(override(base, overrides))
        runs.append(Run(arm, config.seed, config))
    names = [(run.arm, run.seed) for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"get_hyper lists arm {name[0]!r} with seed {name[1]} twice; give the arms two names.")
    return runs


def override(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with dotted keys set; a ValueError for a key that does not exist."""
    result = copy.deepcopy(base)
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        section: Any = result
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            raise ValueError(f"get_hyper sets {dotted!r}, which is not a key of the config; check its spelling.")
        section[last] = value
    return result


def sweep_record(runs: list[Run], base: dict[str, Any], source: Any, command: str) -> dict[str, Any]:
    """The content of sweep.json: everything that the report needs besides the runs' own files."""
    names = list(dict.fromkeys(run.arm for run in runs))
    first = {arm: next(r.config for r in runs if r.arm == arm) for arm in names}
    return {
        "name": Path(source.__file__).stem,
        "description": " ".join((source.__doc__ or "").split("\n\n")[0].split()),
        "arms": names,
        "seeds": sorted({run.seed for run in runs}),
        "baseline": names[0],
        "command": command,
        "config": base,
        "arms_config": {arm: changes(base, as_dict(c)) for arm, c in first.items()},
    }


def changes(base: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys other than the seed whose values a config changes, with its values; None for a missing key."""
    before, after = (flatten(c) for c in (base, config))
    keys = (k for k in before | after if k != "seed" and before.get(k) != after.get(k))
    return {k: after.get(k) for k in keys}


def claim(workdir: Path, record: dict[str, Any], runs: list[Run]) -> list[str]:
    """Write sweep.json; return a line for every arm that was in it and is no longer in the sweep.

    Arms and seeds may be added and removed, and keys may change that affect no number, as long as every existing run
    trains to the numbers of the present sweep.

    Raises:
        ValueError: the folder holds another sweep, or a run of another config or other data.
    """
    lines = check_claim(workdir, record, runs, {})
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / SWEEP, record)
    return lines


def check_claim(workdir: Path, record: dict[str, Any], runs: list[Run], corpora: dict[str, str]) -> list[str]:
    """The lines and errors of `claim`, without writing; `corpora` keeps path -> fingerprint between calls."""
    spec = read_json(workdir / SWEEP, "restore it, or use another folder.")
    if spec and ("trunks" in spec) != ("trunks" in record):
        kinds = ("a plain sweep", "a branched sweep")
        raise ValueError(
            f"--workdir={workdir} holds {kinds['trunks' in spec]}, and get_hyper lists {kinds['trunks' in record]}; "
            "use another folder."
        )
    there = spec.get("arms", [])
    if there and not set(there) & set(record["arms"]):
        raise ValueError(
            f"--workdir={workdir} holds another sweep, with the arms {', '.join(there)}, and none of "
            f"{', '.join(record['arms'])}; use another folder."
        )
    for run in runs:
        path = run.config.data.path
        corpora[path] = corpora.get(path) or check_corpus(path).fingerprint
        check_workdir(folder_of(workdir, run), run.config, corpora[path])
    return [f"arm {arm} is in {workdir} but no longer in the sweep" for arm in there if arm not in record["arms"]]


def folder_of(workdir: Path, run: Run) -> Path:
    """The folder of a run of the sweep."""
    return workdir / run.arm / f"seed{run.seed}"


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `i/n` as (i, n), with 0 <= i < n."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--shard={text} must be i/n with 0 <= i < n; 0/1 does every run.")
    return int(index), int(count)


def refuse_cluster() -> None:
    """Raise a ValueError if a cluster started this command as one process of many."""
    if cluster := processes.find_cluster(os.environ):
        raise ValueError(
            f"{cluster.launcher} started this as one process of many, but each run of a sweep uses one process; "
            "start it once per machine with JAX_NUM_PROCESSES=1 and --claim or --shard=i/n."
        )


FOR_ALL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of the operating system that would end every run


def execute(runs: list[Run], workdir: Path, progress: Progress | None = None) -> tuple[int | None, list[str]]:
    """Train the runs that are not finished, one after the other.

    Args:
        runs: of the sweep, or of a shard of it.
        workdir: of the sweep.
        progress: of all runs of which these are the next ones; None for these alone.

    Returns:
        the signal that stopped them, or None, and a sentence for every run that failed, now or earlier.

    Raises:
        ValueError: a run does not fit the devices; no run was started.
        OSError: the disk is full or not writable.
    """
    fit_devices(runs)
    progress = progress or Progress([planned_steps(run, folder_of(workdir, run)) for run in runs])
    failed: list[str] = []
    for number, run in enumerate(runs, 1):
        folder = folder_of(workdir, run)
        stopped, why = train(run.config, folder, f"[{number}/{len(runs)}] {run.arm} seed {run.seed}")
        if stopped:
            return stopped, failed
        if why:
            failed.append(f"{run.arm}, seed {run.seed} ({folder}): {why}")
            print(f"! {failed[-1]}", flush=True)
        progress.next()
    return None, failed


def fit_devices(runs: list[Run]) -> None:
    """Raise a ValueError unless every run fits the devices that are present."""
    import jax

    for run in runs:
        resolve(run.config, jax.device_count(), jax.devices()[0].platform)


def train(config: Config, folder: Path, name: str) -> tuple[int | None, str]:
    """Train one run unless it is finished or diverged earlier.

    Args:
        config: of the run.
        folder: its workdir.
        name: of the run in the display.

    Returns:
        the signal that stopped it, or None, and why it failed, or "".

    Raises:
        OSError: the disk is full or not writable, which would end every other run, too.
    """
    from moe_jax.analysis.observer import observers
    from moe_jax.training import attempts, loop

    if attempts.is_finished(config, folder):
        return None, ""
    why = ""
    if not diverged(folder):
        try:
            return loop.run(config, folder, hooks=observers(config), name=name).signal, ""
        except Exception as error:  # no error of one run may end the others
            if isinstance(error, OSError) and error.errno in FOR_ALL:
                raise
            if not isinstance(error, (ValueError, OSError, FloatingPointError)):
                traceback.print_exc()  # an error that no input should cause
            why = str(error) or type(error).__name__
    if reason := diverged(folder):
        why = f"diverged: {reason} Delete the folder to try it again."
    return None, why


def planned_steps(run: Run, folder: Path, first: int = 0) -> int:
    """The steps that a run has to train from its first one, 0 if it will not be trained.

    Args:
        run: a run.
        folder: its workdir.
        first: the steps of the state that it begins with.
    """
    from moe_jax.training import attempts

    return 0 if attempts.is_finished(run.config, folder) or diverged(folder) else run.config.num_steps - first


def diverged(folder: Path) -> str:
    """The reason for a run's divergence from its run.json; empty if it did not diverge."""
    return str(read_run(folder).get("diverged", ""))
