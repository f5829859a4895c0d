"""The families with experts that transformers has and we do not: which of ours is nearest, and what it lacks."""

from typing import NamedTuple


class Other(NamedTuple):
    """nearest: the most similar architecture that we do have. lacks: what our model would need, as a phrase."""

    nearest: str
    lacks: str


MIXTRAL, GRANITE, QWEN2 = "MixtralForCausalLM", "GraniteMoeForCausalLM", "Qwen2MoeForCausalLM"
QWEN3, V3 = "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"
GLM, DOTS, MINIMAX = "Glm4MoeForCausalLM", "Dots1ForCausalLM", "MiniMaxM2ForCausalLM"
AFMOE, FLINT = "AfmoeForCausalLM", "FlintForCausalLM"

WINDOWS = "attention within a sliding window in some layers"
INDEXER = "sparse attention, whose keys an indexer picks"
DELTA = "layers of linear attention (gated DeltaNet)"
RELATIVE = "learned relative positions, short convolutions, sliding windows and residuals between distant blocks"

# model_type -> Other
OTHERS = {
    "aria_text": Other(MIXTRAL, "shared experts beside softmax scores of the chosen experts, and fused expert tensors"),
    "axk1": Other(V3, "a norm behind the experts"),
    "axk2": Other(V3, INDEXER),
    "bailing_hybrid": Other(V3, DELTA),
    "beam": Other(AFMOE, "residuals scaled by depth"),
    "cohere2_moe": Other(MIXTRAL, f"LayerNorm, attention beside the feed-forward, and {WINDOWS}"),
    "dbrx": Other(MIXTRAL, "LayerNorm, fused and clipped queries, keys and values, and fused expert tensors"),
    "deepseek_v4": Other(V3, "hyper-connections, and compressed attention with sinks"),
    "doge": Other(MIXTRAL, "masks that are computed from values, and experts of single vectors behind product keys"),
    "dots3_note": Other(V3, f"{INDEXER}, and {WINDOWS}"),
    "dots3_note_text": Other(V3, f"{INDEXER}, and {WINDOWS}"),
    "gemma4": Other(QWEN3, f"a dense layer beside the experts, norms before and after each layer, and {WINDOWS}"),
    "gemma4_text": Other(QWEN3, f"a dense layer beside the experts, norms before and after each layer, and {WINDOWS}"),
    "granitemoehybrid": Other(GRANITE, "Mamba layers"),
    "granitemoeshared": Other(GRANITE, "a shared expert, in fused tensors"),
    "hunyuan_v1_moe": Other(QWEN3, "norms of queries and keys behind RoPE, and a shared expert without a gate"),
    "hy_v4": Other(V3, f"hyper-connections, attention sinks, clamped experts, and {INDEXER}"),
    "inkling_text": Other(DOTS, RELATIVE),
    "inkling2_text": Other(DOTS, RELATIVE),
    "inkling2_loop_text": Other(DOTS, f"{RELATIVE}, and layers that are run again"),
    "jamba": Other(MIXTRAL, "Mamba layers"),
    "jetmoe": Other(MIXTRAL, "experts in attention, and fused expert tensors"),
    "kimi_linear": Other(V3, f"{DELTA}, and latent attention without RoPE"),
    "lara_mini": Other(QWEN2, f"{DELTA}, and {WINDOWS}"),
    "lfm2_moe": Other(DOTS, "layers of short convolutions"),
    "llama4": Other(MIXTRAL, "attention in chunks, and layers without RoPE"),
    "llama4_text": Other(MIXTRAL, "attention in chunks, and layers without RoPE"),
    "longcat_flash": Other(V3, "two attentions a layer, with the experts beside the second, and scaled latents"),
    "mimo_v2_flash": Other(
        FLINT,
        "sinks in layers with a window only, which have twice the heads of keys, and scaled values of another width",
    ),
    "minimax": Other(MIXTRAL, "layers of linear attention (lightning), and weighted residuals"),
    "minimax_m3_vl_text": Other(MINIMAX, f"{INDEXER}, and clamped experts"),
    "nemotron_h": Other(DOTS, "Mamba-2 layers"),
    "qwen3_5_moe": Other(QWEN2, f"{DELTA}, and gated attention"),
    "qwen3_5_moe_text": Other(QWEN2, f"{DELTA}, and gated attention"),
    "qwen3_next": Other(QWEN2, f"{DELTA}, and gated attention"),
    "qwen4_exp": Other(QWEN2, f"{DELTA}, {INDEXER}, and embeddings of n-grams"),
    "qwen4_exp_text": Other(QWEN2, f"{DELTA}, {INDEXER}, and embeddings of n-grams"),
    "sarvam_mla": Other(V3, "nothing but tables of its keys, whose defaults differ"),
    "sarvam_moe": Other(GLM, "fused queries, keys and values"),
    "zaya": Other(MIXTRAL, f"convolutions in attention, a router with layers of its own, and {WINDOWS}"),
}
