"""Laws of verdicts: every branch of the rule, and what happens without runs, with one block, and with nan."""

import math

import pytest

from experiments.statistics.intervals import NOTHING, Interval
from experiments.statistics.power import POWER, power
from experiments.study.claims import Claim, Published, Relation, above, all_claims, below, either, within
from experiments.study.measures import Found
from experiments.study.verdicts import decide, judge

# relation, interval's low and high end, verdict
RULES = [
    (above(1.0), 1.5, 2.0, "reproduced"),
    (above(1.0), 1.0, 2.0, "not resolved"),  # 1 itself is not above 1
    (above(1.0), 0.5, 1.5, "not resolved"),
    (above(1.0), 0.0, 0.5, "contradicted"),
    (above(1.0), 0.0, 1.0, "contradicted"),  # no point of it is above 1
    (below(1.0), 0.0, 0.5, "reproduced"),
    (below(1.0), 0.0, 1.0, "not resolved"),
    (below(1.0), 0.5, 1.5, "not resolved"),
    (below(1.0), 1.5, 2.0, "contradicted"),
    (below(1.0), 1.0, 2.0, "contradicted"),
    (below(-1.0), -3.0, -2.0, "reproduced"),
    (within(1.0), -1.0, 1.0, "reproduced"),
    (within(1.0), -0.5, 0.5, "reproduced"),
    (within(1.0), -1.5, 0.5, "not resolved"),
    (within(1.0), -0.5, 1.5, "not resolved"),
    (within(1.0), -2.0, 2.0, "not resolved"),
    (within(1.0), 1.0, 2.0, "not resolved"),  # 1 itself is within
    (within(1.0), 1.5, 2.0, "contradicted"),
    (within(1.0), -2.0, -1.5, "contradicted"),
    (within(0.0), 0.0, 0.0, "reproduced"),
    (within(0.0), 2.0, 2.0, "contradicted"),
    (either(1.0), 1.5, 2.0, "higher"),
    (either(1.0), 0.0, 0.5, "lower"),
    (either(1.0), 0.5, 1.5, "not resolved"),
    (either(1.0), 1.0, 2.0, "not resolved"),
]


@pytest.mark.parametrize(("relation", "low", "high", "verdict"), RULES)
def test_the_verdict_follows_from_the_ends_of_the_interval(relation, low, high, verdict):
    assert decide(Interval((low + high) / 2, (high - low) / 2, 4), relation) == verdict


@pytest.mark.parametrize("relation", [above(), below(), within(), either()])
def test_without_an_interval_nothing_is_resolved(relation):
    assert decide(Interval(5.0, None, 1), relation) == "not resolved"
    assert decide(NOTHING, relation) == "not resolved"


def judged(found, relation=above(1.0)):
    (one,) = judge([Claim("1", "A claim.", Published("a paper"), lambda _: found, relation)], {})
    return one


def test_missing_runs_are_not_measured():
    one = judged(Found(missing="no run of x"))
    assert one.verdict == "not measured" and math.isnan(one.resolution)
    assert one.found.missing == "no run of x"


def test_blocks_that_are_all_nan_are_not_measured():
    assert judged(Found({0: math.nan, 1: math.nan})).verdict == "not measured"


def test_one_block_resolves_nothing():
    one = judged(Found({3: 7.0}))
    assert one.verdict == "not resolved" and math.isnan(one.resolution)
    assert judged(Found({3: 7.0, 4: math.nan})).verdict == "not resolved"


def test_a_nan_among_blocks_is_left_out_of_mean_and_spread():
    with_nan, without = judged(Found({0: 4.0, 1: 5.0, 2: math.nan, 3: 6.0})), judged(Found({0: 4.0, 1: 5.0, 3: 6.0}))
    assert with_nan.resolution == without.resolution and math.isfinite(with_nan.resolution)
    assert with_nan.verdict == without.verdict


def test_the_resolution_is_what_such_blocks_find_with_the_usual_power():
    one = judged(Found({0: 4.0, 1: 5.0, 2: 6.0}))  # sd 1
    assert power(3, one.resolution, 1.0) == pytest.approx(POWER)
    assert judged(Found({0: 2.0, 1: 2.0})).resolution == 0.0


def test_the_verdict_is_that_of_the_blocks():
    # mean 5, half-width 4.303 / sqrt(3) = 2.48
    found = Found({0: 4.0, 1: 5.0, 2: 6.0})
    assert judged(found, above(2.5)).verdict == "reproduced"
    assert judged(found, above(2.6)).verdict == "not resolved"
    assert judged(found, above(7.5)).verdict == "contradicted"
    assert judged(found, either(2.5)).verdict == "higher"


def test_claims_are_judged_in_their_order_and_none_is_measured_without_tables():
    claims = all_claims()
    found = judge(claims, {})
    assert [one.claim for one in found] == claims
    assert {one.verdict for one in found} == {"not measured"}
    assert all(one.found.missing for one in found)


def test_every_claim_has_a_number_of_its_own_and_a_known_relation():
    claims = all_claims()
    numbers = [claim.number for claim in claims]
    assert len(set(numbers)) == len(numbers)
    assert {claim.relation.kind for claim in claims} == {"above", "below", "within", "either"}
    assert all(isinstance(claim.relation, Relation) and claim.text.endswith(".") for claim in claims)
