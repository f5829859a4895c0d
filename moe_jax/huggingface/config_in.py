"""A config.json of Hugging Face becomes our configuration; a key or a value that we could only ignore is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.config import did_you_mean
from moe_jax.huggingface.families import FAMILIES
from moe_jax.huggingface.family import (
    ALIASES,
    LONGROPE_KEYS,
    READ_APART,
    WITHOUT_EFFECT,
    YARN_KEYS,
    Family,
    value_of,
    whole,
)
from moe_jax.huggingface.layer_lists import first_and_every
from moe_jax.huggingface.others import OTHERS
from moe_jax.huggingface.windows import windows_of


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: it is of none that we know.
    """
    names = hf.get("architectures") or []
    kind = hf.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types and (not names or names in [[one] for one in _classes(family)]):
            return family
    if kind in OTHERS:
        other = OTHERS[kind]
        raise ValueError(
            f"config.json is of architectures={names} and model_type={kind!r}, a family with experts that we do not "
            f"have; the nearest that we do have is {other.nearest}, which lacks {other.lacks}."
        )
    known = ", ".join(f"{f.architecture} ({' or '.join(f.model_types)})" for f in FAMILIES)
    raise ValueError(f"config.json is of architectures={names} and model_type={kind!r}; known are {known}.")


def _classes(family: Family) -> tuple[str, ...]:
    return family.architecture, *family.spellings


