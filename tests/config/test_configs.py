"""The configs of published models have their exact numbers of parameters, as counted in their checkpoints."""

import importlib.util

import jax
import numpy as np
import pytest
from drills.rig import REPO, drill_config

from moe_jax.config import validate
from moe_jax.data import open_corpus
from moe_jax.mesh import make_mesh
from moe_jax.model.cost import AHEAD, parts
from moe_jax.runtime.checkpoint import restore
from moe_jax.training.loop import run
from moe_jax.training.start import start
from moe_jax.training.state import abstract_state
from moe_jax.training.summary import totals

# Embedding and head V D each. Latent attention, with or without a latent of queries R_q (its norm is counted with the
# norms), key-value latent 512, heads of 128 + 64 with and 128 without RoPE:
#   D R_q + R_q H 192 (or D H 192) + D (512 + 64) + 512 H (128 + 128) + H 128 D
# Norms 2 D a layer and D at the end, plus R_q + 512 (or 512) a latent attention. An expert 3 D F, a router D E.
V3_ATTENTION = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
K2_ATTENTION = 7168 * 1536 + 1536 * 64 * 192 + 7168 * 576 + 512 * 64 * 256 + 64 * 128 * 7168
LITE_ATTENTION = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
V3_LAYER = V3_ATTENTION + 257 * 3 * 7168 * 2048 + 7168 * 256 + 2 * 7168 + 1536 + 512
EXPERT = 3 * 2048 * 1408  # of DeepSeekMoE 16B and V2-Lite
FLASH_ATTENTION = 2048 * 768 + 768 * 20 * 256 + 2048 * 576 + 512 * 20 * (192 + 256) + 20 * 256 * 2048  # GLM-4.7-Flash


def grouped(width, heads, kv_heads, head=128, biased=False, norms=0):
    """Grouped-query attention, and both norms of its block."""
    biases = head * (heads + 2 * kv_heads) if biased else 0
    return 2 * width * head * (heads + kv_heads) + biases + norms + 2 * width


def moe(width, experts, ffw, shared=0):
    """Experts with the router, and shared experts of a joint hidden width."""
    return experts * 3 * width * ffw + width * experts + 3 * width * shared


GLM_LAYER = grouped(5120, 96, 8, biased=True, norms=2 * 128) + moe(5120, 160, 1536, shared=1536)
EXACT = {  # all parameters except those of multi-token prediction
    "deepseek_v3": 2 * 129280 * 7168
    + 61 * (V3_ATTENTION + 2 * 7168 + 1536 + 512)
    + 3 * 3 * 7168 * 18432
    + 58 * (257 * 3 * 7168 * 2048 + 7168 * 256)
    + 7168,
    "kimi_k2": 2 * 163840 * 7168
    + 61 * (K2_ATTENTION + 2 * 7168 + 1536 + 512)
    + 3 * 7168 * 18432
    + 60 * (385 * 3 * 7168 * 2048 + 7168 * 384)
    + 7168,
    "deepseek_v2_lite": 2 * 102400 * 2048
    + 27 * (LITE_ATTENTION + 2 * 2048 + 512)
    + 3 * 2048 * 10944
    + 26 * (66 * EXPERT + 2048 * 64)
    + 2048,
    "deepseek_moe_16b": 2 * 102400 * 2048
    + 28 * (4 * 2048 * 2048 + 2 * 2048)
    + 3 * 2048 * 10944
    + 27 * (66 * EXPERT + 2048 * 64)
    + 2048,
    # queries and output 32 heads of 128, keys and values 4, a norm of 128 for queries and for keys
    "qwen3_30b_a3b": 2 * 151936 * 2048
    + 48 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128 + 2 * 128 + 2 * 2048)
    + 48 * (128 * 3 * 2048 * 768 + 2048 * 128)
    + 2048,
    # tied
    "granite_3_3b_a800m": 49155 * 1536 + 32 * (grouped(1536, 24, 8, head=64) + moe(1536, 40, 512)) + 1536,
    # the shared expert has a gate of one column
    "qwen1_5_moe_a2_7b": 2 * 151936 * 2048
    + 24 * (grouped(2048, 16, 16, biased=True) + moe(2048, 60, 1408, shared=5632) + 2048)
    + 2048,
    "glm_4_7_flash": 2 * 154880 * 2048
    + 47 * (FLASH_ATTENTION + 2 * 2048 + 768 + 512)
    + 3 * 2048 * 10240
    + 46 * moe(2048, 64, 1536, shared=1536)
    + 2048,
    "glm_4_5": 2 * 151552 * 5120
    + 89 * GLM_LAYER
    + 3 * (grouped(5120, 96, 8, biased=True, norms=2 * 128) + 3 * 5120 * 12288)
    + 5120,
    "dots_llm1": 2 * 152064 * 4096
    + 62 * grouped(4096, 32, 32, norms=2 * 128)
    + 3 * 4096 * 10944
    + 61 * moe(4096, 128, 1408, shared=2 * 1408)
    + 4096,
    "solar_open_100b": 2 * 196608 * 4096 + 48 * (grouped(4096, 64, 8) + moe(4096, 128, 1280, shared=1280)) + 4096,
    "hy3": 2 * 120832 * 4096
    + 80 * grouped(4096, 64, 8, norms=2 * 128)
    + 3 * 4096 * 13312
    + 79 * moe(4096, 192, 1536, shared=1536)
    + 4096,
    # norms of all 48 heads of queries and 8 of keys
    "minimax_m2": 2 * 200064 * 3072 + 62 * (grouped(3072, 48, 8, norms=56 * 128) + moe(3072, 256, 1536)) + 3072,
    # biases of all projections, a sink for each head, a bias of the router and of every expert's gate, up and down
    "gpt_oss_120b": 2 * 201088 * 2880
    + 36 * (grouped(2880, 64, 8, head=64, biased=True) + 2880 + 64)
    + 36 * (moe(2880, 128, 2880) + 128 + 128 * 3 * 2880)
    + 2880,
    # biases of all projections and of the head, LayerNorm's shifts
    "phi_3_5_moe": 2 * 32064 * 4096
    + 32064
    + 32 * (grouped(4096, 32, 8, biased=True) + 4096 + 2 * 4096 + moe(4096, 16, 6400))
    + 2 * 4096,
    "ernie_4_5_300b": 2 * 103424 * 8192
    + 54 * grouped(8192, 64, 8)
    + 3 * 3 * 8192 * 28672
    + 51 * moe(8192, 64, 3584)
    + 8192,
}
# In billions, as published in papers and model cards: total, active, and the step to which active was rounded
PUBLISHED = {
    "deepseek_v3": (671, 36.7, 0.1),  # active: the README of its weights; 37 in the paper
    "kimi_k2": (1040, 32, 1),
    "deepseek_v2_lite": (15.7, 2.4, 0.1),
    "deepseek_moe_16b": (16.4, 2.8, 0.1),
    "qwen3_30b_a3b": (30.5, 3.3, 0.1),
    "granite_3_3b_a800m": (3.3, 0.8, 0.1),
    "qwen1_5_moe_a2_7b": (14.3, 2.7, 0.1),
    "glm_4_7_flash": (30, 3, 1),
    "glm_4_5": (355, 32, 1),
    "dots_llm1": (143, 14, 1),  # total: its checkpoint; 142 in the paper, rounded down
    "solar_open_100b": (102.6, 12, 1),
    "hy3": (295, 21, 1),
    "minimax_m2": (229, 10, 1),  # total: its checkpoint; 230 on the card
    "gpt_oss_120b": (116.8, 5.1, 0.1),
    "phi_3_5_moe": (41.9, 6.6, 0.1),
    "ernie_4_5_300b": (300, 47, 1),
}
every_model = pytest.mark.parametrize("name", EXACT)


