"""The bytes of what layers keep by name, by hand, and which names fit; `test_cost_laws.py` compiles."""

import dataclasses
from pathlib import Path

from conftest import tiny_config
from moe_jax.config import MeshConfig, validate
from moe_jax.config.command import load
from moe_jax.mesh import abstract_mesh
from moe_jax.planning.keeping import bytes_by_name, fitting, keeping, policy

EXPERTS = dict(num_experts=8, num_layers=2, first_dense=0)


def test_the_names_of_deepseek_v3():
    # 4096 tokens a chip make 32768 copies, for each of 64 chips 640 with the room of 1.25; 58 + 1 MoE layers of 61 + 1
    config = validate(load(Path(__file__).parents[2] / "configs/deepseek_v3.py").get_config())
    rows = 59 * 64 * 640
    assert bytes_by_name(config, abstract_mesh(MeshConfig(data=32, expert=64), 2048)) == {
        "rows": rows * (7168 * 2 + 4),
        "attention": 62 * 4096 * 128 * (128 * 2 + 4),
        "residual": 62 * 4096 * 7168 * 2,
        "hidden": rows * 2 * 2048 * 2,
    }


def test_the_rows_of_a_latent_are_as_narrow_as_it_and_its_sum_is_kept_too():
    # 2 layers; 4 sequences of 16 tokens a device make 128 copies, of which 80 fit into a round to each of 2 devices
    config = tiny_config(model=EXPERTS | dict(latent_dim=6))
    sizes = bytes_by_name(config, abstract_mesh(MeshConfig(data=1, expert=2), 2))
    assert sizes["rows"] == 2 * (2 * 80 * (6 * 4 + 4) + 64 * 6 * 4)
    assert sizes["residual"] == 2 * 64 * 16 * 4


def test_devices_with_all_experts_receive_no_rows_and_multiply_their_own():
    config = tiny_config(batch_size=8, sequence_length=16, model=EXPERTS | dict(top_k=2, expert_ffw_dim=32))
    sizes = bytes_by_name(config, abstract_mesh(MeshConfig(data=2, tensor=2), 4))
    assert sizes["rows"] == 0
    assert sizes["hidden"] == 2 * (4 * 16 * 2) * 2 * (32 // 2) * 4


def test_dispatchers_without_names_keep_none():
    for name in ("dense", "capacity"):
        config = tiny_config(model=EXPERTS | dict(dispatch=name))
        sizes = bytes_by_name(config, abstract_mesh(MeshConfig(data=1, expert=2 if name == "dense" else 1), 2))
        assert sizes["rows"] == sizes["hidden"] == 0


def test_a_name_fits_beside_those_before_it():
    sizes = {"rows": 5, "attention": 3, "residual": 0, "hidden": 4}
    assert fitting(sizes, 7) == ["rows"]
    assert fitting(sizes, 8) == ["rows", "attention"]
    assert fitting(sizes, 4) == ["attention"]
    assert fitting(sizes, 12) == ["rows", "attention", "hidden"]
    assert fitting(sizes, -1) == []


def test_what_is_kept_on_the_chip_already_is_room():
    config = tiny_config(model=EXPERTS | dict(remat="names", remat_keep=("attention", "residual")))
    mesh = abstract_mesh(MeshConfig(data=1), 1)
    assert keeping(config, mesh, 10, 10)["fit"] == ["attention", "residual"]
    assert keeping(config, mesh, None, 10)["fit"] is None
    offloaded = dataclasses.replace(config, model=dataclasses.replace(config.model, remat_offload=("attention",)))
    assert keeping(offloaded, mesh, 10, 10)["fit"] != ["attention", "residual"]
    assert policy(offloaded.model) == "names attention (host) residual"
    everything = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    assert keeping(everything, mesh, 10, 10)["fit"] is None


def test_gathered_tokens_are_kept_with_the_gates_and_ids_of_their_experts():
    # a group of four devices has 64 tokens; a device multiplies the mean of 32 copies and a quarter more
    model = EXPERTS | dict(top_k=2, expert_ffw_dim=32, dispatch="gathered")
    config = tiny_config(batch_size=8, sequence_length=16, model=model)
    sizes = bytes_by_name(config, abstract_mesh(MeshConfig(data=2, expert=4), 8))
    assert sizes["rows"] == 2 * 64 * (config.model.embed_dim + 2 * 2) * 4
    assert sizes["hidden"] == 2 * 40 * 2 * 32 * 4
