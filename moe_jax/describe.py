"""`python -m moe_jax.describe --config=configs/tiny.py`: what the config builds; no array is created.

Prints total and active parameters, FLOPs a token, and memory of the state; on several devices also how every leaf is
split over them. Active parameters are those that a token uses, with the whole embedding; the sums without it, and
without multi-token prediction, are those that papers publish. `--num_devices=N` describes the mesh of N devices, which
need not be present. `--compile` also compiles the train step for one device and reports the memory that XLA reserves
for it; `moe_jax.plan` does so for other machines.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from absl import app, flags

from moe_jax.config import Config, resolve, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.model.cost import AHEAD, Part, parts, train_flops

if TYPE_CHECKING:
    from rich.table import Table


class Memory(NamedTuple):
    """Bytes on each device: parameters and biases, optimizer moments, gradients."""

    parameters: int
    optimizer: int
    gradients: int


def memory(config: Config, num_devices: int = 1) -> Memory:
    """Bytes of the train state and of its gradients; activations depend on the compiler, see `moe_jax.plan`."""
    rows = leaves(config, num_devices)
    parameters = [row for row in rows if not row.path.startswith("optimizer/")]
    optimizer = [row for row in rows if row.path.startswith("optimizer/")]
    gradients = [math.prod(row.part) * 4 for row in rows if row.path.startswith("params/")]
    return Memory(sum(r.bytes for r in parameters), sum(r.bytes for r in optimizer), sum(gradients))


class Leaf(NamedTuple):
    """One array of the train state: its whole shape, and the part that one device holds."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    part: tuple[int, ...]
    bytes: int


def leaves(config: Config, num_devices: int = 1) -> list[Leaf]:
    """Every array of the train state, and how it is split over the mesh; `axes` are the mesh axes of each dimension.

    Raises:
        ValueError: the mesh does not fit the number of devices.
    """
    import jax

    from moe_jax.mesh import abstract_mesh, axes_of, bytes_on_device
    from moe_jax.training.state import abstract_state

    state = abstract_state(config, abstract_mesh(config.mesh, num_devices))._asdict()
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        part = leaf.sharding.shard_shape(leaf.shape)
        axes = (*(axes_of(entry) for entry in leaf.sharding.spec), *[()] * (leaf.ndim - len(leaf.sharding.spec)))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append(Leaf(name, str(leaf.dtype), leaf.shape, axes, part, bytes_on_device(leaf)))
    return rows


def sharding_table(config: Config, num_devices: int) -> "Table":
    """Parameters and biases with the mesh axes that split each dimension; moments are split as their parameters."""
    from rich.table import Table

    sizes = ", ".join(f"{axis} {size}" for axis, size in vars(config.mesh).items())
    table = Table("parameter", "shape, split by", "on each device", title=f"{num_devices} devices: {sizes}")
    for row in leaves(config, num_devices):
        if not row.path.startswith(("params/", "bias/")):
            continue
        dims = (" ".join((str(size), *axes)) for size, axes in zip(row.shape, row.axes, strict=True))
        table.add_row(row.path.partition("/")[2], ", ".join(dims), f"{row.bytes / 2**20:.2f} MiB {row.dtype}")
    table.columns[0].no_wrap = True
    table.columns[2].no_wrap = True
    return table


def compiled_bytes(config: Config) -> tuple[int, int]:
    """(bytes of the arguments, of temporaries) of the compiled train step, by XLA's own analysis."""
    from moe_jax.training.compile import abstract_batch, make_train_step
    from moe_jax.training.state import abstract_state, step_key

    lowered = make_train_step(config).lower(abstract_state(config), abstract_batch(config), step_key(config))
    compiled = lowered.compile()
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def model_table(config: Config) -> "Table":
    """Parameters and FLOPs by part, as a table."""
    from rich.table import Table

    from moe_jax.model.block import layout

    m = config.model
    layers = " + ".join(f"{run.repeats} x ({', '.join(run.kinds)})" for run in layout(m))
    title = f"{m.num_layers} layers: {layers}"
    if m.num_experts:
        title += f"; {m.num_experts} experts, {m.top_k} a token, {m.num_shared_experts} shared"
    table = Table("part", "parameters", "active", "forward FLOPs a token", title=title)
    rows = parts(config)
    for row in rows:
        table.add_row(row.name, f"{row.total:,}", f"{row.active:,}", f"{row.flops:,}")
    table.add_section()
    for part in totals(rows):
        table.add_row(part.name, f"{part.total:,}", f"{part.active:,}", f"{part.flops:,}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def totals(rows: list[Part]) -> list[Part]:
    """The sums that papers publish: of all parts, without multi-token prediction, and without the embedding either.

    Published figures leave multi-token prediction out. A token reads one row of the embedding; some papers count all of
    it as active and others none, so both sums are here.
    """
    left_out: dict[str, tuple[str, ...]] = {"all": ()}
    if any(row.name == AHEAD for row in rows):
        left_out[f"without {AHEAD}"] = (AHEAD,)
    left_out["nor the embedding" if len(left_out) > 1 else "without the embedding"] = (AHEAD, "embedding")
    return [_total(name, [row for row in rows if row.name not in names]) for name, names in left_out.items()]


def _total(name: str, rows: list[Part]) -> Part:
    return Part(name, sum(r.total for r in rows), sum(r.active for r in rows), sum(r.flops for r in rows))


def main(_: list[str]) -> None:
    """Print the tables."""
    flag = flags.FLAGS
    try:
        if flag.num_devices < 0:
            raise ValueError(f"--num_devices={flag.num_devices} must be at least 0; 0 takes those that are present.")
        config = validate(flag.config)
        import jax

        num_devices = flag.num_devices or jax.device_count()
        config = resolve(config, num_devices)
    except ValueError as error:
        advice = "" if flag.num_devices else " --num_devices=N describes it on other devices than those present."
        fail(f"{error}{advice}")
    from rich.console import Console

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
