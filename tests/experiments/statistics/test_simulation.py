"""Every interval that reports offer contains the true value as often as it says; those that do not are not offered."""

import math

import numpy as np
import pytest

from experiments.statistics.alternatives import bootstrap, ends, every_pair
from experiments.statistics.blocks import effect, effect_on, favour, switching_cost
from experiments.statistics.intervals import interval
from experiments.statistics.simulation import (
    ARM,
    BASELINE,
    OFFERED,
    SCENARIOS,
    TRUTH,
    Scenario,
    draw,
    honesty,
    main,
)

ROUNDS = 400
ERROR = 3 * math.sqrt(0.95 * 0.05 / ROUNDS)  # three standard errors: 0.033
HONEST = ["3 trunk seeds x 2 data seeds", "5 x 3, one branch of 10 missing", "5 x 2, data orders suit arms"]


@pytest.mark.parametrize("name", HONEST)
def test_offered_intervals_contain_the_truth_as_often_as_they_say(name):
    for quantity, found in honesty(SCENARIOS[name], OFFERED, TRUTH, ROUNDS).items():
        assert found.coverage >= 0.95 - ERROR, quantity


def test_without_random_parts_every_quantity_is_its_true_value():
    quiet = Scenario(seed=0, trunk=0, suits=0, block=0, data=0, noise=0)
    values = draw(quiet, np.random.default_rng(0))
    found = {
        "effect": effect(values, ARM, BASELINE),
        "effect on one trunk": effect_on(values, ARM, BASELINE, BASELINE),
        "favour": favour(values, ARM, BASELINE),
        "switching cost": switching_cost(values, ARM),
    }
    assert found.keys() == OFFERED.keys() == TRUTH.keys()
    for name, blocks in found.items():
        assert list(blocks.blocks.values()) == pytest.approx([TRUTH[name]] * 5, abs=1e-12), name


def test_intervals_that_take_branches_of_a_trunk_for_independent_or_resample_few_blocks_are_too_narrow():
    other = {
        "every pair": lambda v: every_pair(v, ARM, BASELINE, np.random.default_rng(0)),
        "bootstrap": lambda v: bootstrap(v, ARM, BASELINE, np.random.default_rng(0)),
    }
    truth = dict.fromkeys(other, TRUTH["effect"])
    suits = Scenario(trunk_seeds=3, suits=0.006, block=0.004)
    for name, found in honesty(suits, other, truth, ROUNDS).items():
        assert found.coverage < 0.95 - ERROR, name


def test_blocks_that_share_data_seeds_are_not_independent():
    found = honesty(SCENARIOS["5 x 2, the same for all trunk seeds"], OFFERED, TRUTH, ROUNDS)
    assert found["effect"].coverage < 0.95 - ERROR


def test_missing_runs_are_missing_and_a_sweep_has_every_other_branch():
    whole = draw(Scenario(), np.random.default_rng(0))
    assert len(whole) == 3 * 5 * 3 * 2
    some = draw(Scenario(missing=0.1), np.random.default_rng(0))
    assert some.keys() < whole.keys()


def test_an_interval_without_a_half_width_has_infinite_ends():
    assert ends(interval([1.0])) == (-math.inf, math.inf)


def test_the_command_prints_a_row_for_every_scenario(capsys):
    main(["--rounds=2"])
    main(["--rounds=2", "--alternatives"])
    out = capsys.readouterr().out
    assert all(out.count(f"| {name} |") == 2 for name in SCENARIOS)
    assert "hierarchical bootstrap" in out
