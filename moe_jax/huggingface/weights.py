"""Weights of Hugging Face's families become our parameters, and back, tensor by tensor.

`load_hf`, `save_hf` and the command `python -m moe_jax.convert` all go through here. The command never holds a whole
model in memory.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from moe_jax import balance
from moe_jax.config import Config, ModelConfig, default, validate
from moe_jax.huggingface import shards
from moe_jax.huggingface.config_in import family_of, from_hf
from moe_jax.huggingface.config_out import choose, to_hf
from moe_jax.huggingface.family import CARRIED, Family, words
from moe_jax.huggingface.float8 import SCALE, block_of, dequantised
from moe_jax.huggingface.left_out import LeftOut, left_out
from moe_jax.huggingface.mxfp4 import Packed, Stored, joined
from moe_jax.huggingface.shards import Entry, Plan
from moe_jax.huggingface.tensors import (
    BIAS,
    HEAD,
    ROUTER,
    ROUTER_BIAS,
    Tensor,
    copies,
    join,
    renamed,
    split,
    tensors,
)
from moe_jax.model.abstract import Read, Write, abstract_weights
from moe_jax.model.folding import folded
from moe_jax.runtime.leaves import path_name

CARRIED_FILES = words(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "tokenizer.model tiktoken.model generation_config.json chat_template.json chat_template.jinja"
)
MOST_FILE_BYTES = 256 * 2**20  # of a tokenizer's file
MOST_MISSING = 4  # missing tensors that are named; a false config.json may name more than fits anywhere


# --- in -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A folder of theirs, checked.

    block: rows and columns that share a float8 scale. left_out: tensors that are not read.
    """

    folder: Path
    family: Family
    config: ModelConfig
    tensors: list[Tensor]
    entries: Mapping[str, Stored]
    block: tuple[int, int]
    left_out: LeftOut

    @property
    def num_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(self.entries[t.name].end - self.entries[t.name].begin for t in self.tensors)


def open_hf(folder: Path, dtype: str | None = None) -> Source:
    """Read config and headers, and check that every tensor is there, known, and of the right shape.

    Raises:
        ValueError: as `load_hf`.
    """
    hf = shards.json_object(folder, "config.json") if folder.is_dir() else {}
    stored = shards.open_folder(folder)
    try:
        entries = joined(stored)
        family, config, block = model_of(hf, entries, dtype)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    unread = left_out(family, hf, entries)
    entries = {name: entry for name, entry in entries.items() if name not in unread.names}
    found = _check_tensors(folder, tensors(family, config), entries, copies(family, config))
    return Source(folder, family, config, found, entries, block, unread)


def model_of(
    hf: Mapping[str, Any], entries: Mapping[str, Stored], dtype: str | None = None
) -> tuple[Family, ModelConfig, tuple[int, int]]:
    """The family of a config.json, our config of the model, and the rows and columns that share a float8 scale.

    Raises:
        ValueError: a key or a value that this family, or our model, does not have.
    """
    family, ours = from_hf(hf)
    block = block_of(hf, entries)
    ours["mtp_depth"] = _depths_there(ours, entries)
    ours["param_dtype"] = ours["compute_dtype"] = dtype or _stored_dtype(family, entries)
    config = validate(default(model=ours)).model
    choose(config, family.architecture)  # what is read can be written again
    return family, config, block


def _depths_there(ours: Mapping[str, Any], entries: Mapping[str, Stored]) -> int:
    """The number of multi-token-prediction modules in the files; transformers leaves them out when it saves."""
    first = f"model.layers.{ours['num_layers']}."
    return ours.get("mtp_depth", 0) if any(name.startswith(first) for name in entries) else 0


def _stored_dtype(family: Family, entries: Mapping[str, Stored]) -> str:
    """The narrowest dtype that loses nothing; routers, biases and scales do not count, because they are float32."""
    apart = (*(renamed(family, row).name for row in (ROUTER, ROUTER_BIAS, BIAS)), SCALE)
    dtypes = {entry.dtype for name, entry in entries.items() if not name.endswith(apart)}
    return "bfloat16" if dtypes <= {"BF16", "F8_E4M3", "MXFP4"} else "float32"


def _check_tensors(
    folder: Path, wanted: Iterator[Tensor], entries: Mapping[str, Stored], allowed_copies: Mapping[str, str]
) -> list[Tensor]:
    """The tensors to read; a ValueError names one that is missing, unexpected or of another shape."""
    found, missing = [], []
    for tensor in wanted:
        entry = entries.get(tensor.name)
        if entry is None:
            missing.append(tensor)
            if len(missing) == MOST_MISSING:
                break
        elif entry.shape != tensor.shape:
            raise ValueError(
                f"{folder}: tensor {tensor.name} in {entry.file.name} has shape {list(entry.shape)}, but config.json "
                f"makes it {list(tensor.shape)}; fetch the file, or the config, again."
            )
        else:
            found.append(tensor)
    if missing:
        names = ", ".join(f"{t.name} {list(t.shape)}" for t in missing)
        raise ValueError(
            f"{folder} lacks tensors that config.json requires: {names}{', ...' * (len(missing) == MOST_MISSING)}."
        )
    _check_others(folder, {t.name for t in found}, entries, allowed_copies)
    return found


