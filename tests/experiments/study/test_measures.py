"""Laws of the study's measures: each by numbers that are computed by hand, and what is missing is named."""

import json
import math
from dataclasses import replace

import pytest
from studies import AT, CONFIG, TRUNKS, Arm, line, main_sweep, plain_table, write_ablation
from sweeps import write_run

from experiments.report import read_branched, read_sweep
from experiments.report.numbers import last, tail
from experiments.study import measures as m
from experiments.study.measures import BALANCE, QUALITY, Found
from experiments.study.model_claims import removed

BITS = last(QUALITY)
ARMS = {
    "bias": Arm(0.0, 0.2),
    "aux_1e-2": Arm(0.01, 0.4, 0.05),
    "none": Arm(0.03, 1.6),
    "frozen": Arm(0.02, 0.3),
}


def branched(folder, arms=ARMS, **kwargs):
    return {"arms": read_branched(main_sweep(folder, arms, **kwargs))}


def rewrite(run, key, *values):
    """Put a logged value into the last lines of a run."""
    path = run.directory / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for row, value in zip(lines[-len(values) :], values, strict=True):
        row[key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))


def run_of(tables, trunk, seed, arm):
    return next(r for b, r in tables["arms"].runs.items() if (b.trunk, b.trunk_seed, b.arm) == (trunk, seed, arm))


# --- one branched table -----------------------------------------------------------------------------------


def test_a_level_is_the_mean_over_both_trunk_methods_by_block(tmp_path):
    found = m.level("arms", "none", BITS)(branched(tmp_path))
    # trunks at 2.8 + seed and 2.9 + seed, the arm 0.03 above, and 1e-5 more in block 1
    assert found.blocks == pytest.approx({0: 2.88, 1: 3.88001})
    assert found.planned == 2 and not found.missing
    assert sorted(run.parent.parent.name for run in found.runs) == ["seed0", "seed0", "seed1", "seed1"]


def test_a_level_on_the_trunks_of_one_method_reads_no_others(tmp_path):
    found = m.level("arms", "none", BITS, "aux_1e-2")(branched(tmp_path))
    assert found.blocks == pytest.approx({0: 2.93, 1: 3.93001})
    assert all("branches/aux_1e-2/" in run.as_posix() for run in found.runs) and len(found.runs) == 2


def test_data_seeds_are_averaged_within_their_trunk(tmp_path):
    found = m.level("arms", "bias", BITS)(branched(tmp_path, data_seeds=(0, 1)))
    assert found.blocks == pytest.approx({0: 2.855, 1: 3.855})  # the second data seed has 0.01 more


def test_an_effect_is_arm_minus_baseline_of_the_same_trunk(tmp_path):
    tables = branched(tmp_path)
    found = m.effect("arms", "none", "aux_1e-2", BITS)(tables)
    assert found.blocks == pytest.approx({0: 0.02, 1: 0.02})
    assert len(found.runs) == 8 == len(set(found.runs))
    assert m.effect("arms", "aux_1e-2", "none", BITS)(tables).blocks == pytest.approx({0: -0.02, 1: -0.02})


def test_an_effect_on_one_trunk_method_has_its_runs_only(tmp_path):
    tables = branched(tmp_path)
    rewrite(run_of(tables, "bias", 0, "none"), QUALITY, 2.9)
    found = m.effect("arms", "none", "bias", BITS, "bias")({"arms": read_branched(tmp_path / "arms")})
    assert found.blocks == pytest.approx({0: 0.1, 1: 0.03001})
    assert len(found.runs) == 4 and all("branches/bias/" in run.as_posix() for run in found.runs)


def test_the_favour_is_own_trunks_minus_others(tmp_path):
    tables = branched(tmp_path)
    for seed in (0, 1):
        rewrite(run_of(tables, "bias", seed, "bias"), QUALITY, 2.8 + seed - 0.004)
    found = m.favour("arms", "bias", "aux_1e-2", BITS)({"arms": read_branched(tmp_path / "arms")})
    # on its own trunks -0.014, on the others -0.01
    assert found.blocks == pytest.approx({0: -0.004, 1: -0.004})
    assert len(found.runs) == 8


def test_a_logarithm_makes_differences_ratios_and_has_none_of_zero(tmp_path):
    tables = branched(tmp_path, ARMS | {"forced": Arm(0.0, 0.0)})
    assert m.effect("arms", "none", "bias", m.log(last(BALANCE)))(tables).blocks == pytest.approx(
        {0: math.log(8), 1: math.log(8)}
    )
    found = m.effect("arms", "forced", "bias", m.log(last(BALANCE)))(tables)
    assert not found.blocks and found.missing.startswith("arms: no trunk seed has")


