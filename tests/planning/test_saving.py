"""Laws of the advice on saves: the interval is the best one, and only the first replica's hosts write."""

import pytest

from conftest import tiny_config
from moe_jax.mesh import make_mesh
from moe_jax.planning.saving import advise, saving


def lost(advice, interval):
    """The share of the time that saves and repeated steps cost at some interval."""
    return advice["blocking_seconds"] / interval + interval / 2 / advice["failure_seconds"]


def test_no_other_interval_loses_less():
    advice = advise(10**9, 512, 1)
    # a failure of a host every 54 days x 2048 hosts / 419 = 264 days: of 512 hosts every 12.4 h
    assert advice["failure_seconds"] / 3600 == pytest.approx(12.4, abs=0.03)
    assert advice["interval_seconds"] == pytest.approx(422, abs=1)
    best = lost(advice, advice["interval_seconds"])
    assert advice["lost"] == pytest.approx(best)
    assert best < min(lost(advice, 0.9 * advice["interval_seconds"]), lost(advice, 1.1 * advice["interval_seconds"]))


def test_four_times_the_hosts_save_twice_as_often():
    few, many = advise(1, 4, 1), advise(1, 16, 1)
    assert few["interval_seconds"] == pytest.approx(2 * many["interval_seconds"])


@pytest.mark.parametrize(("hosts", "replicas", "expected"), [(8, 1, 13), (8, 2, 25), (1, 4, 100)])
def test_the_hosts_of_the_first_replica_write_the_state(hosts, replicas, expected):
    assert advise(100, hosts, replicas)["bytes_per_writing_host"] == expected  # 100 / 8 is rounded up


def test_the_state_counts_once_whatever_the_mesh():
    config = tiny_config(mesh=dict(replica=2, data=2, expert=2))
    one = saving(tiny_config(), make_mesh(tiny_config().mesh))
    eight = saving(config, make_mesh(config.mesh))
    assert one["bytes"] == eight["bytes"] > 0
    assert eight["hosts"] == 1
