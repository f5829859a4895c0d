"""`python -m experiments.ablate --config=configs/ablation/demo.py --workdir=DIR`: train a sweep of arms x seeds.

From a wheel: `python -m moe_jax.experiments.ablate --config=ablation/demo --workdir=DIR`.

Seeds are paired: seed k of every arm starts from the same weights and reads the same batches. The runs of an arm share
one compilation. Repeating the command resumes the sweep. `--shard=i/n` trains every n-th run from the i-th, so that n
machines with a common DIR share the work. The command ends with a table and the path of the report.

A failed run does not affect the others: they are trained, and the command ends with a sentence on each failed run and
status 1. When the command is repeated, it skips a run that diverged, which would diverge again, until its folder is
deleted, and retries runs that failed for other reasons. Only a disk that is full or not writable ends the sweep,
because it would end every run.
"""

import copy
import errno
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from moe_jax.config import Config, as_dict, flatten, resolve, validate
from moe_jax.config.command import config_source, define_config_flag, fail, parse_flags, run_own
from moe_jax.config.paths import workdir_of
from moe_jax.data import check_corpus
from moe_jax.runtime import processes
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import is_remote, read_json, write_json
from moe_jax.runtime.memory import use_huge_pages
from moe_jax.runtime.workdir import check_workdir, read_run

from . import hyper


class Run(NamedTuple):
    """One training run of a sweep."""

    arm: str
    seed: int
    config: Config


OURS = ("sweep.json", "report.html", "figures")  # what a sweep's folder holds beside the folders of its arms


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
        "arms_config": {arm: _changed(base, as_dict(c)) for arm, c in first.items()},
    }


def _changed(base: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    before, after = (flatten(c) for c in (base, config))
    keys = (k for k in before | after if k != "seed" and before.get(k) != after.get(k))
    return {k: after.get(k) for k in keys}  # None: the arm does not have the key


def claim(workdir: Path, record: dict[str, Any], runs: list[Run]) -> list[str]:
    """Write sweep.json; return a line for every arm that was in it and is no longer in the sweep.

    Arms and seeds may be added and removed, and keys may change that affect no number, as long as every existing run
    trains to the numbers of the present sweep.

    Raises:
        ValueError: the folder holds another sweep, or a run of another config or other data.
    """
    file = workdir / "sweep.json"
    there = read_json(file, "restore it, or use another folder.").get("arms", [])
    if there and not set(there) & set(record["arms"]):
        raise ValueError(
            f"--workdir={workdir} holds another sweep, with the arms {', '.join(there)}, and none of "
            f"{', '.join(record['arms'])}; use another folder."
        )
    corpora: dict[str, str] = {}
    for run in runs:
        path = run.config.data.path
        corpora[path] = corpora.get(path) or check_corpus(path).fingerprint
        check_workdir(folder_of(workdir, run), run.config, corpora[path])
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
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


FOR_ALL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of the operating system that would end every run


def execute(runs: list[Run], workdir: Path) -> tuple[int | None, list[str]]:
    """Train the runs that are not finished, one after the other.

    Returns:
        the signal that stopped them, or None, and a sentence for every run that failed, now or earlier.

    Raises:
        ValueError: a run does not fit the devices; no run was started.
        OSError: the disk is full or not writable.
    """
    import jax

    from moe_jax.analysis.observer import observers
    from moe_jax.training import attempts, loop

    for run in runs:
        resolve(run.config, jax.device_count(), jax.devices()[0].platform)
    failed: list[str] = []
    for number, run in enumerate(runs, 1):
        folder = folder_of(workdir, run)
        if attempts.is_finished(run.config, folder):
            continue
        if not diverged(folder):
            try:
                name = f"[{number}/{len(runs)}] {run.arm} seed {run.seed}"
                outcome = loop.run(run.config, folder, hooks=observers(run.config), name=name)
            except Exception as error:  # no error of one run may end the others
                if isinstance(error, OSError) and error.errno in FOR_ALL:
                    raise
                if not isinstance(error, (ValueError, OSError, FloatingPointError)):
                    traceback.print_exc()  # an error that no input should cause
                why = str(error) or type(error).__name__
            else:
                if outcome.signal:
                    return outcome.signal, failed
                continue
        if reason := diverged(folder):
            why = f"diverged: {reason} Delete the folder to try it again."
        failed.append(f"{run.arm}, seed {run.seed} ({folder}): {why}")
        print(f"! {failed[-1]}", flush=True)
    return None, failed


def diverged(folder: Path) -> str:
    """The reason for a run's divergence from its run.json; empty if it did not diverge."""
    return str(read_run(folder).get("diverged", ""))


def main(_: list[str]) -> None:
    """Plan, check, train, report."""
    flag = flags.FLAGS
    use_huge_pages()
    keep_compiled()
    try:
        workdir = workdir_of(flag.workdir)
        if is_remote(workdir):
            raise ValueError(f"--workdir={flag.workdir} is in a bucket, which cannot hold a sweep; give a folder.")
        index, count = parse_shard(flag.shard)
        if cluster := processes.find_cluster(os.environ):
            raise ValueError(
                f"{cluster.launcher} started this as one process of many, but each run of a sweep uses one process; "
                "start it once per machine with JAX_NUM_PROCESSES=1 and --shard=i/n."
            )
        file, source = config_source()
        if not hasattr(source, "get_hyper"):
            raise ValueError(f"--config={file} defines no get_hyper(h), so no sweep; use moe_jax.train for one run.")
        base = as_dict(validate(flag.config))
        runs = plan(base, run_own(file, lambda: source.get_hyper(hyper)))
        command = " ".join([f"python -m {__spec__.name}", *sys.argv[1:]])
        for line in claim(workdir, sweep_record(runs, base, source, command), runs):
            print(line)
        stopped, failed = execute(runs[index::count], workdir)
        if stopped:
            raise SystemExit(128 + stopped)
        from . import report

        sweep = report.read_sweep(workdir)
        report.print_table(sweep)
        if count == 1 and sweep.finished:
            print(f"report: {report.write(sweep)}")
        if failed:
            fail("\n  ".join([f"{len(failed)} of {len(runs[index::count])} runs failed:", *failed]), status=1)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error))


if __name__ == "__main__":
    define_config_flag("A file with get_config() and get_hyper(h).")
    flags.DEFINE_string("workdir", None, "The folder for the runs and the report; created if it does not exist.")
    flags.DEFINE_string("shard", "0/1", "i/n: train every n-th run, from the i-th (0-based).")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
