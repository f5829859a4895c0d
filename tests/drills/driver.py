"""Runs a command pinned to one core, with an accident prepared: `python driver.py NAME --flag=...`.

XLA:CPU gives the same bits from run to run on one core only. Environment: DRILL_CORE is the core to pin to,
DRILL holds `kind=number` accidents, separated by commas. At exit the number of compilations of the train
step is written to standard error.

- pace=S: sleep S seconds after every step, so that a signal can be sent between two of them
- late=S: sleep S seconds between the arrival of every batch and its step
- clock=S: the clock of saves shows S seconds, always
- linger=S: sleep S seconds before every batch of an evaluation
- die=N: SIGKILL inside save N (1-based), between the rename and the manifest
- slow=S: sleep S seconds inside every save, before its manifest
- full=STEP: from the save of that step on, no file may grow beyond 4 KiB
- spoil=N: three batches, from the N-th, ask for the same token everywhere, so that their gradients are large
- poison=STEP: from that step on, an embedding row is not a number
"""

import os
import resource
import runpy
import signal
import sys
import time


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("DRILL_CORE", "0")) % len(cores)]})
    sys.path[0] = os.getcwd()
    name, *sys.argv[1:] = sys.argv[1:]
    accidents = dict(pair.split("=") for pair in os.environ.get("DRILL", "").split(",") if pair)
    steps = watch_steps(poison_from=int(accidents.get("poison", 10**9)))
    if "pace" in accidents:
        pace(float(accidents["pace"]))
    if "late" in accidents:
        late(float(accidents["late"]))
    if "clock" in accidents:
        stop_clock(float(accidents["clock"]))
    if "linger" in accidents:
        linger(float(accidents["linger"]))
    if "die" in accidents or "slow" in accidents:
        disturb_manifest(int(accidents.get("die", 0)), float(accidents.get("slow", 0)))
    if "spoil" in accidents:
        spoil(int(accidents["spoil"]))
    if "full" in accidents:
        fill_disk(int(accidents["full"]))
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        sizes = sorted({function._cache_size() for function in steps})
        print(f"train step compilations: {sizes}", file=sys.stderr, flush=True)


def watch_steps(poison_from: int) -> list:
    """Record every train step that is made, and make the parameters non-finite from a step on."""
    from moe_jax.training import compile

    made, original = [], compile.make_train_step

    def make_train_step(config, mesh=None):
        real = original(config, mesh)
        made.append(real)

        def train_step(state, batch, key):
            if poison_from < 10**9 and int(state.step) >= poison_from:
                spoiled = state.params["embedding"].at[int(batch.tokens[0, 0])].set(float("nan"))
                state = state._replace(params=state.params | {"embedding": spoiled})
            return real(state, batch, key)

        return train_step

    compile.make_train_step = make_train_step
    return made


def pace(seconds: float) -> None:
    from moe_jax.runtime.display import Display

    Display.step = lambda self, done: time.sleep(seconds)


def late(seconds: float) -> None:
    from moe_jax.training.actions import Stop

    original = Stop.before

    def before(self, context, now):
        time.sleep(seconds)
        return original(self, context, now)

    Stop.before = before


def stop_clock(seconds: float) -> None:
    from types import SimpleNamespace

    from moe_jax.training import actions

    actions.time = SimpleNamespace(monotonic=lambda: seconds)


def spoil(first: int) -> None:
    import numpy as np

    from moe_jax import data

    make = data.training_batches

    def training_batches(*args, **settings):
        batch_at = make(*args, **settings)

        def at(number, *rows):
            batch = batch_at(number, *rows)
            if not first <= number < first + 3:
                return batch
            return batch._replace(tokens=np.full_like(batch.tokens, 200), targets=np.full_like(batch.targets, 201))

        return at

    data.training_batches = training_batches


def linger(seconds: float) -> None:
    from moe_jax.training import compile

    original = compile.make_eval_step

    def make_eval_step(*args):
        real = original(*args)

        def eval_step(state, batch):
            time.sleep(seconds)
            print("evaluates a batch", flush=True)
            return real(state, batch)

        return eval_step

    compile.make_eval_step = make_eval_step


def disturb_manifest(die_in: int, seconds: float) -> None:
    from moe_jax.runtime import checkpoint

    calls, original = [], checkpoint.write_manifest

    def write_manifest(path, *rest):
        calls.append(path)
        if len(calls) == die_in:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        original(path, *rest)

    checkpoint.write_manifest = write_manifest


def fill_disk(step: int) -> None:
    from moe_jax.runtime import checkpoint

    original = checkpoint.Checkpointer.save

    def save(self, done, state, extra, keep_all=False):
        self.wait()
        if done >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        original(self, done, state, extra, keep_all)

    checkpoint.Checkpointer.save = save


if __name__ == "__main__":
    main()
