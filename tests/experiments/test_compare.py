"""Laws of comparing runs: the same numbers are no difference, and no other difference is missed."""

import json
import shutil

import pytest
from sweeps import branched_sweep

from experiments.compare import compare, main
from experiments.study.archive import collect

ARMS = ("none", "bias_sign")
NUMBERS = {(trunk, k, arm, 1000 * k): 2.0 for trunk in ARMS for k in range(2) for arm in ARMS}
NAMES = sorted(
    [f"arms/branches/{trunk}/seed{k}/{arm}/seed{1000 * k}" for trunk in ARMS for k in range(2) for arm in ARMS]
    + [f"arms/trunks/{trunk}/seed{k}" for trunk in ARMS for k in range(2)]
)


@pytest.fixture
def twice(tmp_path):
    """Two workdirs with the same runs."""
    branched_sweep(tmp_path / "a/arms", NUMBERS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def change(file, **values):
    """Set values of the last line of a log; None removes a key."""
    *lines, last = file.read_text().splitlines()
    line = {key: value for key, value in (json.loads(last) | values).items() if value is not None}
    file.write_text("\n".join([*lines, json.dumps(line)]) + "\n")


def test_the_same_runs_differ_by_nothing(twice, capsys):
    found = compare(*twice)
    assert [one.name for one in found] == NAMES
    assert all(one.steps and one.differences["eval/bits_per_byte"] == 0 for one in found)
    main([*map(str, twice), "--tolerance=0"])
    assert "12 runs in common; the largest relative difference is 0.0e+00" in capsys.readouterr().out


def test_a_difference_at_one_step_of_one_run_is_found(twice, capsys):
    change(twice[1] / NAMES[3] / "metrics.jsonl", **{"eval/bits_per_byte": 2.0 * 1.001})
    differences = {one.name: one.differences["eval/bits_per_byte"] for one in compare(*twice)}
    assert differences.pop(NAMES[3]) == pytest.approx(0.001 / 1.001)
    assert set(differences.values()) == {0}
    with pytest.raises(SystemExit) as ended:
        main([*map(str, twice), "--tolerance=9e-4"])
    assert ended.value.code == 1
    assert "differ by more than --tolerance=0.0009" in capsys.readouterr().err
    main([*map(str, twice), "--tolerance=2e-3"])


@pytest.mark.parametrize("value", [None, "nan"])
def test_a_number_that_only_one_run_has_passes_no_tolerance(twice, value):
    change(twice[0] / NAMES[0] / "metrics.jsonl", **{"eval/bits_per_byte": value})
    with pytest.raises(SystemExit):
        main([*map(str, twice), "--tolerance=1e9"])


def test_a_part_of_the_study_is_compared_with_its_archives(twice, tmp_path):
    collect(twice[0], tmp_path / "results")
    shutil.rmtree(twice[1] / "arms/branches/none/seed1")
    found = compare(tmp_path / "results/arms", twice[1] / "arms")
    assert [one.name for one in found] == [n.removeprefix("arms/") for n in NAMES if "branches/none/seed1" not in n]
    assert max(value for one in found for value in one.differences.values()) < 1e-7


def test_folders_without_a_common_run_are_refused(twice, tmp_path, capsys):
    for first, second in ((twice[0], twice[1] / "arms"), (twice[0], tmp_path / "missing")):
        with pytest.raises(SystemExit):
            main([str(first), str(second)])
        assert "none at the same place" in capsys.readouterr().err
