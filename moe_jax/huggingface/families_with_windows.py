"""The families whose layers have sliding windows, as tables like those of `families`."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config import YarnConfig
from moe_jax.huggingface.family import (
    ANY,
    BASE,
    BIASED_ONLY,
    BIASES,
    BIASES_ALIKE,
    DENSE_WIDTH,
    EVERY_LAYER,
    EXPERT_WIDTH,
    GATE_SCALE,
    GROUPED_KEYS,
    MIXTRAL_NAMES,
    MULTIPLIERS,
    NORMALIZED,
    ONE_GROUP,
    ONLY,
    SHARED_EXPERT,
    SIGMOID_GROUPED,
    SOFTMAX_GROUPED,
    SOME,
    V3_GROUPS,
    Family,
    Key,
    Rule,
    Windows,
    whole,
    without,
    words,
)
from moe_jax.huggingface.layer_lists import BY_KIND, BY_KIND_OR_ALL, BY_STEP

WITHOUT_WINDOWS = "G"


def _global_every(number: int) -> str:
    return "L" * (max(1, number) - 1) + "G"


def _of_exaone(hf: Mapping[str, Any]) -> str:
    pattern = hf.get("sliding_window_pattern", 4)
    if isinstance(pattern, int):
        return _global_every(pattern)
    if not isinstance(pattern, str) or not pattern or set(pattern) - set("LG"):
        raise ValueError(
            f"config.json has sliding_window_pattern={pattern!r}, which must be a number or letters L and G; "
            "correct it."
        )
    return pattern


EXAONE_MOE = Family(  # K-EXAONE
    architecture="ExaoneMoeForCausalLM",
    model_types=("exaone_moe",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("num_experts", "num_experts"),
        Key("num_shared_experts", "num_shared_experts", 1),
        GATE_SCALE,
        NORMALIZED,
        *ONE_GROUP,
    ),
    fixed=dict(attention="gqa", qk_norm="head", score="sigmoid", group_top=2),
    holds=without(SIGMOID_GROUPED, "moe_every", "window") | V3_GROUPS | {"window": SOME},
    only=ONLY | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    writes={},
    layers=BY_KIND,
    windows=Windows(_of_exaone, ("sliding_window_pattern",), "local", may_lack=False),
    leaves_out="mtp.",
    unread=words("is_moe_layer"),  # the tensors tell
    renamed={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
    has_bias=True,
)


def _of_afmoe(hf: Mapping[str, Any]) -> str:
    return _global_every(whole(hf, "global_attn_every_n_layers", 4))


AFMOE = Family(  # Arcee's Trinity
    architecture="AfmoeForCausalLM",
    model_types=("afmoe",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("num_experts", "num_experts"),
        Key("num_shared_experts", "num_shared_experts", 2),
        Key("num_dense_layers", "first_dense", 1),
        Key("route_scale", "gate_scale"),
        *BIASES,
    ),
    fixed=dict(
        attention="gqa",
        qk_norm="head",
        score="sigmoid",
        normalize_gates=True,
        attention_gate="element",
        sandwich_norm=True,
    ),
    holds=without(SIGMOID_GROUPED, "qkv_bias", "out_bias", "embedding_multiplier")
    | {
        "window": SOME,
        "gate_activation": ("sigmoid",),
    },
    only=BIASED_ONLY | {"score_func": ("sigmoid",), "route_norm": (True,), "n_group": (1,), "topk_group": (1,)},
    writes={},
    rules=(
        BIASES_ALIKE,
        Rule(
            lambda c: c.embedding_multiplier in (1.0, c.embed_dim**0.5),
            "embedding_multiplier={c.embedding_multiplier} other than 1 or the square root of embed_dim={c.embed_dim}",
        ),
    ),
    windows=Windows(_of_afmoe, ("global_attn_every_n_layers",), "local", may_lack=False),
    scales_by_width="mup_enabled",
    unread=words("load_balance_coeff use_grouped_mm"),  # of training, and of how products are computed
    renamed={
        "mlp.gate.weight": "mlp.router.gate.weight",
        "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
    },
    has_bias=True,
)

MELLUM = Family(  # Mellum 2
    architecture="MellumForCausalLM",
    model_types=("mellum",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("num_experts", "num_experts"),
        Key("norm_topk_prob", "normalize_gates", True),
        *BIASES,
    ),
    fixed=dict(attention="gqa", qk_norm="head", score="softmax"),
    holds=without(SOFTMAX_GROUPED, "qkv_bias", "out_bias") | {"window": ANY},
    only=without(ONLY, "attention_bias"),
    writes={},
    rules=(BIASES_ALIKE,),
    copied={"num_experts": "num_local_experts"},
    layers=BY_KIND_OR_ALL,
    windows=Windows(lambda hf: WITHOUT_WINDOWS, rope="by_kind"),
    theta=5e5,
    leaves_out="mtp.",
    unread=words("mtp_layer_types mtp_mlp_layer_types"),  # of modules that are left out
)

LAGUNA = Family(
    architecture="LagunaForCausalLM",
    model_types=("laguna",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("num_experts", "num_experts"),
        Key("shared_expert_intermediate_size", "shared_ffw_dim"),
        Key("moe_routed_scaling_factor", "gate_scale", 1.0),
        Key("gating", "attention_gate", True, {True: "head", "per-head": "head", "per-element": "element"}),
        *BIASES,
    ),
    fixed=dict(
        attention="gqa",
        qk_norm="head",
        score="sigmoid",
        normalize_gates=True,
        num_shared_experts=1,
        gate_activation="softplus",
    ),
    holds=without(SIGMOID_GROUPED, "moe_every", "qkv_bias", "out_bias", "partial_rotary_factor")
    | {
        "shared_ffw_dim": ANY,
        "window": ANY,
        "attention_gate": ("head", "element"),
    },
    only=without(BIASED_ONLY, "partial_rotary_factor")
    | {"moe_apply_router_weight_on_input": (False,), "moe_router_logit_softcapping": (0, 0.0)},
    writes={},
    rules=(BIASES_ALIKE,),
    layers=BY_KIND,
    windows=Windows(lambda hf: WITHOUT_WINDOWS, rope="by_kind"),
    repeated={"num_attention_heads_per_layer": "num_attention_heads"},
    theta=5e5,
    partial=1.0,
    renamed={
        "mlp.gate.e_score_correction_bias": "mlp.experts.e_score_correction_bias",
        "self_attn.gate_proj.weight": "self_attn.g_proj.weight",
    }
    | SHARED_EXPERT,
    has_bias=True,
)

GRANITE_MOE_SWA = Family(
    architecture="GraniteMoeSWAForCausalLM",
    model_types=("granitemoe_swa",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        Key("num_local_experts", "num_experts"),
        Key("intermediate_size", "expert_ffw_dim"),
        *(Key(name, name, 1.0) for name in MULTIPLIERS),
        *BIASES,
    ),
    fixed=dict(attention="gqa", qk_norm="none", score="softmax", normalize_gates=True, attention_sinks=True),
    holds=without(SOFTMAX_GROUPED, "qkv_bias", "out_bias", *MULTIPLIERS) | EVERY_LAYER | {"window": ANY},
    only=BIASED_ONLY | {"shared_intermediate_size": (0,), "partial_rotary_factor": (1.0,)},
    writes=dict(shared_intermediate_size=0),
    rules=(BIASES_ALIKE,),
    windows=Windows(lambda hf: "GLLL", ("layer_rope_theta",), rope="by_layer"),
    renamed={"mlp.gate.weight": "block_sparse_moe.router.weight"},
    fused=("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
)


def _of_flint(hf: Mapping[str, Any]) -> str:
    count = whole(hf, "num_hidden_layers")
    return "".join("G" if i < 2 or i % 4 == 1 or i == count - 1 else "L" for i in range(count))


FLINT = Family(
    architecture="FlintForCausalLM",
    model_types=("flint",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("num_experts", "num_experts"),
        Key("shared_expert_intermediate_size", "shared_ffw_dim"),
        NORMALIZED,
        *BIASES,
    ),
    fixed=dict(attention="gqa", qk_norm="head", score="sigmoid", num_shared_experts=1, attention_sinks=True),
    holds=without(SIGMOID_GROUPED, "moe_every", "qkv_bias", "out_bias")
    | {
        "gate_scale": (1.0,),
        "shared_ffw_dim": ANY,
        "window": SOME,
    },
    only=BIASED_ONLY | {"partial_rotary_factor": (1.0,)},
    writes={},
    rules=(BIASES_ALIKE,),
    layers=BY_STEP,
    windows=Windows(_of_flint, rope="local", may_lack=False),
    renamed={"self_attn.sinks": "self_attn.softmax_offset"} | SHARED_EXPERT,
)

KOLIBRI = Family(
    architecture="Kolibri1ForCausalLM",
    model_types=("kolibri1",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        EXPERT_WIDTH,
        Key("num_experts", "num_experts"),
        Key("shared_expert_intermediate_size", "shared_ffw_dim"),
        NORMALIZED,
    ),
    fixed=dict(
        attention="gqa",
        qk_norm="head",
        score="sigmoid",
        num_shared_experts=1,
        sandwich_norm=True,
        select_by="logits",
    ),
    holds=without(SIGMOID_GROUPED, "moe_every")
    | EVERY_LAYER
    | {
        "gate_scale": (1.0,),
        "shared_ffw_dim": ANY,
        "window": SOME,
    },
    only=ONLY,
    writes={},
    windows=Windows(lambda hf: "LLLLG", rope="local", may_lack=False),
    renamed={
        "post_attention_layernorm.weight": "post_attn_norm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "post_mlp_layernorm.weight": "post_ffn_norm.weight",
        "mlp.gate.e_score_correction_bias": "moe.router.expert_bias",
    },
    has_bias=True,
)

GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_types=("gpt_oss",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        Key("num_local_experts", "num_experts"),
        Key("intermediate_size", "expert_ffw_dim"),
        Key("swiglu_limit", "activation_limit", 7.0),
        *(key._replace(default=True) for key in BIASES),
    ),
    fixed=dict(
        attention="gqa",
        qk_norm="none",
        score="softmax",
        normalize_gates=True,
        attention_sinks=True,
        activation="swiglu_oai",
        router_bias=True,
        expert_bias=True,
    ),
    holds=without(SOFTMAX_GROUPED, "qkv_bias", "out_bias", "activation_limit")
    | EVERY_LAYER
    | {
        "window": ANY,
    },
    only=BIASED_ONLY | {"partial_rotary_factor": (1.0,), "swiglu_alpha": (1.702,)},
    writes=dict(swiglu_alpha=1.702),
    rules=(BIASES_ALIKE,),
    windows=Windows(lambda hf: "LG"),
    theta=150000.0,
    unread=words("initial_context_length"),  # YaRN's original length, under another name
    renamed={"mlp.gate.weight": "mlp.router.weight", "mlp.gate.bias": "mlp.router.bias"},
    fused=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    in_turn=True,
)

PHIMOE = Family(  # Phi-3.5-MoE, whose layers have the same window, if any
    architecture="PhimoeForCausalLM",
    spellings=("PhiMoEForCausalLM",),
    model_types=("phimoe",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        Key("num_local_experts", "num_experts"),
        Key("intermediate_size", "expert_ffw_dim"),
        Key("lm_head_bias", "head_bias", False),
        Key("router_jitter_noise", "sparsemixer", 0.01),
        *BIASES,
    ),
    fixed=dict(attention="gqa", qk_norm="none", score="softmax", normalize_gates=False, norm="layer"),
    holds=without(SOFTMAX_GROUPED, "qkv_bias", "out_bias", "longrope", "head_bias", "sparsemixer")
    | EVERY_LAYER
    | {
        "window": ANY,
        "yarn": (YarnConfig(),),
    },
    only=without(ONLY, "attention_bias"),
    writes={},
    rules=(
        BIASES_ALIKE,
        Rule(lambda c: c.sparsemixer > 0, "sparsemixer={c.sparsemixer}"),
        Rule(lambda c: c.top_k == 2, "top_k={c.top_k}"),
        Rule(
            lambda c: len(c.longrope.short_factor) == len(c.longrope.long_factor),
            "longrope.long_factor={c.longrope.long_factor}",
        ),
    ),
    windows=Windows(lambda hf: WITHOUT_WINDOWS if hf.get("sliding_window") is None else "L", listed=False),
    theta=1e6,
    rope_types=("default", "longrope"),
    unread=words("input_jitter_noise original_max_position_embeddings"),  # of training; beside RoPE's keys, among them
    renamed={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
    **MIXTRAL_NAMES,
)

FAMILIES_WITH_WINDOWS = (EXAONE_MOE, AFMOE, MELLUM, LAGUNA, GRANITE_MOE_SWA, FLINT, KOLIBRI, GPT_OSS, PHIMOE)
