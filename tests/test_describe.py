"""The describe command: its parts add up, and equal numbers computed by hand."""

import math
import subprocess
import sys

import jax
import pytest

from conftest import tiny_config
from moe_jax.config import resolve
from moe_jax.model.cost import AHEAD, parts
from moe_jax.training.state import abstract_state
from moe_jax.training.summary import leaves, memory, totals

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


def test_sums_are_given_with_and_without_multi_token_prediction_and_embedding():
    rows = parts(tiny_config(model=dict(mtp_depth=1)))
    ahead, embedding = (next(r for r in rows if r.name == name) for name in (AHEAD, "embedding"))
    every, model, rest = totals(rows)
    assert every.total == sum(row.total for row in rows)
    assert (every.total - model.total, every.flops - model.flops) == (ahead.total, ahead.flops)
    assert (model.active - rest.active, embedding.active) == (264 * 16, 264 * 16)
    assert [t.name for t in totals(parts(CONFIG))] == ["all", "without the embedding"]


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


def test_on_a_mesh_every_leaf_is_listed_with_its_axes_and_its_part_on_a_device():
    config = resolve(tiny_config(mesh=dict(data=2, expert=4)), 8)
    rows = {row.path: row for row in leaves(config, 8)}
    assert len(rows) == len(jax.tree.leaves(abstract_state(config)))
    gate = rows["params/stacks/1/blocks/0/ffw/gate"]  # 2 layers, 4 experts, 16 wide, 8 hidden
    assert gate.axes == ((), ("expert",), ("data",), ())
    assert (gate.part, gate.bytes) == ((2, 1, 8, 8), 4 * 2 * 8 * 8)
    assert rows["bias/stacks/1/blocks/0/ffw/bias"].axes == ((), ())
    # parameters with one dimension are whole on every device, all others are in 8 parts
    whole = sum(math.prod(r.shape) for r in rows.values() if r.path.startswith("params/") and r.part == r.shape)
    total = sum(p.total for p in parts(config))
    assert memory(config, 8).gradients == 4 * (whole + (total - whole) // 8)


def test_the_command_shows_the_sharding_on_devices_that_are_not_present(repo):
    command = [sys.executable, "-m", "moe_jax.describe", "--config=configs/deepseek_v3.py", "--num_devices=2048"]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    for word in ("2048 devices", "data 64, expert 32", "stacks/1/blocks/0/ffw/down", "memory of each device"):
        assert word in result.stdout
    command[-1] = "--num_devices=100"
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "needs a multiple of 32 devices, but there are 100" in result.stderr
