"""Dispatch: send every token copy to its expert, and combine what comes back, weighed by the gates.

T tokens, K slots (experts per token), N = T K copies, E experts, D embed, F expert ffw, B rows, C capacity,
X devices on the mesh's expert axis, each with E / X consecutive experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe_jax.dispatch.capacity import _capacity
from moe_jax.dispatch.experts import ExpertWeights, Traffic, _take, _visits, kernel_for
from moe_jax.dispatch.local import _dense, _local
from moe_jax.dispatch.rounds import _Exchange, _further_rounds, _further_rounds_again, _in_rounds
from moe_jax.dispatch.transports import _padded, _ragged
from moe_jax.kernels import quantize
from moe_jax.mesh import BATCH, GATHERED, is_sharded, per_shard
from moe_jax.routing import Routing


def apply_experts(
    x: Float[Array, "tokens embed"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    mesh: Mesh | None = None,
    backend: str = "auto",
    num_rows: int = 1,
    capacity_factor: float = 1.25,
    cpu_kernel: str = "auto",
    quantization: str = "none",
) -> tuple[Float[Array, "tokens embed"], Traffic]:
    """sum over a token's experts of gate x expert(x), and what it took.

    Dropless and exact whatever the routing, but for "capacity". Tokens lie on the batch axes of the mesh,
    experts on `expert`, their embed dimension on `data` and their ffw dimension on `tensor`.

    Args:
        x: [T, D]; with `num_rows` B, tokens of row b are x[b S : (b + 1) S].
        routing: where the tokens go.
        weights: the experts, in the compute dtype.
        mesh: where everything lies; None for one device.
        backend: "local" sorts the copies by expert, every device having all experts: cost does not grow with E.
            "rounds" ships at most C copies per pair of devices by `all_to_all`, as many times as it takes.
            "ragged" ships exact amounts by `ragged_all_to_all`, which XLA:CPU does not have, in rounds too.
            "auto" is "rounds" where experts are split over devices, else "local".
            "dense" runs every expert on every token: the oracle. "capacity" gives each expert C slots per row
            and drops the rest (GShard, Switch).
        num_rows: B, used by "capacity" only, whose groups are sequences.
        capacity_factor: room over the balanced load: C of an expert ("capacity") or of a round.
        cpu_kernel: how CPUs multiply, see `in_native`.
        quantization: "none", or the format of all products with weights, see `quantize`.

    Returns:
        y [T, D] in x's dtype; what the exchange took.

    Raises:
        ValueError: `cpu_kernel="native"` where that cannot be; `quantization` without qwix.

    Source: dropless sorting as in MegaBlocks (arXiv 2211.15841); capacity: GShard (2006.16668).
    """
    quantize.check(quantization)
    if backend == "dense":
        rows = jnp.int32(x.shape[0] * weights.gate.shape[0])
        visits = _visits(routing.expert_ids, weights.gate.shape[0], 1)
        return _dense(x, routing, weights, quantization), Traffic(jnp.int32(0), jnp.int32(1), rows, visits)
    devices = mesh.shape["expert"] if is_sharded(mesh) else 1
    if backend == "auto":
        backend = "rounds" if devices > 1 else "local"
    if backend in ("rounds", "ragged") and not is_sharded(mesh):
        backend = "local"  # one device has nobody to ship to
    kernel = kernel_for(cpu_kernel, mesh, x.dtype, quantization)
    run: Callable
    if backend == "capacity":
        row_tokens = x.shape[0] // num_rows
        run = functools.partial(_capacity, row_tokens=row_tokens, factor=capacity_factor, devices=devices)
        run = functools.partial(run, quantization=quantization)
    elif backend == "local":
        run = functools.partial(_local, kernel=kernel)
    else:
        transport = {"rounds": _padded, "ragged": _ragged}[backend]
        run = functools.partial(_in_rounds, exchange=_Exchange(transport, capacity_factor, devices, kernel))
    on_shard = functools.partial(_with_weights, run) if is_sharded(mesh) else run
    wide, narrow, tokens = P("expert", "data", "tensor"), P("expert", "tensor", "data"), P(BATCH)
    experts: Any = ExpertWeights._make([wide, wide, narrow])
    y, traffic = per_shard(on_shard, mesh, (tokens, tokens, tokens, experts), (tokens, tokens))(
        x, routing.expert_ids, routing.gates, weights
    )
    total = jax.tree.map(lambda a: a.sum(dtype=jnp.int32), traffic)
    return y.astype(x.dtype), total._replace(rounds=traffic.rounds.max())


def _with_weights(run: Callable, x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights) -> tuple:
    """`run` on a shard: weights gathered over `data` (their gradient scatters), partial sums over `tensor` added."""

    def whole(w: Array, axis: int) -> Array:
        w = lax.all_gather(w, "data", axis=axis, tiled=True)
        return checkpoint_name(lax.pcast(w, ("replica",), to="varying"), GATHERED)

    weights = ExpertWeights(whole(weights.gate, 1), whole(weights.up, 1), whole(weights.down, 2))
    x, gates = (lax.pcast(a, ("tensor",), to="varying") for a in (x, gates))
    y, traffic = run(x, expert_ids, gates, weights)
    return lax.psum(y, "tensor"), traffic


_take.defvjp(
    lambda rows, index, back: (_take(rows, index, back), (index, back)),
    lambda maps, d: (_take(d, maps[1], maps[0]), None, None),
)


_further_rounds.defvjp(lambda *args: (_further_rounds.fun(*args), args[1:]), _further_rounds_again)
