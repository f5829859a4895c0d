"""Parameters at their use: gathered from shards, looked up, rematerialised."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from moe_jax.config import ModelConfig
from moe_jax.mesh import (
    GATHERED,
    HOST_MEMORY,
    axes,
    axes_of,
    gather,
    is_expert_weight,
    is_sharded,
    parameter_spec,
    part_index,
    spec,
    whole_of,
)


def look_up(
    table: Float[Array, "vocab embed"], tokens: Int32[Array, "batch seq"], mesh: Mesh | None
) -> Float[Array, "batch seq embed"]:
    """The tokens' rows of the table, which every device gathers from its shards (the gradient is scattered to them).

    Over an axis that splits the vocabulary but no tokens (`tensor`) it is not gathered: each part looks up its own
    tokens, and the sum over the parts has them all.
    """
    if not is_sharded(mesh):
        return table[tokens]
    place = parameter_spec(mesh, ("vocab", "embed"), table.shape)
    by_token = spec("pieces")
    rows, columns = map(axes_of, place)
    gathered_rows = tuple(name for name in rows if name in axes("tokens"))
    split_rows = tuple(name for name in rows if name not in axes("tokens"))

    def on_shard(part: Array, tokens: Array) -> Array:
        for dim, names in ((1, columns), (0, gathered_rows)):
            part = whole_of(part, names, dim)
        if not split_rows:
            return part[tokens]
        first = part_index(split_rows) * part.shape[0]
        own = jnp.where(tokens >= first, tokens - first, part.shape[0])
        return jax.lax.psum(part.at[own].get(mode="fill", fill_value=0), split_rows)

    return jax.shard_map(on_shard, mesh=mesh, in_specs=(place, by_token), out_specs=by_token)(table, tokens)


def at_use(module: Any, mesh: Mesh | None, dtype: str) -> Any:
    """A module with its parameters ready for use on the mesh: gathered from their shards, in the compute dtype.

    The weights of routed experts stay as they are: dispatch gathers them. On one device it is the module itself.
    """

    def one(variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        dims = variable.get_metadata()["dims"]
        if is_expert_weight(dims):
            return variable
        narrow = len(dims) > 1 and "experts" not in dims  # the router stays float32
        value = variable[...].astype(dtype) if narrow else variable[...]
        return variable.replace(gather(value, mesh, dims))

    if not is_sharded(mesh):
        return module
    return jax.tree.map(one, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def rematerialized(body: Callable, config: ModelConfig, sharded: bool = False) -> Callable:
    """The scan body, keeping for its backward pass what `config.remat` says.

    Everything ("none"), matmul outputs ("dots"), its input ("full"), or also the tensors that `config.remat_keep` names
    ("names"). Weights gathered from shards are never kept: every device would hold those of every layer.
    """
    if config.remat == "none" and not sharded:
        return body
    return jax.checkpoint(body, policy=_policy(config), prevent_cse=False)


def _policy(config: ModelConfig) -> Callable | None:
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return policies.save_anything_except_these_names(GATHERED)
    if config.remat == "dots":
        return policies.dots_with_no_batch_dims_saveable
    if config.remat == "full":
        return None
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in config.remat_keep if name not in config.remat_offload],
        names_which_can_be_offloaded=list(config.remat_offload),
        offload_src="device",
        offload_dst=HOST_MEMORY,
    )


def stacked(rngs: nnx.Rngs, repeats: int, kind: type, config: ModelConfig, *args: Any) -> Any:
    """`repeats` modules of a kind as one, whose parameters have the axis of layers in front."""
    return nnx.vmap(lambda r: kind(config, r, *args))(rngs.split(repeats))
