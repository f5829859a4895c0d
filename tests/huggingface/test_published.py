"""The config.json files that are published with weights mean the same as our configs of those models at full size."""

import dataclasses
import importlib

import pytest
from drills.folders import model_of

from moe_jax.config import validate
from moe_jax.huggingface.config_out import to_hf

YARN = dict(type="yarn", factor=2.0, original_max_position_embeddings=65536)
# name of our config -> architecture, and the keys of the published config.json that say something of the model
OSS_YARN = dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0)
OSS_YARN |= dict(truncate=False)
PUBLISHED = {
    "deepseek_v2_lite": (
        "DeepseekV2ForCausalLM",
        dict(model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, num_hidden_layers=27, rms_norm_eps=1e-6)
        | dict(num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, v_head_dim=128)
        | dict(qk_nope_head_dim=128, qk_rope_head_dim=64, intermediate_size=10944, moe_intermediate_size=1408)
        | dict(n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1)
        | dict(n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False, scoring_func="softmax")
        | dict(routed_scaling_factor=1.0, rope_theta=10000, moe_layer_freq=1, attention_bias=False),
    ),
    "qwen3_30b_a3b": (
        "Qwen3MoeForCausalLM",
        dict(model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, num_hidden_layers=48, rms_norm_eps=1e-6)
        | dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144)
        | dict(moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
        | dict(decoder_sparse_step=1, mlp_only_layers=[], rope_theta=1e6, use_sliding_window=False),
    ),
    "granite_3_3b_a800m": (
        "GraniteMoeForCausalLM",
        dict(model_type="granitemoe", vocab_size=49155, hidden_size=1536, num_hidden_layers=32, rms_norm_eps=1e-6)
        | dict(num_attention_heads=24, num_key_value_heads=8, intermediate_size=512, num_local_experts=40)
        | dict(num_experts_per_tok=8, tie_word_embeddings=True, rope_theta=10000, attention_multiplier=0.015625)
        | dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=6.0, attention_bias=False),
    ),
    "qwen1_5_moe_a2_7b": (
        "Qwen2MoeForCausalLM",
        dict(model_type="qwen2_moe", vocab_size=151936, hidden_size=2048, num_hidden_layers=24, rms_norm_eps=1e-6)
        | dict(num_attention_heads=16, num_key_value_heads=16, intermediate_size=5632, moe_intermediate_size=1408)
        | dict(shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4, norm_topk_prob=False)
        | dict(decoder_sparse_step=1, rope_theta=1e6, use_sliding_window=False, sliding_window=32768)
        | dict(max_window_layers=21),
    ),
    "glm_4_7_flash": (
        "Glm4MoeLiteForCausalLM",
        dict(model_type="glm4_moe_lite", vocab_size=154880, hidden_size=2048, num_hidden_layers=47, rms_norm_eps=1e-5)
        | dict(num_attention_heads=20, num_key_value_heads=20, q_lora_rank=768, kv_lora_rank=512, v_head_dim=256)
        | dict(qk_nope_head_dim=192, qk_rope_head_dim=64, intermediate_size=10240, moe_intermediate_size=1536)
        | dict(n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1)
        | dict(n_group=1, topk_group=1, topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=1.8)
        | dict(num_nextn_predict_layers=1, rope_theta=1000000, rope_scaling=None, partial_rotary_factor=1.0),
    ),
    "glm_4_5": (
        "Glm4MoeForCausalLM",
        dict(model_type="glm4_moe", vocab_size=151552, hidden_size=5120, num_hidden_layers=92, rms_norm_eps=1e-5)
        | dict(num_attention_heads=96, num_key_value_heads=8, head_dim=128, attention_bias=True, use_qk_norm=True)
        | dict(intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=1)
        | dict(num_experts_per_tok=8, first_k_dense_replace=3, n_group=1, topk_group=1, norm_topk_prob=True)
        | dict(routed_scaling_factor=2.5, num_nextn_predict_layers=1, partial_rotary_factor=0.5, rope_theta=1000000),
    ),
    "dots_llm1": (
        "Dots1ForCausalLM",
        dict(model_type="dots1", vocab_size=152064, hidden_size=4096, num_hidden_layers=62, rms_norm_eps=1e-5)
        | dict(num_attention_heads=32, num_key_value_heads=32, intermediate_size=10944, moe_intermediate_size=1408)
        | dict(n_routed_experts=128, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1)
        | dict(n_group=None, topk_group=None, norm_topk_prob=True, routed_scaling_factor=2.5, rope_theta=10000000)
        | dict(scoring_func="sigmoid", sliding_window=None, max_window_layers=62),
    ),
    "solar_open_100b": (
        "SolarOpenForCausalLM",
        dict(model_type="solar_open", vocab_size=196608, hidden_size=4096, num_hidden_layers=48, rms_norm_eps=1e-5)
        | dict(num_attention_heads=64, num_key_value_heads=8, head_dim=128, intermediate_size=10240)
        | dict(moe_intermediate_size=1280, n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8)
        | dict(first_k_dense_replace=0, norm_topk_prob=True, routed_scaling_factor=1.0, partial_rotary_factor=1.0)
        | dict(rope_theta=1000000, rope_scaling=YARN, max_position_embeddings=131072),
    ),
    "hy3": (
        "HYV3ForCausalLM",
        dict(model_type="hy_v3", vocab_size=120832, hidden_size=4096, num_hidden_layers=80, rms_norm_eps=1e-5)
        | dict(num_attention_heads=64, num_key_value_heads=8, head_dim=128, qk_norm=True, intermediate_size=13312)
        | dict(moe_intermediate_size=1536, expert_hidden_dim=1536, num_experts=192, num_experts_per_tok=8)
        | dict(num_shared_experts=1, first_k_dense_replace=1, router_scaling_factor=2.826, num_nextn_predict_layers=1)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=11158840.0), tie_word_embeddings=False),
    ),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        dict(model_type="minimax_m2", vocab_size=200064, hidden_size=3072, num_hidden_layers=62, rms_norm_eps=1e-6)
        | dict(num_attention_heads=48, num_key_value_heads=8, head_dim=128, rotary_dim=64, intermediate_size=1536)
        | dict(num_local_experts=256, num_experts_per_tok=8, scoring_func="sigmoid", use_routing_bias=True)
        | dict(use_qk_norm=True, qk_norm_type="per_layer", shared_intermediate_size=0, attn_type_list=[1] * 62)
        | dict(use_mtp=True, num_mtp_modules=3, mtp_transformer_layers=1, rope_theta=5000000),
    ),
    "gpt_oss_120b": (
        "GptOssForCausalLM",
        dict(model_type="gpt_oss", vocab_size=201088, hidden_size=2880, num_hidden_layers=36, rms_norm_eps=1e-5)
        | dict(num_attention_heads=64, num_key_value_heads=8, head_dim=64, attention_bias=True, sliding_window=128)
        | dict(layer_types=["sliding_attention", "full_attention"] * 18, rope_theta=150000, rope_scaling=OSS_YARN)
        | dict(num_local_experts=128, num_experts_per_tok=4, experts_per_token=4, intermediate_size=2880)
        | dict(swiglu_limit=7.0, initial_context_length=4096, max_position_embeddings=131072),
    ),
    "phi_3_5_moe": (  # without its LongRoPE, and the window that its context does not fill
        "PhiMoEForCausalLM",
        dict(model_type="phimoe", vocab_size=32064, hidden_size=4096, num_hidden_layers=32, rms_norm_eps=1e-5)
        | dict(num_attention_heads=32, num_key_value_heads=8, attention_bias=True, lm_head_bias=True)
        | dict(num_local_experts=16, num_experts_per_tok=2, intermediate_size=6400, router_jitter_noise=0.01)
        | dict(input_jitter_noise=0.01, hidden_dropout=0.0, original_max_position_embeddings=4096, rope_theta=10000.0),
    ),
}
# what a config.json does not decide, and what ranks groups where there is one
APART = ("init_std", "compute_dtype", "remat", "remat_keep", "group_top")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_ours_of_that_model(name):
    architecture, keys = PUBLISHED[name]
    family, read = model_of({"architectures": [architecture], "hidden_act": "silu"} | keys)
    written = validate(importlib.import_module(f"configs.{name}").get_config()).model
    assert read == dataclasses.replace(written, **{key: getattr(read, key) for key in APART})
    assert model_of(to_hf(family, read, "bfloat16", {})) == (family, read)
