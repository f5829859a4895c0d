"""Laws of the FLOPs that a token costs, and of the peaks they are held against."""

import pytest

from conftest import tiny_config
from moe_jax.model.cost import parts, train_flops
from moe_jax.runtime.chips import CHIPS, GPUS, peak_flops

DENSE = dict(num_layers=2, first_dense=2, num_experts=0, num_shared_experts=0, vocab_size=264)


def test_a_training_token_costs_six_flops_a_parameter_and_causal_attention():
    # 264 x 16 head; a layer: q 16 x 16, k and v 16 x 8 each, out 16 x 16, feed-forward 3 x 16 x 24
    weights = 264 * 16 + 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    attention = 6 * 2 * 16 * 2 * 8  # 6 L S H D
    assert train_flops(tiny_config(model=DENSE)) == 6 * weights + attention


def test_biases_of_attention_and_the_gate_of_shared_experts_are_parameters_of_theirs():
    # 2 heads of queries and 1 of keys and of values, of 8 each, in 3 layers; biases multiply nothing
    sparse = dict(num_shared_experts=1)
    plain, biased = ({p.name: p for p in parts(tiny_config(model=sparse | more))} for more in ({}, dict(qkv_bias=True)))
    assert biased["attention"].total - plain["attention"].total == 3 * (2 + 1 + 1) * 8
    assert biased["attention"].flops == plain["attention"].flops
    more = dict(attention_sinks=True, attention_gate="element", out_bias=True)
    full = {p.name: p for p in parts(tiny_config(model=sparse | more))}
    assert full["attention"].total - plain["attention"].total == 3 * (2 + 16 * 2 * 8 + 16)
    assert full["attention"].flops - plain["attention"].flops == 3 * 2 * 16 * 2 * 8
    gated = {p.name: p for p in parts(tiny_config(model=sparse | dict(shared_gate=True)))}
    assert gated["shared experts"].total - plain["shared experts"].total == 2 * 16  # two MoE layers of width 16
    assert gated["shared experts"].flops - plain["shared experts"].flops == 2 * 2 * 16


def test_a_layer_with_a_window_costs_the_keys_that_are_in_it():
    # of 16 tokens: 8 visible keys on average in a global layer, and in a window of 4 its 4 - 4^2 / 32
    windowed = dict(window=4, window_pattern="LG", num_layers=4, first_dense=4)
    plain, local = (
        train_flops(tiny_config(model=DENSE | more)) for more in (dict(num_layers=4, first_dense=4), windowed)
    )
    assert plain - local == 6 * 2 * (8 - 3.5) * 2 * 2 * 8  # 3 passes of 2 FLOPs, layers, keys, heads, widths


def test_latent_attention_costs_its_projections_and_the_widths_of_its_queries_and_values():
    widths = dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    # a layer of 2 heads: queries 16 x 12 and 12 x 2 x 10, latent 16 x 10, rotated key 16 x 4, keys and values of it
    # 10 x 2 x (6 + 5), out 2 x 5 x 16
    layer = 16 * 12 + 12 * 20 + 16 * 10 + 16 * 4 + 10 * 22 + 10 * 16 + 3 * 16 * 24
    attention = 3 * 2 * 16 * 2 * (10 + 5)  # 3 L S H (K + V)
    config = tiny_config(model=DENSE | widths | dict(attention="mla"))
    assert train_flops(config) == 6 * (264 * 16 + 2 * layer) + attention


def test_multi_token_prediction_costs_a_layer_a_projection_and_the_head_again_for_every_depth():
    plain, ahead = (train_flops(tiny_config(model=DENSE | dict(mtp_depth=n))) for n in (0, 2))
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert ahead - plain == 2 * (6 * (layer + 2 * 16 * 16 + 264 * 16) + 6 * 16 * 2 * 8)


def test_a_token_costs_its_own_experts_and_not_the_others():
    few, many = (tiny_config(model=dict(num_experts=n)) for n in (4, 16))
    routed = [next(p for p in parts(c) if p.name == "routed experts") for c in (few, many)]
    assert routed[0].flops == routed[1].flops == 2 * 2 * 2 * 3 * 16 * 8  # 2 FLOPs, 2 layers, 2 experts of 3 x 16 x 8
    assert train_flops(many) - train_flops(few) == 6 * 2 * 16 * 12  # what is more is the router's


def test_experts_on_a_latent_cost_its_width_and_two_projections_that_all_share():
    wide, narrow = ({p.name: p for p in parts(tiny_config(model=dict(latent_dim=n)))} for n in (0, 6))
    # 2 layers of 4 experts, 2 of them active, of 3 x 6 x 8; 16 x 6 down and up
    assert narrow["routed experts"][1:] == (2 * 4 * 144, 2 * 2 * 144, 2 * 2 * 2 * 144)
    assert narrow["latent projections"][1:] == (2 * 192, 2 * 192, 2 * 2 * 192)
    same = wide.keys() - {"routed experts"}
    assert {name: narrow[name] for name in same} == {name: wide[name] for name in same}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", CHIPS["v4"].flops),
        ("TPU v5 lite", CHIPS["v5e"].flops),
        ("TPU v5e", CHIPS["v5e"].flops),
        ("TPU v5", CHIPS["v5p"].flops),
        ("TPU v5p", CHIPS["v5p"].flops),
        ("TPU v6 lite", CHIPS["v6e"].flops),
        ("TPU v6e", CHIPS["v6e"].flops),
        ("TPU7x", CHIPS["tpu7x"].flops),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", GPUS["H100"]),
        ("NVIDIA H100 PCIe", GPUS["H100 PCIe"]),
        ("NVIDIA H200", GPUS["H200"]),
        ("cpu", None),
        ("TPU v9", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_the_name_jax_gives_it(kind, peak):
    assert peak_flops(kind) == peak
