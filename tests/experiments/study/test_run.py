"""Laws of the command: tables in order, resumed after any end, every finished run packed, one progress."""

import errno
import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
from drills import rig

from configs.ablation import scopes
from experiments.report.command import main as report
from experiments.study import __main__ as command
from experiments.study.archive import _packed, read_archive, tables, unpacked
from experiments.study.plan import TABLES, parse_tables, read_tables
from experiments.study.run import MEASURES, check_corpora
from moe_jax import evaluate
from moe_jax.config import as_dict
from moe_jax.runtime import manifest
from moe_jax.training import loop

BASE = as_dict(rig.drill_config(save_every=0))
AT = 12
ARMS = '''"""Trunks and branches."""
from moe_jax.config import default

ARMS = {{"bias": {{}}, "none": {{"balance": {{}}}}}}


def get_config(arg=""):
    return default(**{base!r})


def get_hyper(h):
    """Two arms on two trunks."""
    trunks = h.product(h.arms(bias=ARMS["bias"]), h.sweep("seed", range(2)))
    return h.branches(trunks, h.product(h.arms(**ARMS), h.sweep("seed", range(1))), at={at})
'''
GATES = '''"""Two gates."""
from moe_jax.config import default


def get_config(arg):
    config = default(**{base!r})
    config.num_steps = int(arg)
    return config


def get_hyper(h, arg):
    return h.product(h.arms(sigmoid={{}}, softmax={{"model.score": "softmax"}}), h.sweep("seed", range(1)))
'''
TRUNKS = [f"arms/trunks/bias/seed{k}" for k in range(2)]
BRANCHES = [f"arms/branches/bias/seed{k}/{arm}/seed{1000 * k}" for arm in ("bias", "none") for k in range(2)]
EVERY = [*TRUNKS, *BRANCHES, "gates/sigmoid/seed0", "gates/softmax/seed0"]


def finish(config, folder, bits=2.0):
    """What a finished run leaves."""
    saved = folder / "checkpoints" / f"{config.num_steps:08d}"
    saved.mkdir(parents=True)
    (saved / manifest.MANIFEST).write_text("{}")
    line = {"step": config.num_steps - 1, "eval/loss": 1.5, "eval/bits_per_byte": bits, "eval/max_violation": 0.25}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "config.json").write_text(json.dumps(as_dict(config)))
    (folder / "run.json").write_text("{}")


@pytest.fixture
def study(monkeypatch, tmp_path):
    """`(run, done, errors)`: run(*flags) runs the command; what was trained in order; folder -> signal or exception."""
    done, errors = [], {}
    work = tmp_path / "work"

    def train(config, folder, hooks, name):
        place = folder.relative_to(work).as_posix()
        done.append(place)
        error = errors.pop(place, None)
        if isinstance(error, signal.Signals):
            return loop.Outcome(3, error, {})
        if error is not None:
            raise error
        finish(config, folder)
        return loop.Outcome(config.num_steps, None, {})

    def measure(config, folder, *, ablation=False, specialisation=False):
        assert ablation != specialisation
        place = f"{folder.relative_to(work).as_posix()} {'without' if ablation else 'domains'}"
        done.append(place)
        if error := errors.pop(place, None):
            raise error
        if specialisation:
            (folder / "specialisation.json").write_text('{"domains": ["mine"], "relative_load": [[[1.0], [1.0]]]}')
            return
        result = {"as it is": 2.0, "without shared": 2.5, "without the best 1": 2.25}
        content = {name: {"bits_per_byte": bits} for name, bits in result.items()}
        (folder / "ablation.json").write_text(json.dumps(content))

    def route(folder):
        place = f"{folder.relative_to(work).as_posix()} text"
        done.append(place)
        if error := errors.pop(place, None):
            raise error
        (folder / "excerpts.json").write_text('{"step": 12, "num_experts": 4, "domains": {}}')

    def write_study(tables, judged, output_folder):
        text = " ".join(one.verdict for one in judged)
        (output_folder / "report.html").write_text(f"{', '.join(tables)}: {text}")
        return output_folder / "report.html", output_folder / "report.md"

    monkeypatch.setattr(loop, "run", train)
    monkeypatch.setattr(evaluate, "run", measure)
    monkeypatch.setitem(MEASURES, "text by expert", MEASURES["text by expert"]._replace(run=route))
    monkeypatch.setitem(sys.modules, "experiments.study.page", SimpleNamespace(write_study=write_study))
    (tmp_path / "arms.py").write_text(ARMS.format(base=BASE, at=AT))
    (tmp_path / "gates.py").write_text(GATES.format(base=BASE))
    monkeypatch.setitem(TABLES, "arms", str(tmp_path / "arms.py"))
    monkeypatch.setitem(TABLES, "gates", f"{tmp_path / 'gates.py'}:20")
    monkeypatch.chdir(tmp_path)

    def run(*flags, status=0):
        given = [f"--workdir={work}", "--results=results", "--tables=arms,gates", *flags]
        if status:
            with pytest.raises(SystemExit) as ended:
                command.main(given)
            assert ended.value.code == status
        else:
            command.main(given)

    return run, done, errors


