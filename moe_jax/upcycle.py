"""`python -m moe_jax.upcycle --input=WORKDIR --config=FILE --output=WORKDIR`: a trained model gets (more) experts.

The config is that of the run to come, and describes the model to make. It must have the model of the input but for its
experts: `model.num_experts`, `model.expert_ffw_dim` and what else concerns them. A dense layer becomes whole copies of
itself, or, if `model.expert_ffw_dim` is a fraction of its width, copies in as many slices; experts become more, or
smaller, experts. docs/training.md has examples.

The output is a workdir with weights only, which `evaluate` and `generate` read, and from which a run starts by
`--config.init_from=WORKDIR`. The command prints whether the new model computes what the old one did, or why not.

`--router=random` draws routers anew; without it the slices of a copy are chosen together, and copies of an expert keep
its column of the router, plus `--noise` (0.01, relative) that lets them part. `--reinit=0.5` draws half of the hidden
units of every expert anew. `--weights=ema` starts from the moving average of the input's weights.
"""

import signal
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from moe_jax.config import Config, Weights, validate
from moe_jax.config.command import check_weights, define_config_flag, define_weights_flag, fail, parse_flags
from moe_jax.config.paths import workdir_of
from moe_jax.convert import holds_a_run, refuse_buckets
from moe_jax.runtime.files import new_folder
from moe_jax.runtime.workdir import TOKENIZER, config_of_run


def run(config: Config, source: Path, target: Path, options: dict[str, Any], weights: Weights = "last") -> None:
    """Write the workdir with the new weights, and report what they compute.

    Args:
        config: of the run to come.
        source: the workdir with the trained model.
        target: the workdir to create.
        options: of `model.upcycling.Recipe`.
        weights: which of the source.

    Raises:
        ValueError, OSError: the models do not fit, the checkpoint is missing or damaged, or the output is not empty.
    """
    refuse_buckets(source, target)
    if not holds_a_run(source):
        raise ValueError(f"--input={source} is a Hugging Face folder; convert it with python -m moe_jax.convert first.")
    there = config_of_run(source)
    check_weights(there, weights)
    # these load jax, which takes seconds: the mistakes above are reported before
    from moe_jax.huggingface.folders import open_weights, progress, tokenizer_of, weights_of_workdir
    from moe_jax.huggingface.weights import carry
    from moe_jax.model.upcycling import Recipe, changes, plan, upcycled

    recipe = Recipe(**options)
    how = plan(there.model, config.model)
    step, read = open_weights(source, there, weights)
    with new_folder(target) as partial, tokenizer_of(source) as carried, progress(target.name, None) as advance:
        carry(carried, partial / TOKENIZER, everything=True)
        with weights_of_workdir(partial, config, {"upcycled_from": f"{source.name}@{step}"}) as write:
            for leaf, index, value in upcycled(there.model, config.model, read, recipe):
                write(leaf, index, value)
                advance(value.nbytes)
    made = f"{config.model.num_experts} experts a layer: {how.copies} copies in {how.slices} slices"
    of = f"each of {how.originals} experts" if there.model.num_experts else "the dense layer"
    print(f"wrote {target}: {made} of {of} after {step} steps")
    reasons = changes(there.model, config.model, recipe)
    print("it computes what the input computes" if not reasons else f"it computes something else: {'; '.join(reasons)}")


def main(_: list[str]) -> None:
    """Check the flags, then write the workdir."""
    flag = flags.FLAGS
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # a half-written output is removed
    try:
        config = validate(flag.config)
        options = {name: flag[name].value for name in ("router", "noise", "reinit", "seed")}
        source, target = workdir_of(flag.input, "--input"), workdir_of(flag.output, "--output")
        run(config, source, target, options, flag.weights)
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    define_config_flag("A config file: of the run that will use the weights.")
    flags.DEFINE_string("input", None, "The workdir of a run, or of a converted model.")
    flags.DEFINE_string("output", None, "The workdir to create.")
    flags.DEFINE_enum("router", "grouped", ["grouped", "random"], "How routers begin.")
    flags.DEFINE_float("noise", 0.01, "Noise on copied columns of the router, relative to its root mean square.")
    flags.DEFINE_float("reinit", 0.0, "Share of the hidden units of every expert that are drawn anew.")
    flags.DEFINE_integer("seed", 0, "Seed of all draws.")
    define_weights_flag()
    flags.mark_flags_as_required(["config", "input", "output"])
    app.run(main, flags_parser=parse_flags)
