"""What is refused before a train step is compiled."""

from types import SimpleNamespace

import pytest

from conftest import tiny_config
from moe_jax.training import compile


def device(*kinds):
    return SimpleNamespace(platform="tpu", addressable_memories=lambda: [SimpleNamespace(kind=kind) for kind in kinds])


def test_tensors_wait_only_in_a_host_memory_that_the_device_has():
    config = tiny_config(model=dict(remat="names", remat_offload=("rows",)))
    compile._check_offload(config, device("device", "pinned_host"))
    compile._check_offload(tiny_config(), device("device"))
    sentence = (
        r"^model\.remat_offload=\('rows',\) needs devices with pinned_host memory, but .* tpu have device; set .*\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        compile._check_offload(config, device("device"))
