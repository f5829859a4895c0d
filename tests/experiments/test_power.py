"""Laws of `experiments.power`: its numbers are those of the pairs in the folder, and it says what it cannot know."""

import json
import math

import pytest
from sweeps import branched_sweep, tiny_sweep

from experiments import power
from experiments.report import read_branched, read_sweep
from experiments.statistics.power import needed, smallest

BITS = {"none": [1.0, 1.2, 1.1], "aux": [1.01, 1.23, 1.12], "one": [1.05]}


@pytest.fixture
def plain(tmp_path):
    return tiny_sweep(tmp_path / "plain", BITS)


def branched_numbers(data_seeds=2):
    """Differences 0.01, 0.03 on the trunks of seed 0, and 0.05, 0.07 on those of seed 1 (one trunk method)."""
    return {
        ("none", s, arm, 10 * s + d): 1.0 + s + (arm == "aux") * (0.01 + 0.04 * s + 0.02 * d)
        for s in (0, 1)
        for arm in ("none", "aux")
        for d in range(data_seeds)
    }


def test_every_pair_of_arms_of_a_plain_sweep_has_its_numbers(plain):
    aux, one, other = power.plain_pairs(read_sweep(plain), 0.005)
    assert [(p.arm, p.other, p.n) for p in (aux, one, other)] == [
        ("aux", "none", 3),
        ("one", "none", 1),
        ("one", "aux", 1),
    ]
    assert (aux.difference, aux.sd.sd) == pytest.approx((0.02, 0.01))  # differences 0.01, 0.03, 0.02
    assert aux.parts["run"] == pytest.approx(0.01 / math.sqrt(2))
    assert aux.parts["seed"] == pytest.approx(math.sqrt(0.011))  # covariance: (0.1 x 0.11 + 0.1 x 0.11 + 0) / 2
    assert aux.resolves == pytest.approx(smallest(3, 0.01))
    (design,) = aux.designs
    assert design.seeds == needed(0.005, 0.01) == 34
    assert design.low < 34 < design.high
    assert design.steps == 34 * 3 * 1000
    assert one.designs[0].seeds is None and math.isnan(one.resolves)


def test_the_blocks_of_a_branched_sweep_are_its_trunk_seeds(tmp_path):
    folder = branched_sweep(tmp_path, branched_numbers(), trunks=("none",))
    (pair,) = power.branched_pairs(read_branched(folder), 0.01)
    # block means 0.02 and 0.06: variance 0.0008; within a trunk variance 0.0002
    assert (pair.n, pair.difference, pair.sd.sd) == (2, pytest.approx(0.04), pytest.approx(math.sqrt(0.0008)))
    assert pair.parts["noise"] == pytest.approx(math.sqrt(0.0002))
    assert pair.parts["block"] == pytest.approx(math.sqrt(0.0007))
    assert [d.data_seeds for d in pair.designs] == [1, 2, 4, 8]
    assert [d.seeds for d in pair.designs] == [
        needed(0.01, math.sqrt(variance)) for variance in (0.0009, 0.0008, 0.00075, 0.000725)
    ]
    assert pair.designs[1].steps == pair.designs[1].seeds * (600 + 2 * 2 * 400)  # 1 trunk; 2 arms x 2 data seeds


def test_one_data_seed_says_nothing_of_more(tmp_path):
    folder = branched_sweep(tmp_path, branched_numbers(1), trunks=("none",))
    (pair,) = power.branched_pairs(read_branched(folder), 0.01)
    assert pair.designs[0].seeds is not None
    assert [d.seeds for d in pair.designs[1:]] == [None] * 3
    assert math.isnan(pair.parts["noise"])


def test_the_command_prints_a_table_and_writes_json(plain, tmp_path, capsys):
    power.main([str(plain), "--difference=0.005", f"--json={tmp_path}/power.json"])
    out = capsys.readouterr().out
    assert "aux - none" in out and "seeds for 0.005" in out and "34 (" in out
    assert "cannot be estimated" in out
    found = json.loads((tmp_path / "power.json").read_text())
    assert found["difference"] == 0.005 and found["tokens"] is None and not found["branched"]
    assert found["pairs"][0]["designs"][0]["seeds"] == 34
    assert found["pairs"][1]["resolves"] is None


def test_the_command_reads_a_branched_sweep(tmp_path, capsys):
    folder = branched_sweep(tmp_path / "sweep", branched_numbers(), trunks=("none",))
    power.main([str(folder), f"--json={tmp_path}/power.json"])
    out = capsys.readouterr().out
    assert "trunk seeds x data seeds for 0.001" in " ".join(out.split()) or "x 8" in out
    assert json.loads((tmp_path / "power.json").read_text())["branched"]


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--difference=0", "--difference=0 must be above 0 bits per byte; try 0.001."),
        ("--difference=nan", "--difference=nan must be above 0"),
        ("--json=/nowhere/x.json", "--json=/nowhere/x.json cannot be written"),
    ],
)
def test_bad_flags_are_refused_by_a_sentence(plain, capsys, flag, sentence):
    with pytest.raises(SystemExit) as stop:
        power.main([str(plain), flag])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_sweep_of_one_arm_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        power.main([str(tiny_sweep(tmp_path / "s", {"none": [1.0]}))])
    assert "must have at least two arms to compare; it has none only" in capsys.readouterr().err
