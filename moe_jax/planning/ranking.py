"""What a step will multiply and exchange, from its config and mesh alone: ranks meshes before any is compiled.

T tokens of a device in a micro-batch, K experts per token, D embed, E experts.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moe_jax.config import DISPATCHERS, Config, ModelConfig, is_gated, num_moe_layers, routed_width
from moe_jax.config.schema import Kept
from moe_jax.config.xla_options import SPARSE_CORES
from moe_jax.planning.collectives import Collective
from moe_jax.planning.topology import Topology, exchange, place_of

if TYPE_CHECKING:
    from jax.sharding import Mesh

GATHERS = 2  # of a layer's weights: its backward pass gathers them again
NARROW = 2  # bytes of a number in the compute dtype


class Prediction(NamedTuple):
    """Seconds of a step on one chip: its products at peak, and each kind of exchange alone on its links.

    rows, weights: the exchanges of rows, and those that gather weights and scatter their gradients, by kind. beside:
    whether SparseCores make the latter beside the products.
    """

    compute: float
    rows: dict[str, float]
    weights: dict[str, float]
    beside: bool = False

    @property
    def exchanges(self) -> dict[str, float]:
        """Seconds of every kind of exchange."""
        return dict(Counter(self.rows) + Counter(self.weights))

    @property
    def seconds(self) -> float:
        """A step in which the core waits for every exchange of rows, and for weights unless they move beside it."""
        weights = sum(self.weights.values())
        core = max(self.compute, weights) if self.beside else self.compute + weights
        return core + sum(self.rows.values())


def predict(config: Config, mesh: "Mesh", topology: Topology) -> Prediction:
    """The time of a step of a resolved config on a mesh of chips.

    Assumes balanced routing, dispatch by `rounds` or `gathered`, weights in bfloat16 that every layer gathers for its
    forward and its backward pass, and gradients that are scattered once. It does not count attention's exchanges over
    `tensor`, forward passes that only count loads, or exchanges of less than a weight.
    """
    assert topology.chip
    places = [place_of(d) for d in mesh.devices.flat]

    def seconds(exchanges: Iterator[tuple[Collective, int]]) -> dict[str, float]:
        sums: defaultdict[str, float] = defaultdict(float)
        for c, n in _in_step(exchanges, config).items():
            if one := exchange(c, places, topology):
                sums[c.kind] += n * one.seconds
        return dict(sums)

    beside = topology.platform == "tpu" and SPARSE_CORES.items() <= config.compiler_options.items()
    rows, weights = seconds(_of_rows(config, mesh)), seconds(_of_weights(config, mesh))
    return Prediction(_products(config, mesh) / topology.chip.flops, rows, weights, beside)


def expected(config: Config, mesh: "Mesh") -> Counter[Collective]:
    """The exchanges of a step, and how often it makes each."""
    return _in_step(itertools.chain(_of_rows(config, mesh), _of_weights(config, mesh)), config)


def _in_step(exchanges: Iterable[tuple[Collective, int]], config: Config) -> Counter[Collective]:
    """How often a step makes each exchange, from how often a micro-batch does; those of one device are none."""
    found: Counter[Collective] = Counter()
    for c, n in exchanges:
        if len(c.group) > 1:
            found[c] += n * config.micro_batches
    return found


def _collective(kind: str, size: float, axis: str, mesh: "Mesh") -> Collective:
    """An exchange over one axis.

    XLA gathers and scatters around one ring, but on a block of experts over the links of all its sides. If the axis has
    all devices, it reduces instead: zeros with the part.
    """
    from moe_jax.mesh import axes

    numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    along = np.moveaxis(numbers, mesh.axis_names.index(axis), 0)
    group = tuple(along.reshape(len(along), -1)[:, 0].tolist())
    if kind in ("all-gather", "reduce-scatter") and len(group) == mesh.devices.size:
        kind = "all-reduce"
    return Collective(
        kind,
        round(size),
        group,
        False,
        "",
        "",
        one_ring=kind in ("all-gather", "reduce-scatter") and axis not in axes("experts"),
    )


def tokens_of_device(config: Config, mesh: "Mesh") -> int:
    """The tokens of a device in one micro-batch."""
    from moe_jax.mesh import ways

    return config.batch_size * config.sequence_length // config.micro_batches // ways(mesh, "tokens")


def rows_of_round(config: Config, mesh: "Mesh") -> int:
    """Rows that a device multiplies in the first round of a layer, filled or not; 0 where it has all experts."""
    from moe_jax.mesh import ways

    m = config.model
    devices = ways(mesh, "experts")
    if not m.num_experts or DISPATCHERS[m.dispatch].is_oracle or devices == 1:
        return 0
    copies = tokens_of_device(config, mesh) * m.top_k
    return devices * min(copies, math.ceil(m.capacity_factor * copies / devices))


def rows_that_arrive(config: Config, mesh: "Mesh") -> int:
    """Rows of D numbers that a device gets before the first round: those it multiplies, or all tokens of its group."""
    from moe_jax.mesh import ways

    rows = rows_of_round(config, mesh)
    gathers = rows and DISPATCHERS[config.model.dispatch].gathers_tokens
    return ways(mesh, "experts") * tokens_of_device(config, mesh) if gathers else rows


def kept_names(m: ModelConfig) -> tuple[Kept, ...]:
    """The names that a layer keeps for its backward pass."""
    return m.remat_keep if m.remat == "names" else ()


def _of_rows(config: Config, mesh: "Mesh") -> Iterator[tuple[Collective, int]]:
    """What MoE layers send to experts: T K rows with the room of a round, or T rows to every device.

    There and back, and both gradients; there again in the backward pass, unless what arrived is kept; and for the
    gradient of the projection from a latent, back again.
    """
    from moe_jax.mesh import axes

    m = config.model
    if rows := rows_that_arrive(config, mesh):
        (axis,) = axes("experts")
        again = 0 if m.remat == "none" or "rows" in kept_names(m) else 1
        gathers = DISPATCHERS[m.dispatch].gathers_tokens
        back = again if m.latent_dim else 0
        times = {"all-gather": 2 + again, "reduce-scatter": 2 + back} if gathers else {"all-to-all": 4 + again + back}
        for kind, n in times.items():
            yield _collective(kind, rows * routed_width(m) * NARROW, axis, mesh), n * num_moe_layers(m)


class _Weight(NamedTuple):
    """A matrix that is split over devices which have different tokens.

    size: bytes of the part that a device multiplies by, in the compute dtype. axes: over which it is gathered, in this
    order. gathers, gradients: how often a micro-batch gathers it, and how many gradients of it there are, each over all
    layers.
    """

    size: int
    axes: tuple[str, ...]
    gathers: int
    gradients: int


def _of_weights(config: Config, mesh: "Mesh") -> Iterator[tuple[Collective, int]]:
    """What gathers weights for their use and scatters their gradients, axis by axis.

    Prediction ahead shares the gathered embedding, and adds a gradient of it; it gathers and scatters the head again.
    """
    for w in _weights(config, mesh):
        for n, axis in enumerate(w.axes):
            left = math.prod(mesh.shape[later] for later in w.axes[n + 1 :])  # parts of what is gathered so far
            yield _collective("all-gather", w.size / left, axis, mesh), w.gathers
            yield _collective("reduce-scatter", w.size / left, axis, mesh), w.gradients


def _weights(config: Config, mesh: "Mesh") -> Iterator[_Weight]:
    import jax

    from moe_jax.mesh import axes, axes_of, gathering_axes, is_expert_weight, parameter_spec
    from moe_jax.model.abstract import abstract_model

    model = abstract_model(config.model)
    for leaf, named in zip(jax.tree.leaves(model.params), jax.tree.leaves(model.dims), strict=True):
        dims = named.names
        if len(dims) == 1:
            continue
        shape = leaf.shape[-len(dims) :]
        kept = axes("experts") if is_expert_weight(dims) else ()
        place = parameter_spec(mesh, dims, shape)
        split = [axis for part in place for axis in axes_of(part)]
        gathered = [axis for axis in gathering_axes(place) if axis not in kept]
        elsewhere = math.prod(mesh.shape[axis] for axis in split if axis not in gathered)
        layers = leaf.shape[0] if len(leaf.shape) > len(dims) else 1
        of_vocabulary = "vocab" in dims
        yield _Weight(
            size=math.prod(shape) * NARROW // elsewhere,
            axes=tuple(gathered[::-1] if dims[0] == "vocab" else gathered),  # columns of an embedding before its rows
            gathers=1 if of_vocabulary else GATHERS * layers,
            gradients=1 + config.model.mtp_depth if of_vocabulary else layers,
        )


def _products(config: Config, mesh: "Mesh") -> float:
    """FLOPs of a chip: the model's, those that a backward pass repeats, and tiles in which groups end."""
    from moe_jax.kernels.grouped import tpu_tile
    from moe_jax.mesh import axes
    from moe_jax.model.cost import ROUTED, parts

    m = config.model
    tokens = config.batch_size * config.sequence_length
    rows = tokens_of_device(config, mesh) * m.top_k
    groups = m.num_experts // math.prod(mesh.shape[axis] for axis in axes("experts"))
    tile = tpu_tile(rows, routed_width(m), m.expert_ffw_dim, groups, NARROW)[0] if groups else 0
    padded = 1 + (groups - 1) * tile / rows if groups else 1.0
    passes = sum(p.flops * (padded if p.name == ROUTED else 1.0) * (3 + _repeated(p.name, m)) for p in parts(config))
    return passes * tokens / mesh.size


def _repeated(part: str, m: ModelConfig) -> float:
    """The share of a part's forward FLOPs that the backward pass repeats.

    No gradient reads the last of the products of a feed-forward layer, unless that of the projection from a
    latent does, or the result of that projection. The output projection that "residual"
    saves is counted all the same: it takes as long on every mesh.
    """
    from moe_jax.model.cost import LATENT, ROUTED, SCORES

    if m.remat not in ("full", "names") or part in ("head", "embedding"):
        return 0.0
    kept = kept_names(m)
    if part == LATENT:
        return 1 / 2
    products = 3 if is_gated(m) else 2
    if part == ROUTED and m.latent_dim and "rows" not in kept:
        return 1 / products if "hidden" in kept else 1.0
    if (part == SCORES and "attention" in kept) or (part == ROUTED and "hidden" in kept):
        return 0.0
    return 1 - 1 / products if part in (ROUTED, "shared experts", "dense feed-forward") else 1.0
