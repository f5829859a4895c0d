"""What a token costs: parameters and FLOPs by part of the model, and the rate at which a device could do them."""

import math
from typing import NamedTuple

from moe_jax.chips import ALIASES, CHIPS
from moe_jax.config import Config, ModelConfig

# dense bf16 FLOP/s of NVIDIA's data sheets, whose larger figures are for sparse matrices; longer names first
GPUS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


class Part(NamedTuple):
    """Parameters of one kind: all of them, those a token uses, and its forward matmul FLOPs in them."""

    name: str
    total: int
    active: int
    flops: int


def parts(config: Config) -> list[Part]:
    """The model by kind of parameter, plus the attention scores, which have FLOPs and no parameters.

    A multiply and an add are two FLOPs; the scores of causal attention over a full sequence are halved.
    """
    import jax

    from moe_jax.state import abstract_model

    model = abstract_model(config.model)
    sums: dict[str, list[int]] = {}
    dims = jax.tree.leaves(model.dims)
    for (path, leaf), d in zip(jax.tree_util.tree_leaves_with_path(model.params), dims, strict=True):
        kind = _kind(jax.tree_util.keystr(path, simple=True, separator="/"), d.names, config.model)
        active = math.prod(leaf.shape)
        if kind == "routed experts":
            active = active * config.model.top_k // config.model.num_experts
        row = sums.setdefault(kind, [0, 0, 0])
        row[0] += math.prod(leaf.shape)
        row[1] += active
        row[2] += 2 * active if len(d.names) > 1 and kind != "embedding" else 0
    if config.model.tied_embeddings:
        sums["embedding"][2] = 2 * sums["embedding"][0]
    m = config.model
    scores = 2 * m.num_layers * config.sequence_length * m.num_heads * m.head_dim
    return [Part(kind, *row) for kind, row in sums.items()] + [Part("attention scores", 0, 0, scores)]


def train_flops(config: Config) -> int:
    """Model FLOPs of a training step a token, forward and backward: what has to be computed, however it is done.

    6 x the active parameters that a token is multiplied by (2 in the forward pass, twice that in the backward pass;
    the embedding is looked up, norms are not counted), and 6 L S H D for causal attention over a full sequence, half
    of 12 L S H D for one that sees all. What is computed again (remat) or for padding is not counted.

    Source: PaLM (arXiv 2204.02311), appendix B, with the causal half left out.
    """
    return 3 * sum(part.flops for part in parts(config))


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, by jax's name for it; None where it is not known, as for CPUs.

    Args:
        device_kind: "TPU v5 lite", "TPU v6e", "TPU7x", "NVIDIA H100 80GB HBM3", ...
    """
    if device_kind.startswith("TPU"):
        name = device_kind.lower().replace(" ", "").removeprefix("tpu")
        name = {"v5": "v5p", "7x": "tpu7x"}.get(name, name)
        chip = CHIPS.get(ALIASES.get(name, name))
        return chip.flops if chip else None
    found = next((name for name in GPUS if name in device_kind), None)
    return GPUS[found] if found else None


def _kind(path: str, dims: tuple[str, ...], m: ModelConfig) -> str:
    if len(dims) == 1:
        return "norms"
    if "experts" in dims:
        return "routed experts" if "ffw" in dims else "router"
    if "ffw" in dims:
        return "shared experts" if "/shared/" in path else "dense feed-forward"
    if "vocab" in dims:
        return "embedding" if dims[0] == "vocab" else "head"
    return "attention"
