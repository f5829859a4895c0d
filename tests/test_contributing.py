"""The first example of docs/extending.md works as written: one line and one function are a balancing method."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import balance
from moe_jax.balance import bias, registry
from moe_jax.config import ModelConfig
from moe_jax.config import balance as options


@pytest.fixture
def example(repo, monkeypatch):
    """The name of the example's method, registered while the test runs."""
    line, function = re.findall(r"```python\n(.*?)```", (repo / "docs/extending.md").read_text(), re.DOTALL)[:2]
    ((name, schema),) = eval("{" + line + "}", vars(options)).items()
    monkeypatch.setitem(options.BALANCE_METHODS, name, schema)
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    exec(function, {**vars(bias), "BiasOptions": options.BiasOptions, "ModelConfig": ModelConfig})
    return name


def test_the_example_moves_the_bias_by_the_cube_of_the_relative_error(example):
    # loads 0 2 4 10 around a mean of 4: relative errors 1, 0.5, 0, -1.5
    assert example in balance.names()
    balancer = balance.make({example: {"rate": 0.1}})
    state = balancer.update({"loads": jnp.asarray([0, 2, 4, 10])}, balancer.init(4), jnp.int32(0))
    np.testing.assert_allclose(state["bias"], [0.1, 0.0125, 0.0, -0.3375], atol=1e-6)


def test_the_example_has_the_shared_options_and_works_in_a_config(example):
    config = tiny_config(balance={example: dict(rate=0.1, freeze_step=1, layers=(0, 1)), "z_loss": {}})
    balancer = balance.make(config.balance, config.model)
    loads = {"loads": jnp.asarray([0, 2, 4, 10])}
    for layer, step, moves in ((0, 0, True), (0, 1, False), (1, 0, False)):
        state = balancer.init(4, layer)
        assert bool((balancer.update(loads, state, jnp.int32(step))["bias"] != 0).any()) == moves, (layer, step)
