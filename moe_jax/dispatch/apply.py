"""`apply_experts`: prepare each device's `Work`, run the dispatcher that the config names, and add up its costs.

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
from moe_jax.dispatch.experts import multiply_for
from moe_jax.dispatch.local import local
from moe_jax.dispatch.rounds import rounds
from moe_jax.dispatch.work import DISPATCH_FUNCTIONS, DispatchFunction, Traffic, Work, register
from moe_jax.kernels.activation import SWIGLU, Activation
from moe_jax.kernels.weights import DIMS, ExpertWeights
from moe_jax.mesh import GATHERED, axes, is_sharded, part_index, per_shard, spec, varying_alike, whole_of
from moe_jax.routing import Routing


@register("auto")
def auto(work: Work) -> tuple[Array, Traffic]:
    """`rounds` if experts are split over devices, else `local`."""
    return rounds(work) if work.devices > 1 else local(work)


def apply_experts(
    x: Float[Array, "tokens embed"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    mesh: Mesh | None = None,
    dispatcher: str = "auto",
    num_sequences: int = 1,
    capacity_factor: float = 1.25,
    cpu_kernel: str = "auto",
    quantization: str = "none",
    activation: Activation = SWIGLU,
    gate_on: str = "output",
) -> tuple[Float[Array, "tokens embed"], Traffic]:
    """For every token the sum over its experts of gate x expert(x), and the cost of computing it.

    Exact under any routing, unless the dispatcher drops copies. On a mesh tokens are split over the batch axes,
    experts over `expert`, their embed dimension over `data` and their ffw dimension over `tensor`.

    Args:
        x: [T, D]; tokens of sequence b are x[b S : (b + 1) S], with S = T / B.
        routing: the experts and gates of each token.
        weights: the experts, in the compute dtype.
        mesh: the devices that the arrays are split over; None for one device.
        dispatcher: the name of one, a key of `DISPATCH_FUNCTIONS`.
        num_sequences: B, for dispatchers whose groups are sequences.
        capacity_factor: room over the balanced load, of an expert ("capacity") or of a round (all that have
            rounds).
        cpu_kernel: how CPUs multiply, see `native.chosen`.
        quantization: "none", or the format of all products with weights, see `quantize`.
        activation: of the experts' hidden rows.
        gate_on: "output", or "input" for the sum of expert(gate x x).

    Returns:
        y [T, D] in x's dtype; the cost, of the whole mesh.

    Raises:
        ValueError: a dispatcher that is not registered; `cpu_kernel="native"` where it cannot run; `quantization`
            without qwix.
    """
    if dispatcher not in DISPATCH_FUNCTIONS:
        raise ValueError(
            f"model.dispatch={dispatcher!r} is not registered, but {', '.join(DISPATCH_FUNCTIONS)} are; import the "
            "module of its function."
        )
    function = DISPATCH_FUNCTIONS[dispatcher]
    multiply = multiply_for(cpu_kernel, mesh, x.dtype, quantization, activation, gate_on)
    sequence_length = x.shape[0] // num_sequences
    if DISPATCHERS[dispatcher].is_oracle:
        mesh = None  # it gets whole arrays, which XLA splits

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
        y, traffic = _on_shard(function, work) if is_sharded(mesh) else function(work)
        return y, jax.tree.map(lambda number: number[None], traffic)  # [1], one entry of the shards

    tokens = spec("tokens")
    experts: dict[str, Any] = {name: spec(*DIMS[name]) for name in _present(weights)}
    in_specs = (tokens, tokens, tokens, weights._replace(**experts))
    run = per_shard(on_device, mesh, in_specs, (tokens, spec("shards")))
    y, by_shard = run(x, routing.expert_ids, routing.gates, weights)
    traffic = jax.tree.map(lambda a: a.sum(dtype=jnp.int32), by_shard)
    return y.astype(x.dtype), traffic._replace(rounds=by_shard.rounds.max())


def _on_shard(function: DispatchFunction, work: Work) -> tuple[Array, Traffic]:
    """Run a dispatcher on one device's part, as `Work` describes.

    Weights are gathered over the axis that splits their embed dimension (their gradient is scattered to it), and the
    outputs are summed over the one that splits their ffw dimension. The bias of down, which no axis splits there, is in
    one part of that sum.
    """
    parts = axes("ffw", DIMS["down"])

    def gathered(w: Array, dims: tuple[str, ...]) -> Array:
        return whole_of(w, axes("embed", dims), dims.index("embed")) if "embed" in dims else w

    whole = {name: gathered(w, DIMS[name]) for name, w in _present(work.weights).items()}
    x, gates, *varying = varying_alike(work.x, work.gates, *whole.values())
    whole = dict(zip(whole, varying, strict=True))
    if "down_bias" in whole:
        whole["down_bias"] = jnp.where(part_index(parts) == 0, whole["down_bias"], 0)
    weights = work.weights._replace(**{name: checkpoint_name(w, GATHERED) for name, w in whole.items()})
    y, traffic = function(work._replace(x=x, gates=gates, weights=weights))
    return lax.psum(y, parts), traffic


def _present(weights: ExpertWeights) -> dict[str, Any]:
    """The arrays that these experts have, by name."""
    return {name: w for name, w in weights._asdict().items() if w is not None}
