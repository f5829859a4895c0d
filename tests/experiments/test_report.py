"""Laws of the report: numbers equal those computed by hand, and nothing is hidden."""

import json
import math
import re
from pathlib import Path

import pytest
from sweeps import (
    ARMS_CONFIG,
    CONFIG,
    keep_account,
    simulated_sweep,
    tiny_metrics,
    tiny_sweep,
    write_run,
    write_sweep,
)

from experiments.report.answer import answer, remarks
from experiments.report.columns import COLUMNS, QUALITY, Column, domain_table, main_table, measure, time_table
from experiments.report.experts import shown_layers
from experiments.report.figures import chance_levels
from experiments.report.numbers import last, layer_arrays
from experiments.report.settings import arm_settings, changed_settings
from experiments.report.sweep import SweepError, by_step, planned_steps, read_sweep
from experiments.statistics.intervals import Interval, interval, paired

# --- intervals and readers ------------------------------------------------------------------------------


def test_interval_is_the_t_interval_of_the_mean() -> None:
    found = interval([1.0, 1.2, 1.4])  # sd 0.2, /sqrt(3), times t(0.975, 2) = 4.30265
    assert (found.mean, found.half, found.n) == (pytest.approx(1.2), pytest.approx(0.496828, abs=1e-5), 3)


def test_interval_of_one_value_has_no_width_and_of_none_no_mean() -> None:
    assert interval([2.0, math.nan]) == Interval(2.0, None, 1)
    assert not interval([2.0]).excludes_zero
    assert interval([]).n == 0


def test_pairs_only_where_both_have_the_seed() -> None:
    found = paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.7, 3: 0.0})  # differences 0.5 and 0.3
    assert (found.mean, found.n) == (pytest.approx(0.4), 2)


def test_equal_arms_are_not_distinguishable() -> None:
    assert not paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).excludes_zero


def test_lines_keep_the_last_of_a_step_and_leave_out_a_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5}\n{"step": 0, "loss": 9}\n{"step": 1, "loss": null}\n{"step": 2,')
    assert by_step(path) == ([{"step": 0, "loss": 9}, {"step": 1, "loss": None}], 1)


def test_missing_layers_are_no_arrays(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0]}))
    run = sweep.runs["none"][0]
    assert layer_arrays(run)[1].shape == (4, 2, 3)
    (run.directory / "layers.jsonl").unlink()
    assert layer_arrays(run) is None


def test_arm_settings_are_the_differences_only(tmp_path: Path) -> None:
    write_sweep(tmp_path, list(ARMS_CONFIG), [0])
    sweep = read_sweep(tmp_path)
    assert arm_settings(sweep, "none") == {}
    assert arm_settings(sweep, "aux_loss") == {"balance.aux_loss.weight": 0.02}
    assert arm_settings(sweep, "dense") == {"model.num_experts": 0}  # embed_dim is as in the base config


def test_settings_at_their_defaults_are_left_out(tmp_path: Path) -> None:
    options = {"weight": 0.5, "warmup_steps": 0, "layers": []}
    config = {"num_steps": 7, "seed": 0, "balance": {"aux_loss": options, "z": {"method": "bias_sign", "rate": 0.001}}}
    write_sweep(tmp_path, ["none", "plain"], [0], config=config, arms_config={"plain": {"balance.bias_sign.ema": 0.0}})
    sweep = read_sweep(tmp_path)
    changed = [
        ("num_steps", "7", "1000"),
        ("balance.aux_loss.weight", "0.5", "-"),
        ("balance.z.method", "bias_sign", "-"),
    ]
    assert changed_settings(sweep) == changed
    assert arm_settings(sweep, "plain") == {"balance.bias_sign": "defaults"}


def test_the_level_of_chance_is_the_one_that_runs_logged(tmp_path: Path) -> None:
    sweep = read_sweep(simulated_sweep(tmp_path, ["none", "bias_sign", "dense"], [0], every=200))
    assert chance_levels(sweep, sweep.arms) == [0.08]


