"""What a dispatcher gets and gives, and the table of them by name.

T tokens, K slots (experts per token), E experts, D embed, F expert ffw, X devices on the mesh's expert axis, each with
E / X consecutive experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from moe_jax.config import DISPATCHERS
from moe_jax.dispatch.experts import ExpertWeights, Multiply
from moe_jax.mesh import is_sharded


class Work(NamedTuple):
    """What a dispatcher gets: the tokens and the experts of one device, and how to multiply them.

    x [T, D] in the compute dtype. expert_ids [T, K] among all E, which is an empty slot. gates float32 [T, K].
    weights: of this device's E / X experts, in the compute dtype. Where `tensor` splits F, outputs are parts of a sum
    that is added up afterwards.
    mesh: over whose axes the device may exchange with others; None where there is no other.
    sequence_length: tokens of a sequence, of which whole ones are on a device.
    capacity_factor: room over the balanced load, of an expert or of an exchange.
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
        return self.mesh.shape["expert"] if is_sharded(self.mesh) else 1

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weights.gate.shape[0] * self.devices

    def visits(self, expert_ids: Array | None = None) -> Array:
        """Over all tokens, the number of distinct devices that their experts are on; of these ids, or of all."""
        expert_ids = self.expert_ids if expert_ids is None else expert_ids
        device = jnp.sort(expert_ids // self.weights.gate.shape[0], axis=1)
        new = jnp.concatenate([jnp.ones_like(device[:, :1], bool), device[:, 1:] != device[:, :-1]], 1)
        return (new & (device < self.devices)).sum(dtype=jnp.int32)


class Traffic(NamedTuple):
    """What a dispatch did, int32 [] each, additive over micro-batches.

    dropped: token copies that no expert saw. rounds: exchanges that were needed, 1 when balanced.
    rows: rows multiplied, padding included. visits: over all tokens, how many devices their copies went to.
    """

    dropped: Int32[Array, "*shards"]
    rounds: Int32[Array, "*shards"]
    rows: Int32[Array, "*shards"]
    visits: Int32[Array, "*shards"]

    @classmethod
    def of(
        cls, *, rows: Array | int, visits: Array | int, rounds: Array | int = 1, dropped: Array | int = 0
    ) -> "Traffic":
        """From numbers of any kind."""
        return cls(
            dropped=jnp.asarray(dropped, jnp.int32),
            rounds=jnp.asarray(rounds, jnp.int32),
            rows=jnp.asarray(rows, jnp.int32),
            visits=jnp.asarray(visits, jnp.int32),
        )


# y [T, D], for every token the sum over its experts of gate x expert(token), and what it took
Dispatch = Callable[[Work], tuple[Array, Traffic]]

BACKENDS: dict[str, Dispatch] = {}


def register(name: str) -> Callable[[Dispatch], Dispatch]:
    """Decorator: `model.dispatch=name` runs the decorated function.

    Raises:
        ValueError: nothing is known of the name.
    """
    if name not in DISPATCHERS:
        raise ValueError(
            f"the dispatcher {name!r} has no row in moe_jax.config.DISPATCHERS, which says whether it drops and where "
            "it runs; add one before its function."
        )

    def add(dispatch: Dispatch) -> Dispatch:
        BACKENDS[name] = dispatch
        return dispatch

    return add
