"""The tensors of Hugging Face's families, and where each is in our parameters.

A row of the tables gives the name of a tensor, its layout, and the layout of our parameters that it holds, in letters:

    v vocabulary, d embed, h heads, g kv heads, k head_dim, f dense hidden width, x experts, m an expert's hidden width,
    s the shared experts', y and u all queries and all keys, z and r the latents of queries and of keys and values,
    n a head's part without RoPE, p with it, q both, w a value's width, i is k where RoPE rotates pairs; b and c are d
    twice, j is m again, o is a single one; 1 is an axis that we do not have.

`h.k d` has heads and their width merged in one axis; `n+w` has two of our parameters one after the other, and `m|j` two
in turn. An `x` that our layout lacks is the index of an expert. In `i`, in `p` and at the end of `q` the columns are
permuted, too: their RoPE rotates the pairs (2i, 2i + 1), ours (i, i + half).
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ModelConfig, shared_width
from moe_jax.huggingface.family import GATED, Family
from moe_jax.model.block import places

# --- tables of tensors ----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A tensor of theirs: its name, its layout, and the parameters of ours in it with their layouts."""

    name: str
    layout: str
    ours: Mapping[str, str]


def _same(name: str, ours: str, letter: str = "d") -> Row:
    return Row(name, letter, {ours: letter})


def _swiglu(prefix: str, ours: str, width: str, names: tuple[str, str, str] = GATED) -> tuple[Row, ...]:
    gate, up, down = names
    return (
        Row(f"{prefix}.{gate}.weight", f"{width} d", {f"{ours}gate": f"d {width}"}),
        Row(f"{prefix}.{up}.weight", f"{width} d", {f"{ours}up": f"d {width}"}),
        Row(f"{prefix}.{down}.weight", f"d {width}", {f"{ours}down": f"{width} d"}),
    )


PAIRS = {"p": "p", "q": "p", "i": "i"}  # the last letter of a layout -> how many of its last columns are pairs


def _fused(inputs: str, outputs: str) -> tuple[Row, Row]:
    """The tensors of all experts of a layer: gates with ups, and downs."""
    return (
        Row(inputs, "x m+j d", {"ffw/gate": "d m", "ffw/up": "d j"}),
        Row(outputs, "x d m", {"ffw/down": "m d"}),
    )


def _in_turn(inputs: str, outputs: str) -> tuple[Row, ...]:
    """The same where gates and ups take turns, with biases: gpt-oss."""
    return (
        Row(inputs, "x d m|j", {"ffw/gate": "d m", "ffw/up": "d j"}),
        Row(f"{inputs}_bias", "x m|j", {"ffw/gate_bias": "m", "ffw/up_bias": "j"}),
        Row(outputs, "x m d", {"ffw/down": "m d"}),
        Row(f"{outputs}_bias", "x d", {"ffw/down_bias": "d"}),
    )


EMBEDDING = Row("model.embed_tokens.weight", "v d", {"params/embedding": "v d"})

OUTSIDE = (
    EMBEDDING,
    _same("model.norm.weight", "params/final_norm/scale"),
)

HEAD_BIAS = _same("lm_head.bias", "params/head_bias", "v")

HEAD = Row("lm_head.weight", "v d", {"params/head": "d v"})

NORMS = (
    _same("input_layernorm.weight", "attention_norm/scale"),
    _same("post_attention_layernorm.weight", "ffw_norm/scale"),
)

SANDWICH = (
    NORMS[0],
    _same("post_attention_layernorm.weight", "attention_after_norm/scale"),
    _same("pre_mlp_layernorm.weight", "ffw_norm/scale"),
    _same("post_mlp_layernorm.weight", "ffw_after_norm/scale"),
)

GROUPED = (
    Row("self_attn.q_proj.weight", "h.k d", {"attention/query": "d h k"}),
    Row("self_attn.k_proj.weight", "g.k d", {"attention/key": "d g k"}),
    Row("self_attn.v_proj.weight", "g.k d", {"attention/value": "d g k"}),
    Row("self_attn.o_proj.weight", "d h.k", {"attention/out": "h k d"}),
)

