"""`python -m moe_jax.evaluate --workdir=DIR`: evaluate the newest checkpoint on the whole held-out set, by domain.

Uses the config that the run was started with; `--config=FILE` evaluates its checkpoint with another config, for example
with other data or another batch size. `--data=DIR` reads another prepared corpus, such as one with a converted model's
tokenizer, `--sequence_length=N` sets the window, and `--eval_sequences=N` takes the first N sequences of each domain.
`--weights=ema` evaluates the moving average of the weights, where the run keeps one (results end in _ema).
On a cluster the same command runs in every process, as in training. On other devices than the run's, the mesh is
data-parallel unless a config sets another.

`--specialisation` also reports which experts each domain uses and which are used together (specialisation.json, .png).
`--ablate` also reports the loss without the shared and without the best routed experts (ablation.json). If the run
stored its routing at several evaluations (`measure_every`), router saturation is reported too (saturation.json).
"""

import contextlib
from dataclasses import replace
from pathlib import Path

from absl import app, flags

from moe_jax.config import Config, Weights, check_length, validate
from moe_jax.config.command import check_weights, define_config_flag, define_weights_flag, fail, parse_flags
from moe_jax.config.paths import workdir_of
from moe_jax.data import Corpus, open_corpus
from moe_jax.runtime import processes
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import is_writable
from moe_jax.runtime.memory import use_huge_pages
from moe_jax.runtime.signals import Abandoned, never, noted
from moe_jax.runtime.workdir import TOKENIZER, config_of_run, identity_of, read_run
from moe_jax.training.tokenizer import has_another_tokenizer


def run(
    config: Config, workdir: Path, *, specialisation: bool = False, ablation: bool = False, weights: Weights = "last"
) -> None:
    """Restore the newest checkpoint, evaluate, print, and write evaluation.json and the other results.

    Raises:
        ValueError, OSError: the checkpoint is missing or damaged, the data are bad, the mesh does not fit, or there is
            nothing to measure.
    """
    check_flags(config, specialisation, ablation)
    check_weights(config, weights)
    processes.by_first(lambda: check_writable(workdir, specialisation))
    corpus = processes.by_all(lambda: open_corpus(config.data.path, config.data.verify))
    check_tokenizer(config, workdir, corpus)
    _note_other_data(workdir, corpus)
    # these load jax, which takes seconds: the mistakes above are reported before
    from moe_jax.analysis import results
    from moe_jax.analysis.knockout import ablate
    from moe_jax.analysis.survey import survey
    from moe_jax.mesh import make_mesh
    from moe_jax.training.evaluation import evaluate
    from moe_jax.training.restore import on_these_devices, restore_model

    config = on_these_devices(config)
    suffix = "" if weights == "last" else f"_{weights}"
    mesh = make_mesh(config.mesh)
    state = restore_model(config, workdir, mesh, weights)
    if state is None:
        raise ValueError(f"--workdir={workdir} has no finished checkpoint; train first.")
    # a signal ends a single process at once; several must end together, and JAX catches their SIGTERM
    with noted() if processes.count() > 1 else contextlib.nullcontext(never) as stopped:
        whole = evaluate(config, state, corpus, mesh, stopped=stopped)
        results.report(workdir, f"evaluation{suffix}", {"step": int(state.step), **whole}, results.print_table)
        if specialisation:
            results.write_survey(workdir, survey(config, state, corpus, mesh, stopped), f"specialisation{suffix}")
        if ablation:
            variants = ablate(config, state, corpus, mesh, whole, stopped)
            results.report(workdir, f"ablation{suffix}", variants, results.print_ablation)
    results.report_saturation(config, workdir)


def _note_other_data(workdir: Path, corpus: Corpus) -> None:
    """Print a line if the corpus is not the one that the run was trained on."""
    identity = identity_of(read_run(workdir))
    if identity is not None and identity.corpus != corpus.fingerprint and processes.index() == 0:
        print(
            f"the text is other data (fingerprint {corpus.fingerprint[:16]}) than the run was trained on "
            f"({identity.corpus[:16]})",
            flush=True,
        )


def check_tokenizer(config: Config, workdir: Path, corpus: Corpus) -> None:
    """Raise a ValueError if the corpus of a converted model has another vocabulary than the model."""
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
    """Print a line if the workdir cannot be written; raise a ValueError if a flag requires files in it."""
    if is_writable(workdir):
        return
    if specialisation:
        raise ValueError(f"--specialisation writes into --workdir={workdir}, which cannot be written; copy the run.")
    print(f"{workdir} cannot be written: results are printed, but not kept", flush=True)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    flag = flags.FLAGS
    use_huge_pages()
    try:
        workdir = workdir_of(flag.workdir)
        config = validate(flag.config) if flag.config is not None else config_of_run(workdir)
        if flag.eval_sequences < 0:
            raise ValueError(f"--eval_sequences={flag.eval_sequences} must be at least 0; 0 takes all.")
        if flag.sequence_length < 0:
            raise ValueError(f"--sequence_length={flag.sequence_length} must be at least 1, or 0 for the config's.")
        length = flag.sequence_length or config.sequence_length
        data = replace(config.data, path=flag.data or config.data.path, eval_sequences=flag.eval_sequences)
        check_length(config.model, length)
        config = replace(config, data=data, sequence_length=length)
        with processes.joined(config.heartbeat_seconds, lambda: "evaluation"):
            keep_compiled(workdir)
            try:
                run(config, workdir, specialisation=flag.specialisation, ablation=flag.ablate, weights=flag.weights)
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
    flags.DEFINE_bool("ablate", False, "Also report the loss without the shared, and without the best routed, experts.")
    define_weights_flag()
    define_config_flag("Another config to evaluate with.")
    app.run(main, flags_parser=parse_flags)
