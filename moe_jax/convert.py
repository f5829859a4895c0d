"""`python -m moe_jax.convert --input=DIR --output=DIR`: weights from Hugging Face's folders to workdirs, and back.

A folder with config.json and *.safetensors becomes a workdir that `evaluate` and `generate` read, and from which
`--config.init_from=WORKDIR` starts a run. A workdir, of a run or converted, becomes a folder that transformers and vLLM
load. The input determines the direction. The families are DeepSeek-V2, DeepSeek-V3 (with Kimi-K2), Qwen3-MoE, Mixtral
and OLMoE; a feature that the family or our model does not have is refused by name.

Tensors are converted one after the other, so that memory holds about one of them, however large the model is. The
output appears whole or not at all. `--dtype=float32` or `bfloat16` converts the dtype; without it tensors keep theirs.
"""

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags

from moe_jax.config import Config, as_dict, default, validate
from moe_jax.config.command import fail, parse_flags
from moe_jax.config.paths import workdir_of
from moe_jax.data.corpus import check_corpus, publish_tokenizer
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer
from moe_jax.data.trained import TOKENIZER_FILE
from moe_jax.runtime.files import is_remote, new_folder, read_json, write_json
from moe_jax.runtime.workdir import TOKENIZER, config_of_run, versions

MOST_CONFIG_BYTES = 2**24  # of a config.json of ours


def to_workdir(folder: Path, workdir: Path, dtype: str | None = None) -> Config:
    """Convert a folder of Hugging Face to a workdir: config.json, tokenizer/, and a checkpoint with weights only.

    Args:
        folder: with config.json and *.safetensors.
        workdir: new or empty.
        dtype: of the parameters, "float32" or "bfloat16"; None: as stored.

    Returns:
        The config of the workdir.

    Raises:
        ValueError: something in the folder is not as it must be, and is named; or the workdir is not empty.
    """
    from moe_jax.huggingface.shards import open_folder

    open_folder(folder)  # damaged files are reported before jax is loaded
    # imported before the folder is created: a signal while jax is being loaded ends the process without cleaning up
    from moe_jax.huggingface.weights import abstract_weights, carry, fill, index_axes, open_hf
    from moe_jax.runtime import slices

    with new_folder(workdir) as partial:
        source = open_hf(folder, dtype)
        model = as_dict(Config(model=source.config))["model"]
        config = validate(default(model=model, balance=dict(bias_sign={}) if source.family.has_bias else {}))
        carry(folder, partial / TOKENIZER, everything=True)
        path = partial / "checkpoints" / "00000000"
        abstract = abstract_weights(source.config)
        path.parent.mkdir()
        arrays = slices.create(path, abstract, index_axes(source.config))
        with progress(workdir.name, source.num_bytes) as advance:
            for num_bytes in fill(source, lambda leaf, index, value: arrays[leaf].write(index, value)):
                advance(num_bytes)
        slices.commit(path, abstract, {"config": as_dict(config), "converted_from": folder.name})
        write_json(partial / "config.json", as_dict(config))
        write_json(partial / "run.json", versions())
    return config


