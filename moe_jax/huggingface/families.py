"""The model families of Hugging Face as tables: a new family is a `Family` here, and rows in `tensors` if need be.

`config_in` and `config_out` translate a config.json by these tables; neither knows a family by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.config import ModelConfig


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


class Key(NamedTuple):
    """Their name of a key and ours; `default` applies where it is absent or null (None: it must be there)."""

    name: str
    ours: str
    default: Any = None


COMMON = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "embed_dim"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("num_experts_per_tok", "top_k"),
    Key("rms_norm_eps", "norm_eps"),
    Key("tie_word_embeddings", "tied_embeddings", False),
    Key("initializer_range", "init_std", 0.02),
)

GROUPED_KEYS = (Key("num_key_value_heads", "num_kv_heads"), Key("head_dim", "head_dim"))

DEEPSEEK_KEYS = (
    Key("intermediate_size", "ffw_dim"),
    Key("moe_intermediate_size", "expert_ffw_dim"),
    Key("n_routed_experts", "num_experts"),
    Key("n_shared_experts", "num_shared_experts", 0),
    Key("first_k_dense_replace", "first_dense", 0),
    Key("q_lora_rank", "q_lora_rank", 0),
    Key("kv_lora_rank", "kv_lora_rank"),
    Key("qk_nope_head_dim", "qk_nope_head_dim"),
    Key("qk_rope_head_dim", "qk_rope_head_dim"),
    Key("v_head_dim", "v_head_dim"),
)

V2_ROUTER = (
    Key("routed_scaling_factor", "gate_scale", 1.0),
    Key("n_group", "num_groups", 1),
    Key("topk_group", "top_groups", 1),
)

V3_ROUTER = (  # no defaults for the first three, because no tensor's shape would reveal a wrong guess
    Key("routed_scaling_factor", "gate_scale"),
    Key("n_group", "num_groups"),
    Key("topk_group", "top_groups"),
    Key("norm_topk_prob", "normalize_gates", True),
)

# Our keys with the values that a model of a family can have. Ranges and tuples, because both know `in`.
SOME = range(1, 2**31)

PLAIN = {"num_experts": SOME, "num_zero_experts": (0,), "class_starts": ((),)}

SOFTMAX_GROUPED = PLAIN | {
    "attention": ("gqa",),
    "score": ("softmax",),
    "gate_scale": (1.0,),
    "num_shared_experts": (0,),
    "num_groups": (1,),
    "mtp_depth": (0,),
}

EVERY_LAYER = {"first_dense": (0,), "moe_every": (1,)}

LATENT_HOLDS = PLAIN | {"attention": ("mla",), "moe_every": (1,), "num_shared_experts": SOME}

# Their keys with the values that our model has; others are refused.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (),
    "partial_rotary_factor": (1.0,),
}

MLA_ONLY = ONLY | {"moe_layer_freq": (1,), "rope_interleave": (True,)}

GATED = ("gate_proj", "up_proj", "down_proj")


class Rule(NamedTuple):
    """A rule across our keys that a family's code relies on; `misfit` is formatted with the config as `c`."""

    holds: Callable[[ModelConfig], bool]
    misfit: str


