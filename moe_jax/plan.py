"""`python -m moe_jax.plan --config=FILE --topology=v5p:8x16x16`: the train step compiled for a machine you do not have.

Compiles the real train step for that topology with the TPU compiler (the libtpu wheel; no TPU needed) and tells
whether it fits, its bytes, FLOPs, collectives and kernels, and the bound on MFU that follows. `--topology=cpu:8` does
the same for eight fake local devices, without a chip's figures. `--search` tries meshes and remat policies.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from absl import app, flags

from moe_jax.config import Config, MeshConfig, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.planning import hlo
from moe_jax.runtime.chips import GIB, Place, Topology, exchange_seconds, parse_topology, place_of
from moe_jax.runtime.files import output_of, write_json, write_whole

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from rich.console import Console


def prepare_environment(topology: Topology) -> None:
    """What must be set before jax is imported: the local platform is CPU, with enough fake devices.

    Raises:
        ValueError: the TPU compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.family == "cpu":
        others = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={topology.dims[0]}".strip()
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology} needs the TPU compiler, which is not installed; run pip install 'jax[tpu]', "
            "which has the libtpu that belongs to a jax."
        )
    quiet = dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5p-8")
    # no TPU is opened, so two plans at a time disturb nobody
    for key, value in (quiet | dict(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_MIN_LOG_LEVEL="3")).items():
        os.environ.setdefault(key, value)


def topology_devices(topology: Topology) -> Sequence[Any]:
    """The devices to compile for; none of them needs to exist, but for cpu.

    Raises:
        ValueError: the shape is refused by the compiler, or there are fewer local devices.
    """
    import jax

    if topology.chip is None:
        here = jax.devices("cpu")
        if len(here) < topology.dims[0]:
            raise ValueError(
                f"--topology={topology} needs {topology.dims[0]} local devices and {len(here)} are here; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.dims[0]} before jax is imported."
            )
        return here[: topology.dims[0]]
    from jax.experimental import topologies

    name, options = str(topology._replace(slices=1)), dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices  # type: ignore[assignment]
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        told = " ".join(str(error).split())
        if "lockfile" in told:
            raise ValueError(
                f"--topology={topology}: another process holds the TPU compiler's lock; wait for it, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1."
            ) from None
        raise ValueError(f"--topology={topology} was refused by the TPU compiler: {told}; try another shape.") from None


# --- compiling ------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """The compiled train step: its text, XLA's own account of memory, the seconds and processor seconds it took."""

    text: str
    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int
    peak: int
    seconds: float
    cpu_seconds: float


class DoesNotFit(Exception):
    """The compiler found no way to fit the step into memory: bytes needed and available, 0 where it does not say."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed, self.available = needed, available


def compile_step(config: Config, mesh: "Mesh") -> Compiled:
    """Lower and compile the real train step for the devices of `mesh`; no array is made.

    Raises:
        DoesNotFit: the compiler ran out of the chip's memory.
    """
    import jax

    from moe_jax.mesh import replicated
    from moe_jax.training.state import abstract_state
    from moe_jax.training.step import abstract_batch, make_train_step

    started, busy = time.perf_counter(), time.process_time()
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    key = jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
    counted = dataclasses.replace(config.model, cpu_kernel="xla")  # XLA counts its own products only
    config = dataclasses.replace(config, model=counted)
    lowered = make_train_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh), key)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise DoesNotFit(*out_of_memory(str(error))) from None
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu {metadata.version('libtpu')} writes programs that jax {jax.__version__} cannot read "
            f"({str(error).splitlines()[0]}); run pip install 'jax[tpu]', which has the libtpu that belongs to a jax."
        ) from None
    m = compiled.memory_analysis()
    return Compiled(
        text=text,
        arguments=m.argument_size_in_bytes,
        results=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        peak=getattr(m, "peak_memory_in_bytes", 0),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - busy,
    )


def out_of_memory(message: str) -> tuple[int, int]:
    """(bytes needed, bytes available) of the compiler's message, 0 where it does not say."""

    def read(pattern: str) -> int:
        found = re.search(pattern, message)
        return round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0

    number = r"([\d.]+)([KMGT]?)"
    needed = read(rf"\({number}\) exceeds available") or read(rf"[Uu]sed {number}")
    return needed, read(rf"available HBM \({number}\)") or read(rf"[Uu]sed [\d.]+[KMGT]? of {number}")


