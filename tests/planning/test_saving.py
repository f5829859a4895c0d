"""Laws of the advice on saves: the interval is the best one, and every shard is written by one host."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from conftest import tiny_config
from moe_jax.mesh import make_mesh
from moe_jax.planning.saving import advise, bytes_by_host, saving


def lost(advice, interval):
    """The share of the time that saves and repeated steps cost at some interval."""
    return advice["blocking_seconds"] / interval + interval / 2 / advice["failure_seconds"]


def test_no_other_interval_loses_less():
    advice = advise(512)
    # a failure of a host every 54 days x 2048 hosts / 419 = 264 days: of 512 hosts every 12.4 h
    assert advice["failure_seconds"] / 3600 == pytest.approx(12.4, abs=0.03)
    assert advice["interval_seconds"] == pytest.approx(422, abs=1)
    best = lost(advice, advice["interval_seconds"])
    assert advice["lost"] == pytest.approx(best)
    assert best < min(lost(advice, 0.9 * advice["interval_seconds"]), lost(advice, 1.1 * advice["interval_seconds"]))


def test_four_times_the_hosts_save_twice_as_often():
    assert advise(4)["interval_seconds"] == pytest.approx(2 * advise(16)["interval_seconds"])


class Sharding:
    """A vector of 8 in pieces of 2 or 8; devices 0 to 3 are host 0's, 4 to 7 host 1's."""

    def __init__(self, piece):
        self.piece = piece

    def shard_shape(self, shape):
        return (self.piece,)

    def devices_indices_map(self, shape):
        start = [self.piece * n % 8 for n in range(8)]
        return {Device(n // 4): (slice(start[n], start[n] + self.piece),) for n in range(8)}


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (1, {0: 16, 1: 16}),  # 8 pieces of a float32, each on one device
        (2, {0: 32}),  # 4 pieces, all on host 0, and copies of them on host 1
        (8, {0: 32}),  # whole on every device
    ],
)
def test_of_equal_shards_the_first_is_written(piece, expected):
    leaf = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert bytes_by_host([SimpleNamespace(shape=(8,), dtype=leaf.dtype, sharding=Sharding(piece))]) == expected


def test_the_state_counts_once_whatever_the_mesh():
    config = tiny_config(mesh=dict(replica=2, data=2, expert=2))
    one = saving(tiny_config(), make_mesh(tiny_config().mesh))
    eight = saving(config, make_mesh(config.mesh))
    assert one["bytes"] == one["bytes_of_busiest_host"] == eight["bytes"] > 0
    assert eight["hosts"] == 1
