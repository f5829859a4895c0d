"""A plan beside an earlier one: what has grown."""

from pathlib import Path
from typing import Any

from moe_jax.planning.tables import size
from moe_jax.planning.topology import Topology
from moe_jax.runtime.files import read_json

# what both must agree in, or their figures are not those of one step
SAME = ("topology", "mesh", "remat", "dispatch", "micro_batches", "tokens_per_step")


def read_baseline(file: Path, topology: Topology) -> dict[str, Any]:
    """The report that `--json` once wrote for the same topology.

    Raises:
        ValueError: it is not such a report, or is of another topology.
    """
    fix = "write one with --json=FILE"
    if not file.is_file():
        raise ValueError(f"--baseline={file} does not exist; {fix}.")
    baseline = read_json(file, f"{fix}.", f"--baseline={file}")
    try:
        figures(baseline)
    except (KeyError, TypeError):
        raise ValueError(f"--baseline={file} is not the report of a plan that fits; {fix}.") from None
    if baseline.get("topology") != str(topology):
        raise ValueError(f"--baseline={file} is for {baseline.get('topology')}, not for {topology}; {fix}.")
    return baseline


def figures(report: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """What must not grow: its value, and the same as text. Bytes and seconds are of one chip and step."""
    sent = sum(row["sent"] for row in report["collectives"])
    found = {
        "memory": (report["bytes_per_chip"]["total"], size(report["bytes_per_chip"]["total"])),
        "FLOPs": (report["flops_per_step"]["compiled"], f"{report['flops_per_step']['compiled']:.4g}"),
        "bytes sent to other chips": (sent, size(sent)),
        "bytes of memory traffic": (report["hbm_traffic_per_chip"], size(report["hbm_traffic_per_chip"])),
    }
    if report["schedule"]:
        seconds = report["schedule"]["seconds"]
        found["scheduled time"] = (seconds, f"{1e3 * seconds:.4g} ms")
    return found


def grown(report: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> list[str]:
    """One sentence for every figure that exceeds the baseline's by more than a share of it; empty if none does.

    Raises:
        ValueError: the two are not of the same step.
    """
    # a report written before the mesh had all of its axes has 1 device along the others
    baseline = baseline | {"mesh": dict.fromkeys(report["mesh"], 1) | baseline.get("mesh", {})}
    for key in SAME:
        if report[key] != baseline.get(key):
            raise ValueError(
                f"the baseline has {key.replace('_', ' ')} {baseline.get(key)}, and this plan {report[key]}; write a "
                "baseline of this step with --json=FILE."
            )
    if "flops_per_step" not in report:
        return ["the step does not fit into memory any more."]
    before = figures(baseline)
    sentences = []
    for name, (value, text) in figures(report).items():
        if name in before and value > (1 + tolerance) * before[name][0]:
            share = f"{100 * (value / before[name][0] - 1):.1f} %" if before[name][0] else "from nothing"
            limit = f"{100 * tolerance:g} %"
            sentences.append(f"{name} grew from {before[name][1]} to {text}, by {share}, more than {limit}.")
    return sentences
