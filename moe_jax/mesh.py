"""The device mesh, and ONE table for parameters and activations: logical dimension -> mesh axes.

An axis splits devices (`replica data expert tensor`), a dim names an axis of an array (`embed ffw experts ...`).
The batch is split over replica, data and expert; experts live on `expert`; weights are split fully, so that
a device keeps one part in data x expert x tensor of them; replica repeats everything, across slow links.
No other file names an axis in a PartitionSpec: it names dims, and `spec` looks them up.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moe_jax.config import MeshConfig, mesh_sizes
from moe_jax.runtime.defaults import jax_defaults

AXES = ("replica", "data", "expert", "tensor")
BATCH = AXES[:3]  # what the rows of a batch are split over, and what sums over the whole batch are over
GATHERED = "gathered"  # the checkpoint name of weights gathered from their shards: gathered again for backward

AnyMesh = Mesh | AbstractMesh

# The axes that may split a dimension. It takes, in this order, those that no earlier dimension of the array
# took and that divide it: rows of a weight by `data`, columns by `expert`, since 7168 does not split 2048 ways.
# Of an activation the batch takes all axes but `tensor`, which is left for the heads: one table serves both.
TABLE: dict[str, tuple[str, ...]] = {
    # of parameters
    "experts": ("expert",),
    "embed": ("data",),
    "ffw": ("tensor", "expert"),
    "heads": ("tensor", "expert"),
    "kv_heads": ("tensor", "expert"),
    "head_dim": ("expert",),
    "latent": ("data", "expert"),
    "mixed": ("expert",),
    "vocab": ("tensor", "expert"),
    # of activations
    "batch": BATCH,
    "sequence": (),
    "tokens": BATCH,  # batch x sequence in one axis
    "shards": BATCH,  # one entry from each part of the batch
    # stacked in front
    "layers": (),
    "micro_batches": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh, neighbours on the chips' own network; `replica` spans slices if there are several.

    Args:
        config: sizes of the axes; -1 takes what the others leave. Sizes that are all given may leave devices
            unused, if one process has them all.
        devices: all there are if None; a topology's devices to compile for machines that are not here.

    Raises:
        ValueError: sizes and devices do not fit together.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    if math.prod(sizes) < len(devices) and len({d.process_index for d in devices}) > 1:
        raise ValueError(
            f"mesh of {math.prod(sizes)} devices must use all {len(devices)} of a run of several processes; "
            "set one axis to -1, or start fewer processes."
        )
    devices = devices[: math.prod(sizes)]
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise ValueError(
                f"mesh.replica={sizes[0]} must be a multiple of the {slices} slices, for only replicas cross the "
                f"network between them; set mesh.replica={slices}."
            )
        inside = (sizes[0] // slices, *sizes[1:])
        across = (slices, *[1] * len(sizes[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))  # sort and gather fail on Explicit axes


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The mesh of devices that need not exist: enough to say how arrays would lie.

    Raises:
        ValueError: sizes and devices do not fit together.
    """
    return AbstractMesh(mesh_sizes(config, num_devices), AXES)


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices, which are not always this machine's."""
    return mesh.devices.flat[0].platform


# --- where arrays lie -----------------------------------------------------------------------------------------


def spec(*dims: str) -> P:
    """How an array is split whose first axes are these dims, by TABLE; axes after them are whole.

    For activations, and for what a shard sees inside `per_shard`: every axis splits, whatever it divides.
    """
    return P(*_by_table(dims, lambda index, axes: True))


def specs(dims: Any, *in_front: str) -> Any:
    """`spec` of each field of a record that holds dims, tuples of strings, with the same dims in front of all."""

    def is_dims(node: Any) -> bool:
        return type(node) is tuple and all(isinstance(name, str) for name in node)

    return jax.tree.map(lambda own: spec(*in_front, *own), dims, is_leaf=is_dims)


def parameter_spec(mesh: AnyMesh, dims: Sequence[str], shape: Sequence[int]) -> P:
    """How a parameter is split, by TABLE; vectors (scales of norms, biases) are whole everywhere.

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


def _by_table(dims: Sequence[str], may_split: Callable[[int, Sequence[str]], bool]) -> Iterator[Any]:
    """The entry of a PartitionSpec for each dim: the axes of TABLE that are left, and may split it together."""
    taken: set[str] = set()
    for index, dim in enumerate(dims):
        mine: list[str] = []
        for axis in TABLE[dim]:
            if axis not in taken and may_split(index, [*mine, axis]):
                mine.append(axis)
        taken |= set(mine)
        yield tuple(mine) if len(mine) > 1 else mine[0] if mine else None


def ways(mesh: Mesh | None, dim: str) -> int:
    """Into how many parts the mesh splits the first axis of an activation."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in TABLE[dim])


def axes_of(part: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return part if isinstance(part, tuple) else () if part is None else (part,)


def is_expert_weight(dims: Sequence[str]) -> bool:
    """Whether a parameter belongs to the routed experts, which stay on their devices."""
    return "experts" in dims and "ffw" in dims


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def bytes_on_device(leaf: Any) -> int:
    """What each device holds of an array with a sharding, or of its `jax.ShapeDtypeStruct`."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes, the rest whole."""
    return NamedSharding(mesh, spec("batch"))


def is_sharded(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Whether there is more than one device: None is one, where nothing needs to be said."""
    return mesh is not None and mesh.size > 1


def constrain(x: Any, mesh: Mesh | None, layout: Any) -> Any:
    """The arrays of a pytree, split inside a jitted function as `layout` says: one spec for all, or one for each."""
    if not is_sharded(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, jax.tree.map(lambda one: NamedSharding(mesh, one), layout))


def gather(w: Array, mesh: Mesh | None, dims: Sequence[str]) -> Array:
    """A parameter as a layer multiplies by it; its gradient goes back into shards, never whole to every device."""
    if not is_sharded(mesh):
        return w
    return checkpoint_name(_gathered(w, _way_to_use(mesh, dims, w.shape)), GATHERED)


def _way_to_use(mesh: Mesh, dims: Sequence[str], shape: Sequence[int]) -> tuple[NamedSharding, ...]:
    """The layouts of a parameter from its shards to its use, one axis less each time.

    In one go XLA would fill zeros in and sum the whole over all devices, the gradient likewise; axis by axis it
    gathers, and scatters the gradient's sums.
    """
    parts = [list(axes_of(part)) for part in parameter_spec(mesh, dims, shape)]
    layouts = [P(*map(tuple, parts))]
    for axis in ("expert", "data"):
        for mine in parts:
            if axis in mine:
                mine.remove(axis)
                layouts.append(P(*map(tuple, parts)))
    return tuple(NamedSharding(mesh, layout) for layout in layouts)


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
    """`f` on every device's part; on one device `f` itself, whose part is the whole.

    With `kernel`, f may be a Pallas kernel that does not say over which axes its results vary; then the output
    must be split over every axis, for nothing else checks that a gradient is summed where it must be.
    """
    if not is_sharded(mesh):
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=not kernel)


def around_kernel(kernel: Callable[..., Any], *arrays: Array) -> Any:
    """`kernel(*arrays)` inside `per_shard`, for a kernel that does not say over which axes its results vary.

    They vary over all axes that an operand varies over. Not differentiable: for use within a `custom_vjp`.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        with jax_defaults():
            return kernel(*arrays)
    varying = frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    with jax_defaults():
        y = jax.shard_map(kernel, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(varying), to="varying"), y) if varying else y