def test_more_layers_than_fit_are_spread_with_both_ends() -> None:
    assert shown_layers(3) == [0, 1, 2]
    assert shown_layers(15) == [0, 2, 4, 6, 8, 10, 12, 14]


# --- a sweep in numbers ---------------------------------------------------------------------------------


def test_table_equals_numbers_computed_by_hand(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0, 1.2, 1.4], "aux_loss": [0.9, 1.0, 1.1]}))
    headers, rows = main_table(sweep, COLUMNS, "page")
    assert headers[:4] == ["arm", "seeds", "bits per byte, held out", "max violation, held out"]
    # differences -0.1, -0.2, -0.3: mean -0.2, half 0.1 / sqrt(3) * 4.30265 = 0.2484, so 0 is inside
    # dead at the end: the last quarter of 4 rows is the last row, with 2 of 6 experts at zero
    even = ["1.000 ± 0.000", "2.000 ± 0.000", "1.500 ± 0.000", "2.0 ± 0.0", "1.0 ± 0.0", "1.500 ± 0.000"]
    assert rows[0] == ["none", "3", "1.2000 ± 0.4968", *even, "1,375"]
    half = ["0.500 ± 0.000\n-0.500 ± 0.000 *", "1.000 ± 0.000\n-1.000 ± 0.000 *", "0.750 ± 0.000\n-0.750 ± 0.000 *"]
    same = ["2.0 ± 0.0\n+0.0 ± 0.0", "1.0 ± 0.0\n+0.0 ± 0.0", "1.500 ± 0.000\n+0.000 ± 0.000"]
    assert rows[1] == ["aux_loss", "3", "1.0000 ± 0.2484\n-0.2000 ± 0.2484", *half, *same, "1,375"]


def test_a_column_is_shown_where_its_row_says(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0]}))
    columns = [Column("loss at the end", 1, last("loss"), ("terminal",))]
    assert main_table(sweep, columns, "terminal") == (["arm", "seeds", "loss at the end"], [["none", "1", "3.0 ± n/a"]])
    assert main_table(sweep, columns, "page").headers == ["arm", "seeds"]
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)


def test_dense_arm_shows_dashes(tmp_path: Path) -> None:
    sweep = read_sweep(simulated_sweep(tmp_path, ["none", "dense"], [0, 1], every=100))
    row = main_table(sweep, COLUMNS, "page").rows[1]
    assert row[0] == "dense" and row[3:9] == ["-"] * 6
    assert "no value for dense" in answer(sweep)["Balance"]


def test_the_time_of_an_arms_runs_is_added_up_and_shared_out(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, {"none": [1.0, 1.2], "aux_loss": [0.9, 1.0], "old": [1.0, 1.0]})
    keep_account(
        sweep / "none" / "seed0", 10.0, init=6, compile=12, data=3, step=33, evaluation=3, checkpoint=2, lost=1
    )
    keep_account(sweep / "none" / "seed1", 30.0, init=6, compile=0, data=3, step=51, lost=0)
    keep_account(sweep / "aux_loss" / "seed0", 2048.0, mfu=0.4, step=30)
    headers, rows = time_table(read_sweep(sweep), COLUMNS)
    kinds = ["init", "compile", "data", "step", "evaluation", "checkpoint", "rolled_back", "lost"]
    assert headers == ["arm", "minutes", *kinds, "data wait", "GFLOP/s", "MFU, %"]
    # 120 s: 12 init, 12 compile, 6 data, 84 step, 3 evaluation, 2 checkpoint, 1 lost; data 6 of 90
    shares = ["10.0%", "10.0%", "5.0%", "70.0%", "2.5%", "1.7%", "0.0%", "0.8%"]
    assert rows[0] == ["none", "2.0", *shares, "6.67%", "20.0", "-"]
    assert rows[1] == ["aux_loss", "0.5", *["0.0%"] * 3, "100.0%", *["0.0%"] * 4, "0.00%", "2,048.0", "40.0"]
    assert len(rows) == 2  # the third arm's runs are older than the account


