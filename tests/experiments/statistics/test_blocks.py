"""Laws of the effects of branched sweeps: equal to those computed by hand, and unmoved by what cancels."""

import itertools

import numpy as np
import pytest

from experiments.statistics.blocks import (
    Branch,
    effect,
    effect_on,
    favour,
    pairs,
    shared_seeds,
    switching_cost,
)

TRUNKS = ("none", "aux", "bias")


def numbers(of, trunk_seeds=(0, 1), seeds=(0, 1), trunks=TRUNKS, arms=TRUNKS):
    """Branch -> of(branch); the data seeds of trunk seed s are 10 s + d."""
    branches = [Branch(m, s, a, 10 * s + d) for m, s, a, d in itertools.product(trunks, trunk_seeds, arms, seeds)]
    return {branch: float(of(branch)) for branch in branches}


def test_an_effect_is_the_mean_over_trunk_methods_of_paired_differences_block_by_block():
    # on the trunks none, aux, bias the arm bias changes 3, 6, 9; one more with data seed 1; 10 more with trunk seed 1
    added = {"none": 3, "aux": 6, "bias": 9}
    values = numbers(lambda b: (b.arm == "bias") * (added[b.trunk] + b.seed % 10 + 10 * b.trunk_seed))
    found = effect(values, "bias", "none")
    assert found.blocks == {0: 6.5, 1: 16.5}
    assert (found.interval.mean, found.interval.n) == (11.5, 2)
    assert effect_on(values, "bias", "none", "aux").blocks == {0: 6.5, 1: 16.5}
    assert effect_on(values, "bias", "none", "bias").blocks == {0: 9.5, 1: 19.5}


def test_what_a_trunk_and_its_data_seed_share_cancels_in_effects_and_favour():
    rng = np.random.default_rng(0)
    shared = {(m, s, 10 * s + d): rng.normal() for m in TRUNKS for s in (0, 1) for d in (0, 1)}
    values = numbers(lambda b: 2 * (b.arm == "aux") + 100 * shared[b.trunk, b.trunk_seed, b.seed])
    assert list(effect(values, "aux", "none").blocks.values()) == pytest.approx([2, 2], abs=1e-12)
    assert list(favour(values, "aux", "none").blocks.values()) == pytest.approx([0, 0], abs=1e-12)


def test_favour_is_the_difference_on_the_own_trunk_minus_the_mean_of_that_on_the_others():
    added = {"none": 3, "aux": 6, "bias": 9}
    values = numbers(lambda b: (b.arm == "bias") * added[b.trunk])
    assert favour(values, "bias", "none").blocks == {0: 4.5, 1: 4.5}  # 9 - (3 + 6) / 2
    assert favour(values, "none", "none").blocks == {}
    assert favour(numbers(lambda b: 1, trunks=("none", "aux")), "bias", "none").blocks == {}  # has no trunk of its own


def test_a_switching_cost_is_the_same_arm_on_other_trunks_minus_on_its_own():
    level = {"none": 5, "aux": 2, "bias": 1}
    values = numbers(lambda b: level[b.trunk] + 7 * (b.arm == "bias") - 0.5 * (b.trunk == b.arm))
    assert switching_cost(values, "bias").blocks == {0: 3.0, 1: 3.0}  # (5 + 2) / 2 - 1 + 0.5: no arm's own effect
    assert switching_cost(values, "none").blocks == {0: -3.0, 1: -3.0}  # (2 + 1) / 2 - 5 + 0.5


def test_trunk_methods_have_equal_weights_however_many_data_seeds_they_have():
    added = {"none": 3, "aux": 6, "bias": 9}
    values = numbers(lambda b: (b.arm == "bias") * added[b.trunk], seeds=range(4))
    fewer = {b: v for b, v in values.items() if b.trunk != "bias" or b.seed % 10 == 0}
    assert effect(fewer, "bias", "none").blocks == {0: 6.0, 1: 6.0}


def test_a_block_without_a_pair_on_some_trunk_method_is_left_out_and_named():
    values = numbers(lambda b: (b.arm == "bias") * 1.0, trunk_seeds=(0, 1, 2))
    some = {b: v for b, v in values.items() if not (b.trunk == "aux" and b.trunk_seed == 1 and b.arm == "none")}
    found = effect(some, "bias", "none")
    assert (found.blocks, found.left_out) == ({0: 1.0, 2: 1.0}, [1])
    assert effect_on(some, "bias", "none", "bias").left_out == []


def test_only_branches_of_one_trunk_and_data_seed_are_paired():
    values = {Branch("a", 0, "x", 0): 1.0, Branch("a", 0, "y", 1): 2.0, Branch("a", 1, "y", 0): 3.0}
    assert pairs(values, "y", "x") == {}
    assert pairs(values | {Branch("a", 0, "y", 0): 4.0}, "y", "x") == {("a", 0): [3.0]}


def test_shared_data_seeds_are_found():
    values = numbers(lambda b: 0)
    assert shared_seeds(values) == []
    assert shared_seeds([b._replace(seed=b.seed % 10) for b in values]) == [0, 1]
