"""What a checkpoint weighs on each host, and how often to save."""

import math
from typing import TYPE_CHECKING, Any

from moe_jax.config import Config

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs, 8 a host
HOST_MTBF_SECONDS = 54 * 86400 * (16384 / 8) / 419
# in which a save delays the steps, before it goes on in the background; a run logs its own as time/checkpoint
BLOCKING_SECONDS = 2.0


def saving(config: Config, mesh: "Mesh") -> dict[str, Any]:
    """The bytes of a checkpoint and the advised interval between two; see `advise`."""
    import jax

    from moe_jax.training.state import abstract_state

    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state(config, mesh)))
    hosts = len({device.process_index for device in mesh.devices.flat})
    return advise(num_bytes, hosts, mesh.shape["replica"])


def advise(num_bytes: int, hosts: int, replicas: int) -> dict[str, Any]:
    """What a host writes, and how often, as JSON values.

    `interval_seconds` is Young's sqrt(2 x blocking x mean time between failures) (CACM 17, 1974), which minimises
    `lost`, the share of the time spent on saves and on steps that a failure repeats.

    Args:
        num_bytes: of the whole state.
        hosts: of the run.
        replicas: of the state, the first of which is written.
    """
    writing = max(1, hosts // replicas)
    failure = HOST_MTBF_SECONDS / hosts
    interval = math.sqrt(2 * BLOCKING_SECONDS * failure)
    return {
        "bytes": num_bytes,
        "hosts": hosts,
        "bytes_per_writing_host": math.ceil(num_bytes / writing),
        "blocking_seconds": BLOCKING_SECONDS,
        "failure_seconds": failure,
        "interval_seconds": interval,
        "lost": BLOCKING_SECONDS / interval + interval / 2 / failure,
    }
