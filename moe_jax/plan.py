"""`python -m moe_jax.plan --config=FILE --topology=v5p:8x16x16`: compile the train step for a machine you do not have.

Compiles the real train step for that topology with the compiler of its chips, which needs none of them, and reports
whether it fits into memory, its bytes, FLOPs, collectives and kernels, and the resulting bound on MFU.
`--topology=h100:2x8` is two hosts of eight GPUs; `--topology=cpu:8` does the same for eight simulated local devices,
without a chip's figures. `--search` tries meshes and rematerialisation policies; `--baseline` compares with an earlier
report.
"""

import sys
from typing import Any

from absl import app, flags
from rich.console import Console

from moe_jax.config import Config, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.config.paths import path_of
from moe_jax.planning.baseline import grown, read_baseline
from moe_jax.planning.compile import prepare_environment
from moe_jax.planning.search import Trial, plan, search
from moe_jax.planning.tables import show, show_search
from moe_jax.planning.topology import Topology, parse_topology
from moe_jax.runtime.files import output_of, write_json

FILE_COLUMNS = 100  # the width of tables that are not written to a terminal


def main(_: list[str]) -> None:
    """Plan or search, print the result, and write it as JSON if there is a flag for it."""
    flag = flags.FLAGS
    try:
        topology = parse_topology(flag.topology)
        config = validate(flag.config)
        prepare_environment(topology)
        files = {name: output_of(text, f"--{name}") for name in ("json", "hlo") if (text := str(flag[name].value))}
        if flag.baseline and flag.search:
            raise ValueError("--baseline compares one plan, and --search makes many; give one of the two.")
        baseline = read_baseline(path_of(flag.baseline, "--baseline"), topology) if flag.baseline else None
    except ValueError as error:
        fail(str(error))
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else FILE_COLUMNS)
    sentences: list[str] = []
    try:
        if flag.search:
            result: Any = [trial._asdict() for trial in _search(config, topology, console)]
        else:
            result = plan(config, topology, files.get("hlo"))
            show(result, console)
            sentences = grown(result, baseline, flag.tolerance) if baseline else []
    except ValueError as error:
        fail(str(error))
    if "json" in files:
        write_json(files["json"], result)
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)
    if sentences:
        sys.exit(1)


def _search(config: Config, topology: Topology, console: Console) -> list[Trial]:
    """The trials of a search, each printed when it ends, and all in the end."""
    trials = []
    for trial in search(config, topology, flags.FLAGS.minutes, flags.FLAGS.best):
        trials.append(trial)
        sizes = " x ".join(f"{name} {n}" for name, n in trial.mesh.items() if n > 1)
        console.print(f"{sizes}, remat {trial.remat}: {trial.verdict}", style="dim")
    show_search(trials, console)
    return trials


if __name__ == "__main__":
    define_config_flag("A config file.")
    flags.DEFINE_string("topology", None, "FAMILY:SHAPE, such as v5p:8x16x16, 2xv5e:16x16, h100:2x8 or cpu:8.")
    flags.DEFINE_string("json", "", "Also write the report to this file.")
    flags.DEFINE_string("hlo", "", "Also write the compiled program, scheduled HLO, to this file.")
    flags.DEFINE_string("baseline", "", "A report that --json wrote earlier: end with status 1 if a figure has grown.")
    flags.DEFINE_float("tolerance", 0.02, "The share by which a figure may exceed the baseline's.", lower_bound=0.0)
    flags.DEFINE_bool(
        "search", False, "Compile the meshes predicted to be fastest, with every remat policy; list the fastest first."
    )
    flags.DEFINE_integer("best", 3, "Meshes that a search compiles, if they fit; of a chip only.", lower_bound=1)
    flags.DEFINE_float("minutes", 60.0, "Minutes after which a search starts no further trial.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