def _check_others(
    folder: Path, known: set[str], entries: Mapping[str, Stored], allowed_copies: Mapping[str, str]
) -> None:
    """Check the tensors that are not parameters: copies, scales, tables that RoPE computes; others are refused."""
    for name, entry in entries.items():
        if name in known or name.endswith(".rotary_emb.inv_freq"):
            continue
        if name in allowed_copies:
            original = allowed_copies[name]
            if not _same(entry, entries[original]):
                raise ValueError(
                    f"{folder}: tensor {name} {list(entry.shape)} must be a copy of {original}, because our model "
                    "shares it, but differs; convert another model."
                )
        elif not (name.endswith(SCALE) and name.removesuffix(SCALE) in known):
            raise ValueError(
                f"{folder}: tensor {name} {list(entry.shape)} in {entry.file.name} is not in the model of config.json; "
                "give the config.json that belongs to it."
            )
    for name in known:
        scale = entries.get(name + SCALE)
        narrow = entries[name].dtype.startswith("F8")
        if narrow and len(entries[name].shape) != 2:
            raise ValueError(f"{folder}: tensor {name} is float8, but only matrices can be; fetch the file again.")
        if narrow != (scale is not None):
            missing = "has no" if narrow else f"is {entries[name].dtype}, and needs no"
            raise ValueError(f"{folder}: tensor {name} {missing} {name}{SCALE}; fetch the file again.")


def _same(one: Stored, other: Stored) -> bool:
    if isinstance(one, Packed) or isinstance(other, Packed):
        return False  # what may be a copy is never packed
    return shards.digest(one) == shards.digest(other)


def fill(source: Source, write: Write) -> Iterator[int]:
    """Read every tensor, in the order of the files, and write its slices; yields the bytes read."""
    dtypes = {path_name(p): leaf.dtype for p, leaf in _leaves(source.config)}
    for tensor in sorted(source.tensors, key=lambda t: (source.entries[t.name].file, source.entries[t.name].begin)):
        for part, value in split(tensor, _value(source, tensor.name)):
            write(part.leaf, part.at, value.astype(dtypes[part.leaf]))
        entry = source.entries[tensor.name]
        yield entry.end - entry.begin


def _value(source: Source, name: str) -> np.ndarray:
    """A tensor as stored; float8 and fp4 become their products with the scales, in float32."""
    entry = source.entries[name]
    if isinstance(entry, Packed):
        return entry.read()
    value = shards.read(entry)
    if entry.dtype.startswith("F8"):
        return dequantised(value, _scale(source, name, value.shape), source.block)
    if name.endswith(renamed(source.family, BIAS).name):
        _refuse_unless(np.isfinite(value), source, name, "finite")
    return value


