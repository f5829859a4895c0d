"""Dispatch: send every token copy to its expert, and combine what comes back, weighted by the gates.

T tokens, K slots (experts per token), E experts, D embed, F expert ffw, B sequences.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_jax.config import DISPATCHERS
from moe_jax.dispatch.experts import DIMS, ExpertWeights, multiply_for
from moe_jax.dispatch.local import local
from moe_jax.dispatch.transports import rounds
from moe_jax.dispatch.work import BACKENDS, Dispatch, Traffic, Work, register
from moe_jax.mesh import GATHERED, is_sharded, per_shard, spec
from moe_jax.routing import Routing


@register("auto")
def auto(work: Work) -> tuple[Array, Traffic]:
    """`rounds` where experts are split over devices, else `local`."""
    return rounds(work) if work.devices > 1 else local(work)


def apply_experts(
    x: Float[Array, "tokens embed"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    mesh: Mesh | None = None,
    backend: str = "auto",
    num_sequences: int = 1,
    capacity_factor: float = 1.25,
    cpu_kernel: str = "auto",
    quantization: str = "none",
) -> tuple[Float[Array, "tokens embed"], Traffic]:
    """sum over a token's experts of gate x expert(x), and what it took.

    Exact whatever the routing, unless the dispatcher drops. Tokens lie on the batch axes of the mesh,
    experts on `expert`, their embed dimension on `data` and their ffw dimension on `tensor`.

    Args:
        x: [T, D]; tokens of sequence b are x[b S : (b + 1) S], with S = T / B.
        routing: where the tokens go.
        weights: the experts, in the compute dtype.
        mesh: where everything lies; None for one device.
        backend: the name of a dispatcher, of `BACKENDS`.
        num_sequences: B, for dispatchers whose groups are sequences.
        capacity_factor: room over the balanced load, of an expert ("capacity") or of a round.
        cpu_kernel: how CPUs multiply, see `in_native`.
        quantization: "none", or the format of all products with weights, see `quantize`.

    Returns:
        y [T, D] in x's dtype; what the exchange took.

    Raises:
        ValueError: a backend that is not registered; `cpu_kernel="native"` where that cannot be; `quantization`
            without qwix.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"model.dispatch={backend!r} is not registered, but {', '.join(BACKENDS)} are; import the module of its "
            "function."
        )
    dispatch = BACKENDS[backend]
    multiply = multiply_for(cpu_kernel, mesh, x.dtype, quantization)
    sequence_length = x.shape[0] // num_sequences
    if DISPATCHERS[backend].is_oracle:
        mesh = None  # XLA splits its arrays

    def on_device(x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights) -> tuple[Array, Traffic]:
        work = Work(
            x=x,
            expert_ids=expert_ids,
            gates=gates,
            weights=weights,
            multiply=multiply,
            mesh=mesh,
            sequence_length=sequence_length,
            capacity_factor=capacity_factor,
        )
        y, traffic = _on_shard(dispatch, work) if is_sharded(mesh) else dispatch(work)
        return y, jax.tree.map(lambda number: number[None], traffic)

    tokens = spec("tokens")
    experts: dict[str, Any] = {name: spec(*dims) for name, dims in DIMS.items()}
    places = (tokens, tokens, tokens, ExpertWeights(**experts))
    y, by_shard = per_shard(on_device, mesh, places, (tokens, tokens))(x, routing.expert_ids, routing.gates, weights)
    traffic = jax.tree.map(lambda a: a.sum(dtype=jnp.int32), by_shard)
    return y.astype(x.dtype), traffic._replace(rounds=by_shard.rounds.max())


def _on_shard(dispatch: Dispatch, work: Work) -> tuple[Array, Traffic]:
    """`dispatch` with weights gathered over `data` (their gradient scatters) and partial sums over `tensor` added."""

    def gathered(w: Array, dims: tuple[str, ...]) -> Array:
        w = lax.all_gather(w, "data", axis=dims.index("embed"), tiled=True)
        return checkpoint_name(lax.pcast(w, ("replica",), to="varying"), GATHERED)

    weights = ExpertWeights(**{name: gathered(getattr(work.weights, name), dims) for name, dims in DIMS.items()})
    x, gates = (lax.pcast(a, ("tensor",), to="varying") for a in (work.x, work.gates))
    y, traffic = dispatch(work._replace(x=x, gates=gates, weights=weights))
    return lax.psum(y, "tensor"), traffic
