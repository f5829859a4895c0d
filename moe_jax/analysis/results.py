"""What the evaluate command prints and writes into the workdir."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax.analysis.specialisation import Survey, as_json, draw, saturation, stored_steps
from moe_jax.config import Config, num_choices
from moe_jax.runtime import processes
from moe_jax.runtime.files import write_json, write_whole


def print_ablation(result: Mapping[str, Mapping[str, float | int]]) -> None:
    """Print loss and bits per byte of every variant as a table."""
    table = Table("model", "loss", "bits per byte", "difference")
    whole = result["as it is"]["bits_per_byte"]
    for name, values in result.items():
        bits = values["bits_per_byte"]
        table.add_row(name, f"{values['loss']:.4f}", f"{bits:.4f}", f"{bits - whole:+.4f}")
    Console().print(table)


def print_saturation(result: Mapping[str, Any]) -> None:
    """Print the router saturation of each stored step: mean over layers, first and last layer."""
    table = Table("step", "eval/saturation", "first MoE layer", "last", caption="share of the last step's choices")
    for step, layers in zip(result["steps"], result["saturation"], strict=True):
        shares = (sum(layers) / len(layers), layers[0], layers[-1])
        table.add_row(str(step), *(f"{100 * share:.1f} %" for share in shares))
    Console().print(table)


def print_table(result: Mapping[str, float | int]) -> None:
    """Print the evaluation as a table."""
    table = Table("held-out", "value")
    for name, value in result.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def report(workdir: Path, name: str, result: Mapping[str, Any], show: Callable[[Any], None]) -> None:
    """Print a result and, if possible, write it to workdir/<name>.json; process 0 only."""
    if processes.index() == 0:
        show(result)
        try:
            write_json(workdir / f"{name}.json", result)
        except OSError as error:
            print(f"{workdir / name}.json was not written: {error.strerror or error}")


def write_survey(workdir: Path, found: Survey, name: str = "specialisation") -> None:
    """Write workdir/<name>.json and <name>.png; process 0 only."""
    if processes.index() == 0:
        write_json(workdir / f"{name}.json", as_json(found))
        picture = io.BytesIO()
        draw(found).savefig(picture, format="png", dpi=100)
        write_whole(workdir / f"{name}.png", picture.getvalue())
        print(f"wrote {workdir / name}.json and {name}.png")


def report_saturation(config: Config, workdir: Path) -> None:
    """If the run stored its routing, print router saturation and write saturation.json, or print why there is none."""
    if processes.index() != 0 or not stored_steps(workdir):
        return
    try:
        result = saturation(workdir, num_choices(config.model))
    except ValueError as error:
        print(f"no router saturation: {error}")
    else:
        report(workdir, "saturation", result, print_saturation)
