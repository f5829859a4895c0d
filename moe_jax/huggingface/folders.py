"""A Hugging Face folder becomes a workdir, and a workdir becomes a Hugging Face folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich import progress as bar
from rich.console import Console

from moe_jax.config import Config, ModelConfig, Weights, as_dict, default, validate
from moe_jax.data.corpus import check_corpus, publish_tokenizer
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer
from moe_jax.huggingface.weights import Source, carry, export, fill, open_hf, refuse_balance
from moe_jax.model.abstract import Read, Write, abstract_weights, index_axes
from moe_jax.runtime import slices
from moe_jax.runtime.files import new_folder, write_json
from moe_jax.runtime.workdir import TOKENIZER, config_of_run, versions


def to_workdir(folder: Path, workdir: Path, dtype: str | None = None) -> Source:
    """Convert a Hugging Face folder to a workdir: config.json, tokenizer/, and a checkpoint with weights only.

    Args:
        folder: with config.json and *.safetensors.
        workdir: new or empty.
        dtype: of the parameters, "float32" or "bfloat16"; None: as stored.

    Returns:
        What was read.

    Raises:
        ValueError: a file in the folder is missing, damaged or not supported, or the workdir is not empty.
    """
    with new_folder(workdir) as partial:
        source = open_hf(folder, dtype)
        model = as_dict(Config(model=source.config))["model"]
        config = validate(default(model=model, balance=dict(bias_sign={}) if source.family.has_bias else {}))
        carry(folder, partial / TOKENIZER, everything=True)
        with (
            weights_of_workdir(partial, config, {"converted_from": folder.name}) as write,
            progress(workdir.name, source.num_bytes) as advance,
        ):
            for num_bytes in fill(source, write):
                advance(num_bytes)
    return source


@contextmanager
def weights_of_workdir(workdir: Path, config: Config, origin: dict[str, str]) -> Iterator[Write]:
    """Make a new folder a workdir with weights only; yields a function that writes a slice of them.

    Args:
        workdir: the folder, without checkpoints.
        config: of the workdir.
        origin: where the weights come from, for the checkpoint's manifest.
    """
    path = workdir / "checkpoints" / "00000000"
    abstract = abstract_weights(config.model)
    path.parent.mkdir()
    arrays = slices.create(path, abstract, index_axes(config.model))
    yield lambda leaf, index, value: arrays[leaf].write(index, value)
    slices.commit(path, abstract, {"config": as_dict(config)} | origin)
    write_json(workdir / "config.json", as_dict(config))
    write_json(workdir / "run.json", versions())


def to_folder(
    workdir: Path, folder: Path, dtype: str | None = None, architecture: str = "", weights: Weights = "last"
) -> int:
    """Convert the newest checkpoint of a workdir to a folder for transformers and vLLM.

    Args:
        workdir: of a training run, or from `to_workdir`.
        folder: new or empty.
        dtype: of the tensors, "float32" or "bfloat16"; None: that of the parameters.
        architecture: as in `save_hf`.
        weights: "last" or "ema", their moving average.

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: the checkpoint is missing or damaged, or the family cannot represent the model.
    """
    config = config_of_run(workdir)
    refuse_balance(config)
    step, read = open_weights(workdir, config, weights)
    if (workdir / "checkpoints").resolve() in folder.resolve().parents:
        raise ValueError(f"--output={folder} is inside the checkpoints that are read; name another.")
    with new_folder(folder) as partial, tokenizer_of(workdir) as carried, progress(folder.name, None) as advance:
        for plan, total in export(
            config.model,
            read,
            partial,
            architecture=architecture,
            dtype=dtype,
            carried=carried,
            max_length=config.sequence_length,
        ):
            advance(plan.num_bytes, total)
    return step


def open_weights(workdir: Path, config: Config, weights: Weights) -> tuple[int, Read]:
    """The step of the newest checkpoint, and a function that reads a slice of its weights, or of their average.

    Raises:
        ValueError: the checkpoint is missing or damaged.
    """
    found = slices.open_newest(
        workdir / "checkpoints",
        abstract_weights(config.model) if weights == "last" else _abstract_average(config.model),
        verify=config.checkpoint.verify,
        fallback=config.checkpoint.fallback,
    )
    if found is None:
        raise ValueError(f"--input={workdir} has no finished checkpoint; train first.")
    step, arrays = found
    inside = "" if weights == "last" else "ema/"
    return step, lambda leaf, index: arrays[inside + leaf].read(index)


def _abstract_average(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the moving average, in its place in a checkpoint."""
    return {"ema": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, "float32"), abstract_weights(config))}


@contextmanager
def tokenizer_of(workdir: Path) -> Iterator[Path]:
    """The folder with the tokenizer of a workdir: its own, or a temporary one with the tokenizer of the corpus."""
    if (workdir / TOKENIZER).is_dir():
        yield workdir / TOKENIZER
        return
    path = config_of_run(workdir).data.path
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = _tokenizer_of_corpus(path)
        if tokenizer is not None and not isinstance(tokenizer, ByteTokenizer):
            publish_tokenizer(path, tokenizer, Path(temporary))
        yield Path(temporary)


def _tokenizer_of_corpus(path: str) -> Tokenizer | None:
    """The tokenizer of a corpus; None if it can no longer be read."""
    try:
        return check_corpus(path).tokenizer
    except (ValueError, OSError):
        return None


def why_no_tokenizer(workdir: Path) -> str:
    """The reason why a converted folder has no tokenizer.json."""
    path = config_of_run(workdir).data.path
    if (workdir / TOKENIZER).is_dir():
        return "the original model has none"
    if _tokenizer_of_corpus(path) is None:
        return f"the run's tokenizer is in its corpus, and data.path={path} cannot be read; restore the corpus"
    return "the model's tokens are bytes, and 256 opens a document"


@contextmanager
def progress(name: str, total: int | None) -> Iterator[Any]:
    """Show a progress bar of bytes on standard error; yields (bytes done, total once it is known) -> None."""
    columns = bar.TextColumn("{task.description}"), bar.BarColumn(), bar.DownloadColumn(), bar.TransferSpeedColumn()
    with bar.Progress(*columns, bar.TimeRemainingColumn(), console=Console(stderr=True)) as display:
        task = display.add_task(name, total=total)
        yield lambda done, total=total: display.update(task, advance=done, total=total)
