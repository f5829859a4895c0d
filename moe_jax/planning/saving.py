"""What a checkpoint weighs on each host, and how often to save."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from moe_jax.config import Config

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs, 8 a host
HOST_MTBF_SECONDS = 54 * 86400 * (16384 / 8) / 419
# by which a save delays the steps before it continues in the background; a run logs its own as time/checkpoint
BLOCKING_SECONDS = 2.0


def saving(config: Config, mesh: "Mesh") -> dict[str, Any]:
    """The bytes of a checkpoint, those that the busiest host writes, and `advise`, as JSON values."""
    from moe_jax.training.state import abstract_state

    written = bytes_by_host(abstract_state(config, mesh))
    hosts = len({device.process_index for device in mesh.devices.flat})
    return {"bytes": written.total(), "bytes_of_busiest_host": max(written.values()), **advise(hosts)}


def bytes_by_host(state: Any) -> Counter[int]:
    """The bytes that each process writes of an abstract state: of equal shards, the first device's is written."""
    import jax

    written: Counter[int] = Counter()
    for leaf in jax.tree.leaves(state):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        owners: dict[tuple, int] = {}
        for device, slices in leaf.sharding.devices_indices_map(leaf.shape).items():
            owners.setdefault(tuple((s.start, s.stop) for s in slices), device.process_index)
        for process, shards in Counter(owners.values()).items():
            written[process] += shards * size
    return written


def advise(hosts: int) -> dict[str, Any]:
    """How often to save on N hosts, as JSON values.

    `interval_seconds` is Young's sqrt(2 x blocking x mean time between failures) (CACM 17, 1974), which minimises
    `lost`, the share of the time spent on saves and on steps that a failure repeats.
    """
    failure = HOST_MTBF_SECONDS / hosts
    interval = math.sqrt(2 * BLOCKING_SECONDS * failure)
    return {
        "hosts": hosts,
        "blocking_seconds": BLOCKING_SECONDS,
        "failure_seconds": failure,
        "interval_seconds": interval,
        "lost": BLOCKING_SECONDS / interval + interval / 2 / failure,
    }