class Family(NamedTuple):
    """One architecture: its names, how its keys translate, which models it holds, and its tensors.

    architecture: its class in transformers.
    model_types: the first one is written.
    keys: the keys that translate one to one.
    fixed: our keys that are the same in every such model.
    holds: our key -> the values that such a model can have.
    only: their key -> the values that our model has.
    writes: their keys that are the same in every such model.
    rules: what else must hold of such a model.
    copied: their key -> another name under which it is written, too.
    group_methods: the values of `topk_method` without and with groups; the first is the default. Empty if it is fixed.
    lists_layers: whether `mlp_only_layers` and `decoder_sparse_step` name the layers that have experts.
    theta: the default of `rope_theta`.
    has_bias: whether the router has a selection bias.
    predicts: whether there is multi-token prediction.
    renamed: the name of a tensor in the tables of `tensors.py` -> this family's name of it.
    experts, expert_names: the prefix of an expert's tensors, and the names of its gate, up and down.
    """

    architecture: str
    model_types: tuple[str, ...]
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    holds: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    writes: Mapping[str, Any]
    rules: tuple[Rule, ...] = ()
    copied: Mapping[str, str] = {}
    group_methods: tuple[str, ...] = ()
    lists_layers: bool = False
    theta: float = 10000.0
    has_bias: bool = False
    predicts: bool = False
    renamed: Mapping[str, str] = {}
    experts: str = "mlp.experts.{}"
    expert_names: tuple[str, str, str] = GATED


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_types=("mixtral",),
    keys=(*COMMON, *GROUPED_KEYS, Key("num_local_experts", "num_experts"), Key("intermediate_size", "expert_ffw_dim")),
    fixed=dict(attention="gqa", qk_norm="none", score="softmax", normalize_gates=True),
    holds=SOFTMAX_GROUPED | EVERY_LAYER | {"qk_norm": ("none",), "normalize_gates": (True,)},
    only=ONLY,
    writes=dict(sliding_window=None),
    renamed={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
    experts="block_sparse_moe.experts.{}",
    expert_names=("w1", "w3", "w2"),
    theta=1e6,
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_types=("qwen3_moe",),
    keys=(
        *COMMON,
        *GROUPED_KEYS,
        Key("num_experts", "num_experts"),
        Key("intermediate_size", "ffw_dim"),
        Key("moe_intermediate_size", "expert_ffw_dim"),
        Key("norm_topk_prob", "normalize_gates", False),
    ),
    fixed=dict(attention="gqa", qk_norm="head", score="softmax"),
    holds=SOFTMAX_GROUPED | {"qk_norm": ("head",)},
    only=ONLY | {"use_qk_norm": (True,)},  # in the config.json of Qwen3-Coder
    writes=dict(attention_bias=False, use_sliding_window=False, sliding_window=None, decoder_sparse_step=1),
    copied={"num_experts": "num_local_experts"},  # transformers 5 writes the one, everything else reads the other
    lists_layers=True,
)

OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_types=("olmoe",),
    keys=(
        *COMMON,
        *GROUPED_KEYS,
        Key("num_experts", "num_experts"),
        Key("intermediate_size", "expert_ffw_dim"),
        Key("norm_topk_prob", "normalize_gates", False),
    ),
    fixed=dict(attention="gqa", qk_norm="projection", score="softmax"),
    holds=SOFTMAX_GROUPED | EVERY_LAYER | {"qk_norm": ("projection",)},
    only=ONLY,
    writes=dict(attention_bias=False, clip_qkv=None),
    rules=(
        Rule(
            lambda c: c.num_heads * c.head_dim == c.embed_dim,
            "num_heads={c.num_heads} x head_dim={c.head_dim} other than embed_dim={c.embed_dim}",
        ),
    ),
)

V2_METHODS = ("greedy", "group_limited_greedy")

DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_types=("deepseek_v2",),
    keys=(*COMMON, *DEEPSEEK_KEYS, *V2_ROUTER),
    fixed=dict(attention="mla", score="softmax", normalize_gates=False, group_top=1),
    holds=LATENT_HOLDS | {"score": ("softmax",), "normalize_gates": (False,), "group_top": (1,), "mtp_depth": (0,)},
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
    keys=(*COMMON, *DEEPSEEK_KEYS, *V3_ROUTER),
    fixed=dict(attention="mla", score="sigmoid", group_top=2),
    holds=LATENT_HOLDS | {"score": ("sigmoid",), "group_top": (2,)},
    only=MLA_ONLY | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    writes=dict(
        attention_bias=False,
        moe_layer_freq=1,
        rope_interleave=True,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
    ),
    has_bias=True,
    predicts=True,
)

FAMILIES = (MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3)

# One key by two names; programs differ in which they read and write.
ALIASES = {
    "num_local_experts": "num_experts",
    "num_experts": "num_local_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# Keys that we keep for other programs and do not read.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")

# Keys that change no logit: of training, of caches and outputs, of other programs. `auto_map` names code that comes
# with a checkpoint; it is never run.
WITHOUT_EFFECT = words(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attention_dropout auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size ep_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores prefix pretraining_tp problem_type
    pruned_heads qk_head_dim remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id seq_aux suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """
).union(CARRIED)

# Keys with rules of their own, in every family
READ_APART = words("rope_theta rope_scaling rope_parameters quantization_config sliding_window use_sliding_window")

SPARSE_KEYS = {"decoder_sparse_step", "mlp_only_layers"}  # of families with `lists_layers`

YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
