"""Our configuration becomes a config.json of Hugging Face, of a family that can hold such a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.huggingface.families import CARRIED, FAMILIES, YARN_KEYS, Family
from moe_jax.model.block import layout


def choose(config: ModelConfig, architecture: str = "") -> Family:
    """The family that holds such a model, or the named one.

    Raises:
        ValueError: none does; the error names what the closest one does not hold.
    """
    config = without_idle_groups(config)
    named = [f for f in FAMILIES if architecture in (f.architecture, *f.model_types)]
    if architecture and not named:
        known = ", ".join(f.architecture for f in FAMILIES)
        raise ValueError(f"{architecture!r} is not a known family; known are {known}.")
    lacking = {family.architecture: _misfits(family, config) for family in named or FAMILIES}
    best = min(named or FAMILIES, key=lambda family: len(lacking[family.architecture]))
    if wrong := lacking[best.architecture]:
        others = "" if named else " and no other family can"
        raise ValueError(f"{best.architecture} cannot hold a model with {' and '.join(wrong)}{others}.")
    return best


def _misfits(family: Family, c: ModelConfig) -> list[str]:
    """The values of a config that the family cannot hold."""
    wrong = [f"{k}={getattr(c, k)!r}" for k, allowed in family.holds.items() if getattr(c, k) not in allowed]
    if c.num_groups == 1:
        wrong = [w for w in wrong if not w.startswith("group_top=")]  # without groups nothing reads it
    wrong += [rule.misfit.format(c=c) for rule in family.rules if not rule.holds(c)]
    y = c.yarn
    if y.factor > 1 and y.mscale_all_dim and c.attention != "mla":
        wrong.append(f"yarn.mscale_all_dim={y.mscale_all_dim}")
    if y.factor > 1 and bool(y.mscale) != bool(y.mscale_all_dim) and (y.mscale_all_dim or y.mscale != 1):
        wrong.append(f"yarn.mscale={y.mscale} and yarn.mscale_all_dim={y.mscale_all_dim}, of which one is 0")
    return wrong


def without_idle_groups(c: ModelConfig) -> ModelConfig:
    """The config with a single group if all groups may be used, which routes the same."""
    return dataclasses.replace(c, num_groups=1, top_groups=1) if c.num_groups == c.top_groups else c


def to_hf(family: Family, c: ModelConfig, dtype: str, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        family: as from `choose`.
        c: our config.
        dtype: of the tensors.
        carried: the `CARRIED` keys that are known.
    """
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    for key in family.keys:
        hf[key.name] = getattr(c, key.ours)
    hf |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True} | dict(family.writes)
    for name, other in family.copied.items():
        hf[other] = hf[name]
    if c.attention == "mla":
        hf |= {"num_key_value_heads": c.num_heads, "q_lora_rank": c.q_lora_rank or None}
    if family.predicts:
        hf["num_nextn_predict_layers"] = c.mtp_depth
    if family.lists_layers:
        kinds = [kind for run in layout(c) for kind in run.kinds * run.repeats]
        hf["mlp_only_layers"] = [i for i, kind in enumerate(kinds) if kind == "dense"]
    if family.group_methods:
        hf["topk_method"] = family.group_methods[c.num_groups != c.top_groups]
    hf |= _written_rope(c)
    hf |= {"torch_dtype": dtype, "dtype": dtype}
    return hf | {k: carried[k] for k in CARRIED if k in carried}


def _written_rope(c: ModelConfig) -> dict[str, Any]:
    """RoPE by its old and its new keys, for old and new readers."""
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
