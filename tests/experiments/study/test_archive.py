"""Laws of the archives: nothing that claims and pictures need is lost, and no byte changes without a new run."""

import io
import json
import lzma
import os
import shutil
import tarfile

import numpy as np
import pytest
from sweeps import branched_sweep, simulated_sweep, tiny_sweep

from experiments.report.branched import Branched
from experiments.report.numbers import last, layer_arrays
from experiments.report.sweep import SweepError
from experiments.study import archive
from experiments.study.archive import collect, is_study, opened, read_archive, tables, unpacked
from experiments.study.devices import mean_rounds
from experiments.study.verdicts import judge

NUMBERS = {
    (trunk, k, arm, 1000 * k + j): 1.5 + 0.01 * i + 0.1 * k + 0.001 * j
    for trunk in ("none", "bias_sign")
    for k in range(2)
    for i, arm in enumerate(("none", "bias_sign"))
    for j in range(2)
}


@pytest.fixture
def study(tmp_path):
    """A workdir with a branched and a plain table, and the folder of results."""
    work = tmp_path / "work"
    branched_sweep(work / "arms", NUMBERS)
    for folder in work.glob("arms/branches/*/*/*/seed*"):
        (folder / "layers.jsonl").write_text('{"step": 999, "bias": [[0.5, 0.0]], "loads": [[2, 1]]}\n')
    simulated_sweep(work / "gates", ["none", "bias_sign"], [0, 1], every=100)
    return work, tmp_path / "results"


