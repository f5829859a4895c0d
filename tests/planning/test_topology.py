"""Machines of GPUs: NVLink within a domain, InfiniBand between domains."""

from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.planning.collectives import Collective
from moe_jax.planning.topology import INFINIBAND, NVLINK, Place, exchange, parse_topology, place_of

H100 = parse_topology("h100:2x8")
NVLINK_BYTES, INFINIBAND_BYTES = 450e9, 50e9  # a second, one way, of each H100
GB = 1e9


def places(topology):
    return [place_of(gpu(*at)) for at in np.ndindex(topology.domains)]


def gpu(domain, host, number):
    return SimpleNamespace(platform="gpu", slice_index=0, coords=[domain, host, number])


def collective(kind, size, group):
    return Collective(kind, size, tuple(group), False, "", "")


@pytest.mark.parametrize(
    ("text", "domains"),
    [
        ("h100:1x8", (1, 1, 8)),
        ("h100:2x8", (2, 1, 8)),  # every host is a domain
        ("b200:4x4", (4, 1, 4)),
        ("gb200:2x4", (1, 2, 4)),
        ("gb200:18x4", (1, 18, 4)),  # NVL72
        ("gb200:36x4", (2, 18, 4)),
    ],
)
def test_nvlink_joins_the_gpus_of_a_host_or_of_a_rack(text, domains):
    assert parse_topology(text).domains == domains


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 7 / 8), ("reduce-scatter", 7 / 8), ("all-reduce", 2 * 7 / 8), ("all-to-all", 7 / 8)],
)
def test_within_a_domain_an_exchange_passes_nvlink_alone(kind, sent):
    time = exchange(collective(kind, 8 * GB, range(8)), places(H100), H100)
    assert time.seconds == pytest.approx(8 * GB * sent / NVLINK_BYTES)
    assert time.busy == {NVLINK: time.seconds}


def test_two_gpus_of_two_hosts_exchange_over_infiniband_alone():
    time = exchange(collective("all-gather", 8 * GB, (0, 8)), places(H100), H100)
    assert time.busy == {INFINIBAND: pytest.approx(4 * GB / INFINIBAND_BYTES)}


def test_what_all_gpus_gather_enters_each_host_once_and_is_passed_on_within():
    time = exchange(collective("all-gather", 16 * GB, range(16)), places(H100), H100)
    # 8 GB are the other host's, and each of 8 GPUs takes an eighth of them; then each gets 7/8 of all from the others
    assert time.busy == {
        INFINIBAND: pytest.approx(GB / INFINIBAND_BYTES),
        NVLINK: pytest.approx(14 * GB / NVLINK_BYTES),
    }
    assert time.seconds == pytest.approx(sum(time.busy.values()))


def test_what_all_gpus_send_to_all_crosses_for_every_gpu_of_the_other_host():
    time = exchange(collective("all-to-all", 16 * GB, range(16)), places(H100), H100)
    # of 16 parts of 1 GB, 8 are for the other host, 7 for GPUs of this one, and one stays
    assert time.busy == {
        INFINIBAND: pytest.approx(8 * GB / INFINIBAND_BYTES),
        NVLINK: pytest.approx(7 * GB / NVLINK_BYTES),
    }


def test_a_rack_of_gb200_exchanges_over_nvlink_and_two_racks_over_infiniband():
    group = (0, 71)
    one, two = parse_topology("gb200:18x4"), parse_topology("gb200:36x4")
    assert exchange(collective("all-to-all", GB, group), places(one), one).busy.keys() == {NVLINK}
    assert exchange(collective("all-to-all", GB, (0, 72)), places(two), two).busy.keys() == {INFINIBAND}


def test_a_gpu_is_in_the_domain_that_its_coordinates_begin_with():
    assert place_of(gpu(1, 17, 3)) == Place(1, (17, 3))
