"""The newest checkpoint of a workdir on the devices at hand."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.config import DISPATCHERS, Config, MeshConfig, resolve

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.training.state import TrainState


def restore_run(config: Config, workdir: Path, mesh: "Mesh") -> tuple["TrainState", dict[str, Any]] | None:
    """The newest checkpoint of the workdir as (state, extra), on this mesh; None if there is none."""
    from moe_jax.runtime import checkpoint
    from moe_jax.training.state import abstract_state

    options = config.checkpoint
    target = abstract_state(config, mesh)
    return checkpoint.restore(workdir / "checkpoints", target, verify=options.verify, fallback=options.fallback)


def restore_model(config: Config, workdir: Path, mesh: "Mesh") -> "TrainState | None":
    """The newest checkpoint's model, of a run or converted, on this mesh, without an optimizer; None if there is none.

    Where the checkpoint holds weights only, balancing remembers what it does before step 0.
    """
    import jax
    import jax.numpy as jnp

    from moe_jax.mesh import replicated
    from moe_jax.runtime import checkpoint
    from moe_jax.training.state import TrainState, abstract_state, initial_balance

    options, target = config.checkpoint, abstract_state(config, mesh)
    fields = {name: getattr(target, name) for name in ("step", "params", "bias", "balance")}
    found = checkpoint.restore_weights(
        workdir / "checkpoints", fields, verify=options.verify, fallback=options.fallback
    )
    if found is None:
        return None
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    fresh = {"step": zero, "balance": functools.partial(initial_balance, config), "skipped": zero, "stuck": zero}
    missing = {name: make for name, make in fresh.items() if name not in found[0]}
    made = jax.jit(lambda: {name: make() for name, make in missing.items()}, out_shardings=replicated(mesh))()
    return TrainState(**found[0], **made, optimizer={})


def on_these_devices(config: Config) -> Config:
    """The config with its mesh, or where that does not fit with a data-parallel one of as many devices as can be.

    Raises:
        ValueError: several processes, whose devices the mesh does not fit; or a platform without a collective.
    """
    import jax

    devices, platform = jax.device_count(), jax.devices()[0].platform
    dispatcher = DISPATCHERS[config.model.dispatch]
    if dispatcher.dropless and not dispatcher.is_oracle:  # another gives the same output
        config = replace(config, model=replace(config.model, dispatch="auto"))
    try:
        return resolve(config, devices, platform)
    except ValueError:
        if jax.process_count() > 1:
            raise
    for data in range(devices, 1, -1):
        with contextlib.suppress(ValueError):
            return resolve(replace(config, mesh=MeshConfig(data=data)), devices, platform)
    return resolve(replace(config, mesh=MeshConfig(data=1)), devices, platform)
