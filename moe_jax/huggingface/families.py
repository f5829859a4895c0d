"""The model families of Hugging Face: their config.json in our configuration, and back.

All that tells one family from another is data: tables of keys, with the values that our model has. A key or a value
that we could only ignore is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.config import ModelConfig, did_you_mean
from moe_jax.model.block import layout

# --- tables of keys -------------------------------------------------------------------------------------------


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


class Key(NamedTuple):
    """A key of theirs and ours; `default` where it is absent or null (None: it must be there)."""

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


V3_ROUTER = (  # no tensor's shape would tell a wrong guess of the first three
    Key("routed_scaling_factor", "gate_scale"),
    Key("n_group", "num_groups"),
    Key("topk_group", "top_groups"),
    Key("norm_topk_prob", "normalize_gates", True),
)


# What a model of ours must be to be one of theirs. Ranges and tuples, for both know `in`.
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


# Keys of theirs with the values that our model has; another one is refused.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (),
    "partial_rotary_factor": (1.0,),
}


MLA_ONLY = ONLY | {"moe_layer_freq": (1,), "rope_interleave": (True,)}


GATED = ("gate_proj", "up_proj", "down_proj")


class Family(NamedTuple):
    """One architecture: its names, how keys translate, what it holds, and its tensors."""

    architecture: str
    model_types: tuple[str, ...]  # the first is what we write
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]  # of our keys, what every such model has
    holds: Mapping[str, Any]  # our key -> the values that it can have
    only: Mapping[str, tuple[Any, ...]]  # their key -> the values that we have
    writes: Mapping[str, Any]  # more keys of theirs, always the same
    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts.{}"
    expert_names: tuple[str, str, str] = GATED
    theta: float = 10000.0
    has_bias: bool = False
    predicts: bool = False


MIXTRAL = Family(
    "MixtralForCausalLM",
    ("mixtral",),
    (*COMMON, *GROUPED_KEYS, Key("num_local_experts", "num_experts"), Key("intermediate_size", "expert_ffw_dim")),
    dict(attention="gqa", qk_norm="none", score="softmax", normalize_gates=True),
    SOFTMAX_GROUPED | EVERY_LAYER | {"qk_norm": ("none",), "normalize_gates": (True,)},
    ONLY,
    dict(sliding_window=None),
    router="block_sparse_moe.gate.weight",
    experts="block_sparse_moe.experts.{}",
    expert_names=("w1", "w3", "w2"),
    theta=1e6,
)


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    ("qwen3_moe",),
    (
        *COMMON,
        *GROUPED_KEYS,
        Key("num_experts", "num_experts"),
        Key("intermediate_size", "ffw_dim"),
        Key("moe_intermediate_size", "expert_ffw_dim"),
        Key("norm_topk_prob", "normalize_gates", False),
    ),
    dict(attention="gqa", qk_norm="head", score="softmax"),
    SOFTMAX_GROUPED | {"qk_norm": ("head",)},
    ONLY | {"use_qk_norm": (True,)},  # written in Qwen3-Coder's
    dict(attention_bias=False, use_sliding_window=False, sliding_window=None, decoder_sparse_step=1),
)


OLMOE = Family(
    "OlmoeForCausalLM",
    ("olmoe",),
    (
        *COMMON,
        *GROUPED_KEYS,
        Key("num_experts", "num_experts"),
        Key("intermediate_size", "expert_ffw_dim"),
        Key("norm_topk_prob", "normalize_gates", False),
    ),
    dict(attention="gqa", qk_norm="projection", score="softmax"),
    SOFTMAX_GROUPED | EVERY_LAYER | {"qk_norm": ("projection",)},
    ONLY,
    dict(attention_bias=False, clip_qkv=None),
)


DEEPSEEK_V2 = Family(
    "DeepseekV2ForCausalLM",
    ("deepseek_v2",),
    (*COMMON, *DEEPSEEK_KEYS, *V2_ROUTER),
    dict(attention="mla", score="softmax", normalize_gates=False, group_top=1),
    LATENT_HOLDS | {"score": ("softmax",), "normalize_gates": (False,), "group_top": (1,), "mtp_depth": (0,)},
    MLA_ONLY
    | {
        "scoring_func": ("softmax",),
        "norm_topk_prob": (False,),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    dict(attention_bias=False, mlp_bias=False, moe_layer_freq=1, scoring_func="softmax", norm_topk_prob=False),
)


DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    ("deepseek_v3", "kimi_k2"),
    (*COMMON, *DEEPSEEK_KEYS, *V3_ROUTER),
    dict(attention="mla", score="sigmoid", group_top=2),
    LATENT_HOLDS | {"score": ("sigmoid",), "group_top": (2,)},
    MLA_ONLY | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    dict(
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


# The same key by another name, and what is carried along and read by others only
ALIASES = {
    "num_local_experts": "num_experts",
    "num_experts": "num_local_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}


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


# Read by name below, in every family
MOST_LAYERS = 10**5  # a config that lies may name more than a list can hold


READ_APART = words("rope_theta rope_scaling rope_parameters quantization_config sliding_window use_sliding_window")


SPARSE_KEYS = {"decoder_sparse_step", "mlp_only_layers"}  # Qwen3-MoE's


YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


# --- their config.json to ours --------------------------------------------------------------------------------


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: none of ours.
    """
    names, kind = hf.get("architectures") or [], hf.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types and (not names or names == [family.architecture]):
            return family
    known = ", ".join(f"{f.architecture} ({' or '.join(f.model_types)})" for f in FAMILIES)
    raise ValueError(f"config.json is of architectures={names} and model_type={kind!r}; known are {known}.")