def test_the_tail_is_the_mean_of_the_last_quarter_of_lines(tmp_path):
    tables = branched(tmp_path)
    run = run_of(tables, "bias", 0, "none")
    rewrite(run, "x", 1.0, 2.0, 5.0, 7.0)
    again = run_of({"arms": read_branched(tmp_path / "arms")}, "bias", 0, "none")
    assert tail("x")(again) == 7.0  # one of four lines
    assert math.isnan(tail("nothing")(again))


# --- what is not finished ---------------------------------------------------------------------------------


def test_a_block_that_lacks_a_trunk_method_is_left_out_with_its_runs(tmp_path):
    tables = branched(tmp_path, missing=[("aux_1e-2", 1, "none")])
    for found in (m.level("arms", "none", BITS)(tables), m.effect("arms", "none", "bias", BITS)(tables)):
        assert list(found.blocks) == [0] and found.planned == 2
        assert not any("/seed1/none" in run.as_posix() for run in found.runs)


def test_trunks_of_one_method_are_no_mean_over_both(tmp_path):
    lacking = [("aux_1e-2", seed, arm) for seed in (0, 1) for arm in ARMS]
    tables = branched(tmp_path, missing=lacking)
    for measure in (
        m.level("arms", "none", BITS),
        m.effect("arms", "none", "bias", BITS),
        m.favour("arms", "bias", "none", BITS),
    ):
        found = measure(tables)
        assert not found.blocks and found.planned == 2
        assert "on the trunks of every method" in found.missing
    assert list(m.effect("arms", "none", "bias", BITS, "bias")(tables).blocks) == [0, 1]


def test_a_favour_needs_the_trunks_of_every_planned_method(tmp_path):
    sweep = branched(tmp_path)["arms"]
    favour = m.favour("arms", "bias", "aux_1e-2", BITS)
    assert favour({"arms": sweep}).blocks
    third = replace(sweep, trunks=replace(sweep.trunks, arms=[*sweep.trunks.arms, "none"]))
    assert not favour({"arms": third}).blocks


def test_runs_without_a_pair_are_not_among_those_of_an_effect(tmp_path):
    tables = branched(tmp_path, data_seeds=(0, 1))
    lost = run_of(tables, "bias", 0, "bias").directory
    (lost / "metrics.jsonl").unlink()
    found = m.effect("arms", "none", "bias", BITS)({"arms": read_branched(tmp_path / "arms")})
    assert found.blocks == pytest.approx({0: 0.03, 1: 0.03001})
    assert len(found.runs) == 2 * 8 - 2  # neither the lost run nor its partner


def test_missing_runs_are_named(tmp_path):
    lacking = [(trunk, seed, "none") for trunk in TRUNKS for seed in (0, 1)]
    tables = branched(tmp_path, missing=lacking)
    effect = m.effect("arms", "none", "bias", BITS)
    assert effect(tables).missing == "arms: no finished run of none"
    assert effect({}).missing == "arms: no finished run of none and bias"
    assert effect({}).planned == 0 and effect(tables).planned == 2
    assert m.level("gates", "bias", BITS)(tables).missing == "gates: no finished run of bias"


# --- controls ---------------------------------------------------------------------------------------------


def test_unequal_counts_branches_that_differ_in_any_digit(tmp_path):
    same = ARMS | {"frozen": ARMS["none"]}
    tables = branched(tmp_path, same)
    measure = m.unequal("arms", "frozen", "none", ["aux_1e-2"])
    assert measure(tables).blocks == {0: 0.0, 1: 0.0}
    assert len(measure(tables).runs) == 4
    rewrite(run_of(tables, "aux_1e-2", 1, "frozen"), BALANCE, 1.6 + 1e-15)
    rewrite(run_of(tables, "bias", 0, "frozen"), BALANCE, 9.0)  # another trunk
    assert measure({"arms": read_branched(tmp_path / "arms")}).blocks == {0: 0.0, 1: 1.0}


def test_unequal_ignores_a_measure_that_one_of_them_does_not_have(tmp_path):
    tables = branched(tmp_path, ARMS | {"frozen": ARMS["none"]})
    for seed in (0, 1):
        rewrite(run_of(tables, "aux_1e-2", seed, "frozen"), "eval/bias_changed", 0.0)
    found = m.unequal("arms", "frozen", "none", ["aux_1e-2"])({"arms": read_branched(tmp_path / "arms")})
    assert found.blocks == {0: 0.0, 1: 0.0}


# --- several measures -------------------------------------------------------------------------------------


