"""`python -m moe_jax.describe --config=configs/tiny.py`: describe what the config builds, without creating an array.

Prints total and active parameters, FLOPs a token, and memory of the state; on several devices also how every leaf is
split over them. Active parameters are those that a token uses, with the whole embedding; the sums without it, and
without multi-token prediction, are those that papers publish. `--num_devices=N` describes the mesh of N devices, which
need not be present. `--compile` also compiles the train step for one device and reports the memory that XLA reserves
for it; `moe_jax.plan` does so for other machines.
"""

import math

from absl import app, flags
from rich.console import Console

from moe_jax.config import resolve, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags


def main(_: list[str]) -> None:
    """Print the tables."""
    flag = flags.FLAGS
    try:
        if flag.num_devices < 0:
            raise ValueError(f"--num_devices={flag.num_devices} must be at least 0; 0 takes those that are present.")
        config = validate(flag.config)
        # these load jax, which takes seconds: the mistakes above are reported before
        import jax

        from moe_jax.model.cost import train_flops
        from moe_jax.training.summary import compiled_bytes, memory, model_table, sharding_table

        num_devices = flag.num_devices or jax.device_count()
        config = resolve(config, num_devices)
    except ValueError as error:
        advice = "" if flag.num_devices else " --num_devices=N describes it on other devices than those present."
        fail(f"{error}{advice}")

    console = Console()
    console.print(model_table(config))
    tokens = config.batch_size * config.sequence_length
    console.print(f"training: {train_flops(config):,} FLOPs a token (forward x 3), {tokens:,} tokens a step")
    num_devices = math.prod(vars(config.mesh).values())  # a mesh may leave some devices unused
    if num_devices > 1:
        console.print(sharding_table(config, num_devices))
    m = memory(config, num_devices)
    sizes = ", ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in m._asdict().items())
    each = "one" if num_devices == 1 else "each"
    console.print(f"memory of {each} device: {sizes}; {sum(m) / 2**20:.1f} MiB before activations")
    if flag.compile:
        arguments, temporaries = compiled_bytes(config)
        console.print(
            f"compiled train step: arguments {arguments / 2**20:.1f} MiB, temporaries (activations and "
            f"gradients) {temporaries / 2**20:.1f} MiB"
        )


if __name__ == "__main__":
    define_config_flag("A config file.")
    flags.DEFINE_bool("compile", False, "Also compile the train step for one device, and report its memory.")
    flags.DEFINE_integer("num_devices", 0, "Number of devices of the mesh to describe; 0 takes those that are present.")
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=parse_flags)
