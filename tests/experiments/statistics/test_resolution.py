"""Components of spread are found again in numbers drawn with them, and so many seeds do resolve a difference."""

import itertools
import math

import numpy as np
import pytest

from experiments.statistics.components import components, spread
from experiments.statistics.intervals import interval
from experiments.statistics.power import needed, power, smallest


def drawn(rng, block, trunk, noise, num_blocks=400, num_seeds=3, trunks="abc"):
    cells = {}
    for seed in range(num_blocks):
        shared = block * rng.normal()
        for method in trunks:
            own = shared + trunk * rng.normal()
            cells[method, seed] = list(own + noise * rng.normal(size=num_seeds) + ord(method))
    return cells


def test_components_are_found_in_numbers_that_were_drawn_with_them():
    found = components(drawn(np.random.default_rng(0), 1.0, 2.0, 3.0))
    # standard errors of about 0.07 (block), 0.09 (trunk), 0.04 (noise)
    assert (found.block, found.trunk, found.noise) == pytest.approx((1.0, 2.0, 3.0), abs=0.25)
    assert found.of_blocks.sd == pytest.approx(math.sqrt(1 + 4 / 3 + 9 / 9), rel=0.1)
    assert (found.num_trunks, found.num_seeds, found.of_blocks.n) == (3, 3, 400)


def test_the_spread_with_other_data_seeds_is_that_of_a_sweep_that_has_them():
    few, many = (components(drawn(np.random.default_rng(1), 1.0, 1.0, 4.0, 800, n)) for n in (2, 8))
    assert few.with_seeds(8) == pytest.approx(many.of_blocks.sd, rel=0.1)
    assert few.with_seeds(2) == few.of_blocks.sd
    assert few.of_blocks.sd > 1.3 * many.of_blocks.sd


def test_by_hand_two_blocks_of_one_method():
    found = components({("a", 0): [1.0, 3.0], ("a", 1): [5.0, 7.0]})
    # block means 2 and 6: variance 8; within: variance 2, of a mean of two 1
    assert found.of_blocks.sd == pytest.approx(math.sqrt(8))
    assert found.noise == pytest.approx(math.sqrt(2))
    assert found.block == pytest.approx(math.sqrt(7))
    assert math.isnan(found.trunk)
    assert found.with_seeds(1) == pytest.approx(3.0)  # 7 + 2


def test_what_the_runs_do_not_determine_is_not_a_number():
    one_seed = components({("a", 0): [1.0], ("b", 0): [2.0], ("a", 1): [3.0], ("b", 1): [0.0]})
    assert math.isnan(one_seed.noise) and math.isnan(one_seed.with_seeds(2))
    assert math.isfinite(one_seed.trunk)
    one_block = components({("a", 0): [1.0, 2.0]})
    assert math.isnan(one_block.of_blocks.sd) and one_block.noise == pytest.approx(math.sqrt(0.5))
    assert math.isnan(components({}).of_blocks.sd)
    assert math.isnan(spread([1.0]).sd)


def test_more_data_seeds_never_need_a_larger_spread_even_where_blocks_agree_by_chance():
    found = components({("a", 0): [0.0, 10.0], ("a", 1): [1.0, 9.1]})  # block means 5 and 5.05
    assert found.of_blocks.sd < found.with_seeds(2)
    assert found.with_seeds(1) > found.with_seeds(2) > found.with_seeds(8)


def test_a_component_that_would_be_negative_is_zero():
    assert components({("a", 0): [0.0, 10.0], ("a", 1): [1.0, 9.0]}).block == 0.0


def test_blocks_that_lack_a_trunk_method_are_left_out():
    cells = drawn(np.random.default_rng(0), 1.0, 1.0, 1.0, 5)
    del cells["b", 2]
    assert components(cells).of_blocks.n == 4


def test_the_interval_of_a_standard_deviation_contains_it_19_times_of_20():
    rng = np.random.default_rng(0)
    found = [spread(rng.normal(size=4)) for _ in range(1000)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) == pytest.approx(0.95, abs=0.02)


def test_power_is_that_of_published_tables():
    # Cohen 1988: a one-sample t-test with d = 0.5, alpha 0.05 two-sided, power 0.8 needs 34; with d = 0.2, 199
    assert (needed(0.5, 1.0), needed(0.2, 1.0), needed(0.8, 1.0)) == (34, 199, 15)
    assert needed(-0.005, 0.01) == 34
    assert power(34, 0.5, 1.0) == pytest.approx(0.808, abs=0.001)


def test_the_needed_seeds_resolve_the_difference_in_8_of_10_sweeps():
    n = needed(1.0, 0.9)
    rng = np.random.default_rng(0)
    hits = np.mean([interval(1.0 + 0.9 * rng.normal(size=n)).excludes_zero for _ in range(1000)])
    assert 0.77 < hits < 0.90  # a whole number of seeds has at least 0.8
    assert power(n - 1, 1.0, 0.9) < 0.8 <= power(n, 1.0, 0.9)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_power_grows_with_the_difference(n):
    found = [power(n, size, 1.0) for size in np.linspace(0, 70 / math.sqrt(n), 100)]
    assert found[0] == pytest.approx(0.05, abs=1e-6)
    assert all(after >= before for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_smallest_resolved_difference_has_the_power_it_is_defined_by(n):
    assert power(n, smallest(n, 0.01), 0.01) == pytest.approx(0.8, abs=1e-6)


def test_no_number_is_given_where_there_is_none():
    assert needed(1e-9, 1.0) is None
    assert needed(0.1, math.nan) is None
    assert needed(0.1, 0.0) == 2
    assert needed(1e6, 1.0) == 2
    assert math.isnan(smallest(1, 0.1)) and math.isnan(smallest(3, math.nan))
    assert smallest(3, 0.0) == 0.0