def bytes_in(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_unpacked_reads_as_the_runs_do(study):
    work, results = study
    assert collect(work, results) == []
    there = tables(work)
    with unpacked(results) as folder:
        again = tables(folder)
        assert list(again) == list(there) == ["arms", "gates"]
        arms, gates = again["arms"], again["gates"]
        assert isinstance(arms, Branched)
        assert {branch: run.metrics for branch, run in arms.runs.items()} == {
            branch: run.metrics for branch, run in there["arms"].runs.items()
        }
        assert all(layer_arrays(run)[1].tolist() == [[[2, 1]]] for run in arms.runs.values())
        assert {m: len(runs) for m, runs in arms.trunks.runs.items()} == {"none": 2, "bias_sign": 2}
        assert gates.runs["none"][1].info == there["gates"].runs["none"][1].info
        assert layer_arrays(gates.runs["bias_sign"][1])[2].shape == (10, 4, 16)
    assert not folder.exists()


def test_verdicts_are_the_same(study):
    from experiments.study.claims import Claim, Published, below
    from experiments.study.measures import BALANCE, QUALITY, effect

    work, results = study
    claims = [
        Claim("1", "", Published(""), effect(table, "bias_sign", "none", last(key)), below())
        for table in ("arms", "gates")
        for key in (QUALITY, BALANCE)
    ]
    collect(work, results)
    live = judge(claims, tables(work))
    with unpacked(results) as folder:
        packed = judge(claims, tables(folder))
    assert [one.verdict for one in packed] == [one.verdict for one in live]
    for one, other in zip(packed, live, strict=True):
        assert one.found.blocks == pytest.approx(other.found.blocks, rel=1e-7)


def test_the_biases_of_a_branched_table_are_kept_of_the_runs_that_pictures_show(study):
    work, results = study
    collect(work, results)
    files = {name: read_archive(results / f"arms/branches/none/{name}.tar.xz") for name in ("seed0", "seed1")}
    layers = {f"{part}/{name}": there[name] for part, there in files.items() for name in there if "layers" in name}
    assert len(layers) == 8
    assert all('"loads": [[2, 1]]' in text for text in layers.values())
    biased = [name for name, text in layers.items() if "bias" in text]
    assert sorted(biased) == ["seed0/bias_sign/seed0/layers.jsonl", "seed0/none/seed0/layers.jsonl"]


def test_the_loads_of_a_long_log_are_kept_only_of_runs_that_pictures_show(study, monkeypatch):
    work, results = study
    monkeypatch.setattr(archive, "MOST_LINES", 0)
    collect(work, results)
    names = [name for k in range(2) for name in read_archive(results / f"arms/branches/none/seed{k}.tar.xz")]
    assert sum(name.endswith("layers.jsonl") for name in names) == 2
    assert sum(name.endswith("metrics.jsonl") for name in names) == 8
    assert sum("layers" in name for name in read_archive(results / "gates.tar.xz")) == 4


def test_only_archives_with_new_runs_are_written_again_and_to_the_same_bytes_anywhere(study, tmp_path):
    work, results = study
    new = work / "arms/branches/none/seed1/none/seed1001"
    hidden = new.rename(tmp_path / "hidden")
    assert collect(work, results) == ["arms/branches/none/seed1: 3 of 4 runs are finished"]
    before = bytes_in(results)
    times = {name: (results / name).stat().st_mtime_ns for name in before}
    assert collect(work, results) == ["arms/branches/none/seed1: 3 of 4 runs are finished"]
    assert {name: (results / name).stat().st_mtime_ns for name in before} == times
    hidden.rename(new)
    os.utime(new / "metrics.jsonl", (0, 0))
    assert collect(work, results) == []
    after = bytes_in(results)
    assert {name for name in after if after[name] != before[name]} == {"arms/branches/none/seed1.tar.xz"}
    moved = work.rename(tmp_path / "elsewhere")
    collect(moved, tmp_path / "again")
    assert bytes_in(tmp_path / "again") == after


def test_shards_with_workdirs_of_their_own_add_up(study, tmp_path):
    work, results = study
    collect(work, tmp_path / "whole")
    other = tmp_path / "other"
    shutil.copytree(work, other)
    for folder in [*work.glob("gates/*/seed1"), *work.glob("arms/trunks/*/seed1")]:
        shutil.rmtree(folder)
    for folder in [*other.glob("gates/*/seed0"), *other.glob("arms/trunks/*/seed0")]:
        shutil.rmtree(folder)
    assert "gates: 2 of 4 runs are finished" in collect(work, results)
    assert collect(other, results) == []
    assert bytes_in(results) == bytes_in(tmp_path / "whole")


def test_runs_of_other_settings_are_not_mixed(study):
    work, results = study
    collect(work, results)
    spec = json.loads((work / "gates/sweep.json").read_text())
    spec["arms_config"]["none"] = {"num_steps": 5}
    (work / "gates/sweep.json").write_text(json.dumps(spec))
    (work / "gates/none/seed1/metrics.jsonl").unlink()
    with pytest.raises(SweepError, match=r"gates\.tar\.xz has runs of none with other settings than .*; finish those"):
        collect(work, results)


def test_runs_that_are_not_finished_are_counted_and_other_problems_named(study):
    work, results = study
    metrics = work / "gates/none/seed1/metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:5]))
    with (work / "gates/none/seed0/metrics.jsonl").open("a") as file:
        file.write('{"step": ')
    assert collect(work, results) == [
        "gates: 3 of 4 runs are finished",
        "gates: none, seed 0: 1 unreadable line was left out.",
    ]
    assert not any(name.startswith("none/seed1/") for name in read_archive(results / "gates.tar.xz"))


def test_no_weights_and_nothing_of_the_machine_is_packed(study):
    work, results = study
    run = work / "gates/none/seed0"
    for name in ("checkpoints/00001000", "tensorboard", "routing"):
        (run / name).mkdir(parents=True)
        (run / name / "file").write_text("large")
    (run / "ablation.json").write_text('{"as it is": {"bits_per_byte": 1.0}}')
    collect(work, results)
    raw = lzma.decompress((results / "gates.tar.xz").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    names = [m.name for m in members]
    assert names == sorted(names)
    own = [name.removeprefix("none/seed0/") for name in names if name.startswith("none/seed0/")]
    assert own == ["ablation.json", "config.json", "layers.jsonl", "metrics.jsonl", "run.json"]


def test_paths_become_relative_and_what_names_the_machine_is_refused(study):
    work, results = study
    run = work / "gates/none/seed0"
    config = json.loads((run / "config.json").read_text())
    config |= {"branch_from": f"{work}/arms/trunks/none/seed0@600", "data": {"path": "/data/of/me/bytes"}}
    (run / "config.json").write_text(json.dumps(config))
    collect(work, results)
    packed = json.loads(read_archive(results / "gates.tar.xz")["none/seed0/config.json"])
    assert packed["branch_from"] == "arms/trunks/none/seed0@600"
    assert packed["data"]["path"] == "bytes"
    (run / "run.json").write_text(json.dumps({"note": f"at:{work.resolve()}"}))
    with pytest.raises(SweepError, match=r"run\.json has the folder .*, in .*, which must not be committed"):
        collect(work, results)


@pytest.mark.parametrize("harm", [lambda data: data[:100], lambda data: b"no archive", lambda data: data[:-40]])
def test_a_damaged_archive_is_one_sentence(study, harm):
    work, results = study
    collect(work, results)
    file = results / "gates.tar.xz"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(SweepError, match=r"gates\.tar\.xz is damaged \(.*\); restore it with git"), unpacked(results):
        pass
    with pytest.raises(SweepError, match="is damaged"):
        collect(work, results)


@pytest.mark.parametrize("name", ["../outside", "/etc/file", "none/../seed0/run.json", "none/seed0/other.txt", "link"])
def test_an_archive_with_other_files_than_ours_is_refused(study, name):
    work, results = study
    collect(work, results)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("none/seed0/run.json" if name == "link" else name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    (results / "gates.tar.xz").write_bytes(lzma.compress(buffer.getvalue()))
    with pytest.raises(SweepError, match="which is no file of a sweep"), unpacked(results):
        pass


def test_a_study_is_told_from_a_sweep_and_from_a_folder_of_sweeps(study, tmp_path):
    work, results = study
    collect(work, results)
    tiny_sweep(tmp_path / "several/demo", {"none": [1.0]})
    assert is_study(work) and is_study(results)
    assert not any(map(is_study, (work / "arms", work / "gates", tmp_path / "several", tmp_path / "absent")))
    with opened(work) as folder:
        assert folder == work
    with opened(results) as folder:
        assert folder != results and list(tables(folder)) == ["arms", "gates"]
    with pytest.raises(SweepError, match="must hold the study's archives"), unpacked(tmp_path / "several"):
        pass


def test_of_recorded_routing_only_the_rounds_are_kept(study):
    work, results = study
    run = tables(work)["arms"].parts["none", 0].runs["none"][0]
    model = {"num_experts": 16, "capacity_factor": 1.25}
    (run.directory / "config.json").write_text(json.dumps(run.config | {"model": model}))
    (run.directory / "routing").mkdir()
    np.save(run.directory / "routing/7.npy", np.zeros((2, 16, 2), np.uint16))  # every copy to one of 8 devices
    collect(work, results)
    files = read_archive(results / "arms/branches/none/seed0.tar.xz")
    assert not [name for name in files if "routing" in name]
    assert json.loads(files["none/seed0/rounds.json"]) == {"devices": 8, "step": 7, "rounds": [4, 4]}
    assert [name for name in files if name.endswith("rounds.json")] == ["none/seed0/rounds.json"]
    with unpacked(results) as folder:
        assert mean_rounds(tables(folder)["arms"].parts["none", 0].runs["none"][0]) == 4