def from_hf(hf: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the keys of our `ModelConfig` for it.

    `mtp_depth` is that of the config.json, although a checkpoint may lack those modules.

    Raises:
        ValueError: a key or a value that this family, or our model, does not have.
    """
    family = family_of(hf)
    hf = dict(hf)
    _rename_aliases(family, hf)
    for obstacle in _obstacles(family, hf):
        raise ValueError(obstacle)
    hf = _complete(family, hf)
    ours = dict(family.fixed)
    for key in family.keys:
        value = value_of(hf, key)
        ours[key.ours] = key.values[value] if key.values else value
    if family.windows is not None:
        ours |= windows_of(family.windows, hf, lambda hf, rope: _rope(family, {**hf, "rope_parameters": rope}))
    else:
        ours |= _rope(family, hf)
    if family.scales_by_width:
        ours["embedding_multiplier"] = ours["embed_dim"] ** 0.5 if hf.get(family.scales_by_width) else 1.0
    if family.predicts:
        ours["mtp_depth"] = whole(hf, "num_nextn_predict_layers", 0)
    if family.layers is not None:
        ours["first_dense"], ours["moe_every"] = first_and_every(family.layers, hf)
    if family.group_methods and (hf.get("topk_method") or family.group_methods[0]) == family.group_methods[0]:
        ours["num_groups"] = ours["top_groups"] = 1
    return family, ours


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


def obstacles(hf: Mapping[str, Any]) -> list[str]:
    """Every key and value of a config.json that this family, or our model, does not have; a sentence each.

    Raises:
        ValueError: as `family_of`, or a key has two names and two values.
    """
    family, hf = family_of(hf), dict(hf)
    _rename_aliases(family, hf)
    return list(_obstacles(family, hf))


def _obstacles(family: Family, hf: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every key or value that we could only ignore."""
    read = {key.name for key in family.keys} | WITHOUT_EFFECT | READ_APART | family.unread
    read |= set(family.layers.keys) if family.layers is not None else set()
    read |= {*family.windows.keys} if family.windows is not None else set()
    read |= {"layer_types"} if family.windows is not None and family.windows.listed else set()
    read |= {*family.repeated, family.scales_by_width}
    read |= {"partial_rotary_factor"} if family.partial is not None else set()
    read |= {"rotary_dim"} if family.rotary_dim else set()
    read |= {"num_nextn_predict_layers"} if family.predicts or family.leaves_out else set()
    read |= {"head_dim", "num_key_value_heads"}  # families with latent attention write both, though they read neither
    for name, value in hf.items():
        if name in family.only:
            if value is not None and _only_one(value) not in family.only[name]:
                allowed = " or ".join(map(repr, family.only[name])) or "null"
                yield (
                    f"config.json has {name}={value!r}, which our model does not have ({allowed} only); "
                    "convert another model."
                )
        elif name not in read and value not in (None, False, 0, "", [], {}):
            yield (
                f"config.json has {name}={value!r}, a key that {family.architecture} is not known to have"
                f"{did_you_mean(name, read)}; remove it if it changes nothing."
            )
    for name, other in family.repeated.items():
        if hf.get(name) is not None and _only_one(hf[name]) != hf.get(other):
            yield (
                f"config.json has {name}={hf[name]!r}, but the layers of our model have the same, {other}="
                f"{hf.get(other)!r}; convert another model."
            )
    if hf.get("sliding_window") is not None and family.windows is None and _has_windows(family, hf):
        yield (
            f"config.json has sliding_window={hf['sliding_window']!r}, but our attention sees the whole sequence; "
            "convert another model."
        )


def _only_one(value: Any) -> Any:
    """The value of a list that repeats one, such as one of a kind for every layer; any other value as it is."""
    return value[0] if isinstance(value, list) and value and all(one == value[0] for one in value) else value


def _has_windows(family: Family, hf: Mapping[str, Any]) -> bool:
    """Whether some layer of a config.json with a sliding window uses it."""
    if not hf.get("use_sliding_window", True):
        return False
    if "layer_types" in family.only and hf.get("layer_types"):
        return False  # every layer sees the whole sequence, or the config.json would have been refused
    layers = whole(hf, "num_hidden_layers")
    return not family.windows_from or whole(hf, family.windows_from, layers) < layers


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
    """Our rope_theta, yarn and longrope, and partial_rotary_factor if the family has that."""
    ours = _whole_rope(family, hf)
    if family.partial is not None:
        ours["partial_rotary_factor"] = _partial(family, hf, family.partial)
    return ours


def _whole_rope(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older)."""
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
    if rope.pop("partial_rotary_factor", 1.0) != 1.0 and family.partial is None:
        raise ValueError("config.json rotates a part of each head only (partial_rotary_factor); convert another model.")
    if kind not in family.rope_types:
        known = " and ".join(map(repr, family.rope_types))
        raise ValueError(f"config.json has RoPE of the type {kind!r}; known are {known}.")
    if unknown := sorted(rope.keys() - SCALED.get(kind, {}).keys()):
        raise ValueError(
            f"config.json has {name} of the type {kind!r} with {unknown[0]}={rope[unknown[0]]!r}, which our model does "
            "not have; correct the type, or remove it."
        )
    return {
        "rope_theta": theta,
        "yarn": _yarn(family, rope, hf) if kind == "yarn" else {},
        "longrope": _longrope(rope, hf) if kind == "longrope" else {},
    }


SCALED = {"yarn": YARN_KEYS, "longrope": LONGROPE_KEYS}  # the type of RoPE -> its keys


def _longrope(rope: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    length = "original_max_position_embeddings"
    beside = hf.get(length)
    if beside is not None and rope.setdefault(length, beside) != beside:
        raise ValueError(
            f"config.json has {length}={beside!r} and in its LongRoPE {rope[length]!r}, of which programs read the one "
            "or the other; remove one."
        )
    if missing := [name for name in LONGROPE_KEYS if rope.get(name) in (None, [])]:
        raise ValueError(f"config.json has LongRoPE without {missing[0]}; give the model's own config.json.")
    return {LONGROPE_KEYS[name]: value for name, value in rope.items()}


def _partial(family: Family, hf: Mapping[str, Any], default: float) -> float:
    """Our partial_rotary_factor, which may be beside RoPE's other keys, among them, or a number of dimensions."""
    head_dim = whole(hf, "head_dim")
    found: dict[str, Any] = {"partial_rotary_factor": hf.get("partial_rotary_factor")}
    for name in ("rope_parameters", "rope_scaling"):
        found[f"{name}.partial_rotary_factor"] = (hf.get(name) or {}).get("partial_rotary_factor")
    if family.rotary_dim and hf.get("rotary_dim") is not None and head_dim:
        found["rotary_dim"] = whole(hf, "rotary_dim") / head_dim
    factors: dict[str, float] = {}
    for name, factor in found.items():
        if factor is None:
            continue
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise ValueError(f"config.json has {name}={factor!r}, which must be a number; correct it.")
        factors[name] = factor
    if len({int(head_dim * factor) for factor in factors.values()}) > 1:
        said = " and ".join(f"{name}={factor!r}" for name, factor in factors.items())
        raise ValueError(f"config.json has {said}, which rotate different parts of a head; leave one.")
    return next(iter(factors.values()), default)


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
