"""The logs of the study as they are committed: an archive for each plain sweep, with its finished runs.

    RESULTS/<table>.tar.xz                           a plain table
    RESULTS/<table>/sweep.json, trunks.tar.xz, branches/<method>/seed<k>.tar.xz      a branched one

Unpacked, they have the layout of the workdir. So that a repository can hold them, they are without

- weights, TensorBoard's files, and recorded routing;
- digits that no number needs (`texts.short`);
- the biases of single experts (layers.jsonl) in most runs of branched tables, and their loads too where a run logged
  more than `MOST_LINES` times. Both are kept of those that pictures show: of each arm the finished branch with the
  lowest data seed, on the lowest trunk seed of each method, and of each method the trunk with the lowest seed.

An archive has the same bytes whenever it has the same runs, and is written only if its content changes. Runs that it
has and the workdir has not, such as another machine's, are kept.
"""

import functools
import io
import json
import lzma
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from moe_jax.config import as_dict, validate
from moe_jax.runtime.files import read_json, write_whole
from moe_jax.runtime.log import LAYERS, METRICS

from ..branched import branches_in, trunks_in
from ..report.branched import Branched, is_branched, read_branched
from ..report.sweep import Run, Sweep, SweepError, by_step, read_spec, read_sweep
from ..runs import SWEEP
from ..runs import Run as PlannedRun
from .devices import ROUNDS, rounds_record
from .excerpts import FILE as EXCERPTS
from .plan import TABLES
from .texts import Private, as_lines

ENDING = ".tar.xz"
SPECIALISATION = "specialisation.json"
OBJECTS = ("config.json", "run.json", "ablation.json", "evaluation.json", SPECIALISATION, EXCERPTS)
MEMBER = re.compile(rf"{SWEEP}|\w[\w.-]*/seed\d+/({METRICS}|{LAYERS}|{'|'.join(OBJECTS)}|{ROUNDS})")
DAMAGE = (tarfile.TarError, lzma.LZMAError, EOFError, UnicodeDecodeError)

Files = dict[str, str]  # name in an archive -> text
Layers = Literal["all", "first seeds", "none"]  # the runs whose layers.jsonl is kept whole
TRAINED = ("loss", "moe/max_violation", "eval/bits_per_byte")  # the numbers by which a trunk is known
MOST_LINES = 60  # of layers.jsonl, of which the loads are kept in the other runs


# --- reading ------------------------------------------------------------------------------------------------


def tables(folder: Path) -> dict[str, Sweep | Branched]:
    """Read every table below a folder, `<folder>/<table>/sweep.json`: those of the study in its order, then others.

    Raises:
        SweepError: a table cannot be read.
    """
    found = sorted(spec.parent.name for spec in folder.glob(f"*/{SWEEP}"))
    names = [name for name in TABLES if name in found] + [name for name in found if name not in TABLES]
    return {name: read_branched(at) if is_branched(at) else read_sweep(at) for name in names if (at := folder / name)}


def is_study(folder: Path) -> bool:
    """Whether a folder holds tables of the study, as archives or as runs."""
    if (folder / SWEEP).exists():
        return False
    return any((folder / name / SWEEP).is_file() or (folder / f"{name}{ENDING}").is_file() for name in TABLES)


@contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """The runs of a study: the folder itself if it is a workdir, and what `unpacked` yields if it has archives."""
    if any(folder.rglob(f"*{ENDING}")):
        with unpacked(folder) as runs:
            yield runs
    else:
        yield folder


@contextmanager
def unpacked(results: Path) -> Iterator[Path]:
    """A temporary folder with the layout of the study's workdir, made from its archives.

    Raises:
        SweepError: an archive is damaged, or has a file that none of ours has; or there are none.
    """
    archives = sorted(results.rglob(f"*{ENDING}"))
    if not archives:
        raise SweepError(f"{results} must hold the study's archives; run python -m experiments.study to make them.")
    with tempfile.TemporaryDirectory(prefix="moe_jax_study_") as temporary:
        folder = Path(temporary)
        for spec in results.glob(f"*/{SWEEP}"):
            _write(folder / spec.relative_to(results), spec.read_text())
        for archive in archives:
            target = folder / str(archive.relative_to(results)).removesuffix(ENDING)
            for name, text in read_archive(archive).items():
                _write(target / name, text)
        yield folder


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read_archive(path: Path) -> Files:
    """The files of an archive, in memory, so that no name in it can lead anywhere; empty if there is none.

    Raises:
        SweepError: it is damaged, or has a link, or a file that none of ours has.
    """
    if not path.is_file():
        return {}
    again = "restore it with git, or delete it and collect the runs again."
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(path.read_bytes()))) as tar:
            for member in tar:
                if not member.isreg() or not MEMBER.fullmatch(member.name):
                    raise SweepError(f"{path} has {member.name!r}, which is no file of a sweep; {again}")
                content = tar.extractfile(member)
                assert content is not None
                files[member.name] = content.read().decode()
    except DAMAGE as error:
        raise SweepError(f"{path} is damaged ({str(error) or type(error).__name__}); {again}") from None
    return files


