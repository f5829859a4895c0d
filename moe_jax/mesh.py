"""The device mesh, and how arrays are placed on it: by their dims, which the table in `config/axes.py` maps to axes.

No other file names a mesh axis in a spec or a collective: it names dims, and `spec`, `axes` and `ways` look them up.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moe_jax import torus
from moe_jax.config import MeshConfig, mesh_sizes
from moe_jax.config.axes import AXES, BETWEEN_SLICES, CONFIG_AXES, DATA, axes_of_dim
from moe_jax.runtime.defaults import jax_defaults

GATHERED = "gathered"  # the checkpoint name of weights gathered from their shards: gathered again for backward
HOST_MEMORY = "pinned_host"  # jax's name of the host memory that a device copies to and from by itself

AnyMesh = Mesh | AbstractMesh


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh, neighbours on the chips' own network; `replica` spans the slices if there are several.

    Args:
        config: sizes of the axes; -1 takes what the others leave. If all sizes are given, devices may stay unused,
            provided that one process has them all.
        devices: all that jax finds if None; a topology's devices to compile for machines that are not present.

    Raises:
        ValueError: sizes and devices do not fit together.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(CONFIG_AXES, mesh_sizes(config, len(devices)), strict=True))
    num_used = math.prod(sizes.values())
    if num_used < len(devices) and len({d.process_index for d in devices}) > 1:
        raise ValueError(
            f"mesh of {num_used} devices must use all {len(devices)} of a run of several processes; "
            "set one axis to -1, or start fewer processes."
        )
    devices = devices[:num_used]
    # GPUs have a slice for each NVLink domain, which any axis may cross: neighbours are on the last ones
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform != "gpu"}) or 1
    if slices > 1 and sizes[BETWEEN_SLICES] % slices:
        raise ValueError(
            f"mesh.{BETWEEN_SLICES}={sizes[BETWEEN_SLICES]} must be a multiple of the {slices} slices, because only "
            f"replicas cross the network between them; set mesh.{BETWEEN_SLICES}={slices}."
        )
    grid = _on_tori(sizes, devices, slices)
    if grid is None:
        grid = _in_order(sizes, devices, slices).reshape([sizes.get(axis, 1) for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))  # sort and gather fail on Explicit axes


def _on_tori(sizes: Mapping[str, int], devices: Sequence[Any], slices: int) -> np.ndarray | None:
    """The devices as an array of AXES, placed on each slice by `torus.placed`; None if another axis is split."""
    if math.prod(size for axis, size in sizes.items() if axis not in ("data", "expert")) > slices:
        return None
    numbers = sorted({getattr(d, "slice_index", 0) for d in devices})
    tori = []
    for number in numbers:
        one = torus.placed([d for d in devices if getattr(d, "slice_index", 0) == number], sizes["expert"])
        if one is None or len(numbers) != slices:
            return None
        tori.append(one)
    return np.stack(tori).reshape(slices, *tori[0].shape, *[1] * (len(AXES) - AXES.index("expert") - 1))


def _in_order(sizes: Mapping[str, int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """The devices as an array of CONFIG_AXES, in JAX's order."""
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    inside = {**sizes, BETWEEN_SLICES: sizes[BETWEEN_SLICES] // slices}
    between = dict.fromkeys(sizes, 1) | {BETWEEN_SLICES: slices}
    return mesh_utils.create_hybrid_device_mesh(
        tuple(inside.values()), tuple(between.values()), devices, allow_split_physical_axes=True
    )


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """A mesh of devices that need not exist: enough to compute how arrays would be split.

    Raises:
        ValueError: sizes and devices do not fit together.
    """
    sizes = dict(zip(CONFIG_AXES, mesh_sizes(config, num_devices), strict=True))
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def platform(mesh: Mesh) -> str:
    """The platform of the mesh's devices, `"cpu"`, `"gpu"` or `"tpu"`; they need not be this machine's."""
    return mesh.devices.flat[0].platform


# --- how arrays are split -------------------------------------------------------------------------------------


def axes(dim: str, of: Sequence[str] | None = None) -> tuple[str, ...]:
    """The mesh axes that split a dim, alone or in an array whose first axes are the dims `of`."""
    of = (dim,) if of is None else of
    return axes_of(spec(*of)[list(of).index(dim)])


def ways(mesh: Mesh | None, dim: str, of: Sequence[str] | None = None) -> int:
    """The number of parts into which the mesh splits a dim, alone or in an array with the dims `of`; 1 without one."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes(dim, of))


def spec(*dims: str) -> P:
    """The PartitionSpec of an array whose first axes are these dims, by TABLE; the array's other axes are not split.

    For activations, and for the arguments of `per_shard`: an axis is used whether or not it divides the dimension.
    """
    return P(*_by_table(dims, lambda index, axes: True))


def specs(dims: Any, *in_front: str) -> Any:
    """The `spec` of every field of a record whose fields are dims (tuples of strings), each with `in_front` first."""

    def is_dims(node: Any) -> bool:
        return type(node) is tuple and all(isinstance(name, str) for name in node)

    return jax.tree.map(lambda own: spec(*in_front, *own), dims, is_leaf=is_dims)


def parameter_spec(mesh: AnyMesh, dims: Sequence[str], shape: Sequence[int]) -> P:
    """The PartitionSpec of a parameter, by TABLE; vectors (scales of norms, biases) are not split.

    Args:
        dims: logical dimensions of the array's last axes; layers stacked in front are not split.
        shape: the array's.
    """
    stacked = len(shape) - len(dims)
    if len(dims) < 2:
        return P()

    def divide(index: int, axes: Sequence[str]) -> bool:
        ways = math.prod(mesh.shape[axis] for axis in axes)
        return mesh.shape[axes[-1]] > 1 and shape[stacked + index] % ways == 0

    return P(*[None] * stacked, *_by_table(dims, divide))


def whole_spec(mesh: AnyMesh, dims: Sequence[str], shape: Sequence[int], stacked: int) -> P:
    """The PartitionSpec of a parameter in which devices have whole matrices, as far as their number divides.

    A mesh axis that splits rows or columns of a matrix, as in `parameter_spec`, splits one of the first `stacked` axes
    of the array instead, if it divides that; the last of them is tried first. The other mesh axes stay where they are.
    """
    split = parameter_spec(mesh, dims, shape)
    parts = [list(axes_of(part)) for part in (*split, *[None] * (len(shape) - len(split)))]
    for mine in parts[stacked:]:
        for axis in list(mine):
            for index in reversed(range(stacked)):
                if shape[index] % math.prod(mesh.shape[a] for a in (*parts[index], axis)) == 0:
                    parts[index].append(axis)
                    mine.remove(axis)
                    break
    return P(*(tuple(part) or None for part in parts))


def _by_table(dims: Sequence[str], may_split: Callable[[int, Sequence[str]], bool]) -> Iterator[Any]:
    """The entry of a PartitionSpec for each dim: the axes of TABLE that are still free and may split it together."""
    taken: set[str] = set()
    for index in range(len(dims)):
        mine: list[str] = []
        for axis in axes_of_dim(dims, index):
            if axis not in taken and may_split(index, [*mine, axis]):
                mine.append(axis)
        taken |= set(mine)
        if len(mine) > 1:
            yield tuple(mine)
        else:
            yield mine[0] if mine else None


def axes_of(part: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


def is_expert_weight(dims: Sequence[str]) -> bool:
    """Whether a parameter belongs to the routed experts, which are never gathered over the axis that splits them."""
    return len(dims) > 1 and dims[0] == "experts"


def is_vector(dims: Sequence[str]) -> bool:
    """Whether a parameter is a vector, or one for every expert: it multiplies no matrix, and does not decay."""
    return len(dims) - is_expert_weight(dims) < 2


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array of which every device holds the whole."""
    return NamedSharding(mesh, P())


def bytes_on_device(leaf: Any) -> int:
    """The bytes that each device holds of an array with a sharding, or of its `jax.ShapeDtypeStruct`."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def batch_sharding(mesh: Mesh, dims: Sequence[str] = ("batch",)) -> NamedSharding:
    """The sharding of a field of a batch with these dims, by TABLE."""
    return NamedSharding(mesh, spec(*dims))


def is_sharded(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Whether there is more than one device; None stands for a single one, which needs no shardings."""
    return mesh is not None and mesh.size > 1


def constrain(x: Any, mesh: Mesh | None, layout: Any) -> Any:
    """Constrain the arrays of a pytree, inside a jitted function, to `layout`: one spec for all, or one for each."""
    if not is_sharded(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, jax.tree.map(lambda one: NamedSharding(mesh, one), layout))


def gather(w: Array, mesh: Mesh | None, dims: Sequence[str]) -> Array:
    """A parameter gathered for use in a layer; its gradient is scattered to the shards, never whole on a device."""
    if not is_sharded(mesh):
        return w
    return checkpoint_name(_gathered(w, _gathering_layouts(mesh, dims, w.shape)), GATHERED)


def _gathering_layouts(mesh: Mesh, dims: Sequence[str], shape: Sequence[int]) -> tuple[NamedSharding, ...]:
    """The layouts of a parameter from its shards to its use, with one axis less each time, innermost first.

    It is gathered over the axes that split tokens, since every device multiplies its own tokens by all of it; over the
    others (`tensor`) it stays split. In a single step XLA would pad every shard with zeros and sum the whole over all
    devices, and likewise the gradient; axis by axis it gathers, and scatters the sums of the gradient.
    """
    split = parameter_spec(mesh, dims, shape)
    parts = [list(axes_of(part)) for part in split]
    layouts = [split]
    for axis in gathering_axes(split):
        for mine in parts:
            if axis in mine:
                mine.remove(axis)
                layouts.append(P(*map(tuple, parts)))
    return tuple(NamedSharding(mesh, layout) for layout in layouts)


def gathering_axes(split: P) -> list[str]:
    """The axes over which an array with a spec is gathered for use, in this order: those that split tokens."""
    mine = [axis for part in split for axis in axes_of(part)]
    own = iter([axis for axis in mine if axis in DATA])  # which may be TURNED
    return [next(own) if axis in DATA else axis for axis in axes("tokens") if axis in mine][::-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(w: Array, layouts: tuple[NamedSharding, ...]) -> Array:
    for layout in layouts[1:]:
        w = jax.lax.with_sharding_constraint(w, layout)
    return w


def _scattered(layouts: tuple[NamedSharding, ...], _: None, dw: Array) -> tuple[Array]:
    for layout in layouts[-2::-1]:
        dw = jax.lax.with_sharding_constraint(dw, layout)
    return (dw,)


_gathered.defvjp(lambda w, layouts: (_gathered(w, layouts), None), _scattered)


def per_shard(f: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any, *, kernel: bool = False) -> Callable:
    """`f` applied to each device's part of the arrays; on one device `f` itself, whose part is the whole.

    With `kernel`, f may be a Pallas kernel that does not declare over which axes its results vary. Then the output must
    be split over every axis, because nothing else checks that a gradient is summed where it has to be.
    """
    if not is_sharded(mesh):
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=not kernel)


def whole_of(part: Array, axes: Sequence[str], dim: int) -> Array:
    """An array from the parts into which mesh axes split a dimension, inside `per_shard`; its gradient is scattered.

    It is gathered over one axis after the other, innermost first: over several at once XLA may pad every part with
    zeros and sum the whole over all devices, and only what is exchanged along one dimension of a torus is asynchronous.
    """
    for axis in reversed(axes):
        part = jax.lax.all_gather(part, axis, axis=dim, tiled=True)
    return part


def part_index(axes: Sequence[str]) -> Array:
    """The index of this device's part of a dimension that these mesh axes split, int32 [], inside `per_shard`."""
    first, *others = axes
    index = jax.lax.axis_index(first)
    for axis in others:
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index


def varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each marked as varying over every mesh axis that any of them varies over, inside `per_shard`.

    The gradient of each is summed over the axes that were added.
    """
    varying = _varying(*arrays)
    missing = [tuple(axis for axis in AXES if axis in varying - _varying(x)) for x in arrays]
    pairs = zip(arrays, missing, strict=True)
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in pairs)


def _varying(*arrays: Array) -> frozenset[str]:
    """The mesh axes over which any of the arrays may differ between devices, inside `per_shard`."""
    return frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def around_kernel(kernel: Callable[..., Any], *arrays: Array) -> Any:
    """`kernel(*arrays)` inside `per_shard`, for a kernel that does not declare over which axes its results vary.

    They vary over every axis that any operand varies over. Not differentiable: for use within a `custom_vjp`.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        with jax_defaults():
            return kernel(*arrays)
    varying = _varying(*arrays)
    with jax_defaults():
        y = jax.shard_map(kernel, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(varying), to="varying"), y) if varying else y
