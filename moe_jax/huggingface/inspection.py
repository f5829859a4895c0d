"""What a Hugging Face folder is, and what of it does not fit: from config.json and the files' headers alone."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import ModelConfig, num_moe_layers, shared_width
from moe_jax.huggingface import shards
from moe_jax.huggingface.config_in import family_of, obstacles
from moe_jax.huggingface.family import Family
from moe_jax.huggingface.float8 import SCALE
from moe_jax.huggingface.left_out import LeftOut, left_out
from moe_jax.huggingface.mxfp4 import Stored, joined
from moe_jax.huggingface.tensors import copies, tensors
from moe_jax.huggingface.weights import MOST_MISSING, model_of


@dataclass(frozen=True)
class Inspection:
    """A folder, and what is wrong with it.

    family: None if it is none of ours. config: ours; None if theirs does not fit. entries: where its tensors are.
    left_out: those that would not be read.
    """

    folder: Path
    hf: Mapping[str, Any]
    family: Family | None
    config: ModelConfig | None
    entries: Mapping[str, Stored]
    obstacles: tuple[str, ...]
    left_out: LeftOut

    def lines(self) -> Iterator[str]:
        """What there is to say, a line each."""
        of = self.family.architecture if self.family else "no family that we have"
        yield f"{self.folder}: {of}, model_type={self.hf.get('model_type')!r}"
        if self.config is not None:
            yield from map("  {}".format, _numbers(self.config))
        if self.entries:
            yield f"  {_stored(self.entries)}"
        yield from (f"  would leave out {sentence}" for sentence in self.left_out.sentences())
        yield from (f"does not fit: {obstacle}" for obstacle in self.obstacles)
        if not self.obstacles:
            yield "fits: every key and every tensor has its place"


def inspected(folder: Path) -> Inspection:
    """Read config.json and headers, and compare them with the family's tables.

    Raises:
        ValueError: there is no config.json, or it is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with config.json and *.safetensors.")
    hf = shards.json_object(folder, "config.json")
    family, config, entries = None, None, {}
    wrong: list[str] = []
    try:
        entries = joined(shards.open_folder(folder))
    except ValueError as error:
        wrong.append(str(error))
    try:
        family = family_of(hf)
        wrong += obstacles(hf)
        config = model_of(hf, entries)[1]
    except ValueError as error:
        wrong += [] if str(error) in wrong else [str(error)]
    unread = LeftOut()
    if family is not None and config is not None and entries:
        unread = left_out(family, hf, entries)
        wrong += _misplaced(family, config, {name: e for name, e in entries.items() if name not in unread.names})
    return Inspection(folder, hf, family, config, entries, tuple(wrong), unread)


def _misplaced(family: Family, config: ModelConfig, entries: Mapping[str, Stored]) -> Iterator[str]:
    """A sentence for the tensors that are missing, of another shape, or not of the model, with the first of each."""
    known = set(copies(family, config))
    missing, other = [], []
    for tensor in tensors(family, config):
        known.add(tensor.name)
        entry = entries.get(tensor.name)
        if entry is None:
            missing.append(tensor.name)
            if len(missing) > len(entries):  # a false config.json may require more than fits anywhere
                break
        elif entry.shape != tensor.shape:
            other.append(f"{tensor.name} {list(entry.shape)} for {list(tensor.shape)}")
    unknown = [name for name in entries if name.removesuffix(SCALE) not in known and not _is_table(name)]
    for what, names in (("are missing", missing), ("have another shape", other)):
        if names:
            yield f"{len(names)} tensors that config.json requires {what}: {_first(names)}."
    if unknown and len(missing) <= len(entries):
        yield f"{len(unknown)} tensors are not in the model of config.json: {_first(unknown)}."


def _is_table(name: str) -> bool:
    return name.endswith(".rotary_emb.inv_freq")


def _first(names: list[str]) -> str:
    return ", ".join(names[:MOST_MISSING]) + (", ..." if len(names) > MOST_MISSING else "")


def _numbers(c: ModelConfig) -> Iterator[str]:
    """The main numbers of a model."""
    heads = f"{c.num_kv_heads} of keys and values" if c.attention == "gqa" else "latent attention"
    yield f"{c.num_layers} layers of width {c.embed_dim}, {c.num_heads} heads ({heads}), vocabulary {c.vocab_size}"
    shared = (
        f"{c.num_shared_experts} shared of joint width {shared_width(c)}" if c.num_shared_experts else "none shared"
    )
    layers = num_moe_layers(c) - c.mtp_depth
    yield f"{c.num_experts} experts of width {c.expert_ffw_dim} in {layers} layers, {c.top_k} a token, {shared}"
    if c.mtp_depth:
        yield f"{c.mtp_depth} modules of multi-token prediction"


def _stored(entries: Mapping[str, Stored]) -> str:
    """Parameters, tensors, files and dtypes."""
    count = sum(math.prod(entry.shape) for name, entry in entries.items() if not name.endswith(SCALE))
    size = sum(entry.end - entry.begin for entry in entries.values())
    dtypes = ", ".join(f"{kind} {number}" for kind, number in Counter(e.dtype for e in entries.values()).most_common())
    files = len({entry.file for entry in entries.values()})
    return f"{count / 1e9:.3g}B parameters, {size / 1e9:.3g} GB in {files} files; tensors: {dtypes}"