PAIRED = (
    Row("self_attn.q_proj.weight", "h.i d", {"attention/query": "d h i"}),
    Row("self_attn.k_proj.weight", "g.i d", {"attention/key": "d g i"}),
    *GROUPED[2:],
)

QKV_BIASES = (
    _same("self_attn.q_proj.bias", "attention/query_bias", "y"),
    _same("self_attn.k_proj.bias", "attention/key_bias", "u"),
    _same("self_attn.v_proj.bias", "attention/value_bias", "u"),
)

OUT_BIAS = _same("self_attn.o_proj.bias", "attention/out_bias")

SINKS = _same("self_attn.sinks", "attention/sinks", "h")

GATES = {
    "none": (),
    "element": (Row("self_attn.gate_proj.weight", "h.k d", {"attention/gate": "d h k"}),),
    "head": (Row("self_attn.gate_proj.weight", "h d", {"attention/gate": "d h"}),),
}

QK_NORMS = {
    "none": (),
    "head": (
        _same("self_attn.q_norm.weight", "attention/query_norm/scale", "k"),
        _same("self_attn.k_norm.weight", "attention/key_norm/scale", "k"),
    ),
    "projection": (
        _same("self_attn.q_norm.weight", "attention/query_norm/scale", "y"),
        _same("self_attn.k_norm.weight", "attention/key_norm/scale", "u"),
    ),
}

FULL_QUERIES = (Row("self_attn.q_proj.weight", "h.q d", {"attention/query": "d h q"}),)

LATENT_QUERIES = (
    Row("self_attn.q_a_proj.weight", "z d", {"attention/query_down": "d z"}),
    _same("self_attn.q_a_layernorm.weight", "attention/query_latent_norm/scale", "z"),
    Row("self_attn.q_b_proj.weight", "h.q z", {"attention/query_up": "z h q"}),
)

LATENT = (
    Row("self_attn.kv_a_proj_with_mqa.weight", "r+p d", {"attention/latent_down": "d r", "attention/key_rope": "d p"}),
    _same("self_attn.kv_a_layernorm.weight", "attention/latent_norm/scale", "r"),
    Row("self_attn.kv_b_proj.weight", "h.n+w r", {"attention/key_up": "r h n", "attention/value_up": "r h w"}),
    Row("self_attn.o_proj.weight", "d h.w", {"attention/out": "h w d"}),
)

ROUTER = Row("mlp.gate.weight", "x d", {"ffw/router": "d x"})

DENSE = _swiglu("mlp", "ffw/", "f")

SHARED = _swiglu("mlp.shared_experts", "ffw/shared/", "s")

ROUTER_BIAS = _same("mlp.gate.bias", "ffw/router_bias", "x")

SHARED_GATE = Row("mlp.shared_expert_gate.weight", "o d", {"ffw/shared_gate": "d o"})

BIAS = _same("mlp.gate.e_score_correction_bias", "ffw/bias", "x")

PREDICTION = (
    _same("enorm.weight", "embedding_norm/scale"),
    _same("hnorm.weight", "hidden_norm/scale"),
    Row("eh_proj.weight", "d b+c", {"from_embedding": "b d", "from_hidden": "c d"}),
    _same("shared_head.norm.weight", "norm/scale"),
)


# --- their tensors in our parameters --------------------------------------------------------------------------


class Part(NamedTuple):
    """A slice of one of our parameters, and its place in a tensor of theirs.

    leaf: the parameter's path. at: the index of the layer, and of the expert. span: in the tensor's view. order: the
    axes of that in our order. rope: how many of the last columns are interleaved pairs.
    """

    leaf: str
    at: tuple[int, ...]
    span: tuple[slice | int, ...]
    order: tuple[int, ...]
    rope: int


