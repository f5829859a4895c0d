"""`python -m experiments.benchmarks.start`: the time from the start of a process to its first step, cold and warm.

    --num_layers=8 --embed_dim=256 ...    the model and the batch, as in `experiments.benchmarks.step`
    --rounds=3 --json=FILE

Every figure is of a fresh process. A cold start has an empty folder for jax's persistent cache of compiled programs, a
warm one the folder that the cold start of the same round filled. import: jax, flax, optax and ours. init: the initial
state, drawn under jit. first_step: trace, compile (or read from the cache) and run. second_step: only run. total: from
the start of the process to the end of the first step, including the start of the interpreter.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app

from experiments.benchmarks import timing
from experiments.benchmarks.step import DEEPSEEK, config_like, define_size_flags, sizes_of_flags
from moe_jax.config.command import parse_flags

PARTS = ("import", "init", "first_step", "second_step", "total")


def run(sizes: dict[str, int], batch: dict[str, int]) -> None:
    """The work of the fresh process: print the seconds of every part except `total`, and the end of the first step."""
    stamps = [time.time()]
    import jax

    from experiments.benchmarks.step import random_batch
    from moe_jax.data.batches import Batch
    from moe_jax.training.compile import make_train_step
    from moe_jax.training.state import init_state, step_key

    config = config_like(DEEPSEEK, sizes, batch)
    data: Batch = jax.device_put(random_batch(config))
    stamps.append(time.time())
    state = jax.block_until_ready(init_state(config))
    key = step_key(config)
    stamps.append(time.time())
    step = make_train_step(config)
    for _ in range(2):
        state, _ = jax.block_until_ready(step(state, data, key))
        stamps.append(time.time())
    seconds = {name: stamps[i + 1] - stamps[i] for i, name in enumerate(PARTS[:4])}
    print(json.dumps(seconds | {"done": stamps[3]}))


def start(cache: str, sizes: dict[str, int], batch: dict[str, int]) -> dict[str, float]:
    """Seconds of every part in a fresh process whose cache of compiled programs is the folder `cache`.

    Raises:
        ValueError: the process failed; its own error is printed above.
    """
    settings = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    code = f"from experiments.benchmarks import start; start.run({sizes}, {batch})"
    began = time.time()
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise ValueError("the process that should start a run failed; see its error above.")
    seconds = json.loads(child.stdout.splitlines()[-1])
    return seconds | {"total": seconds.pop("done") - began}


def measure(sizes: dict[str, int], batch: dict[str, int], rounds: int) -> dict[str, Any]:
    """Measure cold and warm starts; the result is ready for JSON, with `seconds[cold or warm][part]` of each round."""
    seconds: dict[str, timing.Times] = {kind: {part: [] for part in PARTS} for kind in ("cold", "warm")}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in seconds:
                found = start(cache, sizes, batch)
                for part in PARTS:
                    seconds[kind][part].append(found[part])
    totals = {kind: times["total"] for kind, times in seconds.items()}
    warm = timing.ratio(totals, "cold", "warm")
    return {"ratio_warm_to_cold": warm.median, "warm_over_cold": warm._asdict(), "seconds": seconds}


def as_text(result: dict[str, Any]) -> str:
    """The result as text."""
    seconds = result["seconds"]
    rows = [[part, *(timing.Spread.of(seconds[kind][part]).text() for kind in seconds)] for part in PARTS]
    rows.append(["warm over cold", "", timing.Spread(**result["warm_over_cold"]).text()])
    return timing.table(["seconds", *seconds], rows)


@timing.command
def main(flag: Any) -> None:
    """Check the flags, start the processes, and print the result."""
    sizes, batch = sizes_of_flags()
    config_like(DEEPSEEK, sizes, batch)
    facts = timing.about(flag.rounds) | {"sizes": sizes | batch}
    print(f"{timing.heading(facts)}\n", flush=True)
    result = measure(sizes, batch, flag.rounds)
    print(as_text(result))
    timing.save(flag.json, facts | result)


if __name__ == "__main__":
    timing.define_flags(rounds=3)
    define_size_flags()
    app.run(main, flags_parser=parse_flags)
