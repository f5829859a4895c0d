"""The cost of a token: parameters and FLOPs by part of the model."""

import math
from typing import NamedTuple

from moe_jax.config import Config, local_layers


class Part(NamedTuple):
    """Parameters of one kind: all of them, those a token uses, and its forward matmul FLOPs in them."""

    name: str
    total: int
    active: int
    flops: int


AHEAD = "multi-token prediction"
SCORES = "attention scores"
ROUTED = "routed experts"
LATENT = "latent projections"


def parts(config: Config) -> list[Part]:
    """The model by kind of parameter, plus the attention scores, which have FLOPs and no parameters.

    A multiply and an add are two FLOPs; the scores of causal attention over a full sequence are halved. Multi-token
    prediction is one part, except its scores, and its FLOPs include the product with the model's head. The whole
    embedding counts as active, as in papers, although a token reads one row.
    """
    import jax

    from moe_jax.mesh import is_expert_weight, is_vector
    from moe_jax.model.abstract import abstract_model

    m = config.model
    model = abstract_model(m)
    sums: dict[str, list[int]] = {}
    dims = jax.tree.leaves(model.dims)
    for (path, leaf), d in zip(jax.tree_util.tree_leaves_with_path(model.params), dims, strict=True):
        routed = is_expert_weight(d.names)
        kind = _kind(jax.tree_util.keystr(path, simple=True, separator="/"), d.names, routed)
        active = math.prod(leaf.shape)
        if routed:
            active = active * m.top_k // m.num_experts
        row = sums.setdefault(kind, [0, 0, 0])  # total, active, FLOPs
        row[0] += math.prod(leaf.shape)
        row[1] += active
        row[2] += 2 * active if not is_vector(d.names) and kind != "embedding" else 0
    if m.tied_embeddings:
        sums["embedding"][2] = 2 * sums["embedding"][0]
    if m.mtp_depth:
        sums[AHEAD][2] += 2 * m.mtp_depth * m.embed_dim * m.vocab_size
    return [Part(kind, *row) for kind, row in sums.items()] + [Part(SCORES, 0, 0, _scores(config))]


def _scores(config: Config) -> int:
    """2 H (K + V) for every key that a token sees: query . key and the mean of values, of widths K and V.

    In a sequence of S tokens that are S / 2 on average, and W - W^2 / 2 S in a layer with a window of W.
    """
    m = config.model
    widths = m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim if m.attention == "mla" else 2 * m.head_dim
    length = config.sequence_length
    window = min(m.window, length)
    layers = [*local_layers(m), *(False for _ in range(m.mtp_depth))]
    twice_seen = sum(window * (2 * length - window) if local else length**2 for local in layers) // length
    return twice_seen * m.num_heads * widths


def train_flops(config: Config) -> int:
    """Model FLOPs of a training step per token, forward and backward, whatever the implementation.

    6 x the active parameters that a token is multiplied by (2 in the forward pass, twice that in the backward pass;
    the embedding is looked up, norms are not counted, the head is counted once more for each depth of multi-token
    prediction), and 3 L S H (K + V) for causal attention over a full sequence, with queries and keys of width K and
    values of width V: 6 L S H D where both are D, half of the 12 L S H D without a mask; less in layers with a window,
    of which only visible keys count. K is the width that attention is trained with, both parts of a latent attention's
    query. Recomputation (remat) and padding are not counted.

    Source: PaLM (arXiv 2204.02311), appendix B, with the causal half left out.
    """
    return 3 * sum(part.flops for part in parts(config))


def _kind(path: str, dims: tuple[str, ...], routed: bool) -> str:
    if path.startswith("mtp/"):
        return AHEAD
    if "experts" in dims or "/router_" in path:
        return ROUTED if routed else "router"
    if path.endswith(("_bias", "/sinks")):
        return "head" if "vocab" in dims else "attention"
    if len(dims) == 1:
        return "norms"
    if "ffw/latent_" in path:
        return LATENT
    if "/shared" in path:  # and the gate of their output
        return "shared experts"
    if "ffw" in dims:
        return "dense feed-forward"
    if "vocab" in dims:
        return "embedding" if dims[0] == "vocab" else "head"
    return "attention"
