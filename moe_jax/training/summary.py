"""What a config builds, as numbers and tables: parameters, FLOPs, memory, and how leaves are sharded."""

import math
from typing import NamedTuple

import jax
from rich.table import Table

from moe_jax.config import Config
from moe_jax.mesh import abstract_mesh, axes_of, bytes_on_device
from moe_jax.model.block import layout
from moe_jax.model.cost import AHEAD, Part, parts
from moe_jax.training.compile import abstract_arguments, make_train_step
from moe_jax.training.state import abstract_state


class Memory(NamedTuple):
    """Bytes on each device: parameters and biases, optimizer moments, gradients."""

    parameters: int
    optimizer: int
    gradients: int


def memory(config: Config, num_devices: int = 1) -> Memory:
    """Bytes of the train state and its gradients; activations depend on the compiler (see `moe_jax.plan`)."""
    rows = leaves(config, num_devices)
    parameters = [row for row in rows if not row.path.startswith("optimizer/")]
    optimizer = [row for row in rows if row.path.startswith("optimizer/")]
    gradients = [math.prod(row.part) * 4 for row in rows if row.path.startswith("params/")]
    return Memory(sum(r.bytes for r in parameters), sum(r.bytes for r in optimizer), sum(gradients))


class Leaf(NamedTuple):
    """One array of the train state: its global shape, and the part that one device holds."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    part: tuple[int, ...]
    bytes: int


def leaves(config: Config, num_devices: int = 1) -> list[Leaf]:
    """Every array of the train state with its sharding; `axes` are the mesh axes of each dimension.

    Raises:
        ValueError: the mesh does not fit the number of devices.
    """
    state = abstract_state(config, abstract_mesh(config.mesh, num_devices))._asdict()
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        part = leaf.sharding.shard_shape(leaf.shape)
        axes = (*(axes_of(entry) for entry in leaf.sharding.spec), *[()] * (leaf.ndim - len(leaf.sharding.spec)))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append(Leaf(name, str(leaf.dtype), leaf.shape, axes, part, bytes_on_device(leaf)))
    return rows


def sharding_table(config: Config, num_devices: int) -> Table:
    """A table of parameters and biases with the mesh axes that split each dimension; moments are split likewise."""
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
    """(bytes of the arguments, bytes of temporaries) of the compiled train step, by XLA's own analysis."""
    compiled = make_train_step(config).lower(*abstract_arguments(config)).compile()
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def model_table(config: Config) -> Table:
    """A table of parameters and FLOPs by part of the model."""
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
    """The sums that papers publish: all parts, without multi-token prediction, and without the embedding too.

    Published figures leave multi-token prediction out. A token reads one row of the embedding; some papers count all
    rows as active and others none, so both sums are given.
    """
    left_out: dict[str, tuple[str, ...]] = {"all": ()}
    if any(row.name == AHEAD for row in rows):
        left_out[f"without {AHEAD}"] = (AHEAD,)
    left_out["nor the embedding" if len(left_out) > 1 else "without the embedding"] = (AHEAD, "embedding")
    return [_total(name, [row for row in rows if row.name not in names]) for name, names in left_out.items()]


def _total(name: str, rows: list[Part]) -> Part:
    return Part(name, sum(r.total for r in rows), sum(r.active for r in rows), sum(r.flops for r in rows))
