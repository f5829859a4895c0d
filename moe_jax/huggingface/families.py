"""The model families of Hugging Face as tables: a new family is a `Family` here, and rows in `tensors` if need be.

`config_in` and `config_out` translate a config.json by these tables; neither knows a family by name.
"""

from moe_jax.huggingface.families_with_windows import FAMILIES_WITH_WINDOWS
from moe_jax.huggingface.family import (
    ANY,
    BASE,
    BIASED_ONLY,
    COMMON,
    DENSE_WIDTH,
    EVERY_LAYER,
    EXPERT_WIDTH,
    FIRST_DENSE,
    GATE_SCALE,
    GATED,
    GROUPED_KEYS,
    MIXTRAL_NAMES,
    MULTIPLIERS,
    NO_WINDOWS,
    NOAUX,
    NORMALIZED,
    ONE_GROUP,
    ONLY,
    QK_NORM,
    ROUTED_AND_SHARED,
    SHARED_EXPERT,
    SIGMOID_GROUPED,
    SOFTMAX_GROUPED,
    TIED,
    V3_GROUPS,
    V3_ROUTER,
    Family,
    Key,
    Rule,
    complete,
    without,
    words,
)
from moe_jax.huggingface.latent_families import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32, GLM4_MOE_LITE, GLM_MOE_DSA
from moe_jax.huggingface.layer_lists import BY_INTERVAL, BY_KIND, BY_STEP

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_types=("mixtral",),
    keys=(*BASE, *GROUPED_KEYS, Key("num_local_experts", "num_experts"), Key("intermediate_size", "expert_ffw_dim")),
    fixed=dict(attention="gqa", qk_norm="none", score="softmax", normalize_gates=True),
    holds=SOFTMAX_GROUPED | EVERY_LAYER,
    only=ONLY,
    writes=dict(sliding_window=None),
    renamed={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
    theta=1e6,
    **MIXTRAL_NAMES,
)

GRANITE_MOE = Family(  # Granite 3.0 and 3.1
    architecture="GraniteMoeForCausalLM",
    model_types=("granitemoe",),
    keys=(*MIXTRAL.keys, *(Key(name, name, 1.0) for name in MULTIPLIERS)),
    fixed=MIXTRAL.fixed,
    holds=without(MIXTRAL.holds, *MULTIPLIERS),
    only=ONLY,
    writes=dict(attention_bias=False),
    renamed={"mlp.gate.weight": "block_sparse_moe.router.layer.weight"},
    fused=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)

QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_types=("qwen2_moe",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        Key("num_experts", "num_experts"),
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("shared_expert_intermediate_size", "shared_ffw_dim"),
        Key("norm_topk_prob", "normalize_gates", False),
        Key("qkv_bias", "qkv_bias", True),
    ),
    fixed=dict(attention="gqa", qk_norm="none", score="softmax", num_shared_experts=1, shared_gate=True),
    holds=without(SOFTMAX_GROUPED, "qkv_bias") | {"shared_ffw_dim": ANY},
    only=ONLY | NO_WINDOWS,
    writes=dict(use_sliding_window=False, sliding_window=None),
    layers=BY_STEP,
    renamed=SHARED_EXPERT,
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_types=("qwen3_moe",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        Key("num_experts", "num_experts"),
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("norm_topk_prob", "normalize_gates", False),
    ),
    fixed=dict(attention="gqa", qk_norm="head", score="softmax"),
    holds=SOFTMAX_GROUPED,
    only=ONLY | {"use_qk_norm": (True,)},  # in the config.json of Qwen3-Coder
    writes=dict(attention_bias=False, use_sliding_window=False, sliding_window=None),
    copied={"num_experts": "num_local_experts"},  # transformers 5 writes the one, everything else reads the other
    layers=BY_STEP,
)

OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_types=("olmoe",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        Key("num_experts", "num_experts"),
        Key("intermediate_size", "expert_ffw_dim"),
        Key("norm_topk_prob", "normalize_gates", False),
    ),
    fixed=dict(attention="gqa", qk_norm="projection", score="softmax"),
    holds=SOFTMAX_GROUPED | EVERY_LAYER,
    only=ONLY,
    writes=dict(attention_bias=False, clip_qkv=None),
    rules=(
        Rule(
            lambda c: c.num_heads * c.head_dim == c.embed_dim,
            "num_heads={c.num_heads} x head_dim={c.head_dim} other than embed_dim={c.embed_dim}",
        ),
    ),
)

FLEX_OLMO = Family(
    architecture="FlexOlmoForCausalLM",
    model_types=("flex_olmo",),
    keys=OLMOE.keys,
    fixed={**OLMOE.fixed, "norm_after": True},
    holds=OLMOE.holds,
    only=without(ONLY, "clip_qkv"),
    writes=dict(attention_bias=False),
    renamed={
        "input_layernorm.weight": "post_attention_layernorm.weight",
        "post_attention_layernorm.weight": "post_feedforward_layernorm.weight",
    },
    theta=5e5,
)

GLM4_MOE = Family(  # GLM-4.5, 4.6 and 4.7
    architecture="Glm4MoeForCausalLM",
    model_types=("glm4_moe",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        *ROUTED_AND_SHARED,
        Key("first_k_dense_replace", "first_dense", 1),
        *V3_ROUTER,
        Key("attention_bias", "qkv_bias", False),
        QK_NORM,
    ),
    fixed=dict(attention="gqa", score="sigmoid", group_top=2),
    holds=without(SIGMOID_GROUPED, "qkv_bias", "partial_rotary_factor", "mtp_depth")
    | V3_GROUPS
    | {"qk_norm": ("none", "head")},
    only=BIASED_ONLY | NOAUX,
    writes={},
    partial=0.5,
    has_bias=True,
    predicts=True,
)

DOTS1 = Family(  # dots.llm1
    architecture="Dots1ForCausalLM",
    model_types=("dots1",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        *ROUTED_AND_SHARED,
        FIRST_DENSE,
        GATE_SCALE,
        NORMALIZED._replace(default=False),
        *ONE_GROUP,
    ),
    fixed=dict(attention="gqa", qk_norm="head", score="sigmoid", group_top=2),
    holds=SIGMOID_GROUPED | V3_GROUPS,
    only=ONLY | NOAUX | NO_WINDOWS | {"moe_layer_freq": (1,)},
    writes=dict(attention_bias=False, sliding_window=None, scoring_func="sigmoid"),
    windows_from="max_window_layers",
    has_bias=True,
)

SOLAR_OPEN = Family(
    architecture="SolarOpenForCausalLM",
    model_types=("solar_open",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        *ROUTED_AND_SHARED,
        GATE_SCALE,
        NORMALIZED,
        *ONE_GROUP,
        Key("attention_bias", "qkv_bias", False),
    ),
    fixed=dict(attention="gqa", qk_norm="none", score="sigmoid", group_top=2),
    holds=without(SIGMOID_GROUPED, "qkv_bias", "partial_rotary_factor") | V3_GROUPS | EVERY_LAYER,
    only=BIASED_ONLY | NOAUX | {"first_k_dense_replace": (0,), "use_qk_norm": (False,)},
    writes=dict(first_k_dense_replace=0, use_qk_norm=False),  # vLLM reads them
    theta=1e6,
    partial=1.0,
    unread=words("intermediate_size"),  # no layer is dense
    has_bias=True,
)