def from_hf(hf: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family and the keys of our `ModelConfig` that a config.json means.

    `mtp_depth` is what it says, though a checkpoint may come without those modules.

    Raises:
        ValueError: a key or a value that this family, or our model, does not have.
    """
    family, hf = family_of(hf), dict(hf)
    _rename_aliases(family, hf)
    _refuse_unknown(family, hf)
    hf = _complete(family, hf)
    ours = dict(family.fixed)
    for key in family.keys:
        ours[key.ours] = _value(hf, key)
    ours |= _rope(family, hf)
    if family.predicts:
        ours["mtp_depth"] = _whole(hf, "num_nextn_predict_layers", 0)
    if family is QWEN3_MOE:
        ours["first_dense"], ours["moe_every"] = _sparse_layers(hf)
    if hf.get("topk_method") == "greedy" or (family is DEEPSEEK_V2 and not hf.get("topk_method")):
        ours["num_groups"] = ours["top_groups"] = 1
    return family, ours


def _value(hf: Mapping[str, Any], key: Key) -> Any:
    value = hf.get(key.name)
    value = key.default if value is None else value
    if value is None:
        raise ValueError(f"config.json has no {key.name}; give the model's own config.json.")
    return value


def _whole(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number that we reckon with before our own config checks it."""
    value = _value(hf, Key(name, "", default))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_LAYERS:
        raise ValueError(
            f"config.json has {name}={value!r}, which must be an integer from 0 to {MOST_LAYERS}; correct it."
        )
    return value


def _rename_aliases(family: Family, hf: dict[str, Any]) -> None:
    """Give a key that has two names the family's own, in place."""
    wanted = {key.name for key in family.keys} | {"num_nextn_predict_layers"}
    for name, other in ALIASES.items():
        if name in hf and other in wanted and name not in wanted:
            value = hf.pop(name)
            if hf.setdefault(other, value) != value:
                raise ValueError(
                    f"config.json has {name}={value!r} and {other}={hf[other]!r}, which are one key; remove one."
                )


def _refuse_unknown(family: Family, hf: Mapping[str, Any]) -> None:
    """Raise a ValueError at the first key or value that we could only ignore."""
    read = {key.name for key in family.keys} | WITHOUT_EFFECT | READ_APART
    read |= SPARSE_KEYS if family is QWEN3_MOE else set()
    read |= {"num_nextn_predict_layers"} if family.predicts else set()
    read |= {"head_dim", "num_key_value_heads"}  # latent attention has one of each head
    for name, value in hf.items():
        if name in family.only:
            if value is not None and value not in family.only[name]:
                allowed = " or ".join(map(repr, family.only[name])) or "null"
                raise ValueError(
                    f"config.json has {name}={value!r}, which our model does not have ({allowed} only); "
                    "convert another model."
                )
        elif name not in read and value not in (None, False, 0, "", [], {}):
            raise ValueError(
                f"config.json has {name}={value!r}, a key that {family.architecture} is not known to have"
                f"{did_you_mean(name, read)}; remove it if it changes nothing."
            )
    if hf.get("sliding_window") is not None and hf.get("use_sliding_window", True):
        raise ValueError(
            f"config.json has sliding_window={hf['sliding_window']!r}, but our attention sees the whole sequence; "
            "convert another model."
        )


def _complete(family: Family, hf: dict[str, Any]) -> dict[str, Any]:
    """With the keys whose default is made of others."""
    heads, width = hf.get("num_attention_heads"), hf.get("hidden_size")
    kv_heads = hf.get("num_key_value_heads")
    if family.fixed["attention"] == "mla":
        if kv_heads not in (None, heads):
            raise ValueError(
                f"config.json has num_key_value_heads={kv_heads!r}, but latent attention has as many as "
                f"num_attention_heads={heads!r}; correct it."
            )
        return hf
    hf["num_key_value_heads"] = heads if kv_heads is None else kv_heads
    if hf.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        hf["head_dim"] = width // heads
    return hf


def _rope(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our rope_theta and yarn; transformers 5 writes `rope_parameters`, before it were `rope_theta`, `rope_scaling`."""
    meant = [_rope_of(family, hf, name) for name in ("rope_parameters", "rope_scaling") if hf.get(name)]
    if len(meant) == 2 and meant[0] != meant[1]:
        raise ValueError(
            f"config.json has rope_parameters={hf['rope_parameters']!r} and rope_scaling={hf['rope_scaling']!r}, which "
            "mean different things; remove one."
        )
    return meant[0] if meant else _rope_of(family, hf, "rope_parameters")


def _rope_of(family: Family, hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = hf.get(name) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json has {name}={found!r}, which must be an object; correct it.")
    rope = {k: v for k, v in found.items() if v is not None}
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or family.theta
    old = rope.pop("type", "default")
    kind = rope.pop("rope_type", old)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json rotates a part of each head only (partial_rotary_factor); convert another model.")
    if kind not in ("default", "yarn"):
        raise ValueError(f"config.json has RoPE of the type {kind!r}; known are 'default' and 'yarn'.")
    if kind == "yarn" and not rope.pop("truncate", True):
        raise ValueError("config.json has YaRN with truncate=false, which our model does not have.")
    if unknown := sorted(rope.keys() - (YARN_KEYS.keys() if kind == "yarn" else ())):
        raise ValueError(
            f"config.json has {name} of the type {kind!r} with {unknown[0]}={rope[unknown[0]]!r}, which our model does "
            "not have; correct the type, or remove it."
        )
    return {"rope_theta": theta, "yarn": _yarn(family, rope, hf) if kind == "yarn" else {}}


def _yarn(family: Family, rope: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    sharpened = rope.get("mscale_all_dim")
    if bool(sharpened) != bool(rope.get("mscale")) and (sharpened or rope["mscale"] != 1):
        raise ValueError(
            f"config.json has YaRN with mscale={rope.get('mscale')!r} and mscale_all_dim={sharpened!r}, which programs "
            "read differently unless both are given; give both or neither."
        )
    if sharpened and family.fixed["attention"] != "mla":
        raise ValueError(
            f"config.json has YaRN with mscale_all_dim={sharpened!r}, which {family.architecture} does not read; "
            "leave mscale and mscale_all_dim out."
        )
    rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if rope.get("factor") is None or rope["original_max_position_embeddings"] is None:
        raise ValueError("config.json has YaRN without factor or original_max_position_embeddings; give them.")
    return {YARN_KEYS[k]: v for k, v in rope.items() if not (k.startswith("mscale") and not v)}


def _sparse_layers(hf: Mapping[str, Any]) -> tuple[int, int]:
    """(first_dense, moe_every) of Qwen3-MoE's `mlp_only_layers` and `decoder_sparse_step`."""
    step, layers = _whole(hf, "decoder_sparse_step", 1), _whole(hf, "num_hidden_layers")
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"config.json has mlp_only_layers={dense!r}, which must be a list of layers; correct it.")
    sparse = [i for i in range(layers) if i not in dense and step > 0 and (i + 1) % step == 0]
    if not sparse:
        raise ValueError(
            f"config.json has decoder_sparse_step={step!r} and mlp_only_layers={dense!r}, so no layer with experts."
        )
    every = sparse[1] - sparse[0] if len(sparse) > 1 else layers - sparse[0]
    first = sparse[0] + 1 - every
    if first < 0 or sparse != list(range(sparse[0], layers, every)):
        raise ValueError(
            f"config.json has decoder_sparse_step={step!r} and mlp_only_layers={dense!r}; we have some dense layers "
            "first and then every n-th with experts."
        )
    return first, every


# --- our config to theirs -------------------------------------------------------------------------------------


def choose(config: ModelConfig, architecture: str = "") -> Family:
    """The family that holds such a model, or the named one.

    Raises:
        ValueError: none does; what is in the way of the closest one is told.
    """
    config = without_idle_groups(config)
    named = [f for f in FAMILIES if architecture in (f.architecture, *f.model_types)]
    if architecture and not named:
        known = ", ".join(f.architecture for f in FAMILIES)
        raise ValueError(f"{architecture!r} is no known family; known are {known}.")
    lacking = {family.architecture: _misfits(family, config) for family in named or FAMILIES}
    best = min(named or FAMILIES, key=lambda family: len(lacking[family.architecture]))
    if wrong := lacking[best.architecture]:
        others = "" if named else " and no other family can"
        raise ValueError(f"{best.architecture} cannot hold a model with {' and '.join(wrong)}{others}.")
    return best


def _misfits(family: Family, c: ModelConfig) -> list[str]:
    """What of a config the family cannot hold."""
    wrong = [f"{k}={getattr(c, k)!r}" for k, allowed in family.holds.items() if getattr(c, k) not in allowed]
    if c.num_groups == 1:
        wrong = [w for w in wrong if not w.startswith("group_top=")]  # read by no one then
    if family is OLMOE and c.num_heads * c.head_dim != c.embed_dim:
        wrong.append(f"num_heads x head_dim={c.num_heads * c.head_dim} other than embed_dim={c.embed_dim}")
    if family is DEEPSEEK_V2 and c.embed_dim % c.num_heads:
        wrong.append(f"embed_dim={c.embed_dim} that num_heads={c.num_heads} does not divide")
    y = c.yarn
    if y.factor > 1 and y.mscale_all_dim and c.attention != "mla":
        wrong.append(f"yarn.mscale_all_dim={y.mscale_all_dim}")
    if y.factor > 1 and bool(y.mscale) != bool(y.mscale_all_dim) and (y.mscale_all_dim or y.mscale != 1):
        wrong.append(f"yarn.mscale={y.mscale} and yarn.mscale_all_dim={y.mscale_all_dim}, of which one is 0")
    return wrong


def without_idle_groups(c: ModelConfig) -> ModelConfig:
    """The config with one group where all groups may be used, which is the same."""
    return dataclasses.replace(c, num_groups=1, top_groups=1) if c.num_groups == c.top_groups else c


def to_hf(family: Family, c: ModelConfig, dtype: str, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        family: what `choose` gave.
        c: our config.
        dtype: of the tensors.
        carried: `CARRIED` keys that are known, as the ids of special tokens.
    """
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    for key in family.keys:
        hf[key.name] = getattr(c, key.ours)
    hf |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True} | dict(family.writes)
    for name, other in ALIASES.items():
        if name in hf and family is QWEN3_MOE:
            hf[other] = hf[name]  # transformers 5 writes the one, everything else reads the other
    if c.attention == "mla":
        hf |= {"num_key_value_heads": c.num_heads, "q_lora_rank": c.q_lora_rank or None}
    if family.predicts:
        hf["num_nextn_predict_layers"] = c.mtp_depth
    if family is QWEN3_MOE:
        kinds = [kind for run in layout(c) for kind in run.kinds * run.repeats]
        hf["mlp_only_layers"] = [i for i, kind in enumerate(kinds) if kind == "dense"]
    if family is DEEPSEEK_V2:
        hf["topk_method"] = "greedy" if c.num_groups == c.top_groups else "group_limited_greedy"
    hf |= _written_rope(c)
    hf |= {"torch_dtype": dtype, "dtype": dtype}
    return hf | {k: carried[k] for k in CARRIED if k in carried}


def _written_rope(c: ModelConfig) -> dict[str, Any]:
    """RoPE by its old and its new keys, for both kinds of readers."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if c.yarn.factor > 1:
        rope = {"rope_type": "yarn"} | {theirs: getattr(c.yarn, ours) for theirs, ours in YARN_KEYS.items()}
        if not c.yarn.mscale_all_dim:
            del rope["mscale"], rope["mscale_all_dim"]
    old = {"type": "yarn"} | rope if c.yarn.factor > 1 else None
    return {
        "rope_theta": c.rope_theta,
        "rope_scaling": old and old | {"rope_theta": c.rope_theta},
        "rope_parameters": rope | {"rope_theta": c.rope_theta},
    }
