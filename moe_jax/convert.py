"""`python -m moe_jax.convert --input=DIR --output=DIR`: convert Hugging Face folders to workdirs, and back.

`--inspect=DIR` instead says what a Hugging Face folder is, which family, its main numbers, and what of it does not fit;
it reads no tensor, only config.json and the headers of the files, and ends with status 1 if anything does not fit.

A folder with config.json and *.safetensors becomes a workdir that `evaluate` and `generate` read, and from which
`--config.init_from=WORKDIR` starts a run. A workdir, of a run or converted, becomes a folder that transformers and vLLM
load. The input determines the direction. docs/huggingface.md lists the families; a feature that the family or our model
does not have is refused by name. What came from a family goes back to it; a model that several families hold, and that
came from none of them, needs `--architecture`.

Tensors are converted one after the other, so that memory holds about one of them, however large the model is. The
output appears whole or not at all. `--dtype=float32` or `bfloat16` converts the dtype; without it tensors keep theirs.
`--weights=ema` converts the moving average of a run's weights.
"""

import signal
import sys
from pathlib import Path

from absl import app, flags

from moe_jax.config import Weights
from moe_jax.config.command import check_weights, define_weights_flag, fail, parse_flags
from moe_jax.config.paths import workdir_of
from moe_jax.data.trained import TOKENIZER_FILE
from moe_jax.runtime.files import is_remote, read_json
from moe_jax.runtime.workdir import config_of_run

MOST_CONFIG_BYTES = 2**24  # a larger config.json is not one of ours


def holds_a_run(folder: Path, flag: str = "--input") -> bool:
    """Whether the folder's config.json is one of ours.

    Raises:
        ValueError: there is no config.json.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{flag}={folder} has no config.json; give a Hugging Face folder, or a workdir.")
    try:
        config = read_json(file, "") if file.stat().st_size < MOST_CONFIG_BYTES else {}
    except ValueError:
        return False  # the conversion from Hugging Face reads it again and reports the damage
    return isinstance(config.get("model"), dict) and "model_type" not in config


def refuse_buckets(source: Path, target: Path) -> None:
    """Raise a ValueError unless both are folders of this machine."""
    if is_remote(source) or is_remote(target):
        raise ValueError("--input and --output must be folders of this machine; copy a bucket's files here first.")


def run(source: Path, target: Path, dtype: str | None, architecture: str, weights: Weights = "last") -> None:
    """Convert in the direction that the input determines, and report the result."""
    refuse_buckets(source, target)
    is_run = holds_a_run(source)
    if architecture and not is_run:
        raise ValueError(
            f"--architecture={architecture} is for conversion to Hugging Face; the other way, config.json names it."
        )
    if is_run:
        check_weights(config_of_run(source), weights)
    elif weights != "last":
        raise ValueError(f"--weights={weights} chooses among the weights of a run; a Hugging Face folder has only one.")
    # these load jax, which takes seconds: the mistakes above are reported before
    from moe_jax.huggingface.folders import to_folder, to_workdir, why_no_tokenizer
    from moe_jax.huggingface.shards import INDEX, SINGLE

    if not is_run:
        read = to_workdir(source, target, dtype)
        model = read.config
        if (source / SINGLE).is_file() and (source / INDEX).exists():
            print(f"read {SINGLE}, as transformers does; ignored {INDEX}, which is from another save")
        for sentence in read.left_out.sentences():
            print(f"left out {sentence}")
        print(f"wrote {target}: {model.num_layers} layers, {model.num_experts} experts, {model.param_dtype}")
    else:
        step = to_folder(source, target, dtype, architecture, weights)
        print(f"wrote {target}: the model after {step} steps")
        if not (target / TOKENIZER_FILE).is_file():
            print(f"no {TOKENIZER_FILE} was written: {why_no_tokenizer(source)}")


def inspect(folder: Path) -> bool:
    """Print what a Hugging Face folder is; whether it fits."""
    if is_remote(folder):
        raise ValueError(f"--inspect={folder} must be a folder of this machine; copy a bucket's files here first.")
    if holds_a_run(folder, "--inspect"):
        raise ValueError(f"--inspect={folder} is a workdir and must be a Hugging Face folder; give one.")
    from moe_jax.huggingface.inspection import inspected

    found = inspected(folder)
    print("\n".join(found.lines()))
    return not found.obstacles


def main(_: list[str]) -> None:
    """Check the flags, then inspect or convert."""
    flag = flags.FLAGS
    for number in (signal.SIGTERM, signal.SIGINT):  # exit by an exception, so that a half-written output is removed
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if flag.inspect is not None:
            if given := [
                f"--{name}" for name in ("input", "output", "dtype", "architecture", "weights") if flag[name].present
            ]:
                raise ValueError(f"--inspect reads a folder and writes nothing; leave {' and '.join(given)} out.")
            sys.exit(0 if inspect(workdir_of(flag.inspect, "--inspect")) else 1)
        for name in ("input", "output"):
            if flag[name].value is None:
                raise ValueError(f"--{name} is missing; give --input=DIR and --output=DIR, or --inspect=DIR.")
        run(
            workdir_of(flag.input, "--input"),
            workdir_of(flag.output, "--output"),
            flag.dtype,
            flag.architecture,
            flag.weights,
        )
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "A Hugging Face folder, or a workdir.")
    flags.DEFINE_string("output", None, "The workdir, or the folder, to create.")
    flags.DEFINE_string("inspect", None, "A Hugging Face folder, to say what it is and whether it fits.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "The dtype of the weights; as stored if left out.")
    flags.DEFINE_string("architecture", "", "The family to convert to, as DeepseekV3ForCausalLM; its own if left out.")
    define_weights_flag()
    app.run(main, flags_parser=parse_flags)
