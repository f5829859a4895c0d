"""A report and a search, printed."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax.planning.search import Trial
from moe_jax.runtime.chips import GIB


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
    console.print(
        f"{r['topology']}: {r['chips']} chips as {_mesh(r['mesh']) or 'one device'}; remat {r['remat']}, "
        f"{r['micro_batches']} micro-batch"
    )
    verdict = {True: "FITS", False: "DOES NOT FIT", None: "the memory of the machine is not known"}[r["fits"]]
    console.print(f"{verdict}: {size(memory['total'])} a chip of {size(memory['hbm'])}")
    names = ", ".join(f"{k.replace('_', ' ')} {size(v)}" for k, v in memory.items() if k not in ("total", "hbm"))
    console.print(f"  {names}")
    _show_names(r["names"], console)
    if "flops_per_step" not in r:
        return
    _show_flops(r["flops_per_step"], r["tokens_per_step"], console)
    _show_collectives(r, console)
    console.print("kernels: " + (", ".join(f"{k} x {n:,}" for k, n in r["kernels"].items()) or "only XLA's own"))
    if r["seconds"]:
        _show_times(r, console)
    else:
        console.print("roofs: not known for this machine")
    for reason, operations in r["not_counted"].items():
        if operations and reason != "untaken_branches":
            console.print(f"  not counted, {reason.replace('_', ' ')}: {', '.join(operations)}")
    s = r["saving"]
    console.print(
        f"a save is {size(s['bytes'])}, {size(s['bytes_of_busiest_host'])} of the busiest host; "
        f"save_every_seconds={s['interval_seconds']:.0f} loses least, {100 * s['lost']:.1f} % of the time, if a save "
        f"delays the steps by {s['blocking_seconds']:.0f} s and one of {s['hosts']} hosts fails every "
        f"{s['failure_seconds'] / 3600:.0f} h"
    )
    for line in r["assumptions"]:
        console.print(f"  assumed: {line}", style="dim")
    console.print(f"compiled in {r['compile_seconds']} s, {r['compile_cpu_seconds']} s of one processor")


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {n}" for name, n in sizes.items() if n > 1)


def _show_names(names: dict[str, Any], console: Console) -> None:
    sizes = ", ".join(f"{name} {size(n)}" for name, n in names["bytes"].items() if n)
    fit = names["fit"]
    advice = "" if fit is None else f"; beside the rest fit {', '.join(fit) or 'none of them'}"
    console.print(f"  names for model.remat_keep: {sizes}{advice}")


def _show_flops(f: dict[str, Any], tokens: int, console: Console) -> None:
    console.print(
        f"FLOPs a step: {f['compiled']:.3e} compiled, {f['compiled_over_ideal']:.2f} x the ideal {f['ideal']:.3e} = "
        f"6 x {f['active_parameters'] / 1e9:.2f}e9 x {tokens:,}; with causal attention the ideal is "
        f"{1 + f['causal_attention'] / f['ideal']:.3f} x that"
    )
    console.print("  " + ", ".join(f"{k} {v:.3e}" for k, v in f["compiled_by_phase"].items()))


def _show_collectives(r: dict[str, Any], console: Console) -> None:
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
    if r["synchronous_share"] is not None:
        share = f"{100 * r['synchronous_share']:.0f} %"
        console.print(f"  of what gathers, scatters and reductions send, {share} is sent while the core waits")


def _show_times(r: dict[str, Any], console: Console) -> None:
    def milliseconds(times: dict[str, float]) -> str:
        return ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in times.items())

    def percent(share: float, with_attention: float) -> str:
        return f"{100 * share:.1f} % ({100 * with_attention:.1f} % with causal attention in the ideal)"

    bound = percent(r["mfu_bound"], r["mfu_bound_with_attention"])
    console.print(f"roofs: {milliseconds(r['seconds'])}; bound on MFU {bound}, by {r['bound_by']}")
    links = r["links"]
    console.print(
        f"  links by dimension: {milliseconds(links['busy']) or 'none'}; all collectives one after another: "
        f"{1e3 * links['one_after_another']:.1f} ms"
    )
    schedule = r["schedule"]
    mfu = percent(schedule["mfu"], schedule["mfu_with_attention"])
    console.print(f"schedule: {1e3 * schedule['seconds']:.1f} ms a step, MFU {mfu}")
    console.print(f"  {milliseconds(schedule['causes'])}")
    chip = r["chip"]
    console.print(
        f"  a chip is assumed to have {chip['flops'] / 1e12:.0f} TFLOP/s in bf16, {size(chip['hbm'])} of HBM at "
        f"{chip['hbm_bandwidth'] / 1e9:.0f} GB/s and links of {chip['link'] / 1e9:.0f} GB/s each way "
        f"({chip['source']})"
    )


def show_search(trials: Sequence[Trial], console: Console) -> None:
    """Print the trials that fit, the fastest schedule first, then the others."""

    def rank(trial: Trial) -> float:
        fits = trial.report.get("fits") is not False
        return -((trial.report.get("schedule") or {}).get("mfu", 0.0)) * fits

    columns = ("mesh", "remat", "predicted", "scheduled", "MFU", "bound", "memory", "")
    table = Table(*columns, title="tried, best first")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for t in sorted(trials, key=rank):
        bound = t.report.get("mfu_bound")
        memory = size(t.report["bytes_per_chip"]["total"]) if "bytes_per_chip" in t.report else ""
        predicted = "" if t.predicted is None else f"{1e3 * t.predicted:.4g} ms"
        schedule = t.report.get("schedule")
        times = (f"{1e3 * schedule['seconds']:.4g} ms", f"{100 * schedule['mfu']:.1f} %") if schedule else ("", "")
        percent = "" if bound is None else f"{100 * bound:.1f} %"
        table.add_row(_mesh(t.mesh), t.remat, predicted, *times, percent, memory, t.verdict)
    console.print(table)
