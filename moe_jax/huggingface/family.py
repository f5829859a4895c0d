"""What a model family of Hugging Face is: its names, its keys, what its models can have, and what families share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.config import LongRopeConfig, ModelConfig

GATED = ("gate_proj", "up_proj", "down_proj")
MOST_LAYERS = 10**5  # a false config.json may name more than a list can hold


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def without(table: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The table without some of its rows."""
    return {name: value for name, value in table.items() if name not in names}


class Key(NamedTuple):
    """Their name of a key and ours; `default` applies where it is absent or null (None: it must be there).

    values: their value -> ours, where they differ.
    """

    name: str
    ours: str
    default: Any = None
    values: Mapping[Any, Any] = {}


def value_of(hf: Mapping[str, Any], key: Key) -> Any:
    """The value of a key in a config.json, as it is written there.

    Raises:
        ValueError: it is absent and has no default, or has none of the values that translate.
    """
    value = hf.get(key.name)
    value = key.default if value is None else value
    if value is None:
        raise ValueError(f"config.json has no {key.name}; give the model's own config.json.")
    if key.values and value not in list(key.values):
        known = " or ".join(map(repr, key.values))
        raise ValueError(f"config.json has {key.name}={value!r}, which must be {known}; correct it.")
    return value


def whole(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number of a config.json that is used before our own config checks it.

    Raises:
        ValueError: it is absent and has no default, or is no integer from 0 to `MOST_LAYERS`.
    """
    value = value_of(hf, Key(name, "", default))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_LAYERS:
        raise ValueError(
            f"config.json has {name}={value!r}, which must be an integer from 0 to {MOST_LAYERS}; correct it."
        )
    return value


class LayerList(NamedTuple):
    """How a config.json lists the layers that have experts.

    keys: their keys.
    sparse: config.json, number of layers -> the layers with experts, in rising order.
    written: "dense" or "moe" for every layer -> their keys.
    """

    keys: tuple[str, ...]
    sparse: Callable[[Mapping[str, Any], int], list[int]]
    written: Callable[[list[str]], dict[str, Any]]


class Windows(NamedTuple):
    """How a config.json says which layers have a sliding window (`sliding_window`), and which RoPE layers have.

    pattern: config.json -> letters as of `model.window_pattern`, where it has no `layer_types`.
    keys: those that this reads.
    rope: "all" have the same, or "local" ones only have any; "by_kind": `rope_parameters` has one for each kind;
        "by_layer": `layer_rope_theta` has a theta for each layer, 0 for none.
    may_lack: whether a model may have no layer with a window.
    listed: whether `layer_types` may list the kinds of layers; else all layers are of the same kind.
    """

    pattern: Callable[[Mapping[str, Any]], str]
    keys: tuple[str, ...] = ()
    rope: str = "all"
    may_lack: bool = True
    listed: bool = True


class Rule(NamedTuple):
    """A rule across our keys that a family's code relies on; `misfit` is formatted with the config as `c`."""

    holds: Callable[[ModelConfig], bool]
    misfit: str


class Family(NamedTuple):
    """One architecture: its names, how its keys translate, which models it holds, and its tensors.

    architecture: its class in transformers.
    spellings: other names of its class in published config.json files.
    model_types: the first one is written.
    keys: the keys that translate one to one.
    fixed: our keys that are the same in every such model.
    holds: our key -> the values that such a model can have; of fixed keys `complete` adds the one value.
    only: their key -> the values that our model has; a list of one value repeated counts as that value.
    writes: their keys that are the same in every such model.
    written_as: the architecture to which such models are exported; "": its own.
    rules: what else must hold of such a model.
    copied: their key -> another name under which it is written, too.
    group_methods: the values of `topk_method` without and with groups; the first is the default. Empty if it is fixed.
    layers: how the layers that have experts are listed; None: `keys` or `fixed` say it.
    windows: how those that have a sliding window are; None: there are none.
    repeated: their key, a list with a value for each layer -> the key whose value all of them must be.
    scales_by_width: their key that multiplies embeddings by the square root of their width.
    theta: the default of `rope_theta`.
    rope_types: the values of `rope_type`.
    partial: the default of `partial_rotary_factor`; None: every head rotates whole.
    rotary_dim: whether the number of rotated dimensions is a key, too.
    paired: whether RoPE rotates the pairs (2i, 2i + 1) of grouped-query attention.
    windows_from: their key that says from which layer on there is a sliding window.
    unread: their keys that change no logit of this family, beside `WITHOUT_EFFECT`.
    has_bias: whether the router has a selection bias.
    predicts: whether there is multi-token prediction.
    has_indexer: whether attention has an indexer, which is left out.
    leaves_out: how the names begin of the tensors of its modules of multi-token prediction, which are left out, because
        transformers does not read them; {} is the module's number among the layers. Empty: there are none.
    renamed: the name of a tensor in the tables of `tensors.py` -> this family's name of it.
    bias_layout: of the tensor with the selection bias, in the letters of `tensors.py`.
    experts, expert_names: the prefix of an expert's tensors, and the names of its gate, up and down.
    fused: instead of them, the names of the tensors of all gates and ups, and of all downs.
    in_turn: whether those are [E, in, out] with gates and ups in turn, and biases beside them, as in gpt-oss.
    """

    architecture: str
    model_types: tuple[str, ...]
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    holds: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    writes: Mapping[str, Any]
    written_as: str = ""
    spellings: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    copied: Mapping[str, str] = {}
    group_methods: tuple[str, ...] = ()
    layers: LayerList | None = None
    windows: Windows | None = None
    repeated: Mapping[str, str] = {}
    scales_by_width: str = ""
    theta: float = 10000.0
    rope_types: tuple[str, ...] = ("default", "yarn")
    partial: float | None = None
    rotary_dim: bool = False
    paired: bool = False
    windows_from: str = ""
    unread: frozenset[str] = frozenset()
    has_bias: bool = False
    predicts: bool = False
    leaves_out: str = ""
    has_indexer: bool = False
    renamed: Mapping[str, str] = {}
    bias_layout: str = "x"
    experts: str = "mlp.experts.{}"
    expert_names: tuple[str, str, str] = GATED
    fused: tuple[str, str] | None = None
    in_turn: bool = False


def complete(family: Family) -> Family:
    """The family, which holds only models with its fixed values."""
    return family._replace(holds={**family.holds, **{key: (value,) for key, value in family.fixed.items()}})


# --- keys -----------------------------------------------------------------------------------------------------

COMMON = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "embed_dim"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("rms_norm_eps", "norm_eps"),
    Key("initializer_range", "init_std", 0.02),
)
TIED = Key("tie_word_embeddings", "tied_embeddings", False)
BASE = (*COMMON, TIED, Key("num_experts_per_tok", "top_k"))

