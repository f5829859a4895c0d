"""Dispatch: send every token copy to its expert, and combine what comes back, weighed by the gates.

T tokens, K slots (experts per token), N = T K copies, E experts, D embed, F expert ffw, B rows, C capacity,
X devices on the mesh's expert axis, each with E / X consecutive experts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from moe_jax.kernels import native, quantize
from moe_jax.kernels.grouped import TILE_ROWS, grouped_matmul, rows_multiplied
from moe_jax.mesh import BATCH, GATHERED, is_sharded, per_shard, platform
from moe_jax.routing import Routing, count


class ExpertWeights(NamedTuple):
    """SwiGLU experts: gate and up [E, D, F], down [E, F, D]; without E a dense layer's."""

    gate: Float[Array, "*experts embed ffw"]
    up: Float[Array, "*experts embed ffw"]
    down: Float[Array, "*experts ffw embed"]


class Traffic(NamedTuple):
    """What a dispatch did, int32 [] each, additive over micro-batches.

    dropped: token copies that no expert saw. rounds: exchanges that were needed, 1 when balanced.
    rows: rows multiplied, padding included. visits: over all tokens, how many devices their copies went to.
    """

    dropped: Int32[Array, "*shards"]
    rounds: Int32[Array, "*shards"]
    rows: Int32[Array, "*shards"]
    visits: Int32[Array, "*shards"]


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


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """`(silu(x gate) * (x up)) down`. Source: arXiv 2002.05202."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def dense_swiglu(
    x: Float[Array, "tokens embed"], weights: ExpertWeights, mesh: Mesh | None = None, cpu_kernel: str = "auto"
) -> Float[Array, "tokens embed"]:
    """`swiglu` with gate and up [D, F], down [F, D]: on one CPU an expert to which all tokens go."""
    if is_sharded(mesh) or not in_native(cpu_kernel, mesh, x.dtype):
        return swiglu(x, *weights)
    tokens = x.shape[0]
    one = ExpertWeights(*(w[None] for w in weights))
    return native.experts(x, jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1), jnp.float32), one).astype(x.dtype)


def _grouped_swiglu(rows: Array, weights: ExpertWeights, sizes: Array, quantization: str) -> Array:
    """`swiglu` of every row with its expert's weights; rows sorted by expert."""

    def times(rows: Array, w: Array) -> Array:
        if quantization == "none":
            return grouped_matmul(rows, w, sizes)
        return quantize.quantized_matmul(rows, w, sizes, quantization)

    return times(jax.nn.silu(times(rows, weights.gate)) * times(rows, weights.up), weights.down)


def _swiglu_of_each(rows: Array, weights: ExpertWeights, quantization: str) -> Array:
    """`swiglu` of rows [E, R, D], R for each expert."""
    if quantization == "none":
        return jax.vmap(swiglu)(rows, *weights)
    sizes = jnp.full(rows.shape[0], rows.shape[1], jnp.int32)
    return _grouped_swiglu(rows.reshape(-1, rows.shape[2]), weights, sizes, quantization).reshape(rows.shape)


def _visits(expert_ids: Array, experts_per_device: int, devices: int) -> Array:
    """Over all tokens, the number of distinct devices that their experts are on."""
    device = jnp.sort(expert_ids // experts_per_device, axis=1)
    new = jnp.concatenate([jnp.ones_like(device[:, :1], bool), device[:, 1:] != device[:, :-1]], 1)
    return (new & (device < devices)).sum(dtype=jnp.int32)


# --- one linear map, its own transpose ------------------------------------------------------------------------


@jax.custom_vjp
def _take(rows: Array, index: Array, back: Array) -> Array:
    """out[i] = sum_k rows[index[i, k]], 0 out of range. `back` says the same from the other side:

    j in index[i] exactly as often as i in back[j], so the transpose is a gather too, never a scatter.
    """
    taken = rows.at[index].get(mode="fill", fill_value=0)
    if index.shape[1] == 1:
        return taken[:, 0]
    return taken.astype(jnp.float32).sum(1).astype(rows.dtype)


_take.defvjp(
    lambda rows, index, back: (_take(rows, index, back), (index, back)),
    lambda maps, d: (_take(d, maps[1], maps[0]), None, None),
)


def _sorting(keys: Array) -> tuple[Array, Array]:
    """(which element comes i-th, at which place element j comes), int32, stable."""
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))