def packed(tmp_path):
    """The folders of the finished runs in the archives."""
    with unpacked(tmp_path / "results") as folder:
        return sorted(file.parent.relative_to(folder).as_posix() for file in folder.rglob("metrics.jsonl"))


def test_tables_are_trained_in_order_and_trunks_measured(study, tmp_path, capsys):
    run, done, _ = study
    run()
    measured = [*(f"{TRUNKS[0]} {what}" for what in ("without", "domains", "text")), f"{TRUNKS[1]} without"]
    assert done == [*TRUNKS, *BRANCHES, *measured, *EVERY[6:]]
    assert packed(tmp_path) == sorted(EVERY)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "runs done" in line]
    assert len(lines) == 7  # over both tables, and nothing after the last
    assert lines[0].startswith("1 of 8 runs done, about ")
    row = next(line for line in out.splitlines() if "Without the shared expert the loss" in line)
    assert "+0.25 ± 0 " in row and "reproduced" in row
    assert out.rstrip().endswith("Wrote results/report.html")
    assert (tmp_path / "results/report.html").read_text().startswith("arms, gates: not measured")
    assert list((tmp_path / "work").glob("arms/branches/*/*/*/*/checkpoints")) == []
    assert len(list((tmp_path / "work").glob("arms/trunks/*/*/checkpoints"))) == 2
    run()
    assert len(done) == 12  # nothing is done twice


@pytest.mark.parametrize("place", [TRUNKS[1], BRANCHES[2], EVERY[7]])
def test_a_signal_packs_what_is_finished_and_the_command_goes_on_when_repeated(study, tmp_path, place):
    run, done, errors = study
    errors[place] = signal.SIGTERM
    run(status=128 + signal.SIGTERM)
    assert packed(tmp_path) == sorted(EVERY[: EVERY.index(place)])
    before = len(done)
    run()
    assert done[before] == place
    assert packed(tmp_path) == sorted(EVERY)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_runs_packs_too(study, tmp_path, monkeypatch, number):
    run, done, _ = study

    def kill():
        if len(done) == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("experiments.study.run.Progress", lambda steps: SimpleNamespace(next=kill))
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    run(status=128 + number)
    assert packed(tmp_path) == sorted(EVERY[:4])
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_failure_is_named_in_the_end_and_the_others_are_trained(study, tmp_path, capsys):
    run, done, errors = study
    errors |= {BRANCHES[2]: FloatingPointError("the loss is nan"), f"{TRUNKS[0]} without": ValueError("no checkpoint")}
    errors[f"{TRUNKS[0]} text"] = ValueError("a damaged checkpoint")
    run(status=1)
    captured = capsys.readouterr()
    assert "not every run is finished:" in captured.err
    assert "arm none, seed 0" in captured.err and "the loss is nan" in captured.err
    assert "trunk bias, seed 0" in captured.err and "without some of its experts: no checkpoint" in captured.err
    assert "text by expert: a damaged checkpoint" in captured.err
    assert packed(tmp_path) == sorted(set(EVERY) - {BRANCHES[2]})
    assert "arms/branches/bias/seed0: 1 of 2 runs are finished" in captured.out
    before = len(done)
    run()
    assert done[before:] == [BRANCHES[2], f"{TRUNKS[0]} without", f"{TRUNKS[0]} text"]