class Tensor(NamedTuple):
    """A tensor of theirs: name, shape, shape with merged axes separated, the parts."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    parts: tuple[Part, ...]


def tensors(family: Family, c: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a model, in the order of the layers."""
    sizes = _sizes(c)

    def place(rows: tuple[Row, ...], prefix: str, path: str, index: tuple[int, ...] = ()) -> Iterator[Tensor]:
        return (_tensor(renamed(family, row), prefix, path, index, sizes) for row in rows)

    outside = _with_shifts(OUTSIDE, c) + (() if c.tied_embeddings else (HEAD,)) + ((HEAD_BIAS,) if c.head_bias else ())
    yield from place(outside, "", "")
    for layer, where in enumerate(places(c)):
        prefix = f"model.layers.{layer}."
        if layer >= c.num_layers:
            yield from place(PREDICTION, prefix, "params/mtp/", (where.repeat,))
        yield from _layer(family, c, prefix, f"params/{where.path}", where.repeat, where.kind, sizes)


def copies(family: Family, c: ModelConfig) -> dict[str, str]:
    """copy -> original; a checkpoint may lack the copies, and those it has must be equal to their originals."""
    embedding = renamed(family, EMBEDDING).name
    head = renamed(family, HEAD).name
    # repeated in every module of multi-token prediction, as DeepSeek publishes them
    of_module = {"embed_tokens.weight": embedding, "shared_head.head.weight": embedding if c.tied_embeddings else head}
    found = {head: embedding} if c.tied_embeddings else {}
    for depth in range(c.mtp_depth):
        prefix = f"model.layers.{c.num_layers + depth}."
        found |= {prefix + name: original for name, original in of_module.items()}
    return found


def _layer(
    family: Family, c: ModelConfig, prefix: str, path: str, at: int, kind: str, sizes: Mapping[str, int]
) -> Iterator[Tensor]:
    """The tensors of one layer."""
    own = functools.partial(renamed, family)
    rows = _with_shifts(SANDWICH if c.sandwich_norm else NORMS, c)
    if c.attention == "mla":
        rows += (LATENT_QUERIES if c.q_lora_rank else FULL_QUERIES) + LATENT
    else:
        rows += (PAIRED if family.paired else GROUPED) + (QKV_BIASES if c.qkv_bias else ()) + QK_NORMS[c.qk_norm]
        rows += GATES[c.attention_gate] + ((OUT_BIAS,) if c.out_bias else ()) + ((SINKS,) if c.attention_sinks else ())
    if kind == "dense":
        rows += DENSE
    else:
        rows += (ROUTER,) + ((ROUTER_BIAS,) if c.router_bias else ())
        rows += (SHARED if c.num_shared_experts else ()) + ((SHARED_GATE,) if c.shared_gate else ())
        if family.has_bias:
            bias = own(BIAS)._replace(layout=family.bias_layout)
            yield _tensor(bias, prefix, path.replace("params/", "bias/", 1), (at,), sizes)
    yield from (_tensor(own(row), prefix, path, (at,), sizes) for row in rows)
    if family.fused is not None and kind == "moe":
        fused = _in_turn if family.in_turn else _fused
        yield from (_tensor(row, prefix, path, (at,), sizes) for row in fused(*family.fused))
        return
    for expert in range(c.num_experts if kind == "moe" else 0):
        for row in _swiglu(family.experts.format(expert), "ffw/", "m", family.expert_names):
            yield _tensor(row, prefix, path, (at, expert), sizes)


def _with_shifts(rows: tuple[Row, ...], c: ModelConfig) -> tuple[Row, ...]:
    """The rows, and those of the shifts of LayerNorm if they have the scales of norms."""
    if c.norm == "rms":
        return rows
    suffix = "norm/scale"
    scales = [(row, ours) for row in rows for ours in row.ours if ours.endswith(suffix)]
    shifts = (
        _same(row.name.removesuffix("weight") + "bias", ours.removesuffix("scale") + "shift") for row, ours in scales
    )
    return (*rows, *shifts)


def renamed(family: Family, row: Row) -> Row:
    """The row under the family's name of its tensor."""
    return row._replace(name=family.renamed.get(row.name, row.name))


