"""The entry point of training: everything that can be checked before jax is loaded, then the session."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from moe_jax.config import Config
from moe_jax.runtime import processes
from moe_jax.runtime.display import Display
from moe_jax.runtime.ledger import Ledger
from moe_jax.runtime.sinks import check_tracking
from moe_jax.runtime.watchdog import Watchdog
from moe_jax.runtime.workdir import check_workdir
from moe_jax.training.hooks import Hook
from moe_jax.training.opening import open_data
from moe_jax.training.setup import Outcome, Setup


def run(
    config: Config,
    workdir: Path,
    *,
    hooks: Sequence[Hook] = (),
    name: str = "train",
    stop_at: int = 0,
    quiet: bool = False,
    watchdog: Watchdog | None = None,
    profile: int = 0,
) -> Outcome:
    """Train `config` in `workdir` until `num_steps`, on all devices of all processes; resume the run that is there.

    Args:
        config: validated; the same in every process.
        workdir: created if absent, shared by all processes; gets config.json, metrics.jsonl, layers.jsonl, run.json,
            checkpoints/.
        hooks: what else to do around the steps, after the hooks of every run: `analysis.observer.observers(config)`,
            and the user's own.
        name: of the run in the progress display.
        stop_at: stop (and save) after this many steps, as if interrupted; 0 for never.
        quiet: print nothing.
        watchdog: ends the process if a step gets stuck; created from the config if None.
        profile: number of steps to trace into workdir/profile, beginning with the third of this start; 0 for none.

    Raises:
        ValueError: the workdir of another config, bad data, a damaged or different checkpoint, here or at
            `branch_from`, too few steps to trace,
            or an interval in the config without its hook.
        FloatingPointError: several steps in a row were not finite.
    """
    _refuse_interval_without_hook(config, hooks)
    with closing(watchdog or Watchdog(config.step_timeout_seconds)) as watchdog:
        ledger = Ledger(stopped_seconds=watchdog.stopped_seconds)
        check_tracking(config)
        corpus = open_data(config)
        processes.by_first(lambda: check_workdir(workdir, config, corpus.fingerprint))
        display = Display(name, config.num_steps, quiet or processes.index() > 0)
        # loads jax, which takes seconds: the mistakes above are reported before
        from moe_jax.training.branch import check_branch
        from moe_jax.training.session import train

        processes.by_first(lambda: check_branch(config, workdir))
        last = min(stop_at or config.num_steps, config.num_steps)
        return train(Setup(config, workdir, corpus, ledger, display, watchdog), hooks, last, profile)


def _refuse_interval_without_hook(config: Config, hooks: Sequence[Hook]) -> None:
    for key in ("measure_every", "record_scores_every"):
        if getattr(config, key) and all(hook.key != key for hook in hooks):
            raise ValueError(
                f"{key}={getattr(config, key)} has no hook; add observers(config) of moe_jax.analysis.observer to "
                "hooks, or set it to 0."
            )