def test_domains_are_paired_too(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0, 1.2], "aux_loss": [0.9, 1.1]}))
    headers, rows = domain_table(sweep)
    assert headers == ["arm", "prose"]
    assert rows[1] == ["aux_loss", "0.9000 ± 1.2706\n-0.1000 ± 0.0000 *"]


def test_the_answer_agrees_with_the_intervals(tmp_path: Path) -> None:
    bits = {"none": [1.0, 1.2, 1.4], "aux_loss": [0.9, 1.0, 1.1], "worse": [1.1, 1.3, 1.5]}
    sweep = read_sweep(tiny_sweep(tmp_path, bits))
    balance, quality, certainty = answer(sweep).values()
    assert "lower than none: aux_loss (0.500, difference -0.500 ± 0.000) and worse" in balance
    assert "not distinguishable from none: aux_loss (1.0000, difference -0.2000 ± 0.2484)" in quality
    assert "higher than none: worse (1.3000, difference +0.1000 ± 0.0000)" in quality
    assert quality.endswith("No arm is shown to be better than none.")
    assert "over 3 seeds" in certainty and "95 % t-interval" in certainty


def test_one_seed_has_no_interval_and_no_claim(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0], "aux_loss": [0.5]}))
    _, quality, certainty = answer(sweep).values()
    assert "one seed, so no interval, for aux_loss" in quality
    assert "lower than" not in quality and "One seed has no interval (n/a)" in certainty
    assert main_table(sweep, COLUMNS, "page").rows[1][2] == "0.5000 ± n/a\n-0.5000 ± n/a"


def test_baseline_can_be_another_arm(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.1], "aux_loss": [0.9, 1.0]})
    found = measure(read_sweep(tmp_path, baseline="aux_loss"), QUALITY)
    assert found["none"].difference.mean == pytest.approx(0.1)
    assert found["aux_loss"].difference.n == 0


def test_missing_seed_is_named_and_its_pair_left_out(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0, 1.2, 1.4], "aux_loss": [0.9, 1.0]}))
    assert remarks(sweep) == ["aux_loss, seed 2: not started (no metrics)."]
    none, aux = measure(sweep, QUALITY).values()
    assert (none.value.n, aux.value.n, aux.difference.n) == (3, 2, 2)


def test_unfinished_diverged_and_stray_runs_are_named(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.0, 1.0], "aux_loss": [0.9]})
    write_run(tmp_path / "aux_loss/seed1", tiny_metrics(1.0, 1.0, (0, 100, 200)), [])
    diverged = tiny_metrics(1.0, 1.0)
    diverged[-1]["eval/bits_per_byte"] = None
    write_run(tmp_path / "aux_loss/seed2", diverged, [])
    write_run(tmp_path / "other/seed0", tiny_metrics(1.0, 1.0), [])
    sweep = read_sweep(tmp_path)
    assert list(sweep.runs["aux_loss"]) == [0]
    assert remarks(sweep) == [
        "aux_loss, seed 1: unfinished (step 200 of 1000).",
        "aux_loss, seed 2: diverged (the evaluation at step 999 is not finite); left out of every mean.",
        "other/seed0 is not listed in sweep.json and was not read.",
    ]


def test_runs_of_unequal_lengths_are_finished_at_their_own_ends_and_are_compared(tmp_path: Path) -> None:
    write_sweep(tmp_path, ["wide", "narrow"], [0, 1])
    for arm, num_steps in {"wide": 4, "narrow": 8}.items():
        for seed in (0, 1):
            metrics = tiny_metrics(1.0 if arm == "wide" else 0.9, 1.0, (0, num_steps - 1))
            write_run(tmp_path / arm / f"seed{seed}", metrics, [], CONFIG | {"num_steps": num_steps})
    sweep = read_sweep(tmp_path)
    assert remarks(sweep) == [
        "The arms plan different numbers of steps (wide 4, narrow 8); each is compared at its own end."
    ]
    narrow = measure(sweep, QUALITY)["narrow"]
    assert (narrow.difference.n, round(narrow.difference.mean, 6)) == (2, -0.1)


