"""The model summary adds up."""

import subprocess
import sys

import jax
import pytest

from conftest import tiny_config
from moe_jax.describe import memory, parts
from moe_jax.state import abstract_state

CONFIG = tiny_config(balance=dict(bias_sign={}))


def by_name(config):
    return {part.name: part for part in parts(config)}


def test_the_parts_add_up_to_every_parameter():
    assert sum(p.total for p in parts(CONFIG)) == sum(a.size for a in jax.tree.leaves(abstract_state(CONFIG).params))


def test_parameters_and_flops_by_hand():
    found = by_name(CONFIG)
    # 2 MoE layers x 4 experts x 3 matrices of 16 x 8; a token uses 2 of 4
    assert found["routed experts"][1:] == (2 * 4 * 3 * 128, 2 * 2 * 3 * 128, 2 * 2 * 2 * 3 * 128)
    assert found["shared experts"].total == found["shared experts"].active == 2 * 3 * 128
    assert found["router"].total == 2 * 16 * 4
    # one dense layer of 3 matrices 16 x 24
    assert found["dense feed-forward"].total == 3 * 16 * 24
    # 3 layers: queries and output 16 x 2 x 8 each, key and value 16 x 1 x 8 each
    assert found["attention"].total == 3 * (2 * 256 + 2 * 128)
    assert found["embedding"][1:] == (264 * 16, 264 * 16, 0)
    # scores and values: 2 products x 2 FLOPs x 16 positions x 16 wide x 3 layers, half of it masked
    assert found["attention scores"].flops == 2 * 2 * 16 * 16 * 3 // 2


def test_a_tied_embedding_is_counted_once_and_multiplies_once():
    found = by_name(tiny_config(model=dict(tied_embeddings=True)))
    assert "head" not in found
    assert found["embedding"].flops == 2 * 264 * 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_take_two_values_a_parameter(dtype):
    config = tiny_config(optimizer=dict(moment_dtype=dtype))
    parameters = sum(p.total for p in parts(config))
    width = 4 if dtype == "float32" else 2
    assert memory(config).optimizer == 2 * width * parameters + 4  # and Adam's count
    assert memory(config).gradients == 4 * parameters


def test_the_command_prints_the_table(repo):
    command = [sys.executable, "-m", "moe_jax.describe", "--config=configs/tiny.py"]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    for word in ("routed experts", "attention", "FLOPs a token", "memory of one device"):
        assert word in result.stdout
