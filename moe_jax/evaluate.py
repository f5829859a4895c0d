"""`python -m moe_jax.evaluate --workdir=DIR`: the whole held-out set, per domain; nothing is changed.

Uses the config that the run was started with; `--config=FILE` evaluates its checkpoint with another, for example with
other data or another batch size. `--data=DIR` reads another prepared corpus, such as one with a converted model's
tokenizer, `--sequence_length=N` sets the window, and `--eval_sequences=N` takes the first N sequences of each domain.
On a cluster the same command runs in every process, as in training; on other devices than the run's, the mesh is
data-parallel unless a config says otherwise.

`--specialisation` adds which experts each domain uses and which are used together (specialisation.json, .png);
`--ablate` adds what the model loses without its shared or its best routed experts (ablation.json). If the run stored
its routing at several evaluations (`measure_every`), how early it settled is reported, too (saturation.json).
"""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from moe_jax.config import Config, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.config.paths import workdir_of
from moe_jax.runtime import processes
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import is_writable, write_json, write_whole
from moe_jax.runtime.signals import Abandoned, never, noted
from moe_jax.runtime.workdir import TOKENIZER, config_of_run, identity_of, read_run

if TYPE_CHECKING:
    from moe_jax.analysis.specialisation import Survey
    from moe_jax.data import Corpus


def print_ablation(result: Mapping[str, Mapping[str, float | int]]) -> None:
    """Print the variants as a table, with the loss in bits per byte."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "loss", "bits per byte", "difference")
    whole = result["as it is"]["bits_per_byte"]
    for name, values in result.items():
        bits = values["bits_per_byte"]
        table.add_row(name, f"{values['loss']:.4f}", f"{bits:.4f}", f"{bits - whole:+.4f}")
    Console().print(table)


def print_saturation(result: Mapping[str, Any]) -> None:
    """Print the share of the last routing that each stored step had: mean over layers, first and last layer."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "eval/saturation", "first MoE layer", "last", caption="share of the last step's choices")
    for step, layers in zip(result["steps"], result["saturation"], strict=True):
        shares = (sum(layers) / len(layers), layers[0], layers[-1])
        table.add_row(str(step), *(f"{100 * share:.1f} %" for share in shares))
    Console().print(table)


def print_table(result: Mapping[str, float | int]) -> None:
    """Print the evaluation as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out", "value")
    for name, value in result.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def run(config: Config, workdir: Path, *, specialisation: bool = False, ablation: bool = False) -> None:
    """Restore the newest checkpoint, evaluate, print, and write evaluation.json and the other results.

    Raises:
        ValueError, OSError: the checkpoint is missing or damaged, the data are bad, the mesh does not fit, or there is
            nothing to measure.
    """
    from moe_jax.analysis.knockout import ablate
    from moe_jax.analysis.survey import survey
    from moe_jax.data import open_corpus
    from moe_jax.mesh import make_mesh
    from moe_jax.training.evaluation import evaluate
    from moe_jax.training.restore import on_these_devices, restore_model

    check_flags(config, specialisation, ablation)
    processes.by_first(lambda: check_writable(workdir, specialisation))
    corpus = processes.by_all(lambda: open_corpus(config.data.path, config.data.verify))
    check_tokenizer(config, workdir, corpus)
    _note_other_data(workdir, corpus)
    config = on_these_devices(config)
    mesh = make_mesh(config.mesh)
    state = restore_model(config, workdir, mesh)
    if state is None:
        raise ValueError(f"--workdir={workdir} has no finished checkpoint; train first.")
    # a single process dies of a signal; several must end together, and JAX catches their SIGTERM
    with noted() if processes.count() > 1 else contextlib.nullcontext(never) as stopped:
        whole = evaluate(config, state, corpus, mesh, stopped=stopped)
        report(workdir, "evaluation", {"step": int(state.step), **whole}, print_table)
        if specialisation:
            write_survey(workdir, survey(config, state, corpus, mesh, stopped))
        if ablation:
            report(workdir, "ablation", ablate(config, state, corpus, mesh, whole, stopped), print_ablation)
    report_saturation(config, workdir)


def _note_other_data(workdir: Path, corpus: "Corpus") -> None:
    """Print a line if the text is not held out from the run's own data, but other data."""
    identity = identity_of(read_run(workdir))
    if identity is not None and identity.corpus != corpus.fingerprint and processes.index() == 0:
        print(
            f"the text is other data (fingerprint {corpus.fingerprint[:16]}) than the run was trained on "
            f"({identity.corpus[:16]})",
            flush=True,
        )


