"""Laws of reports on branched sweeps: numbers by hand, every one traceable to a folder, from logs alone."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from rich.console import Console
from sweeps import branched_sweep, tiny_sweep

from experiments import report
from experiments.report.columns import QUALITY
from experiments.report.crossed import branched_table, left_out, runs_table, sentences
from experiments.report.sweep import SweepError, read_sweep
from experiments.statistics.blocks import Branch

ARMS = ("none", "bias_sign")


def numbers(trunk_seeds=(0, 1, 2), own_data=True):
    """On trunk none the arm bias_sign adds 0.02, on its own 0.01 less, and 0.001 more in every block.

    A data seed adds 0.1, a trunk seed 1, the trunk bias_sign 0.05: that cancels.
    """
    found = {}
    for t, trunk in enumerate(ARMS):
        for s in trunk_seeds:
            for arm in ARMS:
                for d in (0, 1):
                    effect = (0.02 - 0.01 * t + 0.001 * s) * (arm == "bias_sign")
                    found[trunk, s, arm, 1000 * s * own_data + d] = 1.0 + s + 0.1 * d + 0.05 * t + effect
    return found


@pytest.fixture
def folder(tmp_path):
    return branched_sweep(tmp_path / "sweep", numbers())


def printed(folder):
    console = Console(file=io.StringIO(), width=140)
    report.print_branched(report.read_branched(folder), console)
    return console.file.getvalue()


def test_the_table_has_the_numbers_computed_by_hand(folder):
    headers, rows = branched_table(report.read_branched(folder))
    assert headers == ["arm", "runs", "blocks", QUALITY.title, "effect", "trunk's favour", "switching cost"]
    # effects by block 0.015, 0.016, 0.017: sd 0.001, / sqrt(3), x t(0.975, 2) 4.303 = 0.0025
    # favour -0.01 in every block; bias_sign on trunk none minus on its own: -0.05 + 0.01; none: 0.05
    assert rows[0] == ["none", "12", "3", "2.0750", "-", "-", "+0.0500 ± 0.0000 *"]
    assert rows[1] == [
        "bias_sign",
        "12",
        "3",
        "2.0910",
        "+0.0160 ± 0.0025 *",
        "-0.0100 ± 0.0000 *",
        "-0.0400 ± 0.0000 *",
    ]


def test_every_number_is_traced_to_the_folder_of_its_run(folder):
    sweep = report.read_branched(folder)
    values = sweep.values(QUALITY)
    assert values.keys() == sweep.runs.keys() == {Branch(*name) for name in numbers()}
    rows = runs_table(sweep).rows
    assert len(rows) == len(values)
    for trunk, trunk_seed, arm, seed, bits, _, place in rows:
        lines = (folder / place / "metrics.jsonl").read_text().splitlines()
        assert float(bits) == pytest.approx(json.loads(lines[-1])["eval/bits_per_byte"])
        assert float(bits) == pytest.approx(numbers()[trunk, int(trunk_seed), arm, int(seed)])


def test_a_missing_branch_is_named_and_its_pair_is_left_out(tmp_path):
    gone = ("none", 1, "bias_sign", 1000)
    some = {name: value for name, value in numbers().items() if name != gone}
    sweep = report.read_branched(branched_sweep(tmp_path, some, missing=(gone,)))
    assert sweep.problems == ["trunk none, seed 1: bias_sign, seed 1000: not started (no metrics)."]
    assert branched_table(sweep).rows[1][1:3] == ["11", "3"]
    assert branched_table(sweep).rows[1][4] == "+0.0160 ± 0.0025 *"  # the other data seed of that trunk is still there
    assert left_out(sweep) == []


def test_an_arm_of_which_no_branch_is_started_is_one_sentence(tmp_path):
    """A sweep of many arms that trains arm by arm is reported while it runs."""
    some = {name: value for name, value in numbers().items() if name[2] != "bias_sign"}
    gone = tuple(name for name in numbers() if name not in some)
    sweep = report.read_branched(branched_sweep(tmp_path, some, missing=gone))
    assert sweep.problems == ["bias_sign: its 12 branches are not started."]


def test_a_block_without_a_trunk_method_is_named_and_left_out(tmp_path):
    some = {name: value for name, value in numbers().items() if name[:3] != ("none", 1, "bias_sign")}
    gone = tuple(name for name in numbers() if name not in some)
    folder = branched_sweep(tmp_path, some, missing=gone)
    sweep = report.read_branched(folder)
    (sentence,) = left_out(sweep)
    assert sentence.startswith("bias_sign: trunk seed 1 is left out of the effect")
    assert branched_table(sweep).rows[1][4].startswith("+0.0160")  # blocks 0.015 and 0.017
    assert sentence in " ".join(printed(folder).replace("!", "").split()) or "trunk seed 1 is left out" in printed(
        folder
    )


def test_shared_data_seeds_are_remarked(tmp_path):
    sweep = report.read_branched(branched_sweep(tmp_path, numbers(own_data=False)))
    (problem,) = sweep.problems
    assert "share data seeds (0, 1)" in problem and "not for other orders of the data" in problem


def test_the_answer_claims_no_more_than_the_interval(folder, tmp_path):
    assert "bias_sign is higher than none (+0.0160 ± 0.0025)" in sentences(report.read_branched(folder))["Quality"]
    values = {name: value + 0.5 * (name[1] == 2) * (name[2] == "none") for name, value in numbers().items()}
    unclear = sentences(report.read_branched(branched_sweep(tmp_path / "other", values)))
    assert "bias_sign is not distinguishable from none" in unclear["Quality"]
    one = sentences(report.read_branched(branched_sweep(tmp_path / "one", numbers((0,)))))
    assert "a single block, so no interval" in one["Quality"]
    assert "blocks are trunk seeds (1)" in one["Certainty"]


def test_the_page_has_the_crossed_table_with_a_dot_for_every_trunk(folder):
    page = report.write_branched(report.read_branched(folder))
    html = page.read_text()
    assert html.count("<circle") == 2 * 3  # trunk methods x trunk seeds, of the arm that is not the baseline
    for trunk, difference in (("none", 0.02), ("bias_sign", 0.01)):
        for seed in range(3):
            assert f"<title>{trunk}, trunk seed {seed}: {difference + 0.001 * seed:+.5f}</title>" in html
    assert html.count(" class=own") == 2
    places = re.findall(r"(?:src|href)=|https?://", html)
    assert places == []
    for tag in ("table", "tr", "td", "span", "svg", "circle", "main", "details"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag
    for branch in report.read_branched(folder).runs:
        assert f"branches/{branch.trunk}/seed{branch.trunk_seed}/{branch.arm}/seed{branch.seed}" in html


def test_a_larger_difference_is_further_right_and_zero_is_where_the_line_is(folder):
    html = report.write_branched(report.read_branched(folder)).read_text()
    marks = re.findall(r'<circle cx="([\d.]+)".*?: ([+-][\d.]+)</title>', html)
    places = {float(difference): float(x) for x, difference in marks}
    line = {float(x) for x in re.findall(r'<line x1="([\d.]+)"', html)}
    assert line == {8.0}  # all differences are positive, so 0 is at the left margin
    # the scale is from 0 at 8 to the largest difference, 0.022, at 142
    for difference, x in places.items():
        assert x == pytest.approx(8 + 134 * difference / 0.022, abs=0.06)


def test_the_report_needs_logs_only(folder, repo):
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {
        "sweep.json",
        "config.json",
        "metrics.jsonl",
        "layers.jsonl",
    }
    for file in folder.rglob("layers.jsonl"):
        file.unlink()
    command = [sys.executable, "-m", "experiments.report", str(folder)]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {folder}/report.html" in done.stdout
    assert "+0.0160" in done.stdout and "± 0.0025 *" in done.stdout


def test_its_parts_are_plain_sweeps(folder):
    assert read_sweep(folder / "trunks").problems == []
    part = read_sweep(folder / "branches" / "none" / "seed2")
    assert part.seeds == [2000, 2001] and part.problems == []
    report.main([str(folder / "trunks")])
    assert (folder / "trunks" / "report.html").is_file()


def test_another_baseline_turns_the_signs(folder):
    rows = branched_table(report.read_branched(folder, "bias_sign")).rows
    assert rows[0][4] == "-0.0160 ± 0.0025 *"
    assert rows[1][4] == "-"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--baseline=nothing"], "baseline='nothing' must be one of"), (["--figures"], "--figures is for plain sweeps")],
)
def test_bad_flags_are_refused_by_a_sentence(folder, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        report.main([str(folder), *flags])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_folders_that_are_not_what_is_read_are_refused(folder, tmp_path):
    with pytest.raises(SweepError, match="holds a branched sweep; give one of its plain ones, such as"):
        read_sweep(folder)
    with pytest.raises(SweepError, match="must hold a branched sweep; it holds a plain one"):
        report.read_branched(tiny_sweep(tmp_path / "plain", {"none": [1.0]}))
    shutil.rmtree(folder / "branches" / "none" / "seed1")
    with pytest.raises(SweepError, match=r"seed1 must be a folder that holds a sweep"):
        report.read_branched(folder)
    spec = json.loads((folder / "sweep.json").read_text()) | {"parts": []}
    (folder / "sweep.json").write_text(json.dumps(spec))
    with pytest.raises(SweepError, match=r"parts=\[\] must be a list of \[trunk method, trunk seed\]"):
        report.read_branched(folder)


def test_without_a_finished_branch_no_page_is_written(tmp_path):
    folder = branched_sweep(tmp_path, {}, missing=tuple(numbers()))
    with pytest.raises(SweepError, match="at least one finished branch; it has none of 24"):
        report.write_branched(report.read_branched(folder))
    assert not (folder / "report.html").exists()
    assert "not started" in printed(folder)