# --- dense: the oracle ----------------------------------------------------------------------------------------


def _dense(x: Array, routing: Routing, weights: ExpertWeights, quantization: str) -> Array:
    num_experts = weights.gate.shape[0]
    if quantization == "none":
        outputs = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x, *weights)
    else:
        outputs = _swiglu_of_each(jnp.broadcast_to(x, (num_experts, *x.shape)), weights, quantization)
    share = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.float32) * routing.gates[..., None]
    return jnp.einsum("te,etd->td", share.sum(1), outputs).astype(x.dtype)


# --- local: sort by expert, dropless --------------------------------------------------------------------------


class Kernel(NamedTuple):
    """(x [T, D], expert_ids [T, K], gates [T, K], weights) -> float32 [T, D], an expert's rows padded to tiles."""

    multiply: Callable[[Array, Array, Array, ExpertWeights], Array]
    tile: int


def in_native(cpu_kernel: str, mesh: Mesh | None, dtype: jnp.dtype) -> bool:
    """Whether experts run in C++ here: "xla" nowhere; "auto" on CPUs that can; "native" on CPUs, or not at all.

    Raises:
        ValueError: `cpu_kernel="native"` on a CPU without a compiler, or with another dtype.
    """
    here = jax.default_backend() if mesh is None else platform(mesh)
    if here != "cpu" or cpu_kernel == "xla":
        return False
    why = native.missing() if dtype in native.DTYPES else f"it computes in float32 and bfloat16, not {dtype}"
    if why and cpu_kernel == "native":
        raise ValueError(f'model.cpu_kernel="native" cannot be: {why}; or set it to "auto" or "xla".')
    return why is None


def kernel_for(cpu_kernel: str, mesh: Mesh | None, dtype: jnp.dtype, quantization: str) -> Kernel:
    """The kernel that the config means on these devices."""
    if quantization != "none":
        return Kernel(_in_format(quantization), TILE_ROWS)
    return NATIVE if in_native(cpu_kernel, mesh, dtype) else IN_XLA


def told(cpu_kernel: str, mesh: Mesh, dtype: str, quantization: str = "none") -> str | None:
    """One line on how experts multiply, on CPUs or narrowed; None where there is nothing to tell."""
    quantize.check(quantization)
    if quantization != "none":
        return f"experts multiply in {quantization}, quantized by qwix, in XLA"
    if platform(mesh) != "cpu":
        return None
    if in_native(cpu_kernel, mesh, jnp.dtype(dtype)):
        return "experts multiply in C++"
    return f"experts multiply in XLA: {native.missing() or f'model.cpu_kernel={cpu_kernel!r}, {dtype}'}"