GROUPED_KEYS = (Key("num_key_value_heads", "num_kv_heads"), Key("head_dim", "head_dim"))

LATENT_KEYS = (
    Key("q_lora_rank", "q_lora_rank", 0),
    Key("kv_lora_rank", "kv_lora_rank"),
    Key("qk_nope_head_dim", "qk_nope_head_dim"),
    Key("qk_rope_head_dim", "qk_rope_head_dim"),
    Key("v_head_dim", "v_head_dim"),
)

DENSE_WIDTH = Key("intermediate_size", "ffw_dim")
EXPERT_WIDTH = Key("moe_intermediate_size", "expert_ffw_dim")

ROUTED_AND_SHARED = (
    EXPERT_WIDTH,
    Key("n_routed_experts", "num_experts"),
    Key("n_shared_experts", "num_shared_experts", 0),
)

FIRST_DENSE = Key("first_k_dense_replace", "first_dense", 0)

ONE_GROUP = (Key("n_group", "num_groups", 1), Key("topk_group", "top_groups", 1))  # where groups may be left out

# keys have no defaults where no tensor's shape would reveal a wrong guess
GATE_SCALE = Key("routed_scaling_factor", "gate_scale")
NORMALIZED = Key("norm_topk_prob", "normalize_gates", True)

V3_ROUTER = (GATE_SCALE, Key("n_group", "num_groups"), Key("topk_group", "top_groups"), NORMALIZED)

MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")  # Granite's

# the names of a shared expert's tensors where a family has only one
SHARED_EXPERT = {f"mlp.shared_experts.{name}.weight": f"mlp.shared_expert.{name}.weight" for name in GATED}

# the tensors of an expert of Mixtral
MIXTRAL_NAMES: dict[str, Any] = dict(experts="block_sparse_moe.experts.{}", expert_names=("w1", "w3", "w2"))

# one key for the biases of all four projections
BIASES = (Key("attention_bias", "qkv_bias", False), Key("attention_bias", "out_bias", False))
BIASES_ALIKE = Rule(
    lambda c: c.qkv_bias == c.out_bias, "qkv_bias={c.qkv_bias} and out_bias={c.out_bias}, which are one key there"
)

QK_NORM = Key("use_qk_norm", "qk_norm", False, {True: "head", False: "none"})

# --- our keys with the values that a model of a family can have. Ranges and tuples, because both know `in`. ---

SOME = range(1, 2**31)
ANY = range(2**31)

PLAIN = {
    "num_experts": SOME,
    "num_zero_experts": (0,),
    "class_starts": ((),),
    "index_topk": (0,),
    "longrope": (LongRopeConfig(),),
    "norm": ("rms",),
    "head_bias": (False,),
    "sparsemixer": (0.0,),
    "latent_dim": (0,),
    "expert_bias": (False,),
    "router_bias": (False,),
    "router_norm": ("none",),
    "router_scale": (1.0,),
    "expert_scale": (False,),
    "select_by": ("scores",),
    "gate_on": ("output",),
    "activation": ("swiglu",),
    "activation_limit": (0.0,),
    "norm_after": (False,),
    "sandwich_norm": (False,),
    "window": (0,),
    "attention_sinks": (False,),
    "attention_gate": ("none",),
    "out_bias": (False,),
    "attention_multiplier": (0.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "shared_ffw_dim": (0,),
    "shared_gate": (False,),
}

GROUPED = PLAIN | {
    "attention": ("gqa",),
    "qkv_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "num_groups": (1,),
    "mtp_depth": (0,),
}

SOFTMAX_GROUPED = GROUPED | {"score": ("softmax",), "gate_scale": (1.0,), "num_shared_experts": (0,)}

SIGMOID_GROUPED = GROUPED | {"score": ("sigmoid",), "num_shared_experts": SOME, "moe_every": (1,)}

V3_GROUPS = {"num_groups": SOME, "group_top": (2,)}

EVERY_LAYER = {"first_dense": (0,), "moe_every": (1,)}

LATENT_HOLDS = PLAIN | {"attention": ("mla",), "moe_every": (1,), "num_shared_experts": SOME}

V3_HOLDS = LATENT_HOLDS | {"score": ("sigmoid",), "group_top": (2,)}

# --- their keys with the values that our model has; others are refused ----------------------------------------

ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (),
    "partial_rotary_factor": (1.0,),
}

BIASED_ONLY = without(ONLY, "attention_bias", "partial_rotary_factor")

MLA_ONLY = ONLY | {"moe_layer_freq": (1,), "rope_interleave": (True,)}

NOAUX = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}

NO_WINDOWS = {"layer_types": ("full_attention",)}

NOAUX_WRITES = dict(scoring_func="sigmoid", topk_method="noaux_tc")

# --- of every family -------------------------------------------------------------------------------------------

# One key by two names; programs differ in which they read and write.
ALIASES = {
    "num_local_experts": "num_experts",
    "num_experts": "num_local_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "expert_hidden_dim": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
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

YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}

LONGROPE_KEYS = {
    "short_factor": "short_factor",
    "long_factor": "long_factor",
    "short_mscale": "short_mscale",
    "long_mscale": "long_mscale",
    "original_max_position_embeddings": "original_length",
}