def state_bytes(config: Config, mesh: "Mesh") -> tuple[int, int, int]:
    """Bytes a chip of (parameters, optimizer, the rest of the state), by the shardings of the abstract state."""
    import jax

    from moe_jax.mesh import bytes_on_device
    from moe_jax.training.state import abstract_state

    state = abstract_state(config, mesh)

    def size(tree: Any) -> int:
        return sum(map(bytes_on_device, jax.tree.leaves(tree)))

    return size(state.params), size(state.optimizer), size((state.bias, state.balance))


def axes_of(group: Sequence[int], mesh: "Mesh") -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(list(group), mesh.devices.shape)
    return tuple(name for name, at in zip(mesh.axis_names, places, strict=True) if np.ptp(at) > 0)


# --- the report -----------------------------------------------------------------------------------------------

ASSUMPTIONS = (
    "FLOPs are those of matrix products and of kernels that tell theirs, each loop counted as often as it runs",
    "the ideal is 6 x active parameters x tokens: embedding look-up and attention scores are not in it",
    "routing is balanced: a conditional takes its cheapest branch, one round of dispatch",
    "HBM traffic is the operands and results of every scheduled instruction, without what XLA keeps on the chip: an "
    "estimate, high where a kernel keeps data on the chip, low where it reads an operand twice",
    "collectives run one after another at link speed over all links they can use, without latency",
    "the bound on MFU is the ideal FLOPs at peak over the longest of the three times, as if the other two were hidden",
)
CPU_LOOP = (
    'experts are those of model.cpu_kernel="xla", whose loop over tiles of rows is counted as if it met every row once'
)


def make_report(config: Config, topology: Topology, mesh: "Mesh", compiled: Compiled) -> dict[str, Any]:
    """Everything that the command tells, as JSON values; bytes are per chip, FLOPs per step."""
    trips = tile_trips if topology.chip is None else lambda loop, body: None
    cost = hlo.analyze(compiled.text, trips)
    places = [place_of(d) for d in mesh.devices.flat]
    report = _heading(config, topology, mesh)
    report["bytes_per_chip"] = _memory(config, topology, mesh, compiled)
    total, limit = report["bytes_per_chip"]["total"], report["bytes_per_chip"]["hbm"]
    report["fits"] = None if limit is None else total <= limit
    report["flops_per_step"] = _flops(config, len(places), cost)
    report["collectives"] = _collectives(cost, mesh, places, topology)
    report["largest_exchanges"] = _largest(cost, mesh, places, topology)
    report["flops_per_chip_during_exchange"] = {kind: n for kind, n in cost.beside.items() if n}
    report["kernels"] = dict(sorted(cost.kernels.items()))
    report["seconds"], report["bound_by"], report["mfu_bound"] = _roofs(report, cost, topology, len(places))
    report["hbm_traffic_per_chip"] = round(cost.hbm)
    report["not_counted"] = {
        "kernels_without_flops": sorted(cost.uncosted),
        "loops_of_unknown_length": sorted(cost.unknown_loops),
        "untaken_branches": {"flops_per_chip": cost.untaken[0], "bytes_sent_per_chip": cost.untaken[1]},
    }
    report["assumptions"] = list(ASSUMPTIONS) + ([CPU_LOOP] if topology.chip is None else [])
    report["compile_seconds"] = round(compiled.seconds, 1)
    report["compile_cpu_seconds"] = round(compiled.cpu_seconds, 1)
    return report


def _heading(config: Config, topology: Topology, mesh: "Mesh") -> dict[str, Any]:
    import jax

    chip = topology.chip
    versions = {"jax": jax.__version__}
    if chip is not None:
        versions["libtpu"] = metadata.version("libtpu")
    return {
        "topology": str(topology),
        "chips": mesh.devices.size,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "remat": config.model.remat,
        "dispatch": config.model.dispatch,
        "micro_batches": config.micro_batches,
        "tokens_per_step": config.batch_size * config.sequence_length,
        "chip": None if chip is None else chip._asdict(),
        "versions": versions,
    }


def _memory(config: Config, topology: Topology, mesh: "Mesh", compiled: Compiled) -> dict[str, int | None]:
    parameters, optimizer, rest = state_bytes(config, mesh)
    kept = min(hlo.saved_bytes(compiled.text), compiled.temporaries)
    together = compiled.arguments + compiled.results - compiled.aliased + compiled.temporaries + compiled.code
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "bias_and_balance": rest,
        "batch_and_results": compiled.arguments - parameters - optimizer - rest + compiled.results - compiled.aliased,
        "activations": kept,
        "temporaries": compiled.temporaries - kept,
        "code": compiled.code,
        "total": max(together, compiled.peak),
        "hbm": topology.chip.hbm if topology.chip else None,
    }


