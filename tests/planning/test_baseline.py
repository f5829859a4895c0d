"""A plan that has grown says so in one sentence a figure."""

import copy
import json

import pytest

from moe_jax.planning.baseline import grown, read_baseline
from moe_jax.planning.topology import Topology

V5P = Topology("v5p", (4, 4, 4))
REPORT = {
    "topology": "v5p:4x4x4",
    "mesh": {"data": 16, "expert": 4},
    "remat": "full",
    "dispatch": "rounds",
    "micro_batches": 1,
    "tokens_per_step": 4096,
    "fits": True,
    "bytes_per_chip": {"total": 10 * 2**30},
    "flops_per_step": {"compiled": 1e15},
    "collectives": [{"sent": 2**30}, {"sent": 3 * 2**30}],
    "hbm_traffic_per_chip": 2**40,
    "schedule": {"seconds": 0.5},
}


def changed(**values):
    report = copy.deepcopy(REPORT) | values
    return grown(report, REPORT, 0.02)


def test_equal_plans_have_not_grown():
    assert changed() == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"bytes_per_chip": {"total": 11 * 2**30}},
            "memory grew from 10.00 GiB to 11.00 GiB, by 10.0 %, ",
        ),
        ({"flops_per_step": {"compiled": 1.5e15}}, "FLOPs grew from 1e+15 to 1.5e+15, by 50.0 %, more than 2 %."),
        ({"collectives": [{"sent": 5 * 2**30}]}, "bytes sent to other chips grew from 4.00 GiB to 5.00 GiB, by 25.0 %"),
        ({"hbm_traffic_per_chip": 2**41}, "bytes of memory traffic grew from 1024.00 GiB to 2048.00 GiB, by 100.0 %"),
        ({"schedule": {"seconds": 0.6}}, "scheduled time grew from 500 ms to 600 ms, by 20.0 %, more than 2 %."),
    ],
)
def test_each_figure_that_has_grown_is_one_sentence(values, sentence):
    (found,) = changed(**values)
    assert found.startswith(sentence)


def test_growth_within_the_tolerance_and_savings_are_silent():
    assert changed(flops_per_step={"compiled": 1.019e15}, schedule={"seconds": 0.1}) == []
    assert len(changed(flops_per_step={"compiled": 1.021e15})) == 1


def test_a_step_that_no_longer_fits_has_grown():
    report = {key: value for key, value in REPORT.items() if key != "flops_per_step"}
    assert grown(report | {"fits": False}, REPORT, 0.02) == ["the step does not fit into memory any more."]


@pytest.mark.parametrize(("key", "value"), [("mesh", {"data": 64}), ("remat", "none"), ("tokens_per_step", 1)])
def test_another_step_is_not_compared(key, value):
    with pytest.raises(ValueError, match=f"the baseline has {key.replace('_', ' ')} .* write a baseline of this step"):
        changed(**{key: value})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist; write one with --json=FILE"),
        ("[]", "must hold a JSON object; write one with --json=FILE"),
        ("{", "is not valid JSON"),
        (json.dumps({"topology": "v5p:4x4x4"}), "is not the report of a plan that fits"),
        (json.dumps(REPORT | {"topology": "cpu:8"}), "is for cpu:8, not for v5p:4x4x4"),
    ],
)
def test_a_wrong_baseline_is_one_sentence(content, sentence, tmp_path):
    file = tmp_path / "baseline.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_baseline(file, V5P)
    assert str(error.value).startswith(f"--baseline={file}")
    assert "\n" not in str(error.value)


def test_a_report_is_a_baseline(tmp_path):
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(REPORT))
    assert read_baseline(file, V5P) == REPORT