# --- writing ------------------------------------------------------------------------------------------------


def collect(workdir: Path, results: Path) -> list[str]:
    """Pack the logs of the finished runs of every table in a workdir.

    Args:
        workdir: of the study, or of a shard of it; tables that have not begun are left as they are in `results`.
        results: the folder of the archives, created if absent.

    Returns:
        a line for every archive that lacks planned runs, and for every run that has a problem other than that.

    Raises:
        SweepError: a text names this machine; an archive is damaged, or has runs of an arm with other settings, or of
            a trunk with other numbers.
    """
    private = Private(workdir)
    lines = []
    for folder in sorted(spec.parent for spec in workdir.glob(f"*/{SWEEP}")):
        if is_branched(folder):
            for method, seed in read_spec(folder)["parts"]:
                check_trunk(folder, method, seed, results)
        for plain, layers in _plain_sweeps(folder):
            lines += _pack(plain, plain.relative_to(workdir), results, layers, private)
        if is_branched(folder):
            plan = _spec_text(folder, private)
            target = results / folder.name / SWEEP
            if not target.is_file() or target.read_text() != plan:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, plan)
    return lines


def check_trunk(table: Path, method: str, seed: int, results: Path) -> None:
    """Raise a SweepError if the archives have branches of a trunk with other numbers than the workdir's.

    A trunk that is not in both places is not compared.

    Args:
        table: the folder of the trunk's table in the workdir.
        method: the arm of the trunk.
        seed: of the trunk.
        results: the folder of the archives.
    """
    sweep = trunks_in(table)
    archive = archive_of(sweep, table, results)
    there = read_archive(archive).get(f"{method}/seed{seed}/{METRICS}", "")
    here = sweep / method / f"seed{seed}" / METRICS
    branches = archive_of(branches_in(table, method, seed), table, results)
    if not there or not here.is_file() or not branches.is_file():
        return
    known = {line["step"]: line for line in map(json.loads, there.splitlines())}
    for line in map(json.loads, as_lines(by_step(here)[0]).splitlines()):
        for key in TRAINED:
            numbers = known.get(line["step"], {}).get(key), line.get(key)
            if None not in numbers and repr(numbers[0]) != repr(numbers[1]):
                raise SweepError(
                    f"{branches} has branches of a trunk with {key}={numbers[0]} after step {line['step']}, and the "
                    f"trunk of {here.parent} has {numbers[1]}, so that branches of the two cannot be compared; give "
                    "another folder as --results."
                )


def archive_of(sweep: Path, table: Path, results: Path) -> Path:
    """The archive of a plain sweep in the workdir: of a plain table, of trunks, or of the branches of one."""
    return results / f"{sweep.relative_to(table.parent)}{ENDING}"


def _plain_sweeps(table: Path) -> Iterator[tuple[Path, Layers]]:
    """The plain sweeps of a table, and the runs whose layers.jsonl is kept whole."""
    if not is_branched(table):
        yield table, "all"
        return
    yield trunks_in(table), "first seeds"
    parts = read_spec(table)["parts"]
    for method, seed in parts:
        is_first = seed == min(k for m, k in parts if m == method)
        yield branches_in(table, method, seed), "first seeds" if is_first else "none"


def _pack(folder: Path, name: Path, results: Path, layers: Layers, private: Private) -> list[str]:
    """Write the archive of a plain sweep if it changed, and say what it lacks; `name` is that of the folder."""
    sweep = read_sweep(folder)
    archive = results / f"{name}{ENDING}"
    there = read_archive(archive)
    files = {SWEEP: _spec_text(folder, private)}
    kept = _kept(there, files[SWEEP], sweep, archive)
    for arm, runs in sweep.runs.items():
        seeds = {*runs, *(seed for kept_arm, seed in kept if kept_arm == arm)}
        for seed, run in runs.items():
            is_whole = layers == "all" or (layers == "first seeds" and seed == min(seeds))
            files |= _files_of(run, f"{arm}/seed{seed}", is_whole, private)
    files |= {name: text for name, text in there.items() if _run_in(name) in kept}
    if files != there:
        archive.parent.mkdir(parents=True, exist_ok=True)
        write_whole(archive, _packed(files))
    planned, packed = len(sweep.arms) * len(sweep.seeds), len(sweep.finished) + len(kept)
    lines = [f"{name}: {packed} of {planned} runs are finished"] if packed < planned else []
    # a run that has not begun, or is under way, is only counted
    return lines + [f"{name}: {one}" for one in sweep.problems if not re.search(r": (not started|unfinished) ", one)]


