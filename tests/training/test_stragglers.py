"""Laws of the comparison of hosts: the worst is named, and a line is printed only if it is clearly late."""

import pytest

from moe_jax.runtime import processes
from moe_jax.runtime.ledger import Ledger
from moe_jax.training import stragglers
from moe_jax.training.stragglers import Stragglers, compare

HOSTS = ["a", "b", "c"]


def test_the_host_with_the_largest_excess_of_any_kind_is_named():
    # excess over the median: data 5 - 2 = 3 (b), dispatch 0.5 - 0.5 = 0, save 9 - 8 = 1 (c)
    columns, line = compare([[1.0, 0.5, 7.0], [5.0, 0.5, 8.0], [2.0, 0.5, 9.0]], HOSTS, 20.0)
    assert columns == {
        "hosts/data": 5.0,
        "hosts/data_median": 2.0,
        "hosts/dispatch": 0.5,
        "hosts/dispatch_median": 0.5,
        "hosts/save": 9.0,
        "hosts/save_median": 8.0,
        "hosts/slowest": "b",
    }
    assert line == (
        "b (process 1) delays the others: 5.0 s waiting for data in the last 20.0 s, the median process 2.0 s"
    )


def test_of_two_processes_the_faster_one_is_the_median():
    columns, line = compare([[0.0, 4.0, 0.0], [0.0, 1.0, 0.0]], HOSTS, 10.0)
    assert (columns["hosts/dispatch"], columns["hosts/dispatch_median"], columns["hosts/slowest"]) == (4.0, 1.0, "a")
    assert "a (process 0) delays the others: 4.0 s before dispatching steps" in line


@pytest.mark.parametrize(
    ("late", "elapsed"),
    [
        (4.0, 30.0),  # 4 - 1 = 3 s, a tenth of the time
        (1.9, 5.0),  # less than twice the median's 1 s
    ],
)
def test_a_difference_that_costs_little_is_logged_but_not_printed(late, elapsed):
    columns, line = compare([[late, 0.0, 0.0], [1.0, 0.0, 0.0]], HOSTS, elapsed)
    assert columns["hosts/data"] == late
    assert line == ""


def test_what_is_compared_is_the_time_since_the_last_comparison(clock, monkeypatch):
    gathered = []
    monkeypatch.setattr(processes, "gather_json", lambda name: [name, "other"])
    monkeypatch.setattr(processes, "gather_floats", lambda own: [gathered.append(own) or own, [0.0] * 3])
    monkeypatch.setattr(stragglers.time, "perf_counter", clock)
    ledger, before_dispatch = Ledger(clock), [1.0]
    both = Stragglers(ledger, lambda: sum(before_dispatch))
    for kind, seconds in (("data", 2), ("checkpoint", 4), ("step", 8), ("data", 16)):
        with ledger(kind):
            clock.time += seconds
    before_dispatch.append(0.5)
    _, line = both.compare()
    assert "18.0 s waiting for data in the last 30.0 s" in line
    both.compare()
    assert gathered == [[18.0, 0.5, 4.0], [0.0, 0.0, 0.0]]


def test_one_process_compares_nothing():
    assert Stragglers(Ledger(), float).compare() == ({}, "")