def check_tokenizer(config: Config, workdir: Path, corpus: "Corpus") -> None:
    """Raise a ValueError if a converted model would read another vocabulary than its own."""
    from moe_jax.training.tokenizer import has_another_tokenizer

    if has_another_tokenizer(workdir, corpus):
        raise ValueError(
            f"--workdir={workdir} has a tokenizer of its own, but data.path={config.data.path!r} is of "
            f"{corpus.tokenizer.name!r}; run moe_jax.data.prepare with --tokenizer={workdir / TOKENIZER}, and give "
            "its folder as --data."
        )


def check_flags(config: Config, specialisation: bool, ablation: bool) -> None:
    """Raise a ValueError if a flag needs experts and the model has none."""
    for flag, is_set in (("--specialisation", specialisation), ("--ablate", ablation)):
        if is_set and not config.model.num_experts:
            raise ValueError(f"{flag} needs experts, and model.num_experts=0 has none; leave {flag} out.")


def check_writable(workdir: Path, specialisation: bool) -> None:
    """If the workdir cannot be written, print that results are not kept; a ValueError if files are required."""
    if is_writable(workdir):
        return
    if specialisation:
        raise ValueError(f"--specialisation writes into --workdir={workdir}, which cannot be written; copy the run.")
    print(f"{workdir} cannot be written: results are printed, but not kept", flush=True)


def report(workdir: Path, name: str, result: Mapping[str, Any], show: Callable[[Any], None]) -> None:
    """Print a result and, if possible, write it to workdir/<name>.json; only in process 0."""
    if processes.index() == 0:
        show(result)
        try:
            write_json(workdir / f"{name}.json", result)
        except OSError as error:
            print(f"{workdir / name}.json was not written: {error.strerror or error}")


def write_survey(workdir: Path, found: "Survey") -> None:
    """Write specialisation.json and specialisation.png; only in process 0."""
    from moe_jax.analysis.specialisation import as_json, draw

    if processes.index() == 0:
        write_json(workdir / "specialisation.json", as_json(found))
        picture = io.BytesIO()
        draw(found).savefig(picture, format="png", dpi=100)
        write_whole(workdir / "specialisation.png", picture.getvalue())
        print(f"wrote {workdir / 'specialisation.json'} and specialisation.png")


def report_saturation(config: Config, workdir: Path) -> None:
    """If the run stored its routing, print router saturation and write saturation.json, or print what is missing."""
    from moe_jax.analysis.specialisation import saturation, stored_steps

    if processes.index() != 0 or not stored_steps(workdir):
        return
    try:
        result = saturation(workdir, config.model.num_experts + config.model.num_zero_experts)
    except ValueError as error:
        print(f"no router saturation: {error}")
    else:
        report(workdir, "saturation", result, print_saturation)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    flag = flags.FLAGS
    keep_compiled()
    try:
        workdir = workdir_of(flag.workdir)
        config = validate(flag.config) if flag.config is not None else config_of_run(workdir)
        if flag.eval_sequences < 0:
            raise ValueError(f"--eval_sequences={flag.eval_sequences} must be at least 0; 0 takes all.")
        if flag.sequence_length < 0:
            raise ValueError(f"--sequence_length={flag.sequence_length} must be at least 1, or 0 for the config's.")
        length = flag.sequence_length or config.sequence_length
        data = replace(config.data, path=flag.data or config.data.path, eval_sequences=flag.eval_sequences)
        config = replace(config, data=data, sequence_length=length)
        with processes.joined(config.heartbeat_seconds, lambda: "evaluation"):
            try:
                run(config, workdir, specialisation=flag.specialisation, ablation=flag.ablate)
            except Abandoned as stop:
                raise SystemExit(128 + stop.number) from None
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_integer("eval_sequences", 0, "Held-out sequences per domain; 0 takes all.")
    flags.DEFINE_string("data", "", "A prepared folder to evaluate on; the config's if left out.")
    flags.DEFINE_integer("sequence_length", 0, "Tokens of a window; 0 takes the config's.")
    flags.DEFINE_bool(
        "specialisation", False, "Also report which experts each domain uses, and which are used together."
    )
    flags.DEFINE_bool("ablate", False, "Also report what is lost without the shared, or the best routed, experts.")
    define_config_flag("Another config to evaluate with.")
    app.run(main, flags_parser=parse_flags)
