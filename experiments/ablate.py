"""`python -m experiments.ablate --config=configs/ablation/demo.py --workdir=DIR`: a sweep, arms x seeds.

From a wheel: `python -m moe_jax.experiments.ablate --config=ablation/demo --workdir=DIR`.

Seeds are paired: seed k of every arm starts from the same weights and reads the same batches. The runs of an
arm share one compilation. The same command goes on where it stopped; `--shard=i/n` does every n-th run from
the i-th, so that n machines with a common DIR share the work. Ends with a table and the path of the report.

A run that fails takes no other with it: the others are done, and the command ends with a sentence on each that failed
and status 1. One that diverged would diverge again: the same command leaves it out, until its folder is deleted. Runs
that failed otherwise are tried again. Only a full disk or one that cannot be written ends the sweep, for it would end
every run.
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
from moe_jax.runtime.workdir import check_workdir, read_run

from . import hyper


class Run(NamedTuple):
    """One training run of a sweep."""

    arm: str
    seed: int
    config: Config


OURS = ("sweep.json", "report.html", "figures")  # beside the folders of the arms


def plan(base: dict[str, Any], settings: list[hyper.Setting]) -> list[Run]:
    """Every run of the sweep, validated before the first starts.

    Args:
        base: the config the settings override, as nested dicts.
        settings: from `get_hyper`.

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
            raise ValueError(f"get_hyper names an arm {arm!r}, as a file of the sweep is named; choose another name.")
        config = validate(override(base, overrides))
        runs.append(Run(arm, config.seed, config))
    names = [(run.arm, run.seed) for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"get_hyper wants arm {name[0]!r} with seed {name[1]} twice; name the arms apart.")
    return runs


def override(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with dotted keys set; a key that is not there is an error."""
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
    """What sweep.json holds: all that the report must know besides the runs' own files."""
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
    return {k: after.get(k) for k in keys}  # None: the arm does without it


def claim(workdir: Path, record: dict[str, Any], runs: list[Run]) -> list[str]:
    """Write sweep.json; a line for every arm that was in it and is not in the sweep any more.

    A sweep may grow and shrink by arms and seeds, and change every key that changes no number: what counts is that
    each run that is there trains what the sweep now wants of it.

    Raises:
        ValueError: the folder holds another sweep, a run of another config, or one that read other data.
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
    """Where a run of a sweep lives."""
    return workdir / run.arm / f"seed{run.seed}"


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" as (i, n), 0 <= i < n."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--shard={text} must be i/n with 0 <= i < n; 0/1 does every run.")
    return int(index), int(count)


FOR_ALL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of the operating system that no other run would be spared


def execute(runs: list[Run], workdir: Path) -> tuple[int | None, list[str]]:
    """Train the runs that are not finished, one after the other.

    Returns:
        the signal that stopped them, if one did, and a sentence for every run that failed, now or before.

    Raises:
        ValueError: one of the runs does not fit the devices; none was started.
        OSError: the disk is full, or cannot be written.
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
            except Exception as error:  # whatever it is, the other runs are not to pay for it
                if isinstance(error, OSError) and error.errno in FOR_ALL:
                    raise
                if not isinstance(error, (ValueError, OSError, FloatingPointError)):
                    traceback.print_exc()  # nothing that the input can cause
                why = str(error) or type(error).__name__
            else:
                if outcome.signal:
                    return outcome.signal, failed
                continue
        if said := diverged(folder):
            why = f"diverged: {said} Delete the folder to try it again."
        failed.append(f"{run.arm}, seed {run.seed} ({folder}): {why}")
        print(f"! {failed[-1]}", flush=True)
    return None, failed


def diverged(folder: Path) -> str:
    """What a run says of its divergence; empty if it did not diverge."""
    return str(read_run(folder).get("diverged", ""))


def main(_: list[str]) -> None:
    """Plan, check, train, report."""
    flag = flags.FLAGS
    keep_compiled()
    try:
        workdir = workdir_of(flag.workdir)
        if is_remote(workdir):
            raise ValueError(f"--workdir={flag.workdir} is in a bucket, where a sweep cannot be; name a folder.")
        index, count = parse_shard(flag.shard)
        if cluster := processes.find_cluster(os.environ):
            raise ValueError(
                f"{cluster.launcher} started this as one process of many, but a sweep's runs are of one process each; "
                "start it once a machine with JAX_NUM_PROCESSES=1 and --shard=i/n."
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
    flags.DEFINE_string("workdir", None, "Where the runs and the report go; made if absent.")
    flags.DEFINE_string("shard", "0/1", "i/n: do every n-th run, from the i-th (0-based).")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
