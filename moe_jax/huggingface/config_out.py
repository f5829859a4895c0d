"""Our configuration becomes a config.json of Hugging Face, of a family that can hold such a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config import ModelConfig, rotated_width
from moe_jax.huggingface.families import FAMILIES
from moe_jax.huggingface.family import CARRIED, LONGROPE_KEYS, YARN_KEYS, Family
from moe_jax.huggingface.windows import misfits, written
from moe_jax.model.block import layout


def choose(config: ModelConfig, architecture: str = "", origin: str = "") -> Family:
    """The family to export a model to: the named one, else that of its origin, else the only one that holds it.

    Several families may hold the same model under different keys and names of tensors, so none is guessed.

    Args:
        config: of the model.
        architecture: the class or model_type of the requested family; "" requests none. Of a family that is not written
            itself, the one that it is written as.
        origin: that of the family that the model was imported from; "": none.

    Raises:
        ValueError: the family does not hold such a model, and the error names what it lacks; or several do, or none.
    """
    config = plainest(config)
    name = architecture or origin
    named = [f for f in FAMILIES if name in (f.architecture, *f.spellings, *f.model_types)]
    named = [next(g for g in FAMILIES if g.architecture == (f.written_as or f.architecture)) for f in named]
    if architecture and not named:
        known = ", ".join(f.architecture for f in FAMILIES)
        raise ValueError(f"{architecture!r} is not a known family; known are {known}.")
    own = [family for family in FAMILIES if not family.written_as]
    lacking = {family.architecture: _misfits(family, config) for family in named or own}
    fitting = [family for family in named or own if not lacking[family.architecture]]
    if config.window == 0:  # families with windows are for models that have some, if others hold the model too
        fitting = [family for family in fitting if family.windows is None] or fitting
    if len(fitting) > 1:
        raise ValueError(
            f"{', '.join(f.architecture for f in fitting)} can all hold this model, and no config.json of theirs "
            "came with it; name one with --architecture, or as the architecture of save_hf."
        )
    if fitting:
        return fitting[0]
    best = min(named or own, key=lambda family: len(lacking[family.architecture]))
    others = " and no other family can" if not named else "" if architecture else ", though it came from there"
    raise ValueError(
        f"{best.architecture} cannot hold a model with {' and '.join(lacking[best.architecture])}{others}."
    )


def _misfits(family: Family, c: ModelConfig) -> list[str]:
    """The values of a config that the family cannot hold."""
    wrong = [f"{k}={getattr(c, k)!r}" for k, allowed in family.holds.items() if getattr(c, k) not in allowed]
    if c.num_groups == 1:
        wrong = [w for w in wrong if not w.startswith("group_top=")]  # without groups nothing reads it
    wrong += [rule.misfit.format(c=c) for rule in family.rules if not rule.holds(c)]
    wrong += [] if family.windows is None else misfits(family.windows, c)
    y = c.yarn
    if y.factor > 1 and y.mscale_all_dim and c.attention != "mla":
        wrong.append(f"yarn.mscale_all_dim={y.mscale_all_dim}")
    if y.factor > 1 and bool(y.mscale) != bool(y.mscale_all_dim) and (y.mscale_all_dim or y.mscale != 1):
        wrong.append(f"yarn.mscale={y.mscale} and yarn.mscale_all_dim={y.mscale_all_dim}, of which one is 0")
    return wrong


def plainest(c: ModelConfig) -> ModelConfig:
    """The same model without what changes nothing: groups that may all be used, a width that is the default."""
    if c.num_groups == c.top_groups:
        c = dataclasses.replace(c, num_groups=1, top_groups=1)
    if c.shared_ffw_dim == c.expert_ffw_dim:
        c = dataclasses.replace(c, shared_ffw_dim=0)
    return dataclasses.replace(c, attention_multiplier=0.0) if c.attention_multiplier == c.head_dim**-0.5 else c


def _spelled_out(c: ModelConfig) -> ModelConfig:
    """The same model without a 0 that stands for a default."""
    return dataclasses.replace(
        c,
        shared_ffw_dim=c.shared_ffw_dim or c.expert_ffw_dim,
        attention_multiplier=c.attention_multiplier or c.head_dim**-0.5,
    )


def to_hf(family: Family, c: ModelConfig, dtype: str, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        family: as from `choose`.
        c: our config.
        dtype: of the tensors.
        carried: the `CARRIED` keys that are known.
    """
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    c = _spelled_out(c)
    for key in family.keys:
        value = getattr(c, key.ours)
        hf[key.name] = {ours: theirs for theirs, ours in key.values.items()}[value] if key.values else value
    hf |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True} | dict(family.writes)
    for name, other in family.copied.items():
        hf[other] = hf[name]
    if c.attention == "mla":
        hf |= {"num_key_value_heads": c.num_heads, "q_lora_rank": c.q_lora_rank or None}
    if family.predicts:
        hf["num_nextn_predict_layers"] = c.mtp_depth
    if family.layers is not None:
        hf |= family.layers.written([kind for run in layout(c) for kind in run.kinds * run.repeats])
    if family.group_methods:
        hf["topk_method"] = family.group_methods[c.num_groups != c.top_groups]
    if family.scales_by_width:
        hf[family.scales_by_width] = c.embedding_multiplier != 1
    for name, other in family.repeated.items():
        hf[name] = [hf[other]] * c.num_layers
    rope = _written_rope(family, c)
    if family.windows is not None:
        by_kind = written(family.windows, c, rope["rope_parameters"])
        rope = by_kind if "rope_parameters" in by_kind else rope | by_kind
    hf |= rope
    hf |= {"torch_dtype": dtype, "dtype": dtype}
    return hf | {k: carried[k] for k in CARRIED if k in carried}


def _written_rope(family: Family, c: ModelConfig) -> dict[str, Any]:
    """RoPE by its old and its new keys, for old and new readers."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if c.yarn.factor > 1:
        rope = {"rope_type": "yarn"} | {theirs: getattr(c.yarn, ours) for theirs, ours in YARN_KEYS.items()}
        if not c.yarn.mscale_all_dim:
            del rope["mscale"], rope["mscale_all_dim"]
    if c.longrope.short_factor:
        values = {theirs: getattr(c.longrope, ours) for theirs, ours in LONGROPE_KEYS.items()}
        scaled = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        rope = {"rope_type": "longrope"} | scaled
    part = {"partial_rotary_factor": c.partial_rotary_factor} if family.partial is not None else {}
    rope |= part
    part |= {"rotary_dim": rotated_width(c)} if family.rotary_dim else {}
    length = "original_max_position_embeddings"
    part |= {length: rope[length]} if c.longrope.short_factor else {}  # beside LongRoPE's keys, too, as published
    old = None if rope["rope_type"] == "default" else {"type": rope["rope_type"]} | rope
    return part | {
        "rope_theta": c.rope_theta,
        "rope_scaling": old and old | {"rope_theta": c.rope_theta},
        "rope_parameters": rope | {"rope_theta": c.rope_theta},
    }