def _sizes(c: ModelConfig) -> dict[str, int]:
    """letter -> size."""
    letters = dict(v=c.vocab_size, d=c.embed_dim, b=c.embed_dim, c=c.embed_dim, h=c.num_heads, g=c.num_kv_heads)
    letters |= dict(k=c.head_dim, f=c.ffw_dim, x=c.num_experts, m=c.expert_ffw_dim)
    letters |= dict(y=c.num_heads * c.head_dim, u=c.num_kv_heads * c.head_dim)
    letters |= dict(j=c.expert_ffw_dim, s=shared_width(c), z=c.q_lora_rank, r=c.kv_lora_rank, i=c.head_dim, o=1)
    return letters | dict(
        n=c.qk_nope_head_dim, p=c.qk_rope_head_dim, q=c.qk_nope_head_dim + c.qk_rope_head_dim, w=c.v_head_dim
    )


def _tensor(row: Row, prefix: str, path: str, index: tuple[int, ...], sizes: Mapping[str, int]) -> Tensor:
    axes = [axis for merged in row.layout.split() for axis in merged.split(".") if axis != "1"]
    size = {axis: sum(sizes[letter] for letter in axis if letter.isalpha()) for axis in axes} | {"1": 1}
    shape = tuple(math.prod(size[axis] for axis in merged.split(".")) for merged in row.layout.split())
    by_expert = "x" in axes and not any("x" in letters for letters in row.ours.values())
    kept = [axis for axis in axes if not (by_expert and axis == "x")]
    divided = next((axis for axis in kept if len(axis) > 1), kept[0])
    slices = _places(divided, sizes)
    parts: list[Part] = []
    for expert in range(sizes["x"]) if by_expert else (None,):
        at = index if expert is None else (*index, expert)
        whole: dict[str, Any] = dict.fromkeys(axes, slice(None)) | ({} if expert is None else {"x": expert})
        for (ours, letters), part in zip(row.ours.items(), slices, strict=True):
            span = tuple((whole | {divided: part})[axis] for axis in axes)
            order = tuple(next(i for i, axis in enumerate(kept) if one in axis) for one in letters.split())
            rope = sizes[PAIRS[letters[-1]]] if letters[-1] in PAIRS else 0
            parts.append(Part(path + ours, at, span, order, rope))
    return Tensor(prefix + row.name, shape, tuple(size[axis] for axis in axes), tuple(parts))


def _places(axis: str, sizes: Mapping[str, int]) -> list[slice]:
    """Where each of our parameters is in an axis of theirs."""
    if "|" in axis:
        return [slice(first, None, 2) for first in range(2)]
    starts = itertools.accumulate((sizes[letter] for letter in axis.split("+")), initial=0)
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


def split(tensor: Tensor, value: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    """The slices of our parameters in a tensor of theirs."""
    view = value.reshape(tensor.view)
    for part in tensor.parts:
        yield part, _as_halves(view[part.span].transpose(part.order), part.rope)


def join(tensor: Tensor, slices: list[np.ndarray]) -> np.ndarray:
    """The tensor of theirs from slices of our parameters: the inverse of `split`."""
    found = [
        _as_pairs(value, part.rope).transpose(np.argsort(part.order))
        for part, value in zip(tensor.parts, slices, strict=True)
    ]
    if len(found) == 1:
        return found[0].reshape(tensor.shape)
    whole = np.empty(tensor.view, found[0].dtype)
    for part, value in zip(tensor.parts, found, strict=True):
        whole[part.span] = value
    return whole.reshape(tensor.shape)


def _as_halves(value: np.ndarray, rope: int) -> np.ndarray:
    """The last `rope` columns reordered: the first of every pair, then the second of every pair."""
    if not rope:
        return value
    pairs = value[..., -rope:]
    return np.concatenate([value[..., :-rope], pairs[..., 0::2], pairs[..., 1::2]], -1)


def _as_pairs(value: np.ndarray, rope: int) -> np.ndarray:
    """The inverse of `_as_halves`."""
    if not rope:
        return value
    result = value.copy()
    result[..., -rope::2] = value[..., -rope : -rope // 2]
    result[..., 1 - rope :: 2] = value[..., -rope // 2 :]
    return result
