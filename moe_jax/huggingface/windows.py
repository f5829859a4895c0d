"""Which layers of a config.json have a sliding window, and which RoPE each kind of layers has."""

from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import ModelConfig, local_layers
from moe_jax.huggingface.family import Windows, whole

TYPES = {"L": "sliding_attention", "G": "full_attention"}

# (config.json, its part about RoPE) -> our rope_theta and yarn, and partial_rotary_factor if the family has that
ReadRope = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


def windows_of(windows: Windows, hf: Mapping[str, Any], rope: ReadRope) -> dict[str, Any]:
    """Our window, window_pattern, and what the RoPE of layers is.

    Args:
        windows: the family's.
        hf: a config.json.
        rope: reads one RoPE.

    Raises:
        ValueError: a key is not as it must be, or our model does not have such a RoPE.
    """
    letters = _letters(windows, hf) or "G"  # a model without layers is refused when it is whole
    ours: dict[str, Any] = {"window": 0, "window_pattern": "L"}
    if "L" in letters:
        ours = {"window": whole(hf, "sliding_window"), "window_pattern": shortest(letters)}
    elif not windows.may_lack:
        raise ValueError(
            f"config.json has layer_types={hf.get('layer_types')!r}, but in this family only layers with a sliding "
            "window have RoPE, and our model has RoPE in some layer; convert another model."
        )
    if windows.rope == "by_kind":
        return ours | _by_kind(hf, letters, rope)
    ours |= rope(hf, hf.get("rope_parameters") or {})
    if windows.rope == "by_layer":
        return ours | _by_layer(hf, letters, ours)
    # a model whose layers are all local has RoPE in all
    return ours | ({"rope_layers": windows.rope} if len(ours["window_pattern"]) > 1 else {})


def shortest(letters: str) -> str:
    """The shortest pattern that gives these letters when it is repeated."""
    lengths = range(1, len(letters) + 1)
    return next(letters[:n] for n in lengths if all(letters[i] == letters[i % n] for i in range(len(letters))))


def _letters(windows: Windows, hf: Mapping[str, Any]) -> str:
    """L or G for each layer."""
    count, types = whole(hf, "num_hidden_layers"), hf.get("layer_types") if windows.listed else None
    if types is None:
        pattern = windows.pattern(hf)
        return "".join(pattern[i % len(pattern)] for i in range(count))
    if not (isinstance(types, list) and len(types) == count and all(one in TYPES.values() for one in types)):
        raise ValueError(
            f"config.json has layer_types={types!r}, which must be a list of 'sliding_attention' or 'full_attention' "
            f"for each of num_hidden_layers={count}; correct it."
        )
    return "".join("L" if one == TYPES["L"] else "G" for one in types)


def _by_kind(hf: Mapping[str, Any], letters: str, rope: ReadRope) -> dict[str, Any]:
    found = hf.get("rope_parameters") or {}
    parts: dict[str, Any] = {letter: found.get(TYPES[letter]) for letter in sorted(set(letters))}
    for letter, part in parts.items():
        if not isinstance(part, Mapping) or part.get("rope_theta") is None:
            raise ValueError(
                f"config.json has rope_parameters={found!r} without rope_theta of {TYPES[letter]!r}; give the model's "
                "own config.json."
            )
        if not part.get("truncate", True):  # transformers reads it elsewhere, for all kinds
            raise ValueError("config.json has YaRN with truncate=false for a kind of layers; remove it.")
    if len(parts) == 1 or parts["L"] == parts["G"]:
        return rope(hf, parts[letters[0]])
    ours, local = (rope(hf, parts[letter]) for letter in "GL")
    if local["yarn"]:
        raise ValueError(
            f"config.json has rope_parameters={found!r} with YaRN in layers with a sliding window only, or another "
            "than in the rest, which our model does not have; convert another model."
        )
    share = local.get("partial_rotary_factor", 1.0)
    return ours | {"local_rope": {"theta": local["rope_theta"], "partial_rotary_factor": share}}


def _by_layer(hf: Mapping[str, Any], letters: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    thetas = hf.get("layer_rope_theta")
    if thetas is None:
        return {}
    known = isinstance(thetas, list) and len(thetas) == len(letters)
    known = known and all(isinstance(theta, int | float) and not isinstance(theta, bool) for theta in thetas)
    pairs = set(zip(letters, thetas, strict=True)) if known else set()
    if not known or len(pairs) > len(set(letters)):
        raise ValueError(
            f"config.json has layer_rope_theta={thetas!r}, which must have a number for each layer, the same for all "
            "with a sliding window and for all without; convert another model."
        )
    theta = dict(pairs)
    local, other = theta.get("L", theta.get("G")), theta.get("G", theta.get("L"))
    if local and local == other:
        return {"rope_theta": local}
    if local and not other:
        return {"rope_theta": local, "rope_layers": "local"}
    if local and other and not ours["yarn"]:
        return {"rope_theta": other, "local_rope": {"theta": local, "partial_rotary_factor": 1.0}}
    raise ValueError(
        f"config.json has layer_rope_theta={thetas!r}, and our model has RoPE in all layers with a sliding window, and "
        "no YaRN if it is another than in the rest; convert another model."
    )


def written(windows: Windows, c: ModelConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Their keys of a model.

    Args:
        windows: the family's.
        c: our config.
        rope: RoPE of layers without a window, as `rope_parameters` has it.
    """
    kinds = ["L" if local else "G" for local in local_layers(c)]
    keys: dict[str, Any] = {"sliding_window": c.window} if c.window else {}
    keys |= {"layer_types": [TYPES[kind] for kind in kinds]} if windows.listed else {}
    own = c.local_rope
    if windows.rope == "by_kind":
        local = dict(rope)
        if own.theta:
            local = {"rope_type": "default", "rope_theta": own.theta}
            local |= {"partial_rotary_factor": own.partial_rotary_factor} if "partial_rotary_factor" in rope else {}
        keys["rope_parameters"] = {TYPES["G"]: dict(rope), TYPES["L"]: local}
    if windows.rope == "by_layer":
        theta = {"L": own.theta or c.rope_theta, "G": c.rope_theta if c.rope_layers == "all" else 0}
        keys["layer_rope_theta"] = [theta[kind] for kind in kinds]
    return keys


def misfits(windows: Windows, c: ModelConfig) -> list[str]:
    """What of windows and of RoPE by kind of layers such a family cannot hold, as phrases."""
    found = []
    if c.window == 0 and not windows.may_lack:
        found.append("window=0")
    mixed = len(set(local_layers(c))) > 1
    if mixed and not windows.listed:
        found.append(f"window_pattern={c.window_pattern!r}")
    if mixed and c.rope_layers != windows.rope and (c.rope_layers == "local" or windows.rope == "local"):
        found += [] if windows.rope == "by_layer" else [f"rope_layers={c.rope_layers!r}"]
    if c.local_rope.theta and windows.rope not in ("by_kind", "by_layer"):
        found.append(f"local_rope.theta={c.local_rope.theta}")
    if (
        c.local_rope.theta
        and windows.rope == "by_layer"
        and (c.yarn.factor > 1 or c.local_rope.partial_rotary_factor != 1)
    ):
        found.append("a local_rope that differs in more than its theta")
    if windows.rope == "by_kind" and c.yarn.factor > 1 and not c.yarn.truncate:
        found.append("yarn.truncate=False")
    return found