def _kept(there: Files, plan: str, sweep: Sweep, archive: Path) -> set[tuple[str, int]]:
    """The planned runs that an archive has, and the workdir has not.

    Raises:
        SweepError: such a run was trained with other settings than the plan's.
    """
    names = {run for name in there if (run := _run_in(name))}
    kept = {(arm, seed) for arm, seed in names if arm in sweep.runs and seed in sweep.seeds}
    kept = {(arm, seed) for arm, seed in kept if seed not in sweep.runs[arm]}
    for arm in sorted({arm for arm, _ in kept}):
        if _settings(there.get(SWEEP, "{}"), arm) != _settings(plan, arm):
            raise SweepError(
                f"{archive} has runs of {arm} with other settings than {sweep.directory}; finish those of the workdir, "
                "give another folder as --results, or delete the archive."
            )
    return kept


def archived_run(run: PlannedRun, sweep: Path, table: Path, results: Path) -> Files:
    """The files of a planned run in an archive, by their names in the run's folder.

    Args:
        run: as it is planned.
        sweep: the folder of its plain sweep in the workdir.
        table: the folder of its table there.
        results: the folder of the archives.

    Returns:
        nothing if the archive lacks it, or has it with other settings.
    """
    there = read_archive(archive_of(sweep, table, results))
    plan = _spec_text(sweep, Private(table.parent))
    if _settings(there.get(SWEEP, "{}"), run.arm) != _settings(plan, run.arm):
        return {}
    place = f"{run.arm}/seed{run.seed}/"
    return {name.removeprefix(place): text for name, text in there.items() if name.startswith(place)}


def _settings(spec: str, arm: str) -> Any:
    """The config of an arm by the text of a sweep.json, with the defaults of keys that it is older than."""
    content = json.loads(spec)
    own = content.get("arms_config", {}).get(arm)
    return None if own is None else _complete(json.dumps([content.get("config"), own]))


@functools.lru_cache
def _complete(text: str) -> Any:
    """A config with the values that an arm gives by dotted keys; the two as they are if they are not valid any more."""
    config, own = json.loads(text)
    try:
        whole = json.loads(text)[0]
        for key, value in own.items():
            *path, name = key.split(".")
            if value is None and path[0] == "balance":  # a method that the arm has not
                whole["balance"].pop(path[1], None)
                continue
            section = whole
            for part in path:
                section = section.setdefault(part, {})
            section[name] = value
        return as_dict(validate(whole))
    except (ValueError, AttributeError, TypeError, LookupError):
        return config, own


def _run_in(name: str) -> tuple[str, int] | None:
    """The arm and the seed of a file in an archive."""
    found = re.fullmatch(r"([^/]+)/seed(\d+)/[^/]+", name)
    return (found[1], int(found[2])) if found else None


def _files_of(run: Run, name: str, is_whole: bool, private: Private) -> Files:
    lines, _ = by_step(run.directory / METRICS)
    private.check(f"{run.directory / METRICS}", lines)
    files = {f"{name}/{METRICS}": as_lines(lines)}
    layers, _ = by_step(run.directory / LAYERS)
    if not is_whole:
        layers = [{key: line[key] for key in ("step", "loads") if key in line} for line in layers]
    if layers and (is_whole or len(layers) <= MOST_LINES):
        files[f"{name}/{LAYERS}"] = as_lines(layers)
    for file in OBJECTS:
        if (run.directory / file).is_file():
            files[f"{name}/{file}"] = _object_text(run.directory / file, private)
    if rounds := rounds_record(run):  # recorded routing is left out, and this is what pictures need of it
        files[f"{name}/{ROUNDS}"] = json.dumps(rounds) + "\n"
    return files


def _spec_text(folder: Path, private: Private) -> str:
    return _object_text(folder / SWEEP, private)


def _object_text(path: Path, private: Private) -> str:
    """A file with a JSON object, without paths of this machine."""
    value = private.without_paths(read_json(path, "write it again or delete it."))
    private.check(str(path), value)
    return json.dumps(value, indent=1) + "\n"


def _packed(files: Files) -> bytes:
    """The bytes of an archive: names in order, and no time, owner or right but the defaults of `TarInfo`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            content = files[name].encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=9)