def _flops(config: Config, chips: int, cost: hlo.Cost) -> dict[str, Any]:
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
    """The part of a step that an instruction belongs to; XLA drops some names when it rewrites."""
    if "/" not in op_name:
        return "unnamed"
    again = "rematted_computation" in op_name
    return "recomputed" if again else "backward" if "transpose(" in op_name else "forward"


def _origins(cost: hlo.Cost, chips: int) -> Counter[str]:
    """FLOPs by the last word of their op_name: dot_general, ragged_dot_general, a kernel's name."""
    found: Counter[str] = Counter()
    for name, n in cost.flops.items():
        found["/".join(name.split("/")[-2:]) if "ragged" in name else name.rpartition("/")[2] or "unnamed"] += n * chips
    return found


def _collectives(cost: hlo.Cost, mesh: "Mesh", places: Sequence[Place], topology: Topology) -> list[dict[str, Any]]:
    """By kind and mesh axes: how many a step, bytes a chip puts in, bytes that leave it, seconds alone."""
    rows: dict[tuple, dict[str, Any]] = {}
    for c, n in cost.collectives.items():
        axes = axes_of(c.group, mesh)
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
        seconds = exchange_seconds(c, places, topology)
        row["seconds"] = None if seconds is None else row["seconds"] + seconds * n
    return sorted(rows.values(), key=lambda row: -row["sent"])


def _largest(cost: hlo.Cost, mesh: "Mesh", places: Sequence[Place], topology: Topology) -> list[dict[str, Any]]:
    """The exchanges that send most, with their shape and where they come from: what to look at first."""
    rows = sorted(cost.collectives.items(), key=lambda item: -item[0].sent * item[1])[:12]
    return [
        dict(
            kind=c.kind,
            axes=list(axes_of(c.group, mesh)),
            count=n,
            sent=round(c.sent * n),
            shape=c.shape,
            origin=c.op_name,
        )
        for c, n in rows
    ]


