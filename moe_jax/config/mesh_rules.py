"""What must hold of the mesh: what its axes divide, and what its devices have."""

import dataclasses
import math
from collections.abc import Callable
from operator import attrgetter

from moe_jax.config.axes import BATCH, CONFIG_AXES, TABLE
from moe_jax.config.dispatchers import DISPATCHERS
from moe_jax.config.schema import Config, MeshConfig, ModelConfig, mesh_sizes


def nearby(value: int, divisor: int) -> str:
    """The positive multiples of `divisor` on either side of `value`, as text."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def _has_dense_layer(m: ModelConfig) -> bool:
    return m.num_experts == 0 or m.first_dense > 0 or m.moe_every > 1


# (key, the axes that must divide its value together, which models use it); others in TABLE split it only if they divide
DIVISIBLE: tuple[tuple[str, tuple[str, ...], Callable[[ModelConfig], bool]], ...] = (
    ("model.num_heads", TABLE["own_heads"], lambda m: True),
    ("model.num_kv_heads", TABLE["kv_heads"][:1], lambda m: m.attention == "gqa"),
    ("model.ffw_dim", TABLE["ffw"][:1], _has_dense_layer),
    ("model.embed_dim", TABLE["embed"], lambda m: m.num_experts > 0 and not m.latent_dim),
    ("model.latent_dim", TABLE["embed"], lambda m: m.num_experts > 0),
    ("model.num_experts", TABLE["experts"], lambda m: m.num_experts > 0),
    ("model.expert_ffw_dim", TABLE["ffw"][:1], lambda m: m.num_experts > 0),
    ("model.shared_ffw_dim", TABLE["ffw"][:1], lambda m: m.num_experts > 0),
    ("sequence_length", TABLE["length"], lambda m: True),
)


def check_mesh(c: Config) -> None:
    """Raise a ValueError where the mesh does not fit the model or the batch, as far as its sizes are known.

    `resolve` calls it again when all of them are known.
    """
    m = c.model
    sizes = {axis: getattr(c.mesh, axis) for axis in CONFIG_AXES}
    for axis, size in sizes.items():
        if size == 0:
            raise ValueError(f"mesh.{axis}=0 must be at least 1, or -1 for all remaining devices; set mesh.{axis}=1.")
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ValueError(f"mesh.{' and mesh.'.join(unknown)} are -1, but only one axis can be; give the others.")
    for key, axes, is_used in DIVISIBLE:
        value = attrgetter(key)(c)
        split = {f"mesh.{axis}": sizes[axis] for axis in axes if sizes.get(axis, 1) > 1}  # -1 is not known yet
        ways = math.prod(split.values())
        if is_used(m) and value % ways:
            raise ValueError(
                f"{key}={value} must be divisible by {' x '.join(f'{axis}={size}' for axis, size in split.items())}; "
                f"try {key}={nearby(value, ways)}, or another {' or '.join(split)}."
            )
    shared = [axis for axis in BATCH if axis in sizes]
    shards = math.prod(max(1, sizes[axis]) for axis in shared)
    rows = c.batch_size // c.micro_batches
    if rows % shards:
        raise ValueError(
            f"batch_size={c.batch_size} in micro_batches={c.micro_batches} is {rows} rows at a time, which must be "
            f"divisible by mesh.{' x '.join(shared)} = {shards}; "
            f"try batch_size={nearby(c.batch_size, shards * c.micro_batches)}, "
            f"{'fewer micro_batches, ' if c.micro_batches > 1 else ''}or a mesh of at most {rows} of these "
            "(mesh.data=1 is one)."
        )
    dispatcher = DISPATCHERS[m.dispatch]
    for splits, needed, (axis,) in (
        (dispatcher.splits_experts, "every expert on every device", TABLE["experts"]),
        (dispatcher.splits_sequences, "whole sequences on a device", TABLE["length"]),
    ):
        if m.num_experts and sizes[axis] > 1 and not splits:
            raise ValueError(
                f"model.dispatch={m.dispatch!r} needs {needed}, but mesh.{axis}={sizes[axis]} splits them; "
                "set model.dispatch='auto'."
            )


def resolve(config: Config, num_devices: int, platform: str = "") -> Config:
    """The config with the sizes of its mesh on `num_devices` devices, checked by every rule about them.

    Args:
        config: a config whose mesh may have an axis of -1.
        num_devices: the number of devices.
        platform: "cpu", "gpu" or "tpu"; "" checks nothing that depends on it.

    Raises:
        ValueError: the sizes do not fit the devices, the model or the batch; the platform lacks a collective.
    """
    sizes = mesh_sizes(config.mesh, num_devices)
    dispatcher = DISPATCHERS[config.model.dispatch]
    if config.model.num_experts and platform in dispatcher.not_on:
        raise ValueError(
            f"model.dispatch={config.model.dispatch!r} needs {dispatcher.needs}, which {platform.upper()}s do not "
            "have; set model.dispatch='auto' or 'rounds'."
        )
    config = dataclasses.replace(config, mesh=MeshConfig(**dict(zip(CONFIG_AXES, sizes, strict=True))))
    check_mesh(config)
    return config