def to_folder(workdir: Path, folder: Path, dtype: str | None = None, architecture: str = "") -> int:
    """Convert the newest checkpoint of a workdir to a folder for transformers and vLLM.

    Args:
        workdir: of a training run, or from `to_workdir`.
        folder: new or empty.
        dtype: of the tensors, "float32" or "bfloat16"; None: that of the parameters.
        architecture: the family; "": the one that holds such a model.

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: the checkpoint is missing or damaged, or the family cannot hold the model.
    """
    from moe_jax.huggingface.weights import abstract_weights, export, refuse_balance
    from moe_jax.runtime import slices

    config = config_of_run(workdir)
    refuse_balance(config)
    found = slices.open_newest(
        workdir / "checkpoints",
        abstract_weights(config.model),
        verify=config.checkpoint.verify,
        fallback=config.checkpoint.fallback,
    )
    if found is None:
        raise ValueError(f"--input={workdir} has no finished checkpoint; train first.")
    step, arrays = found
    if (workdir / "checkpoints").resolve() in folder.resolve().parents:
        raise ValueError(f"--output={folder} is inside the checkpoints that are read; name another.")
    with new_folder(folder) as partial, tokenizer_of(workdir) as carried, progress(folder.name, None) as advance:
        for plan, total in export(
            config.model,
            lambda leaf, index: arrays[leaf].read(index),
            partial,
            architecture=architecture,
            dtype=dtype,
            carried=carried,
            max_length=config.sequence_length,
        ):
            advance(plan.num_bytes, total)
    return step


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
    """Why a converted folder has no tokenizer.json."""
    path = config_of_run(workdir).data.path
    if (workdir / TOKENIZER).is_dir():
        return "the original model had none"
    if _tokenizer_of_corpus(path) is None:
        return f"that of the run is in its corpus, and data.path={path} cannot be read; restore the corpus"
    return "the model's tokens are bytes, and 256 opens a document"


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Any]:
    """A bar of bytes on standard error; yields (bytes done, total once it is known) -> None."""
    from rich import progress as bar
    from rich.console import Console

    columns = bar.TextColumn("{task.description}"), bar.BarColumn(), bar.DownloadColumn(), bar.TransferSpeedColumn()
    with bar.Progress(*columns, bar.TimeRemainingColumn(), console=Console(stderr=True)) as display:
        task = display.add_task(what, total=total)
        yield lambda done, total=total: display.update(task, advance=done, total=total)


def holds_a_run(folder: Path) -> bool:
    """Whether config.json is one of ours.

    Raises:
        ValueError: it is absent.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"--input={folder} has no config.json; give a Hugging Face folder, or a workdir.")
    try:
        config = read_json(file, "") if file.stat().st_size < MOST_CONFIG_BYTES else {}
    except ValueError:
        return False  # reading it as one of Hugging Face reports the damage
    return isinstance(config.get("model"), dict) and "model_type" not in config


def run(source: Path, target: Path, dtype: str | None, architecture: str) -> None:
    """Convert in the direction that the input determines, and report the result."""
    from moe_jax.huggingface.shards import INDEX, SINGLE

    if is_remote(source) or is_remote(target):
        raise ValueError("--input and --output must be folders of this machine; copy a bucket's files here first.")
    if not holds_a_run(source):
        if architecture:
            raise ValueError(
                f"--architecture={architecture} is for conversion to Hugging Face; the other way, config.json names it."
            )
        config = to_workdir(source, target, dtype)
        model = config.model
        if (source / SINGLE).is_file() and (source / INDEX).exists():
            print(f"read {SINGLE}, as transformers does; ignored {INDEX}, which is from another save")
        print(f"wrote {target}: {model.num_layers} layers, {model.num_experts} experts, {model.param_dtype}")
    else:
        step = to_folder(source, target, dtype, architecture)
        print(f"wrote {target}: the model after {step} steps")
        if not (target / TOKENIZER_FILE).is_file():
            print(f"no {TOKENIZER_FILE} was written: {why_no_tokenizer(source)}")


def main(_: list[str]) -> None:
    """Check the flags, then convert."""
    flag = flags.FLAGS
    for number in (signal.SIGTERM, signal.SIGINT):  # so that a half-written output is removed
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        run(workdir_of(flag.input, "--input"), workdir_of(flag.output, "--output"), flag.dtype, flag.architecture)
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "A Hugging Face folder, or a workdir.", required=True)
    flags.DEFINE_string("output", None, "The workdir, or the folder, to create.", required=True)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "The dtype of the weights; as stored if left out.")
    flags.DEFINE_string("architecture", "", "The family to convert to, as DeepseekV3ForCausalLM; found if left out.")
    app.run(main, flags_parser=parse_flags)
