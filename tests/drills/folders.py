"""Small folders of Hugging Face's families, made without torch: config.json and random tensors."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_jax.config import default, validate
from moe_jax.huggingface.config_in import from_hf
from moe_jax.huggingface.family import without
from moe_jax.huggingface.shards import Plan, write_folder
from moe_jax.huggingface.tensors import copies, tensors

BASE = dict(vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
BASE |= dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, rms_norm_eps=1e-5)
GROUPED = BASE | dict(num_key_value_heads=1, num_experts_per_tok=2)
LATENT = BASE | dict(num_key_value_heads=2, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=3)
LATENT |= dict(kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
LATENT |= dict(first_k_dense_replace=1, n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=2.0)
INDEXED = dict(index_topk=128, index_head_dim=8, index_n_heads=2)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)
YARN |= dict(rope_theta=50000.0)
SHARPENED = YARN | dict(mscale=1.0, mscale_all_dim=0.7)
FINE = GROUPED | dict(moe_intermediate_size=8, routed_scaling_factor=2.0, norm_topk_prob=True)
FINE |= dict(n_routed_experts=8, n_shared_experts=2)
ERNIE = dict(moe_k=2, moe_num_experts=4, moe_num_shared_experts=2, moe_intermediate_size=8, num_key_value_heads=1)
TYPES_OF_LAYERS = ["sliding_attention", "full_attention"] * 2
WINDOWED = GROUPED | dict(num_hidden_layers=4, sliding_window=3, head_dim=8, layer_types=TYPES_OF_LAYERS)
WINDOWED |= dict(num_experts=4, moe_intermediate_size=8)
OWN_ROPE = dict(rope_type="default", rope_theta=1000.0)
LONGROPE = dict(rope_type="longrope", rope_theta=1000.0, short_factor=[1.0, 1.25, 1.5, 3.0], short_mscale=1.25)
LONGROPE |= dict(long_factor=[1.0, 2.0, 4.0, 8.0], long_mscale=1.5, original_max_position_embeddings=128)
# name -> the part of transformers' class names before Config, and the keys
CASES = {
    "mixtral": ("Mixtral", GROUPED | dict(num_local_experts=4, head_dim=12)),
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED
        | dict(num_experts=4, moe_intermediate_size=8, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0])
        | dict(rope_parameters=YARN, tie_word_embeddings=True),
    ),
    "granitemoe": (
        "GraniteMoe",
        GROUPED
        | dict(num_local_experts=4, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.25)
        | dict(logits_scaling=2.0, tie_word_embeddings=True),
    ),
    "olmoe": ("Olmoe", GROUPED | dict(num_experts=4)),
    "flex_olmo": ("FlexOlmo", GROUPED | dict(num_experts=4, norm_topk_prob=True)),
    "qwen2_moe": (
        "Qwen2Moe",
        GROUPED
        | dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=12, norm_topk_prob=False)
        | dict(mlp_only_layers=[0]),
    ),
    "glm4_moe_lite": ("Glm4MoeLite", LATENT | dict(rope_parameters=SHARPENED, num_nextn_predict_layers=0)),
    "glm4_moe": (
        "Glm4Moe",
        FINE
        | dict(head_dim=8, attention_bias=True, use_qk_norm=True, n_group=2, topk_group=1, first_k_dense_replace=1)
        | dict(num_nextn_predict_layers=0),
    ),
    "dots1": ("Dots1", FINE | dict(head_dim=12, first_k_dense_replace=1)),
    "solar_open": ("SolarOpen", FINE | dict(head_dim=8, rope_parameters=YARN)),
    "hy_v3": (
        "HYV3",
        GROUPED
        | dict(num_experts=4, moe_intermediate_size=8, head_dim=12, num_shared_experts=1)
        | dict(router_scaling_factor=2.0),
    ),
    "minimax_m2": ("MiniMaxM2", GROUPED | dict(num_local_experts=4, head_dim=8, rotary_dim=4)),
    "ernie4_5_moe": ("Ernie4_5_Moe", BASE | ERNIE | dict(head_dim=8)),
    "deepseek_v2": ("DeepseekV2", LATENT | dict(topk_method="group_limited_greedy", rope_parameters=SHARPENED)),
    "deepseek_v2_lite": ("DeepseekV2", LATENT | dict(q_lora_rank=None, topk_method="greedy")),
    "deepseek_v32": ("DeepseekV32", LATENT | INDEXED | dict(rope_parameters=SHARPENED)),
    "glm_moe_dsa": ("GlmMoeDsa", LATENT | INDEXED | dict(indexer_types=["full", "shared"])),
    "deepseek_v3": ("DeepseekV3", LATENT | dict(rope_parameters=SHARPENED, num_nextn_predict_layers=0)),
    "exaone_moe": (
        "ExaoneMoe",
        without(WINDOWED, "layer_types")
        | dict(sliding_window_pattern=2, routed_scaling_factor=2.0, norm_topk_prob=True),
    ),
    "afmoe": ("Afmoe", WINDOWED | dict(route_scale=2.0, mup_enabled=True, attention_bias=True)),
    "mellum": (
        "Mellum",
        WINDOWED
        | dict(norm_topk_prob=True, mlp_layer_types=["dense", *["sparse"] * 3], attention_bias=True)
        | dict(rope_parameters=dict(full_attention=YARN, sliding_attention=OWN_ROPE)),
    ),
    "laguna": (
        "Laguna",
        WINDOWED
        | dict(shared_expert_intermediate_size=12, moe_routed_scaling_factor=2.0)
        | dict(mlp_layer_types=["dense", *["sparse"] * 3])
        | dict(
            rope_parameters=dict(
                full_attention=YARN | dict(partial_rotary_factor=0.5),
                sliding_attention=OWN_ROPE | dict(partial_rotary_factor=1.0),
            )
        ),
    ),
    "granitemoe_swa": (
        "GraniteMoeSWA",
        without(WINDOWED, "num_experts", "moe_intermediate_size")
        | dict(num_local_experts=4, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.25)
        | dict(logits_scaling=2.0, tie_word_embeddings=True, layer_rope_theta=[100.0, 0, 100.0, 0]),
    ),
    "flint": ("Flint", WINDOWED | dict(shared_expert_intermediate_size=12, mlp_only_layers=[0], norm_topk_prob=True)),
    "kolibri1": ("Kolibri1", without(WINDOWED, "intermediate_size") | dict(shared_expert_intermediate_size=12)),
    "gpt_oss": (
        "GptOss",
        without(WINDOWED, "num_experts", "moe_intermediate_size", "layer_types")
        | dict(num_local_experts=4, swiglu_limit=1.0, rope_parameters=YARN | dict(truncate=False)),
    ),
    "phimoe": (
        "Phimoe",
        GROUPED
        | dict(num_local_experts=4, attention_bias=True, lm_head_bias=True, router_jitter_noise=0.5, sliding_window=64)
        | dict(rope_parameters=LONGROPE),
    ),
}
# name -> the case, and keys that are changed: all cases, and models whose layers are not those of any
KINDS: dict[str, tuple[str, dict]] = {case: (case, {}) for case in CASES}
KINDS["qwen3_moe, every second"] = ("qwen3_moe", dict(num_hidden_layers=4, mlp_only_layers=[], decoder_sparse_step=2))
KINDS["deepseek_v3, tied, two ahead"] = ("deepseek_v3", dict(num_nextn_predict_layers=2, tie_word_embeddings=True))
KINDS["deepseek_v3, untied, one ahead"] = ("deepseek_v3", dict(num_nextn_predict_layers=1))
PARTLY = dict(partial_rotary_factor=0.5)
KINDS["laguna, local heads rotate in part"] = (
    "laguna",
    dict(rope_parameters=dict(full_attention=YARN | PARTLY, sliding_attention=OWN_ROPE | PARTLY)),
)
TYPES = {name: case.removesuffix("_lite") if name == "DeepseekV2" else case for case, (name, _) in CASES.items()}


def config_of(case, **keys):
    """The config.json of a case, with keys changed."""
    name, own = CASES[case]
    return {"architectures": [f"{name}ForCausalLM"], "model_type": TYPES[name], "hidden_act": "silu"} | own | keys


def model_of(hf):
    """The family and the model config of such a config.json."""
    family, ours = from_hf(hf)
    return family, validate(default(model=ours)).model


def make(folder: Path, case: str, dtype: str = "float32", shard_bytes: int = 10**9, change=None, **keys):
    """Write a folder, and return its tensors by name, after `change` has changed them."""
    hf, folder = config_of(case, **keys), Path(folder)
    family, config = model_of(hf)
    draw, values = np.random.default_rng(0), {}
    for t in tensors(family, config):
        kind = "float32" if t.name.endswith(("correction_bias", "expert_bias")) else dtype
        values[t.name] = draw.normal(1.0 if "norm" in t.name else 0.0, 0.3, t.shape).astype(np.float32).astype(kind)
    values |= {name: values[of] for name, of in copies(family, config).items() if name != "lm_head.weight"}
    if change is not None:
        change(values)
    write(folder, hf, values, shard_bytes)
    return values


def write(folder, hf, values, shard_bytes=10**9):
    """config.json and the tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    plans = [Plan(name, str(value.dtype), value.shape) for name, value in values.items()]
    for _ in write_folder(folder, plans, values.__getitem__, shard_bytes):
        pass


def as_float8(values, block, kept=("norm", "embed", "head", "gate.weight", "bias")):
    """Weights as DeepSeek stores them: float8 with a scale for every block."""
    for name in [n for n in values if not any(word in n for word in kept)]:
        wide = values[name].astype(np.float32)
        rows, columns = (-(-n // b) for n, b in zip(wide.shape, block, strict=True))
        scale = np.random.default_rng(len(name)).uniform(0.5, 2.0, (rows, columns)).astype(np.float32)
        values[name] = wide.astype(ml_dtypes.float8_e4m3fn)
        values[name + "_scale_inv"] = scale