def test_a_run_whose_last_line_is_an_earlier_evaluation_is_unfinished(tmp_path: Path) -> None:
    # 900 + the 300 between two lines is beyond 1000, but the last evaluation is that of step 899
    write_sweep(tmp_path, ["none"], [0])
    write_run(tmp_path / "none/seed0", tiny_metrics(1.0, 1.0, (0, 299, 599, 899)), [])
    assert remarks(read_sweep(tmp_path)) == ["none, seed 0: unfinished (step 899 of 1000)."]


def test_a_run_that_noted_its_divergence_is_called_diverged(tmp_path: Path) -> None:
    write_sweep(tmp_path, ["none"], [0])
    write_run(tmp_path / "none/seed0", tiny_metrics(1.0, 1.0, (0, 8)), [])
    (tmp_path / "none/seed0/run.json").write_text('{"diverged": "step 8: the loss was not finite; lower something."}')
    expected = ["none, seed 0: diverged (step 8: the loss was not finite); left out of every mean."]
    assert remarks(read_sweep(tmp_path)) == expected


def test_unfinished_is_seen_without_a_step_count(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_steps"}
    assert planned_steps(CONFIG) == 1000 and planned_steps(config) is None
    write_sweep(tmp_path, ["none", "aux_loss"], [0], config=config)
    write_run(tmp_path / "none/seed0", tiny_metrics(1.0, 1.0), [], config)
    write_run(tmp_path / "aux_loss/seed0", tiny_metrics(1.0, 1.0, (0, 250)), [], config)
    expected = ["aux_loss, seed 0: unfinished (step 250 of 1000)."]
    assert remarks(read_sweep(tmp_path)) == expected


def test_skipped_steps_and_partial_lines_are_reported(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0]})
    path = tmp_path / "none/seed0/metrics.jsonl"
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 2') + '{"step": 751, "lo')
    assert remarks(read_sweep(tmp_path)) == [
        "none, seed 0: 1 unreadable line was left out.",
        "none, seed 0: 2 steps skipped, because loss, gradient or update was not finite.",
    ]


def test_what_a_guard_skipped_and_went_back_from_is_reported(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0]})
    path = tmp_path / "none/seed0/metrics.jsonl"
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 2, "outliers": 2'))
    back = {"first": 12, "at": 15, "to": 10, "offset": 5}
    (path.parent / "run.json").write_text(json.dumps({"rollbacks": [back]}))
    assert remarks(read_sweep(tmp_path)) == [
        "none, seed 0: 2 steps skipped, because loss or gradient was an outlier.",
        "none, seed 0: went back from step 15 to 10, and on with other batches.",
    ]


# --- folders that are no sweep ----------------------------------------------------------------------------


def test_runs_that_read_different_data_are_named(tmp_path: Path) -> None:
    folder = tiny_sweep(tmp_path, {"none": [2.0, 2.1], "bias": [1.9, 2.0]})
    for arm, seed, corpus in (("none", 0, "aaaa"), ("bias", 0, "bbbb"), ("none", 1, "aaaa"), ("bias", 1, "aaaa")):
        (folder / arm / f"seed{seed}" / "run.json").write_text(json.dumps({"identity": {"corpus": corpus}}))
    problems = read_sweep(folder).problems
    assert problems == ["bias, seed 0: read other data than none; their difference is not due to the arms."]


@pytest.mark.parametrize(
    ("changes", "baseline", "words"),
    [
        ({"arms": []}, None, "arms=[] must be a list with at least one entry"),
        ({"seeds": 3}, None, "seeds=3 must be a list"),
        ({}, "nothing", "baseline='nothing' must be one of the sweep's arms; try one of: none."),
    ],
)
def test_sweep_errors_are_sentences(tmp_path: Path, changes: dict, baseline: str | None, words: str) -> None:
    write_sweep(tmp_path, ["none"], [0], **changes)
    with pytest.raises(SweepError, match=re.escape(words)):
        read_sweep(tmp_path, baseline)


def test_missing_folder_and_missing_sweep_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="does not exist"):
        read_sweep(tmp_path / "nowhere")
    with pytest.raises(SweepError, match=r"must hold sweep\.json"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match="not valid JSON"):
        read_sweep(tmp_path)
