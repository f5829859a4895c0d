"""What a compiled step costs on its topology: memory, FLOPs, bytes and the bound on MFU."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.config import Config
from moe_jax.config.axes import CONFIG_AXES
from moe_jax.planning import hlo, loops
from moe_jax.planning.compile import Compiled, compiler_version, state_bytes
from moe_jax.planning.cost import Cost, Program
from moe_jax.planning.keeping import keeping, policy
from moe_jax.planning.ranking import tokens_of_device
from moe_jax.planning.saving import saving
from moe_jax.planning.timeline import simulate
from moe_jax.planning.topology import NETWORKS, Place, Topology, exchange, place_of

if TYPE_CHECKING:
    from jax.sharding import Mesh


def group_axes(group: Sequence[int], mesh: "Mesh") -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(list(group), mesh.devices.shape)
    return tuple(name for name, at in zip(mesh.axis_names, places, strict=True) if np.ptp(at) > 0)


MOST_EXCHANGES = 12  # in the list of the largest
ASSUMPTIONS = (
    "FLOPs are those of matrix products and of kernels whose FLOPs are known; each loop counts as often as it runs",
    "the experts' kernel multiplies the rows of balanced routing, and a tile more for every group that ends within one",
    "the attention kernel multiplies the blocks that the causal mask does not hide, whatever the documents are",
    "the ideal is 6 x active parameters x tokens, without embedding look-up and attention scores",
    "routing is balanced: a conditional takes its cheapest branch, one round of dispatch",
    "HBM traffic is the operands and results of every scheduled instruction, without those that XLA keeps on the chip: "
    "an estimate, too high if a kernel keeps data on the chip, too low if it reads an operand twice",
    "collectives run at link speed over all links that they can use, two if the compiled algorithm is one ring, and "
    "without latency; the roof of the interconnect is the time of the busiest links, as if others were free meanwhile",
    "the bound on MFU is the time of the ideal FLOPs at peak over the longest roof",
    "the schedule runs the compiled instructions in their order: a synchronous collective stops the core, an "
    "asynchronous one is waited for at its end, and asynchronous ones on the same links follow one another",
)
OF_PLATFORM = {
    "cpu": (
        'experts are those of model.cpu_kernel="xla", whose loop over tiles of rows is assumed to process every row '
        "once",
    ),
    "gpu": (
        "products and kernels have their default tiles, because nothing can be tuned on a GPU that is not present",
        "an exchange passes InfiniBand, of which every GPU has its share, and then NVLink; what NCCL chooses, and the "
        "cores that it takes from products, are not known",
    ),
    "tpu": (),
}


def make_report(config: Config, topology: Topology, mesh: "Mesh", compiled: Compiled) -> dict[str, Any]:
    """Everything that the command reports, as JSON values; bytes are per chip, FLOPs per step."""
    trips = tile_trips if topology.chip is None else lambda loop, body: None
    program = Program(compiled.text, trips, rows_of_experts(config, mesh), shares_of_kinds(config))
    cost = program.computation(program.module.entry)
    places = [place_of(d) for d in mesh.devices.flat]
    report = heading(config, topology, mesh)
    report["bytes_per_chip"] = _memory(config, topology, mesh, compiled)
    total = report["bytes_per_chip"]["total"]
    limit = report["bytes_per_chip"]["hbm"]
    report["fits"] = None if limit is None else total <= limit
    report["names"] = keeping(config, mesh, total, limit)
    report["flops_per_step"] = _flops(config, len(places), cost)
    report["collectives"] = _collectives(cost, mesh, places, topology)
    report["largest_exchanges"] = _largest(cost, mesh, places, topology)
    report["flops_per_chip_during_exchange"] = {kind: n for kind, n in cost.overlapped.items() if n}
    report["kernels"] = dict(sorted(cost.kernels.items()))
    report["synchronous_share"] = _synchronous_share(cost)
    report |= _times(report["flops_per_step"], program, cost, places, topology)
    report["hbm_traffic_per_chip"] = round(cost.hbm)
    report["not_counted"] = {
        "kernels_without_flops": sorted(cost.uncosted),
        "loops_of_unknown_length": sorted(cost.unknown_loops),
        "untaken_branches": {"flops_per_chip": cost.untaken[0], "bytes_sent_per_chip": cost.untaken[1]},
    }
    report["assumptions"] = [*ASSUMPTIONS, *OF_PLATFORM[topology.platform]]
    report["saving"] = saving(config, mesh)
    report["compile_seconds"] = round(compiled.seconds, 1)
    report["compile_cpu_seconds"] = round(compiled.cpu_seconds, 1)
    return report


def sizes_of(mesh: "Mesh") -> dict[str, int]:
    """The sizes of a config's axes, and of those among the others that split anything."""
    return {axis: int(size) for axis, size in mesh.shape.items() if axis in CONFIG_AXES or size > 1}


