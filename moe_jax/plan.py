"""`python -m moe_jax.plan --config=FILE --topology=v5p:8x16x16`: compile the train step for a machine you do not have.

Compiles the real train step for that topology with the TPU compiler (the libtpu wheel; no TPU needed) and reports
whether it fits into memory, its bytes, FLOPs, collectives and kernels, and the resulting bound on MFU.
`--topology=cpu:8` does the same for eight simulated local devices, without a chip's figures. `--search` tries meshes
and rematerialisation policies.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from moe_jax.config import validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.planning.compile import prepare_environment
from moe_jax.planning.search import Trial, plan, search
from moe_jax.planning.topology import parse_topology
from moe_jax.runtime.chips import GIB
from moe_jax.runtime.files import output_of, write_json

FILE_COLUMNS = 100  # the width of tables that are not written to a terminal


def size(n: float | None) -> str:
    """A number of bytes with its unit; "?" for None."""
    if n is None:
        return "?"
    for unit, one in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= one:
            return f"{n / one:.2f} {unit}"
    return f"{n:.0f} B"


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as tables."""
    r = report
    memory = report["bytes_per_chip"]
    mesh = " x ".join(f"{name} {n}" for name, n in r["mesh"].items() if n > 1) or "one device"
    console.print(
        f"{r['topology']}: {r['chips']} chips as {mesh}; remat {r['remat']}, {r['micro_batches']} micro-batch"
    )
    verdict = {True: "FITS", False: "DOES NOT FIT", None: "the memory of the machine is not known"}[r["fits"]]
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
    console.print("kernels: " + (", ".join(f"{k} x {n:,}" for k, n in r["kernels"].items()) or "only XLA's own"))
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
    for reason, operations in r["not_counted"].items():
        if operations and reason != "untaken_branches":
            console.print(f"  not counted, {reason.replace('_', ' ')}: {', '.join(operations)}")
    for line in r["assumptions"]:
        console.print(f"  assumed: {line}", style="dim")
    console.print(f"compiled in {r['compile_seconds']} s, {r['compile_cpu_seconds']} s of one processor")


def show_search(trials: Sequence[Trial], console: Console) -> None:
    """Print the trials that fit, best bound first, then the others."""

    def rank(trial: Trial) -> float:
        fits = trial.report.get("fits") is not False
        return -(trial.report.get("mfu_bound") or 0.0) * fits

    table = Table("mesh", "remat", "bound on MFU", "by", "memory a chip", "", title="tried, best first")
    for t in sorted(trials, key=rank):
        bound = t.report.get("mfu_bound")
        mesh = " x ".join(f"{name} {n}" for name, n in t.mesh.items() if n > 1)
        memory = size(t.report["bytes_per_chip"]["total"]) if "bytes_per_chip" in t.report else ""
        percent = "" if bound is None else f"{100 * bound:.1f} %"
        table.add_row(mesh, t.remat, percent, t.report.get("bound_by") or "", memory, t.verdict)
    console.print(table)


def main(_: list[str]) -> None:
    """Plan or search, print the result, and write it as JSON if there is a flag for it."""
    flag = flags.FLAGS
    try:
        topology = parse_topology(flag.topology)
        config = validate(flag.config)
        prepare_environment(topology)
        files = {name: output_of(text, f"--{name}") for name in ("json", "hlo") if (text := str(flag[name].value))}
    except ValueError as error:
        fail(str(error))
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else FILE_COLUMNS)
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
    define_config_flag("A config file.")
    flags.DEFINE_string("topology", None, "FAMILY:SHAPE, such as v5p:8x16x16, v5e:16x16, 2xv5e:16x16 or cpu:8.")
    flags.DEFINE_string("json", "", "Also write the report to this file.")
    flags.DEFINE_string("hlo", "", "Also write the compiled program, scheduled HLO, to this file.")
    flags.DEFINE_bool(
        "search", False, "Try every mesh that divides, with every remat policy; list the best bound first."
    )
    flags.DEFINE_float("minutes", 60.0, "Minutes after which a search starts no further trial.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
