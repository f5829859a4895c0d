"""A config.json of Hugging Face becomes our configuration; a key or a value that we could only ignore is refused."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config import did_you_mean
from moe_jax.huggingface.families import (
    ALIASES,
    FAMILIES,
    READ_APART,
    SPARSE_KEYS,
    WITHOUT_EFFECT,
    YARN_KEYS,
    Family,
    Key,
)

MOST_LAYERS = 10**5  # a false config.json may name more than a list can hold


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: it is of none that we know.
    """
    names = hf.get("architectures") or []
    kind = hf.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types and (not names or names == [family.architecture]):
            return family
    known = ", ".join(f"{f.architecture} ({' or '.join(f.model_types)})" for f in FAMILIES)
    raise ValueError(f"config.json is of architectures={names} and model_type={kind!r}; known are {known}.")


def from_hf(hf: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the keys of our `ModelConfig` for it.

    `mtp_depth` is that of the config.json, although a checkpoint may lack those modules.

    Raises:
        ValueError: a key or a value that this family, or our model, does not have.
    """
    family = family_of(hf)
    hf = dict(hf)
    _rename_aliases(family, hf)
    _refuse_unknown(family, hf)
    hf = _complete(family, hf)
    ours = dict(family.fixed)
    for key in family.keys:
        ours[key.ours] = _value(hf, key)
    ours |= _rope(family, hf)
    if family.predicts:
        ours["mtp_depth"] = _whole(hf, "num_nextn_predict_layers", 0)
    if family.lists_layers:
        ours["first_dense"], ours["moe_every"] = _sparse_layers(hf)
    if family.group_methods and (hf.get("topk_method") or family.group_methods[0]) == family.group_methods[0]:
        ours["num_groups"] = ours["top_groups"] = 1
    return family, ours


def _value(hf: Mapping[str, Any], key: Key) -> Any:
    value = hf.get(key.name)
    value = key.default if value is None else value
    if value is None:
        raise ValueError(f"config.json has no {key.name}; give the model's own config.json.")
    return value


def _whole(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number that is used before our own config checks it."""
    value = _value(hf, Key(name, "", default))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_LAYERS:
        raise ValueError(
            f"config.json has {name}={value!r}, which must be an integer from 0 to {MOST_LAYERS}; correct it."
        )
    return value


def _rename_aliases(family: Family, hf: dict[str, Any]) -> None:
    """Rename keys that have two names to the family's own, in place."""
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
    read |= SPARSE_KEYS if family.lists_layers else set()
    read |= {"num_nextn_predict_layers"} if family.predicts else set()
    read |= {"head_dim", "num_key_value_heads"}  # families with latent attention write both, though they read neither
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
    """Add the keys whose default depends on others."""
    heads = hf.get("num_attention_heads")
    width = hf.get("hidden_size")
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
    """Our rope_theta and yarn, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older)."""
    found = [_rope_of(family, hf, name) for name in ("rope_parameters", "rope_scaling") if hf.get(name)]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(
            f"config.json has rope_parameters={hf['rope_parameters']!r} and rope_scaling={hf['rope_scaling']!r}, which "
            "mean different things; remove one."
        )
    return found[0] if found else _rope_of(family, hf, "rope_parameters")


def _rope_of(family: Family, hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = hf.get(name) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json has {name}={found!r}, which must be an object; correct it.")
    rope = {k: v for k, v in found.items() if v is not None}
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or family.theta
    kind = rope.pop("type", "default")  # the older name of the next key
    kind = rope.pop("rope_type", kind)
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
    sharpened = rope.get("mscale_all_dim")  # scales the softmax; see model/attention.py
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
    """(first_dense, moe_every) from `mlp_only_layers` and `decoder_sparse_step`."""
    step = _whole(hf, "decoder_sparse_step", 1)
    layers = _whole(hf, "num_hidden_layers")
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"config.json has mlp_only_layers={dense!r}, which must be a list of layers; correct it.")
    sparse = [i for i in range(layers) if i not in dense and step > 0 and (i + 1) % step == 0]
    if not sparse:
        raise ValueError(
            f"config.json has decoder_sparse_step={step!r} and mlp_only_layers={dense!r}, so no layer has experts."
        )
    every = sparse[1] - sparse[0] if len(sparse) > 1 else layers - sparse[0]
    first = sparse[0] + 1 - every
    if first < 0 or sparse != list(range(sparse[0], layers, every)):
        raise ValueError(
            f"config.json has decoder_sparse_step={step!r} and mlp_only_layers={dense!r}; our model has dense layers "
            "first and then experts in every n-th layer."
        )
    return first, every
