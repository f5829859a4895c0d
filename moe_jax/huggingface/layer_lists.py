"""The ways in which config.json files list the layers that have experts."""

from collections.abc import Mapping
from typing import Any

from moe_jax.huggingface.family import LayerList, whole


def first_and_every(layers: LayerList, hf: Mapping[str, Any]) -> tuple[int, int]:
    """Our first_dense and moe_every.

    Raises:
        ValueError: a key is not as it must be, or our model does not have layers in such an order.
    """
    count = whole(hf, "num_hidden_layers")
    sparse = layers.sparse(hf, count)
    said = " and ".join(f"{key}={hf.get(key)!r}" for key in layers.keys)
    if not sparse:
        raise ValueError(f"config.json has {said}, so no layer has experts.")
    every = sparse[1] - sparse[0] if len(sparse) > 1 else count - sparse[0]
    first = sparse[0] + 1 - every
    if first < 0 or sparse != list(range(sparse[0], count, every)):
        raise ValueError(
            f"config.json has {said}; our model has dense layers first and then experts in every n-th layer."
        )
    return first, every


# --- every n-th layer, except those of a list: Qwen -----------------------------------------------------------


def _by_step(hf: Mapping[str, Any], count: int) -> list[int]:
    step = whole(hf, "decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"config.json has mlp_only_layers={dense!r}, which must be a list of layers; correct it.")
    return [i for i in range(count) if i not in dense and step > 0 and (i + 1) % step == 0]


def _step_and_list(kinds: list[str]) -> dict[str, Any]:
    dense = [i for i, kind in enumerate(kinds) if kind == "dense"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


BY_STEP = LayerList(("decoder_sparse_step", "mlp_only_layers"), _by_step, _step_and_list)


# --- the kind of every layer, or the number of dense ones at the start: GLM-4.7-Flash, Hy3; or none: Mellum -----


def _by_kind(hf: Mapping[str, Any], count: int) -> list[int]:
    kinds, dense = hf.get("mlp_layer_types"), whole(hf, "first_k_dense_replace", 1)
    if kinds is None:
        return list(range(dense, count))
    if not (isinstance(kinds, list) and len(kinds) == count and all(kind in ("dense", "sparse") for kind in kinds)):
        raise ValueError(
            f"config.json has mlp_layer_types={kinds!r}, which must be a list of 'dense' or 'sparse' for each of "
            f"num_hidden_layers={count}; correct it."
        )
    sparse = [i for i, kind in enumerate(kinds) if kind == "sparse"]
    if "first_k_dense_replace" in hf and sparse and sparse[0] != dense:
        raise ValueError(
            f"config.json has first_k_dense_replace={dense} and mlp_layer_types={kinds!r}, which say different things; "
            "remove one."
        )
    return sparse


def _kinds(kinds: list[str]) -> dict[str, Any]:
    theirs = ["sparse" if kind == "moe" else kind for kind in kinds]
    return {"mlp_layer_types": theirs, "first_k_dense_replace": kinds.index("moe")}  # older programs read the latter


BY_KIND = LayerList(("first_k_dense_replace", "mlp_layer_types"), _by_kind, _kinds)


def _by_kind_or_all(hf: Mapping[str, Any], count: int) -> list[int]:
    return list(range(count)) if hf.get("mlp_layer_types") is None else _by_kind(hf, count)


BY_KIND_OR_ALL = LayerList(
    ("mlp_layer_types",), _by_kind_or_all, lambda kinds: {"mlp_layer_types": _kinds(kinds)["mlp_layer_types"]}
)


# --- every n-th layer of a range: ERNIE -----------------------------------------------------------------------

START, END, INTERVAL = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"


def _by_interval(hf: Mapping[str, Any], count: int) -> list[int]:
    end = hf.get(END)
    last = count - 1 if end in (None, -1) else whole(hf, END)
    step = whole(hf, INTERVAL, 1)
    return [i for i in range(whole(hf, START, 1), min(last + 1, count)) if step > 0 and (i + 1) % step == 0]


def _interval(kinds: list[str]) -> dict[str, Any]:
    sparse = [i for i, kind in enumerate(kinds) if kind == "moe"]
    step = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    return {START: sparse[0], END: sparse[-1], INTERVAL: step}


BY_INTERVAL = LayerList((START, END, INTERVAL), _by_interval, _interval)