HY_V3 = Family(  # Hy3
    architecture="HYV3ForCausalLM",
    model_types=("hy_v3",),
    keys=(
        *BASE,
        *GROUPED_KEYS,
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("num_experts", "num_experts"),
        Key("num_shared_experts", "num_shared_experts", 1),
        Key("router_scaling_factor", "gate_scale"),
    ),
    fixed=dict(attention="gqa", qk_norm="head", score="sigmoid", normalize_gates=True),
    holds=without(SIGMOID_GROUPED, "moe_every"),
    only=ONLY
    | {
        "qk_norm": (True,),
        "route_norm": (True,),
        "moe_router_use_sigmoid": (True,),
        "moe_router_enable_expert_bias": (True,),
    },
    writes=dict(attention_bias=False, mlp_bias=False, qk_norm=True, route_norm=True),
    layers=BY_KIND,
    theta=11_158_840.0,
    leaves_out="model.layers.{}.",
    unread=words("enable_moe_fp32_combine enable_attention_fp32_softmax enable_lm_head_fp32"),  # where they round
    renamed={
        "mlp.gate.weight": "mlp.router.gate.weight",
        "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
    }
    | {f"mlp.shared_experts.{name}.weight": f"mlp.shared_mlp.{name}.weight" for name in GATED},
    has_bias=True,
)

MINIMAX_M2 = Family(  # MiniMax-M2, 2.5 and 2.7
    architecture="MiniMaxM2ForCausalLM",
    model_types=("minimax_m2",),
    keys=MIXTRAL.keys,
    fixed=dict(attention="gqa", qk_norm="projection", score="sigmoid", normalize_gates=True),
    holds=without(SIGMOID_GROUPED, "partial_rotary_factor")
    | EVERY_LAYER
    | {"gate_scale": (1.0,), "num_shared_experts": (0,)},
    only=without(ONLY, "partial_rotary_factor")
    | {
        "scoring_func": ("sigmoid",),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "use_routing_bias": (True,),
        "shared_intermediate_size": (0,),
        "attn_type_list": (1,),
    },
    writes=dict(scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer", use_routing_bias=True),
    theta=5e6,
    partial=1.0,
    rotary_dim=True,
    unread=words("mlp_intermediate_size mtp_transformer_layers num_mtp_modules use_mtp"),  # of modules not published
    renamed={
        "mlp.gate.weight": "block_sparse_moe.gate.weight",
        "mlp.gate.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
    },
    has_bias=True,
    **MIXTRAL_NAMES,
)

ERNIE4_5_MOE = Family(
    architecture="Ernie4_5_MoeForCausalLM",
    model_types=("ernie4_5_moe",),
    keys=(
        *COMMON,
        *GROUPED_KEYS,
        TIED._replace(default=True),
        DENSE_WIDTH,
        EXPERT_WIDTH,
        Key("moe_k", "top_k"),
        Key("moe_num_experts", "num_experts"),
        Key("moe_num_shared_experts", "num_shared_experts", 2),
    ),
    fixed=dict(attention="gqa", qk_norm="none", score="softmax", normalize_gates=True),
    holds=SOFTMAX_GROUPED | {"num_shared_experts": ANY},
    only=ONLY | {"use_bias": (False,), "moe_gate": ("topk",), "moe_gate_act": ("softmax",), "moe_norm_min": (1e-12,)},
    writes=dict(use_bias=False),
    rules=(
        Rule(
            lambda c: c.first_dense % c.moe_every == 0,
            "first_dense={c.first_dense} that moe_every={c.moe_every} does not divide",
        ),
    ),
    layers=BY_INTERVAL,
    theta=5e5,
    paired=True,
    unread=words("moe_capacity moe_use_aux_free"),  # of training
    bias_layout="1 x",
    renamed={"mlp.gate.e_score_correction_bias": "mlp.moe_statics.e_score_correction_bias"},
    has_bias=True,
)

FAMILIES = tuple(
    complete(family)
    for family in (
        MIXTRAL,
        GRANITE_MOE,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        FLEX_OLMO,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        DEEPSEEK_V32,
        GLM_MOE_DSA,
        GLM4_MOE_LITE,
        GLM4_MOE,
        DOTS1,
        SOLAR_OPEN,
        HY_V3,
        MINIMAX_M2,
        ERNIE4_5_MOE,
        *FAMILIES_WITH_WINDOWS,
    )
)