def _scale(source: Source, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The scales of a tensor's blocks, which must be finite and not negative."""
    entry = source.entries[name + SCALE]
    assert isinstance(entry, Entry)  # only blocks with their scales are packed
    scale = shards.read(entry).astype(np.float32)
    blocks = [math.ceil(n / b) for n, b in zip(shape, source.block, strict=True)]
    if list(scale.shape) != blocks:
        raise ValueError(
            f"{source.folder}: tensor {name}{SCALE} has shape {list(scale.shape)}, but blocks of {list(source.block)} "
            f"make it {blocks}; fetch the file again."
        )
    _refuse_unless(np.isfinite(scale) & (scale >= 0), source, name + SCALE, "finite and not negative")
    return scale


def _refuse_unless(good: np.ndarray, source: Source, name: str, what: str) -> None:
    if not good.all():
        raise ValueError(
            f"{source.folder}: tensor {name} has {np.size(good) - good.sum()} values that are not {what}; "
            "fetch the file again."
        )


# --- out ------------------------------------------------------------------------------------------------------


def export(
    config: ModelConfig,
    read: Read,
    folder: Path,
    *,
    architecture: str = "",
    dtype: str | None = None,
    carried: Path | None = None,
    max_length: int = 4096,
) -> Iterator[tuple[Plan, int]]:
    """Write config.json, the tensors and the tokenizer's files; yields each tensor and the bytes of all.

    Args:
        config: of the model.
        read: returns slices of its parameters.
        folder: existing and empty.
        architecture: as in `save_hf`.
        dtype: as in `save_hf`.
        carried: folder with the tokenizer's files and the original config.json, if there is one.
        max_length: as in `save_hf`.
    """
    config, read = folded(config, read)
    family = choose(config, architecture, _origin(carried))
    if not family.has_bias:
        _refuse_bias(family, config, read)
    found = {tensor.name: tensor for tensor in tensors(family, config)}
    head = renamed(family, HEAD).name
    repeated = {name: of for name, of in copies(family, config).items() if name != head}
    plans = [Plan(t.name, _written_dtype(t, config, read, dtype), t.shape) for t in found.values()]
    plans += [Plan(name, dtype or config.param_dtype, found[of].shape) for name, of in repeated.items()]
    kinds = {plan.name: plan.dtype for plan in plans}

    def value(name: str) -> np.ndarray:
        tensor = found[repeated.get(name, name)]
        whole = join(tensor, [read(part.leaf, part.at) for part in tensor.parts])
        return whole.astype(kinds[name])

    known = {"max_position_embeddings": _length(config, max_length)} | carry(carried, folder)
    if config.index_topk:
        known["max_position_embeddings"] = min(known["max_position_embeddings"], config.index_topk)
    (folder / "config.json").write_text(
        json.dumps(to_hf(family, config, dtype or config.param_dtype, known), indent=2) + "\n"
    )
    total = sum(plan.num_bytes for plan in plans)
    for plan in shards.write_folder(folder, plans, value):
        yield plan, total


def _origin(carried: Path | None) -> str:
    """The family of the config.json that came with the model; "" without one, or if it is none that we know."""
    if carried is None or not (carried / "config.json").is_file():
        return ""
    try:
        return family_of(shards.json_object(carried, "config.json")).architecture
    except ValueError:
        return ""


def _length(config: ModelConfig, max_length: int) -> int:
    yarn = config.yarn
    return round(yarn.original_length * yarn.factor) if yarn.factor > 1 else max_length


def _written_dtype(tensor: Tensor, config: ModelConfig, read: Read, dtype: str | None) -> str:
    """float32 for the selection bias; for routers and sinks the narrowest dtype that loses nothing; else `dtype`."""
    (leaf, index, *_), *_ = tensor.parts
    if leaf.startswith("bias/"):
        return "float32"
    if dtype is None and config.param_dtype == "bfloat16" and leaf.endswith(("/router", "/router_bias", "/sinks")):
        wide = read(leaf, index)
        return "bfloat16" if np.array_equal(wide, wide.astype(ml_dtypes.bfloat16).astype(np.float32)) else "float32"
    return dtype or config.param_dtype


def _refuse_bias(family: Family, config: ModelConfig, read: Read) -> None:
    """Raise a ValueError if a bias would be lost that selects other experts than the scores alone."""
    for path, leaf in _leaves(config):
        if path_name(path).startswith("bias/"):
            value = read(path_name(path), ())
            if np.ptp(value.reshape(leaf.shape[0], -1), axis=-1).any():
                raise ValueError(
                    f"{family.architecture} has no place for a selection bias, but {path_name(path)} is from "
                    f"{value.min():.3g} to {value.max():.3g}; its choice of experts would be lost. Train with another "
                    "balancing method, or a model that DeepseekV3ForCausalLM holds."
                )


def refuse_balance(config: Config) -> None:
    """Raise a ValueError if a run selects experts by anything but scores plus bias, which no family has."""
    balancer = balance.make(config.balance, config.model)
    names = ", ".join(entry.label for entry in config.balance)
    if balancer.combine is not None and config.model.num_experts:
        raise ValueError(
            f"balance ({names}) does not add the bias to the scores, as every family does; it cannot be exported."
        )
    if balancer.select is not None and balancer.inference == "same":
        raise ValueError(
            f"balance ({names}) selects experts itself, in inference too, as no family does; it cannot be exported."
        )
    if balancer.router is not None:
        raise ValueError(f"balance ({names}) has routers that are no parameters of the model; it cannot be exported.")


def carry(source: Path | None, target: Path, everything: bool = False) -> dict[str, Any]:
    """Copy the tokenizer's files, and with `everything` config.json; returns `CARRIED` keys of config.json, if any."""
    if source is None or not source.is_dir():
        return {}
    names = [name for name in sorted(CARRIED_FILES) if (source / name).exists()]
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        names += [f"{templates.name}/{file.name}" for file in templates.glob("*.jinja")]
    for name in names:
        _copy(source, target, name)
    if not (source / "config.json").exists():
        return {}
    if everything:
        _copy(source, target, "config.json")
    config = shards.json_object(source, "config.json")
    return {key: config[key] for key in CARRIED if key in config}


def _copy(source: Path, target: Path, name: str) -> None:
    """Copy one file, which must not lead out of the source, to the same place below the target."""
    place, _, plain = name.rpartition("/")
    file = shards.inside(source, plain, place)
    if file.stat().st_size > MOST_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any tokenizer's file; remove it.")
    (target / place).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target / name)


# --- our leaves -----------------------------------------------------------------------------------------------


def _leaves(config: ModelConfig) -> list[tuple[Any, jax.ShapeDtypeStruct]]:
    return jax.tree_util.tree_leaves_with_path(abstract_weights(config))