def _roofs(
    report: dict[str, Any], cost: hlo.Cost, topology: Topology, chips: int
) -> tuple[dict[str, float] | None, str | None, float | None]:
    """Seconds a step that each roof needs, the longest of them, and the bound on MFU; None without a chip."""
    chip = topology.chip
    if chip is None:
        return None, None, None
    seconds = {
        "compute": cost.flops.total() / chip.flops,
        "hbm": cost.hbm / chip.hbm_bandwidth,
        "interconnect": sum(row["seconds"] for row in report["collectives"]),
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    ideal = report["flops_per_step"]["ideal"] / chips / chip.flops
    return seconds, slowest, ideal / seconds[slowest]


def tile_trips(loop: hlo.Instruction, body: hlo.Computation) -> int | None:
    """Turns of the CPU's loop over tiles of rows, whose number depends on the routing: all rows once."""
    tiles = [
        i.leaves[0].dims[0]
        for i in body.instructions.values()
        if "dynamic_slice" in i.op_name and i.leaves and len(i.leaves[0].dims) == 2
    ]
    rows = [leaf.dims[0] for leaf in loop.leaves if len(leaf.dims) == 2]
    return max(1, max(rows) // min(tiles)) if tiles and rows else None


# --- one plan, or many ----------------------------------------------------------------------------------------


def plan(config: Config, topology: Topology, text_file: Path | None = None) -> dict[str, Any]:
    """The report of one config on one topology; `text_file` gets the compiled program.

    Raises:
        ValueError: the topology is refused, or the mesh does not divide.
    """
    from moe_jax.config import resolve
    from moe_jax.mesh import make_mesh

    devices = topology_devices(topology)
    config = resolve(config, len(devices), "cpu" if topology.chip is None else "tpu")
    return plan_on(config, topology, make_mesh(config.mesh, devices), text_file)


def plan_on(config: Config, topology: Topology, mesh: "Mesh", text_file: Path | None = None) -> dict[str, Any]:
    """`plan` for a mesh that is made already; the config's is resolved."""
    try:
        compiled = compile_step(config, mesh)
    except DoesNotFit as error:
        parameters, optimizer, rest = state_bytes(config, mesh)
        memory = dict(parameters=parameters, optimizer=optimizer, bias_and_balance=rest, total=error.needed or None)
        available = error.available or (topology.chip.hbm if topology.chip else None)
        return _heading(config, topology, mesh) | {"fits": False, "bytes_per_chip": memory | {"hbm": available}}
    if text_file:
        write_whole(text_file, compiled.text)
    return make_report(config, topology, mesh, compiled)


class Trial(NamedTuple):
    """One line of a search: sizes of the mesh, the remat policy, and what came of it."""

    mesh: dict[str, int]
    remat: str
    verdict: str
    report: dict[str, Any]


# from what recomputes least to what keeps least
REMATS: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


def search(config: Config, topology: Topology, minutes: float) -> Iterator[Trial]:
    """Compile the real step on every mesh that divides, until the time is up; each trial as it is done.

    On each mesh the remat policies are tried from the one that recomputes least; the first that fits ends them,
    for the next would only recompute more. A mesh on which the state alone does not fit is not compiled.
    """
    import jax

    from moe_jax.mesh import make_mesh

    devices = topology_devices(topology)
    until = time.monotonic() + 60 * minutes
    for resolved in meshes(config, len(devices)):
        mesh = make_mesh(resolved.mesh, devices)
        sizes = {name: int(size) for name, size in mesh.shape.items()}
        state = sum(state_bytes(resolved, mesh))
        if topology.chip and state > topology.chip.hbm:
            yield Trial(sizes, "any", f"the state alone takes {state / GIB:.1f} GiB", {"fits": False})
            continue
        for remat in REMATS:
            if time.monotonic() > until:
                yield Trial(sizes, remat, "not tried: time is up", {})
                break
            jax.clear_caches()
            one = dataclasses.replace(resolved, model=dataclasses.replace(resolved.model, remat=remat))
            report = plan_on(one, topology, mesh)
            yield Trial(sizes, remat, "fits" if report["fits"] in (True, None) else "does not fit", report)
            if report["fits"] in (True, None):
                break


def meshes(config: Config, devices: int) -> list[Config]:
    """The config on every mesh of data x expert x tensor that its rules accept, `replica` as it is.

    Those without `tensor` first, nearest in `expert` to its own first, so that little time tries what is likely.

    Raises:
        ValueError: none is accepted.
    """
    from moe_jax.config import resolve

    found: list[Config] = []
    replica, own = max(1, config.mesh.replica), max(1, config.mesh.expert)
    rest = devices // replica
    sizes = [n for n in range(1, rest + 1) if rest % n == 0]
    for expert, tensor in itertools.product(reversed(sizes), sizes):
        if rest % (expert * tensor):
            continue
        mesh = MeshConfig(replica, rest // (expert * tensor), expert, tensor)
        with contextlib.suppress(ValueError):
            found.append(resolve(dataclasses.replace(config, mesh=mesh), devices))
    if not found:
        resolve(config, devices)  # says why
        raise ValueError(f"no mesh of {devices} devices with mesh.replica={replica} fits the model and the batch.")
    return sorted(found, key=lambda c: (c.mesh.tensor, abs(math.log2(c.mesh.expert / own))))


# --- what is printed ------------------------------------------------------------------------------------------


def size(n: float | None) -> str:
    """Bytes for people."""
    if n is None:
        return "?"
    for unit, one in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= one:
            return f"{n / one:.2f} {unit}"
    return f"{n:.0f} B"


def show(report: dict[str, Any], console: "Console") -> None:
    """The report as tables."""
    from rich.table import Table

    r, memory = report, report["bytes_per_chip"]
    mesh = " x ".join(f"{name} {n}" for name, n in r["mesh"].items() if n > 1) or "one device"
    console.print(
        f"{r['topology']}: {r['chips']} chips as {mesh}; remat {r['remat']}, {r['micro_batches']} micro-batch"
    )
    verdict = {True: "FITS", False: "DOES NOT FIT", None: "memory of the machine is not known"}[r["fits"]]
    console.print(f"{verdict}: {size(memory['total'])} a chip of {size(memory['hbm'])}")
    names = ", ".join(f"{k.replace('_', ' ')} {size(v)}" for k, v in memory.items() if k not in ("total", "hbm"))
    console.print(f"  {names}")
    if "flops_per_step" not in r:
        return
    f = r["flops_per_step"]
    console.print(
        f"FLOPs a step: {f['compiled']:.3e} compiled, {f['compiled_over_ideal']:.2f} x the ideal {f['ideal']:.3e} = "
        f"6 x {f['active_parameters'] / 1e9:.2f}e9 x {r['tokens_per_step']:,}; causal attention would be "
        f"{f['causal_attention']:.3e} more"
    )
    console.print("  " + ", ".join(f"{k} {v:.3e}" for k, v in f["compiled_by_phase"].items()))
    table = Table(
        "collective", "over", "count", "async", "bytes a chip", "sent", "ms alone", title="a step, on one chip"
    )
    for row in r["collectives"]:
        seconds = "?" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f}"
        names = " x ".join(row["axes"]) or "-"
        counts = (f"{row['count']:,}", f"{row['asynchronous']:,}")
        table.add_row(row["kind"], names, *counts, size(row["bytes"]), size(row["sent"]), seconds)
    for column in table.columns[2:]:
        column.justify = "right"
    console.print(table)
    for kind, n in r["flops_per_chip_during_exchange"].items():
        console.print(f"  scheduled between start and end of {kind}: {n:.3e} FLOPs of matrix products a chip")
    console.print("kernels: " + (", ".join(f"{k} x {n:,}" for k, n in r["kernels"].items()) or "none but XLA's own"))
    if r["seconds"]:
        times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in r["seconds"].items())
        console.print(f"roofs: {times}; bound on MFU {100 * r['mfu_bound']:.1f} %, by {r['bound_by']}")
        chip = r["chip"]
        console.print(
            f"  a chip is assumed to have {chip['flops'] / 1e12:.0f} TFLOP/s in bf16, {size(chip['hbm'])} of HBM at "
            f"{chip['hbm_bandwidth'] / 1e9:.0f} GB/s and links of {chip['link'] / 1e9:.0f} GB/s each way "
            f"({chip['source']})"
        )
    else:
        console.print("roofs: not known for this machine")
    for name, what in r["not_counted"].items():
        if what and name != "untaken_branches":
            console.print(f"  not counted, {name.replace('_', ' ')}: {', '.join(what)}")
    for line in r["assumptions"]:
        console.print(f"  assumed: {line}", style="dim")
    console.print(f"compiled in {r['compile_seconds']} s, {r['compile_cpu_seconds']} s of one processor")


def show_search(trials: Sequence[Trial], console: "Console") -> None:
    """The trials that were compiled, best bound first, then the others."""
    from rich.table import Table

    table = Table("mesh", "remat", "bound on MFU", "by", "memory a chip", "", title="tried, best first")
    for t in sorted(trials, key=lambda t: -(t.report.get("mfu_bound") or 0.0) * (t.report.get("fits") is not False)):
        bound = t.report.get("mfu_bound")
        mesh = " x ".join(f"{name} {n}" for name, n in t.mesh.items() if n > 1)
        memory = size(t.report["bytes_per_chip"]["total"]) if "bytes_per_chip" in t.report else ""
        told = "" if bound is None else f"{100 * bound:.1f} %"
        table.add_row(mesh, t.remat, told, t.report.get("bound_by") or "", memory, t.verdict)
    console.print(table)


def main(_: list[str]) -> None:
    """Plan, or search; print, and write JSON where asked."""
    flag = flags.FLAGS
    try:
        topology = parse_topology(flag.topology)
        config = validate(flag.config)
        prepare_environment(topology)
        files = {name: output_of(text, f"--{name}") for name in ("json", "hlo") if (text := str(flag[name].value))}
    except ValueError as error:
        fail(str(error))
    from rich.console import Console

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 100)  # in a file the tables need not wrap
    try:
        if flag.search:
            trials = []
            for trial in search(config, topology, flag.minutes):
                trials.append(trial)
                sizes = " x ".join(f"{name} {n}" for name, n in trial.mesh.items() if n > 1)
                console.print(f"{sizes}, remat {trial.remat}: {trial.verdict}", style="dim")
            show_search(trials, console)
            result: Any = [t._asdict() for t in trials]
        else:
            result = plan(config, topology, files.get("hlo"))
            show(result, console)
    except ValueError as error:
        fail(str(error))
    if "json" in files:
        write_json(files["json"], result)


if __name__ == "__main__":
    define_config_flag("A config file of ours or yours.")
    flags.DEFINE_string("topology", None, "FAMILY:SHAPE, as v5p:8x16x16, v5e:16x16, 2xv5e:16x16 or cpu:8.")
    flags.DEFINE_string("json", "", "Also write the report to this file.")
    flags.DEFINE_string("hlo", "", "Also write the compiled program, scheduled HLO, to this file.")
    flags.DEFINE_bool("search", False, "Try every mesh that divides, and the remat policies; best bound first.")
    flags.DEFINE_float("minutes", 60.0, "Begin no trial of a search after so many minutes.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