def heading(config: Config, topology: Topology, mesh: "Mesh") -> dict[str, Any]:
    """What was compiled, and for which machine."""
    import jax

    chip = topology.chip
    versions = {"jax": jax.__version__} | compiler_version(topology)
    return {
        "topology": str(topology),
        "chips": mesh.devices.size,
        "mesh": sizes_of(mesh),
        "remat": policy(config.model),
        "dispatch": config.model.dispatch,
        "micro_batches": config.micro_batches,
        "tokens_per_step": config.batch_size * config.sequence_length,
        "chip": None if chip is None else chip._asdict(),
        "versions": versions,
    }


def _memory(config: Config, topology: Topology, mesh: "Mesh", compiled: Compiled) -> dict[str, int | None]:
    parameters, optimizer, rest = state_bytes(config, mesh)
    saved = min(loops.saved_bytes(compiled.text), compiled.temporaries)
    sum_of_parts = compiled.arguments + compiled.results - compiled.aliased + compiled.temporaries + compiled.code
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "bias_and_balance": rest,
        "batch_and_results": compiled.arguments - parameters - optimizer - rest + compiled.results - compiled.aliased,
        "activations": saved,
        "temporaries": compiled.temporaries - saved,
        "code": compiled.code,
        "total": max(sum_of_parts, compiled.peak),
        "hbm": topology.chip.hbm if topology.chip else None,
    }


def shares_of_kinds(config: Config) -> dict[str, float]:
    """The share of global layers, whose attention is the dearer one, where they are scanned with local ones."""
    from moe_jax.model.block import kinds_of_attention
    from moe_jax.model.kinds import BY_KIND

    mixed = [kind for kinds in kinds_of_attention(config.model) for kind in kinds if not isinstance(kind, bool)]
    return {BY_KIND: 1 - float(np.concatenate(mixed).mean())} if mixed else {}


def rows_of_experts(config: Config, mesh: "Mesh") -> int:
    """Token copies that a device multiplies in one layer and micro-batch, if routing is balanced."""
    m = config.model
    copies = tokens_of_device(config, mesh) * m.top_k
    return round(copies * (1.0 - m.zero_share if m.num_zero_experts else 1.0))


def _flops(config: Config, chips: int, cost: Cost) -> dict[str, Any]:
    from moe_jax.model.cost import parts

    tokens = config.batch_size * config.sequence_length
    rows = parts(config)
    products = sum(p.flops for p in rows if p.name != "attention scores")
    scores = sum(p.flops for p in rows if p.name == "attention scores")
    phases: Counter[str] = Counter()
    for name, n in cost.flops.items():
        phases[_phase(name)] += n * chips
    compiled = cost.flops.total() * chips
    return {
        "active_parameters": products // 2,
        "ideal": 3 * products * tokens,
        "causal_attention": 3 * scores * tokens,
        "compiled": compiled,
        "compiled_over_ideal": compiled / (3 * products * tokens),
        "compiled_by_phase": dict(phases),
        "compiled_by_origin": dict(_origins(cost, chips)),
    }


def _phase(op_name: str) -> str:
    """The part of a step that an instruction belongs to; XLA drops some names in its rewrites."""
    if "/" not in op_name:
        return "unnamed"
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


def _origins(cost: Cost, chips: int) -> Counter[str]:
    """FLOPs by the last word of their op_name (dot_general, a kernel's name), or the last two of a ragged product's."""
    found: Counter[str] = Counter()
    for name, n in cost.flops.items():
        origin = name.rpartition("/")[2] or "unnamed"
        if "ragged" in name:
            origin = "/".join(name.split("/")[-2:])
        found[origin] += n * chips
    return found


