"""`python -m moe_jax.harness --workdir=DIR --tasks=held_out`: run tasks of the lm-evaluation-harness on our models.

Needs `pip install 'moe_jax[lm-eval]'`. --tasks names any tasks of the harness that need likelihoods or text, or your
own with --include_path; most of them download their data. Two of ours do not: `held_out`, the bits per byte of the
held-out documents of the run's corpus (or --data=DIR), each document by itself; and `continuation`, where the model
selects which of four passages continues a held-out text. With --output=FILE the results are also written as JSON.

A continuation is scored from the first token at which the whole text differs from its context alone. If a token spans
the end of the context, scoring begins with this token, so every byte of the continuation is scored. Requests that
cannot be answered are refused, with the names of all their tasks, before any request is answered.

In Python, `adapter()(workdir=...)` is a model for `lm_eval.simple_evaluate`.
"""

import json
from typing import Any

from absl import app, flags

from moe_jax.config.command import fail, parse_flags
from moe_jax.config.paths import path_of, workdir_of
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import output_of, write_json
from moe_jax.runtime.memory import use_huge_pages
from moe_jax.runtime.workdir import config_of_run


def run(flag: Any) -> dict[str, Any]:
    """Evaluate, print the harness's table, and return its results.

    Raises:
        ValueError, OSError: a flag or a task is wrong, or something is missing in the workdir.
    """
    from moe_jax.text.answers import OURS
    from moe_jax.text.lm_eval import adapter

    model_class = adapter()  # a ValueError if the harness is not installed, so its modules are imported below
    workdir = workdir_of(flag.workdir)
    if flag.output:
        output_of(flag.output, "--output")
    for name in ("num_fewshot", "limit", "max_length", "bootstrap"):
        if (getattr(flag, name) or 0) < 0:
            raise ValueError(f"--{name}={getattr(flag, name)} must be at least 0; raise it, or leave it out.")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    data = flag.data or config_of_run(workdir).data.path
    ours = {file.stem for file in OURS.glob("*.yaml")}
    names = [name for name in flag.tasks.split(",") if name]
    model = model_class(str(workdir), flag.tokenizer, flag.max_length, flag.batch_size, flag.eos)

    class Tasks(TaskManager):
        """The harness's tasks, which are passed to the model when they are loaded."""

        def load(self, task_list: Any) -> Any:
            loaded = super().load(task_list)
            model.tasks = list(loaded["tasks"].values())
            return loaded

        def _load_spec(self, spec: Any) -> Any:
            try:
                return super()._load_spec(spec)
            except IndexError as error:  # there is no first document, or no first letter of a choice
                raise ValueError(
                    f"the task {spec} has no document, or one with an empty choice ({error}), so nothing can be "
                    "scored; leave it out, or correct it."
                ) from error

    paths = [str(OURS), *([str(path_of(flag.include_path, "--include_path"))] if flag.include_path else [])]
    manager = Tasks(include_path=paths, include_defaults=not ours.issuperset(names), metadata={"data_path": data})
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"--tasks={flag.tasks} names {', '.join(unknown)}, which are not tasks; ours are {', '.join(sorted(ours))}."
        )
    found = simple_evaluate(
        model=model,
        tasks=names,
        num_fewshot=flag.num_fewshot,
        limit=flag.limit or None,
        gen_kwargs=flag.gen_kwargs or None,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=flag.bootstrap,
    )
    if flag.output:  # before printing, which may fail
        write_json(output_of(flag.output, "--output"), json.loads(json.dumps(found["results"], default=str)))
    print(make_table(found))
    return found["results"]


def define_flags(values: Any = flags.FLAGS) -> None:
    """Define the flags of the command."""
    text = flags.DEFINE_string
    whole = flags.DEFINE_integer
    text("workdir", None, "The workdir of a training run, or of a converted model.", flag_values=values, required=True)
    text("tasks", "held_out", "Names of tasks, separated by commas.", flag_values=values)
    text("include_path", "", "A folder with tasks of your own.", flag_values=values)
    text("data", "", "A prepared folder for our tasks; the run's if left out.", flag_values=values)
    text("tokenizer", "", "bytes, or a folder with a tokenizer.json; the model's own if left out.", flag_values=values)
    text("eos", "", "A further token, by name or id, that ends texts.", flag_values=values)
    text("gen_kwargs", "", "Options for generated text, such as temperature=0.5,max_gen_toks=32.", flag_values=values)
    text("output", "", "Write the results to this file.", flag_values=values)
    whole("num_fewshot", None, "Examples before each question; the task's own number if left out.", flag_values=values)
    whole("limit", 0, "Documents of each task; 0: all.", flag_values=values)
    whole("batch_size", 8, "Number of texts processed at the same time.", flag_values=values)
    whole("max_length", 0, "The largest number of tokens of a text; 0: the model's own limit.", flag_values=values)
    whole("bootstrap", 1000, "Samples for the standard errors; 0: none.", flag_values=values)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    use_huge_pages()
    keep_compiled()
    try:
        run(flags.FLAGS)
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