def test_a_full_disk_ends_it_after_what_is_finished_is_packed(study, tmp_path):
    run, _, errors = study
    errors[BRANCHES[1]] = OSError(errno.ENOSPC, "No space left on device")
    run(status=2)
    assert packed(tmp_path) == sorted([*TRUNKS, BRANCHES[0]])


def test_a_lost_workdir_costs_the_trunks_alone(study, tmp_path, capsys):
    run, done, _ = study
    run()
    before = {file: file.read_bytes() for file in (tmp_path / "results").rglob("*.tar.xz")}
    shutil.rmtree(tmp_path / "work")
    done.clear()
    run()
    assert [place for place in done if " " not in place] == TRUNKS
    assert capsys.readouterr().out.count(": restored from the archives") == len(EVERY) - len(TRUNKS)
    assert {file: file.read_bytes() for file in (tmp_path / "results").rglob("*.tar.xz")} == before


def test_archives_of_an_earlier_version_have_the_defaults_of_later_keys(study, tmp_path):
    run, done, _ = study
    run()
    for archive in (tmp_path / "results").rglob("*.tar.xz"):
        files = read_archive(archive)
        spec = json.loads(files["sweep.json"])
        del spec["config"]["model"]["norm"], spec["config"]["mesh"]["sequence"]
        archive.write_bytes(_packed(files | {"sweep.json": json.dumps(spec)}))
    shutil.rmtree(tmp_path / "work")
    done.clear()
    run()
    assert [place for place in done if " " not in place] == TRUNKS


def test_an_arm_with_other_settings_is_not_restored(study, tmp_path):
    run, done, _ = study
    run()
    shutil.rmtree(tmp_path / "work")
    done.clear()
    (tmp_path / "gates.py").write_text(GATES.format(base=BASE | {"seed": 7}))
    run(status=2)  # what the archive has of it is not mixed with
    assert not list((tmp_path / "work").glob("gates/*/*/metrics.jsonl"))


@pytest.mark.parametrize("branches", ["kept", "lost"])
def test_branches_of_a_trunk_with_other_numbers_are_not_mixed(study, tmp_path, capsys, monkeypatch, branches):
    run, done, _ = study
    run()
    before = {file: file.read_bytes() for file in (tmp_path / "results").rglob("*.tar.xz")}
    shutil.rmtree(tmp_path / "work" / ("arms/branches" if branches == "lost" else "gates"))
    file = tmp_path / "work" / TRUNKS[1] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"eval/bits_per_byte": 2.0', '"eval/bits_per_byte": 2.5'))
    done.clear()
    run(status=2)
    error = capsys.readouterr().err
    assert "branches of a trunk with eval/bits_per_byte=2.0 after step" in error and "has 2.5" in error
    assert error.rstrip().endswith("give another folder as --results.")
    assert done == []
    assert {file: file.read_bytes() for file in (tmp_path / "results").rglob("*.tar.xz")} == before


def test_shards_do_every_run_once(study, tmp_path, capsys):
    run, done, _ = study
    for index in range(2):
        run(f"--shard={index}/2")
    assert sorted(done) == sorted(
        [*EVERY, *(f"{TRUNKS[0]} {what}" for what in ("text", "domains")), *(f"{t} without" for t in TRUNKS)]
    )
    assert packed(tmp_path) == sorted(EVERY)
    assert not (tmp_path / "results/report.html").exists()
    report(["results"])
    assert capsys.readouterr().out.rstrip().endswith("Wrote results/report.html")


