"""The model families with DeepSeek's latent attention, as tables.

Of those with an indexer, which picks the tokens that attention sees, the indexer is left out: up to `index_topk` tokens
it picks all, so that such a model is exact there, and longer sequences are refused. It is written as DeepSeek-V3.
"""

from moe_jax.huggingface.family import (
    ANY,
    BASE,
    DENSE_WIDTH,
    FIRST_DENSE,
    GATE_SCALE,
    LATENT_HOLDS,
    LATENT_KEYS,
    MLA_ONLY,
    NOAUX,
    NOAUX_WRITES,
    ONE_GROUP,
    ROUTED_AND_SHARED,
    SOME,
    V3_HOLDS,
    V3_ROUTER,
    Family,
    Key,
    Rule,
    words,
)
from moe_jax.huggingface.layer_lists import BY_KIND

V2_METHODS = ("greedy", "group_limited_greedy")

DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_types=("deepseek_v2",),
    keys=(
        *BASE,
        DENSE_WIDTH,
        *ROUTED_AND_SHARED,
        FIRST_DENSE,
        *LATENT_KEYS,
        GATE_SCALE._replace(default=1.0),
        *ONE_GROUP,
    ),
    fixed=dict(attention="mla", score="softmax", normalize_gates=False, group_top=1),
    holds=LATENT_HOLDS | {"mtp_depth": (0,)},
    only=MLA_ONLY
    | {
        "scoring_func": ("softmax",),
        "norm_topk_prob": (False,),
        "topk_method": V2_METHODS,
    },
    writes=dict(attention_bias=False, mlp_bias=False, moe_layer_freq=1, scoring_func="softmax", norm_topk_prob=False),
    rules=(
        Rule(
            lambda c: c.embed_dim % c.num_heads == 0,
            "embed_dim={c.embed_dim} that num_heads={c.num_heads} does not divide",
        ),
    ),
    group_methods=V2_METHODS,
)

DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_types=("deepseek_v3", "kimi_k2"),
    keys=(*BASE, DENSE_WIDTH, *ROUTED_AND_SHARED, FIRST_DENSE, *LATENT_KEYS, *V3_ROUTER),
    fixed=dict(attention="mla", score="sigmoid", group_top=2),
    holds=V3_HOLDS | {"index_topk": ANY},
    only=MLA_ONLY | NOAUX,
    writes=dict(attention_bias=False, moe_layer_freq=1, rope_interleave=True) | NOAUX_WRITES,
    has_bias=True,
    predicts=True,
)

GLM4_MOE_LITE = Family(  # GLM-4.7-Flash: DeepSeek-V3, but for the list of layers
    architecture="Glm4MoeLiteForCausalLM",
    model_types=("glm4_moe_lite",),
    keys=(*BASE, DENSE_WIDTH, *ROUTED_AND_SHARED, *LATENT_KEYS, *V3_ROUTER),
    fixed=DEEPSEEK_V3.fixed,
    holds=V3_HOLDS,
    only=MLA_ONLY | NOAUX,
    writes=dict(attention_bias=False, rope_interleave=True, topk_method="noaux_tc"),
    layers=BY_KIND,
    has_bias=True,
    predicts=True,
)

DEEPSEEK_V32 = Family(
    architecture="DeepseekV32ForCausalLM",
    model_types=("deepseek_v32",),
    keys=(*GLM4_MOE_LITE.keys, Key("index_topk", "index_topk")),
    fixed=DEEPSEEK_V3.fixed,
    holds=V3_HOLDS | {"index_topk": SOME, "mtp_depth": (0,)},
    only=MLA_ONLY | NOAUX | {"layer_types": ("indexed_attention",)},
    writes={},
    written_as=DEEPSEEK_V3.architecture,
    layers=BY_KIND,
    unread=words("index_head_dim index_n_heads"),
    has_bias=True,
    leaves_out="model.layers.{}.",
    has_indexer=True,
)

GLM_MOE_DSA = DEEPSEEK_V32._replace(  # GLM-5; some of its layers reuse what the indexer of an earlier one picked
    architecture="GlmMoeDsaForCausalLM",
    model_types=("glm_moe_dsa",),
    unread=words(
        """
        index_head_dim index_n_heads indexer_rope_interleave indexer_types index_topk_freq index_topk_pattern
        index_skip_topk_offset index_share_for_mtp_iteration
        """
    ),
)
