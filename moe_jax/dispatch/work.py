"""The interface of a dispatcher: its input `Work`, its output with `Traffic`, and the table of functions by name.

T tokens, K slots (experts per token), E experts, D embed, F expert ffw, X devices on the mesh's expert axis, each with
E / X consecutive experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from moe_jax.config import DISPATCHERS
from moe_jax.dispatch.experts import Multiply
from moe_jax.kernels.weights import ExpertWeights
from moe_jax.mesh import ways


class Work(NamedTuple):
    """The input of a dispatcher: the tokens and the experts of one device, and how to multiply them.

    x: [T, D] in the compute dtype.
    expert_ids: int32 [T, K] in [0, E]; E is an empty slot.
    gates: float32 [T, K], 0 in empty slots.
    weights: those of this device's E / X experts, in the compute dtype.
    multiply: the products of rows with experts, chosen for the platform and the config.
    mesh: the devices to exchange with, if it has several; None for the oracle.
    sequence_length: tokens of a sequence; a device has whole ones, unless the mesh cuts sequences into pieces.
    capacity_factor: room over the balanced load, of an expert or of an exchange.

    On one device there is no `shard_map`, and a collective fails: do none where `is_sharded(mesh)` is False. On several
    devices a dispatcher runs inside `jax.shard_map` over all axes of the mesh, with `check_vma` on; the oracle
    (`Dispatcher.is_oracle`) gets whole arrays instead, which XLA splits. Inside `shard_map`:

    - Arrays are the device's own part. Collectives find their axes by dim: `lax.all_to_all(rows, axes("experts"), ..)`.
    - Every device has to run the same collectives in the same order, so a number of rounds, or a branch around a
      collective, depends only on values that are equal on all devices (`lax.pmax(..., axes("tokens"))`).
    - x, gates and weights vary over the same axes, expert_ids only over those that split tokens. A constant varies over
      none, so the initial carry of a `scan` and both results of a `cond` must come from arrays that vary as they do:
      `jnp.zeros_like(work.x)`, not `jnp.zeros(work.x.shape)`.
    - Where an axis splits F (`tensor`), each device's output is one part of a sum, which the caller adds up. The ids do
      not vary over that axis, and `Traffic` must not either: compute it from expert_ids alone.
    """

    x: Float[Array, "tokens embed"]
    expert_ids: Int32[Array, "tokens slots"]
    gates: Float[Array, "tokens slots"]
    weights: ExpertWeights
    multiply: Multiply
    mesh: Mesh | None
    sequence_length: int
    capacity_factor: float

    @property
    def devices(self) -> int:
        """X."""
        return ways(self.mesh, "experts")

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weights.num_experts * self.devices

    def visits(self, expert_ids: Array | None = None) -> Array:
        """The number of distinct devices that hold a token's experts, summed over tokens; of these ids, or of all."""
        expert_ids = self.expert_ids if expert_ids is None else expert_ids
        device = jnp.sort(expert_ids // self.weights.num_experts, axis=1)
        new = jnp.concatenate([jnp.ones_like(device[:, :1], bool), device[:, 1:] != device[:, :-1]], 1)
        return (new & (device < self.devices)).sum(dtype=jnp.int32)


class Traffic(NamedTuple):
    """The cost of one dispatch, int32 [] each, additive over micro-batches.

    A dispatcher returns it for its device, and `apply_experts` for the whole mesh; a layer puts it into its `Report`,
    from which the train step logs `moe/dropped`, `moe/rounds`, `moe/padding` and `moe/devices_per_token`.

    dropped: token copies that no expert processed.
    rounds: rounds that were needed, of exchanges or of a device's own copies; 1 when balanced.
    rows: rows multiplied, padding included.
    visits: the number of devices that a token's copies went to, summed over tokens.
    """

    dropped: Int32[Array, "*shards"]
    rounds: Int32[Array, "*shards"]
    rows: Int32[Array, "*shards"]
    visits: Int32[Array, "*shards"]

    @classmethod
    def of(
        cls, *, rows: Array | int, visits: Array | int, rounds: Array | int = 1, dropped: Array | int = 0
    ) -> "Traffic":
        """From Python or JAX integers, as int32."""
        return cls(
            dropped=jnp.asarray(dropped, jnp.int32),
            rounds=jnp.asarray(rounds, jnp.int32),
            rows=jnp.asarray(rows, jnp.int32),
            visits=jnp.asarray(visits, jnp.int32),
        )


# Work -> y [T, D], for every token the sum over its experts of gate x expert(token), and the cost
DispatchFunction = Callable[[Work], tuple[Array, Traffic]]

DISPATCH_FUNCTIONS: dict[str, DispatchFunction] = {}  # the function of each dispatcher; `DISPATCHERS` has its facts


def register(name: str) -> Callable[[DispatchFunction], DispatchFunction]:
    """Decorator: `model.dispatch=name` runs the decorated function.

    Raises:
        ValueError: `DISPATCHERS` has no row of that name.
    """
    if name not in DISPATCHERS:
        raise ValueError(
            f"the dispatcher {name!r} has no row in moe_jax.config.DISPATCHERS, which declares whether it drops copies "
            "and where it runs; add one before its function."
        )

    def add(function: DispatchFunction) -> DispatchFunction:
        DISPATCH_FUNCTIONS[name] = function
        return function

    return add