def test_a_shard_removes_experts_from_its_own_trunks(study, tmp_path):
    run, done, _ = study
    run()
    for file in (tmp_path / "work").rglob("ablation.json"):
        file.unlink()
    run("--shard=1/2")
    assert done[12:] == [f"{TRUNKS[1]} without"]


def test_the_report_reads_archives_and_workdirs(study, tmp_path, capsys):
    run, _, _ = study
    run()
    (tmp_path / "page").mkdir()
    report(["work", "--output=page"])
    assert (tmp_path / "page/report.html").read_text() == (tmp_path / "results/report.html").read_text()
    assert "Wrote page/report.html" in capsys.readouterr().out
    for flag in ("--figures", "--baseline=none"):
        with pytest.raises(SystemExit):
            report(["results", flag])
        assert "is for one sweep, and DIR=results holds the study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--tables=arms,gate", "--tables=arms,gate names 'gate', which is not one; did you mean 'gates'?"),
        ("--tables=x", "the tables are arms, gates, leak"),
        ("--shard=2/2", "must be i/n"),
        ("--results=gs://bucket/x", "--results=gs://bucket/x is an address"),
    ],
)
def test_a_mistake_is_one_sentence(study, capsys, flag, sentence):
    run, done, _ = study
    run(flag, status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert done == []


def test_without_its_text_the_study_names_make_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(["--workdir=work"])
    error = "error: data.path=corpus/bytes of the study does not exist; run make corpus.\n"
    assert capsys.readouterr().err == error
    assert list(tmp_path.iterdir()) == []


# --- the real tables --------------------------------------------------------------------------------------------


def test_every_table_of_the_study_is_planned(tmp_path):
    found = {table.name: table for table in read_tables(TABLES, tmp_path)}
    assert {name: len(table.every_run) for name, table in found.items()} == {
        "arms": 584,
        "gates": 12,
        "leak": 9,
        "systems": 21,
        **{f"quantile_{size}": 60 for size in ("16x2048", "16x8192", "64x2048", "64x8192")},
    }
    with pytest.raises(ValueError, match=r"data\.path=corpus/bytes"):
        check_corpora(list(found.values()))
    assert parse_tables("gates,arms") == ["arms", "gates"]
    # all shards together do what one does; a branch resumes from its trunk, and has 400 steps of 2048 tokens
    work = [sum(found["arms"].work((index, 3))) for index in range(3)]
    assert sum(work) == sum(found["arms"].work((0, 1))) == (8 * 1000 + 576 * 400) * 2048


def test_an_arm_is_added_by_one_line_and_is_in_the_plan_and_in_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scopes.ARMS, "mine", {"balance": dict(aux_loss=dict(weight=5e-2))})
    (table,) = read_tables(["arms"], tmp_path / "work")
    assert len(table.every_run) == 584 + 24
    mine = [run for part in table.parts for run in part.branches if run.arm == "mine"]
    assert {run.config.balance[0].options.weight for run in mine} == {5e-2}
    monkeypatch.setattr("experiments.runs.check_corpus", lambda path: SimpleNamespace(fingerprint="same"))
    table.claim("the command")
    for part in table.parts:
        for run in part.branches:
            if run.arm in ("bias", "mine") and run.seed % 1000 == 0:
                name = f"branches/{part.trunk.arm}/seed{part.trunk.seed}/{run.arm}/seed{run.seed}"
                finish(run.config, tmp_path / "work/arms" / name, 2.0 + 0.5 * (run.arm == "mine"))
    sweep = tables(tmp_path / "work")["arms"]
    effects = {b[:2]: r.final("eval/bits_per_byte") for b, r in sweep.runs.items() if b.arm == "mine"}
    assert len(effects) == 8 and set(effects.values()) == {2.5}
    report([str(tmp_path / "work/arms")])
    assert "+0.5000" in capsys.readouterr().out
    assert "mine" in (tmp_path / "work/arms/report.html").read_text()
