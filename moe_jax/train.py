"""`python -m moe_jax.train --config=configs/tiny.py --workdir=DIR`: train, or resume the run in DIR.

A run resumes from its newest verified checkpoint and `batch_at(step)`, with the same numbers as without interruption.
On SIGTERM, SIGINT, SIGHUP and SIGUSR1, during an evaluation too, it saves the last finished step and ends with status
128 + signal (143, 130, 129, 138). Repeat the same command to resume an unfinished run; it also repeats an interrupted
evaluation.

On a cluster the same command runs in every process. Each loads only the rows that its devices hold, all save
together, process 0 writes the logs, and a signal to one process stops all at the same step, with status 143.
A lost or stuck process ends the run with status 75.
"""

from absl import app, flags

from moe_jax.analysis.observer import observers
from moe_jax.config import branch_point, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.config.paths import workdir_of
from moe_jax.data import check_corpus
from moe_jax.runtime import processes
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.memory import use_huge_pages
from moe_jax.runtime.watchdog import Watchdog
from moe_jax.training.loop import run


def main(_: list[str]) -> None:
    """Check the config and the data before jax is loaded, then run."""
    flag = flags.FLAGS
    use_huge_pages()
    try:
        if not flag.workdir:
            raise ValueError("--workdir= is empty; name a folder, or write --workdir=. for the current one.")
        if flag.profile < 0:
            raise ValueError(f"--profile={flag.profile} must be at least 0, the number of steps to trace.")
        if flag.stop_at < 0:
            raise ValueError(f"--stop_at={flag.stop_at} must be at least 0; 0 trains to num_steps.")
        config = validate(flag.config)
        workdir = workdir_of(flag.workdir)
        check_corpus(config.data.path)
        workdir_of(config.init_from, "init_from")
        workdir_of(branch_point(config)[0], "branch_from")
        watchdog = Watchdog(config.step_timeout_seconds)
        with processes.joined(config.heartbeat_seconds, lambda: watchdog.doing):
            keep_compiled(workdir)
            outcome = run(
                config,
                workdir,
                hooks=observers(config),
                stop_at=flag.stop_at,
                watchdog=watchdog,
                profile=flag.profile,
            )
            if outcome.signal:
                raise SystemExit(128 + outcome.signal)
            if processes.index() == 0:
                print(f"{outcome.step} of {config.num_steps} steps done in {flag.workdir}", flush=True)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error))


if __name__ == "__main__":
    define_config_flag("A config file.")
    flags.DEFINE_string("workdir", None, "The folder of the run; created if absent.")
    flags.DEFINE_integer("stop_at", 0, "Stop and save after this many steps; the same command without it resumes.")
    flags.DEFINE_integer("profile", 0, "Number of steps to trace, once they are compiled, into WORKDIR/profile.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