def written_in(name, *arg):
    spec = importlib.util.spec_from_file_location(name, REPO / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arg)


def config_of(name):
    return validate(written_in(name))


def sums_of(name):
    """The sums without multi-token prediction, and those also without the embedding."""
    *_, model, without_embedding = totals(parts(config_of(name)))
    return model, without_embedding


@every_model
def test_all_parameters_are_there(name):
    assert sums_of(name)[0].total == EXACT[name]


@every_model
def test_the_total_is_the_published_one_within_half_a_percent(name):
    total, exact = PUBLISHED[name][0], EXACT[name]
    if name == "kimi_k2":
        # 61 MoE layers would have the report's 1.04T; configuration and checkpoint have 60 and a dense one, 1.026T
        exact += 385 * 3 * 7168 * 2048 + 7168 * 384 - 3 * 7168 * 18432
    if name == "glm_4_5":  # the report counts prediction ahead, but neither embedding nor head
        exact += GLM_LAYER + 2 * 5120 * 5120 + 3 * 5120 - 2 * 151552 * 5120
    assert abs(exact / 1e9 / total - 1) < 0.005


@every_model
def test_active_parameters_round_to_the_published_ones_with_or_without_the_embedding(name):
    # papers do not state which parameters they count or how they round: within one step of the last digit of either sum
    _, active, step = PUBLISHED[name]
    assert any(abs(s.active / 1e9 - active) < step for s in sums_of(name))


def test_multi_token_prediction_is_one_more_layer_and_two_halves_of_a_projection():
    # the card's 11.5B exclude the projection; 685B counts embedding and head again: 671 + 11.6 + 2 x 0.93
    found = {p.name: p for p in parts(config_of("deepseek_v3"))}[AHEAD]
    assert found.total == V3_LAYER + 2 * 7168 * 7168 + 3 * 7168
    assert abs((found.total + EXACT["deepseek_v3"] + 2 * 129280 * 7168) / 684.5e9 - 1) < 0.005


def test_training_on_from_bfloat16_weights_moves_nearly_every_parameter(tmp_path, capsys):
    # at its learning rate of 1e-5 only one in twenty bfloat16 parameters would move
    narrow = drill_config(model=dict(param_dtype="bfloat16"))
    run(narrow, tmp_path / "lite", stop_at=2)
    assert "model.param_dtype='bfloat16' loses every change" in capsys.readouterr().out
    written = written_in("from_checkpoint", str(tmp_path / "lite"))
    written.update(num_steps=2, sequence_length=16, data=dict(eval_sequences=8), optimizer=dict(warmup_steps=1))
    config = validate(written)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    (tmp_path / "on").mkdir()
    before = start(config, mesh, tmp_path / "on", open_corpus()).state.params
    run(config, tmp_path / "on")
    assert "bfloat16" not in capsys.readouterr().out
    after = restore(tmp_path / "on" / "checkpoints", abstract_state(config, mesh))[0].params
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    moved = np.concatenate([(np.asarray(a) != np.asarray(b)).ravel() for a, b in pairs])
    assert moved.mean() > 0.95