def fixed(blocks, *runs, missing="", planned=3):
    return lambda _: Found(blocks, runs, missing, planned)


def test_minus_is_taken_block_by_block_where_both_have_one():
    found = m.minus(fixed({0: 5.0, 1: 7.0, 2: 9.0}, "a", "b"), fixed({1: 1.0, 2: 4.0}, "b", "c"))({})
    assert found == Found({1: 6.0, 2: 5.0}, ["a", "b", "c"], "", 3)


@pytest.mark.parametrize("order", [1, -1])
def test_minus_says_what_is_missing(order):
    pair = (fixed({0: 1.0}), fixed({}, missing="gates: no finished run of x"))[::order]
    assert m.minus(*pair)({}).missing == "gates: no finished run of x"
    assert m.minus(fixed({0: 1.0}), fixed({1: 1.0}))({}).missing == "no block has all of the numbers"


def test_rank_correlation_is_of_arms_within_each_block():
    first = {arm: fixed({0: x, 1: x}, "a") for arm, x in zip("pqr", (1.0, 2.0, 3.0), strict=True)}
    second = {"p": fixed({0: 10.0, 1: 30.0}, "b"), "q": fixed({0: 20.0, 1: 20.0}), "r": fixed({0: 90.0, 1: 25.0})}
    found = m.rank_correlation(first, second)({})
    # block 0 in the same order; block 1: ranks 3, 1, 2 against 1, 2, 3: 1 - 6 (4 + 1 + 1) / (3 * 8)
    assert found.blocks == pytest.approx({0: 1.0, 1: -0.5})
    assert found.runs == ["a", "b"]


def test_rank_correlation_needs_an_order_and_all_arms():
    equal = {arm: fixed({0: 1.0}) for arm in "pq"}
    order = {"p": fixed({0: 1.0}), "q": fixed({0: 2.0})}
    assert not m.rank_correlation(equal, order)({}).blocks
    lacking = order | {"q": fixed({}, missing="no q")}
    assert m.rank_correlation(order, lacking)({}).missing == "no q"


def test_a_constant_has_the_blocks_and_the_gaps_of_another_measure():
    assert m.constant(4.0, fixed({0: 1.0, 2: 3.0}, "a"))({}) == Found({0: 4.0, 2: 4.0}, ("a",), "", 3)
    assert m.constant(4.0, fixed({}, missing="none"))({}).missing == "none"


# --- files and plain tables -------------------------------------------------------------------------------


def test_experts_taken_away_are_read_from_the_trunks(tmp_path):
    tables = branched(tmp_path)
    measure = m.minus(removed("without shared"), removed("without the best 1"))
    assert measure(tables).missing == "arms: no finished run of bias has ablation.json with this number"
    write_ablation(tmp_path / "arms/trunks/bias/seed1", 2.0, 2.75, 2.5)
    found = measure(tables)
    assert found.blocks == {1: 0.25} and found.planned == 2
    assert found.runs == [tmp_path / "arms/trunks/bias/seed1"]


def test_a_number_of_a_file_that_is_not_finite_is_none(tmp_path):
    tables = branched(tmp_path)
    write_ablation(tmp_path / "arms/trunks/bias/seed0", 2.0, math.nan, 2.5)
    assert not removed("without shared")(tables).blocks
    (tmp_path / "arms/trunks/bias/seed0/ablation.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        removed("without shared")(tables)


def test_a_plain_table_is_paired_by_seed(tmp_path):
    folder = plain_table(tmp_path, "gates", {"a": Arm(0.0), "b": Arm(0.02)})
    write_run(folder / "b" / "seed7", [line(AT, Arm(), 1.0)], [], CONFIG)  # not in the plan
    tables = {"gates": read_sweep(folder)}
    found = m.effect("gates", "b", "a", BITS)(tables)
    assert found.blocks == pytest.approx({0: 0.02, 1: 0.02, 2: 0.02}) and found.planned == 3
    assert len(found.runs) == 6
    assert m.level("gates", "b", BITS)(tables).blocks == pytest.approx({0: 2.82, 1: 3.82, 2: 4.82})
    (folder / "a/seed1/metrics.jsonl").unlink()
    found = m.effect("gates", "b", "a", BITS)({"gates": read_sweep(folder)})
    assert list(found.blocks) == [0, 2] and len(found.runs) == 4


def test_the_interval_is_over_the_blocks():
    # mean 2, sd 1, t(0.975, 2) = 4.303
    found = Found({0: 1.0, 1: 2.0, 2: 3.0})
    assert found.interval.mean == 2.0 and found.interval.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert Found({0: 1.0}).interval.half is None
