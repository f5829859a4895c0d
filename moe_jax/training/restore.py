"""Restore the newest checkpoint of a workdir on the devices that are present."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.config import DISPATCHERS, Config, MeshConfig, Weights, resolve
from moe_jax.mesh import replicated
from moe_jax.runtime import checkpoint
from moe_jax.training.state import TrainState, abstract_state, initial_balance


def restore_run(config: Config, workdir: Path, mesh: Mesh) -> tuple[TrainState, dict[str, Any]] | None:
    """Restore the newest checkpoint of the workdir on this mesh, as (state, extra); None if there is none."""
    options = config.checkpoint
    target = abstract_state(config, mesh)
    return checkpoint.restore(workdir / "checkpoints", target, verify=options.verify, fallback=options.fallback)


def restore_model(config: Config, workdir: Path, mesh: Mesh, weights: Weights = "last") -> TrainState | None:
    """Restore the model of the newest checkpoint on this mesh, without the optimizer; None if there is none.

    The checkpoint may be of a run or of a converted model. Where it holds weights only, the balancer state is that
    before step 0.

    Args:
        weights: "last" or "ema", their moving average, in the dtype of the parameters.

    Raises:
        ValueError: the checkpoint is damaged, or has no average (`config.command.check_weights` says so beforehand).
    """
    options = config.checkpoint
    target = abstract_state(config, mesh)
    names = ("params", "bias") if weights == "last" else ("ema",)
    fields = {name: getattr(target, name) for name in ("step", *names, "balance")}
    found = checkpoint.restore_weights(
        workdir / "checkpoints", fields, verify=options.verify, fallback=options.fallback
    )
    if found is None:
        return None
    read = dict(found[0])
    if weights == "ema":
        average = read.pop("ema")
        read["bias"] = average.bias
        read["params"] = jax.tree.map(lambda a, like: a.astype(like.dtype), average.params, target.params)
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    fresh = {"step": zero, "balance": functools.partial(initial_balance, config), "skipped": zero, "stuck": zero}
    missing = {name: make for name, make in fresh.items() if name not in read}
    made = jax.jit(lambda: {name: make() for name, make in missing.items()}, out_shardings=replicated(mesh))()
    return TrainState(**read, **made, optimizer={})


def on_these_devices(config: Config) -> Config:
    """The config with its mesh if that fits, else with a data-parallel mesh of as many devices as possible.

    Raises:
        ValueError: the mesh does not fit the devices of several processes; or the platform lacks a collective.
    """
    devices = jax.device_count()
    platform = jax.devices()[0].platform
    dispatcher = DISPATCHERS[config.model.dispatch]
    if dispatcher.dropless and not dispatcher.is_oracle:  # every dropless dispatcher gives the same output
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