def _by_sorting(x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, quantization: str = "none") -> Array:
    """`native.experts` in XLA, for every platform."""
    num_experts, slots = weights.gate.shape[0], expert_ids.shape[1]
    with jax.named_scope("dispatch"):
        order, place = _sorting(expert_ids.ravel())
        copies = _take(x, order[:, None] // slots, place.reshape(-1, slots))
    with jax.named_scope("experts"):
        outputs = _grouped_swiglu(copies, weights, count(expert_ids, num_experts), quantization)
    with jax.named_scope("combine"):
        back = _take(outputs, place[:, None], order[:, None]).reshape(*expert_ids.shape, x.shape[1])
        return jnp.einsum("tk,tkd->td", gates, back)


@functools.cache  # the same kernel is the same function
def _in_format(quantization: str) -> Callable[[Array, Array, Array, ExpertWeights], Array]:
    return functools.partial(_by_sorting, quantization=quantization)


NATIVE, IN_XLA = Kernel(native.experts, 1), Kernel(_by_sorting, TILE_ROWS)


def _local(
    x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, *, kernel: Kernel
) -> tuple[Array, Traffic]:
    num_experts = weights.gate.shape[0]
    rows = rows_multiplied(count(expert_ids, num_experts), kernel.tile)
    y = kernel.multiply(x, expert_ids, gates, weights)
    return y, _traffic(rounds=1, rows=rows, visits=_visits(expert_ids, num_experts, 1))


def _traffic(dropped: Array | int = 0, *, rounds: Array | int, rows: Array | int, visits: Array) -> Traffic:
    """One row of a per-shard report."""
    return Traffic(*(jnp.asarray(n, jnp.int32)[None] for n in (dropped, rounds, rows, visits)))


# --- expert parallel: exchange, multiply, exchange back, in as many rounds as it takes ------------------------


class _Copies(NamedTuple):
    """This device's token copies, sorted by expert, and so by device, for a device's experts are consecutive.

    token, copy [N, 1]: which of them stands at a place. place [T, K]: where each copy stands. start, send [X]:
    the first place and the number of copies for each device. received [X, E / X]: how many copies every source
    has for each expert here.
    """

    token: Int32[Array, "copies 1"]
    copy: Int32[Array, "copies 1"]
    place: Int32[Array, "tokens slots"]
    device: Int32[Array, "tokens slots"]
    start: Int32[Array, "devices"]
    send: Int32[Array, "devices"]
    received: Int32[Array, "devices local_experts"]


class _Round(NamedTuple):
    """One exchange: which slot of the outgoing buffer holds which copy, and how the buffer travels.

    token, copy [slots, 1] of every outgoing slot, slot [T, K] of every copy; out of range where there is none.
    expert [rows]: the local expert of every incoming row, E / X for none. there, home: buffer <-> rows.
    """

    token: Array
    copy: Array
    slot: Array
    expert: Array
    there: Callable[[Array], Array]
    home: Callable[[Array], Array]


class _Exchange(NamedTuple):
    """How copies travel: by which transport, with how much room, between how many devices, multiplied by what."""

    transport: Callable
    factor: float
    devices: int
    kernel: Kernel

    def plan(self, copies: _Copies) -> tuple[int, Array, Callable[[Array | int], _Round]]:
        """Rounds that could be needed, that are, and round by number."""
        return self.transport(copies, self.factor, self.devices)


def _in_rounds(
    x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, *, exchange: _Exchange
) -> tuple[Array, Traffic]:
    """Dropless expert parallelism in bounded memory: what does not fit into a round waits for the next.

    All devices do as many rounds as the busiest needs, over every axis: a device that stopped early would leave
    the others waiting. The first round is unconditional, so that a balanced step has no branch on its way and
    shared experts may compute meanwhile; the others run only if somebody needs them.
    """
    num_local, devices = weights.gate.shape[0], exchange.devices
    copies = _sort_copies(expert_ids, num_local * devices, devices)
    _, needed, make = exchange.plan(copies)
    first = jax.checkpoint(lambda x, gates, weights: _one_round(make(0), x, gates, weights, exchange.kernel))
    y, rows = _add(first(x, gates, weights), _further_rounds(exchange, x, gates, weights, copies))
    visits = _visits(expert_ids, num_local, devices)
    return y, _traffic(rounds=needed, rows=rows, visits=visits)


def _one_round(now: _Round, x: Array, gates: Array, weights: ExpertWeights, kernel: Kernel) -> tuple[Array, Array]:
    """What the round's copies add to the output, float32 [T, D], and how many rows were multiplied.

    Gates travel with their copies: weighed here, the way home needs not be gone again in the backward pass.
    """
    with jax.named_scope("dispatch"):
        incoming = now.there(_take(x, now.token, now.slot))
        share = now.there(_take(gates.reshape(-1, 1), now.copy, now.slot.reshape(-1, 1)))
        rows = rows_multiplied(count(now.expert, weights.gate.shape[0]), kernel.tile)
    outputs = kernel.multiply(incoming, now.expert[:, None], share, weights)
    with jax.named_scope("combine"):
        outgoing = now.home(outputs.astype(x.dtype))
        return _take(outgoing, now.slot, now.token).astype(jnp.float32), rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(
    exchange: _Exchange, x: Array, gates: Array, weights: ExpertWeights, copies: _Copies
) -> tuple[Array, Array]:
    """The sum of all rounds after the first. Nothing is kept of them for the backward pass, which does them again,

    whatever the layer around keeps: memory must not grow with the number of rounds that could be needed.
    """
    possible, needed, make = exchange.plan(copies)

    def nothing(_: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(x, jnp.float32), jnp.zeros_like(copies.send, shape=())

    def one(number: Array) -> tuple[Array, Array]:
        # the sum stays outside of the checkpoint, or backward would keep it for every possible round
        run = jax.checkpoint(lambda n: _one_round(make(n), x, gates, weights, exchange.kernel))
        return lax.cond(number < needed, run, nothing, number)

    def all_of_them(numbers: Array) -> tuple[Array, Array]:
        return lax.scan(lambda sofar, n: (_add(sofar, jax.checkpoint(one)(n)), None), nothing(numbers), numbers)[0]

    numbers = jnp.arange(1, possible, dtype=jnp.int32)
    return lax.cond(needed > 1, all_of_them, nothing, numbers) if possible > 1 else nothing(numbers)


def _further_rounds_again(exchange: _Exchange, kept: tuple, d: tuple) -> tuple[Array, Array, ExpertWeights, None]:
    *inputs, copies = kept
    return *jax.vjp(lambda *inputs: _further_rounds.fun(exchange, *inputs, copies), *inputs)[1](d), None


_further_rounds.defvjp(lambda *args: (_further_rounds.fun(*args), args[1:]), _further_rounds_again)


def _add(a: tuple, b: tuple) -> tuple:
    return jax.tree.map(jnp.add, a, b)


def _sort_copies(expert_ids: Array, num_experts: int, devices: int) -> _Copies:
    slots = expert_ids.shape[1]
    loads = count(expert_ids, num_experts).reshape(devices, -1)
    order, place = _sorting(expert_ids.ravel())
    send = loads.sum(1, dtype=jnp.int32)
    return _Copies(
        token=order[:, None] // slots,
        copy=order[:, None],
        place=place.reshape(expert_ids.shape),
        device=expert_ids // (num_experts // devices),
        start=_before(send),
        send=send,
        received=lax.all_to_all(loads, "expert", 0, 0, tiled=True),
    )


def _before(sizes: Array) -> Array:
    """The sum of all earlier entries, along the first axis."""
    return jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes


def _padded(copies: _Copies, factor: float, devices: int) -> tuple[int, Array, Callable[[Array | int], _Round]]:
    """Rounds of `all_to_all`, of at most C = factor x mean copies from each device to each; runs anywhere."""
    num_copies = copies.copy.shape[0]
    capacity = min(num_copies, math.ceil(factor * num_copies / devices))
    needed = lax.pmax(-(-copies.send.max() // capacity), BATCH)
    upto = jnp.cumsum(copies.received, axis=1, dtype=jnp.int32)
    inside = jnp.arange(capacity, dtype=jnp.int32)[None]

    def make(number: Array | int) -> _Round:
        first = number * capacity
        filled = first + inside < copies.send[:, None]
        at = jnp.where(filled, copies.start[:, None] + first + inside, num_copies).ravel()
        token, copy = (m.at[at].get(mode="fill", fill_value=num_copies) for m in (copies.token, copies.copy))
        wanted = copies.place - copies.start.at[copies.device].get(mode="fill", fill_value=0) - first
        here = (wanted >= 0) & (wanted < capacity) & (copies.device < devices)
        slot = jnp.where(here, copies.device * capacity + wanted, devices * capacity)
        # a source's copies for this device are sorted by expert: place c of the round is of the first expert
        # whose copies, with those of all experts before it, are more than that
        expert = (upto[:, :, None] <= first + inside[None]).sum(1, dtype=jnp.int32).ravel()

        def exchange(buffer: Array) -> Array:
            return lax.all_to_all(buffer.reshape(devices, capacity, -1), "expert", 0, 0, tiled=True).reshape(
                buffer.shape
            )

        return _Round(token, copy, slot, expert, exchange, exchange)

    return math.ceil(num_copies / capacity), needed, make


def _ragged(copies: _Copies, factor: float, devices: int) -> tuple[int, Array, Callable[[Array | int], _Round]]:
    """Rounds of `ragged_all_to_all`, in which a device takes in at most factor x mean copies from all others.

    The copies for one device, source after source, are one list; round n ships its n-th piece.
    """
    num_copies = copies.copy.shape[0]
    capacity = math.ceil(min(factor, devices) * num_copies)
    sent = lax.all_gather(copies.send, "expert")  # [source, destination]
    needed = lax.pmax(-(-sent.sum(0).max() // capacity), BATCH)
    here = lax.axis_index("expert")
    offset = _before(sent)  # where a source's copies lie in the destination's list
    start = _before(sent.T)[here]  # where the copies for this device lie at every source
    upto = jnp.cumsum(copies.received.ravel(), dtype=jnp.int32)
    local_experts = copies.received.shape[1]

    def make(number: Array | int) -> _Round:
        first = number * capacity
        begin, end = (jnp.clip(bound - offset, 0, sent) for bound in (first, first + capacity))
        amount, landing = end - begin, offset + begin - first
        listed = first + jnp.arange(capacity, dtype=jnp.int32)
        # runs are those of `received`: sources, then experts
        run = (upto[:, None] <= listed[None]).sum(0, dtype=jnp.int32)
        expert = jnp.where(run < upto.size, run % local_experts, local_experts)

        def there(buffer: Array) -> Array:
            rows = jnp.zeros_like(buffer, shape=(capacity, buffer.shape[1]))
            places = copies.start + begin[here], amount[here], landing[here], amount[:, here]
            return lax.ragged_all_to_all(buffer, rows, *places, axis_name="expert")

        def home(rows: Array) -> Array:
            buffer = jnp.zeros_like(rows, shape=(num_copies, rows.shape[1]))
            places = landing[:, here], amount[:, here], start + begin[:, here], amount[here]
            return lax.ragged_all_to_all(rows, buffer, *places, axis_name="expert")

        # copies of other rounds lie in the buffer too: they are not shipped, and come home as 0
        return _Round(copies.token, copies.copy, copies.place, expert, there, home)

    return math.ceil(devices * num_copies / capacity), needed, make


# --- capacity: fixed slots per expert and sequence, the rest is dropped ---------------------------------------


def capacity_of(row_tokens: int, slots: int, num_experts: int, capacity_factor: float) -> int:
    """Slots an expert has for one sequence: factor x the balanced load, rounded up, at least 1."""
    return max(1, math.ceil(capacity_factor * row_tokens * slots / num_experts))


def _capacity(
    x: Array,
    expert_ids: Array,
    gates: Array,
    weights: ExpertWeights,
    *,
    row_tokens: int,
    factor: float,
    devices: int,
    quantization: str,
) -> tuple[Array, Traffic]:
    """GShard's dispatch: first choices of a whole sequence are seated before second choices.

    That order is the original's, and it means that with K > 1 a later token's first choice can unseat an
    earlier token's second: capacity dispatch is causal for top-1 only. Source: arXiv 2006.16668 Algorithm 1.
    """
    num_experts, slots = weights.gate.shape[0] * devices, expert_ids.shape[1]
    num_rows = x.shape[0] // row_tokens
    capacity = capacity_of(row_tokens, slots, num_experts, factor)
    ids = expert_ids.reshape(num_rows, row_tokens, slots)
    seat = jax.vmap(lambda row: _seats(row, num_experts))(ids)
    kept = (ids < num_experts) & (seat < capacity)
    dropped = ((ids < num_experts) & ~kept).sum(dtype=jnp.int32)
    # slot (e, b, c) of one flat buffer; a copy without a seat points past its end
    position = (ids * num_rows + jnp.arange(num_rows, dtype=jnp.int32)[:, None, None]) * capacity + seat
    position = jnp.where(kept, position, num_experts * num_rows * capacity).reshape(-1, slots)
    buffer = jnp.zeros_like(x, shape=(num_experts * num_rows * capacity, x.shape[1]))
    buffer = buffer.at[position].set(x[:, None, :], mode="drop").reshape(num_experts, -1, x.shape[1])
    if devices > 1:
        buffer = lax.all_to_all(buffer, "expert", 0, 1, tiled=True)
    outputs = _swiglu_of_each(buffer, weights, quantization)
    if devices > 1:
        outputs = lax.all_to_all(outputs, "expert", 1, 0, tiled=True)
    back = outputs.reshape(-1, x.shape[1]).at[position].get(mode="fill", fill_value=0)
    rows = buffer.shape[0] * buffer.shape[1]
    seated = jnp.where(kept, ids, num_experts).reshape(-1, slots)
    visits = _visits(seated, num_experts // devices, devices)
    return jnp.einsum("tk,tkd->td", gates, back), _traffic(dropped, rounds=1, rows=rows, visits=visits)


def _seats(ids: Int32[Array, "tokens slots"], num_experts: int) -> Int32[Array, "tokens slots"]:
    """The place of every copy in its expert's queue: all first choices in token order, then all second ones."""
    queue = ids.T.ravel()
    _, place = _sorting(queue)
    sizes = jnp.zeros(num_experts + 1, jnp.int32).at[queue].add(1)
    starts = _before(sizes)
    return (place - starts[queue]).reshape(ids.shape[::-1]).T