def _collectives(cost: Cost, mesh: "Mesh", places: Sequence[Place], topology: Topology) -> list[dict[str, Any]]:
    """By kind and mesh axes: the number per step, a chip's input bytes, the bytes that leave it, seconds if alone."""
    rows: dict[tuple, dict[str, Any]] = {}
    for c, n in cost.collectives.items():
        axes = group_axes(c.group, mesh)
        row = rows.setdefault(
            (c.kind, axes),
            dict(
                kind=c.kind, axes=list(axes), group=len(c.group), count=0, asynchronous=0, bytes=0, sent=0, seconds=0.0
            ),
        )
        row["count"] += n
        row["asynchronous"] += n if c.asynchronous else 0
        row["bytes"] += c.bytes * n
        row["sent"] += round(c.sent * n)
        time = exchange(c, places, topology)
        row["seconds"] = None if time is None else row["seconds"] + time.seconds * n
    return sorted(rows.values(), key=lambda row: -row["sent"])


def _largest(cost: Cost, mesh: "Mesh", places: Sequence[Place], topology: Topology) -> list[dict[str, Any]]:
    """The exchanges that send most bytes, with shape and origin."""
    rows = sorted(cost.collectives.items(), key=lambda item: -item[0].sent * item[1])[:MOST_EXCHANGES]
    return [
        dict(
            kind=c.kind,
            axes=list(group_axes(c.group, mesh)),
            count=n,
            sent=round(c.sent * n),
            shape=c.shape,
            origin=c.op_name,
        )
        for c, n in rows
    ]


OF_WEIGHTS = ("all-gather", "reduce-scatter", "all-reduce")  # what weights and their gradients are exchanged by


def _synchronous_share(cost: Cost) -> float | None:
    """The part of the bytes sent by the exchanges of weights during which the core waits; None if there are none."""
    sent = {c: c.sent * n for c, n in cost.collectives.items() if c.kind in OF_WEIGHTS}
    total = sum(sent.values())
    return sum(size for c, size in sent.items() if not c.asynchronous) / total if total else None


def _times(
    flops: dict[str, Any], program: Program, cost: Cost, places: Sequence[Place], topology: Topology
) -> dict[str, Any]:
    """Seconds per step of the roofs and of the schedule, with their MFU; every value is None without a chip."""
    if topology.chip is None:
        return dict.fromkeys(("seconds", "links", "bound_by", "mfu_bound", "mfu_bound_with_attention", "schedule"))
    seconds, links = roofs(cost, places, topology)
    slowest = max(seconds, key=lambda name: seconds[name])
    schedule = simulate(program, places, topology)
    ideal = flops["ideal"] / len(places) / topology.chip.flops
    with_attention = ideal * (1 + flops["causal_attention"] / flops["ideal"])
    return {
        "seconds": seconds,
        "links": links,
        "bound_by": slowest,
        "mfu_bound": ideal / seconds[slowest],
        "mfu_bound_with_attention": with_attention / seconds[slowest],
        "schedule": dict(
            seconds=schedule.seconds,
            mfu=ideal / schedule.seconds,
            mfu_with_attention=with_attention / schedule.seconds,
            causes=dict(sorted(schedule.causes.items(), key=lambda item: -item[1])),
        ),
    }


def roofs(cost: Cost, places: Sequence[Place], topology: Topology) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds if only one thing limited the step, and of the links; the topology has a chip.

    Returns:
        seconds of compute, of memory, of the busiest links of the torus, or of NVLink, and, if there are several slices
        or NVLink domains, of the network between them; and how long the links of each dimension are busy, beside the
        sum of all collectives.
    """
    assert topology.chip
    busy: Counter[str] = Counter()
    one_after_another = 0.0
    for c, n in cost.collectives.items():
        if one := exchange(c, places, topology):
            one_after_another += n * one.seconds
            busy.update({dimension: n * seconds for dimension, seconds in one.busy.items()})
    across = {network: busy.pop(network) for network in NETWORKS if network in busy}
    seconds = {
        "compute": cost.flops.total() / topology.chip.flops,
        "hbm": cost.hbm / topology.chip.hbm_bandwidth,
        "interconnect": max(busy.values(), default=0.0),
    }
    return seconds | across, dict(busy=dict(sorted(busy.items())), one_after_another=one_after_another)


def tile_trips(loop: hlo.Instruction, body: hlo.Computation) -> int | None:
    """The trip count of the CPU's loop over tiles of rows, as if it processed every row once; it depends on routing."""
    tiles = [
        i.leaves[0].dims[0]
        for i in body.instructions.values()
        if "dynamic_slice" in i.op_name and i.leaves and len(i.leaves[0].dims) == 2
    ]
    rows = [leaf.dims[0] for leaf in loop.leaves if len(leaf.dims) == 2]
    return max(1, max(rows) // min(tiles)) if tiles and rows else None
