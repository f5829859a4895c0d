"""`python -m experiments.benchmarks.scaling`: how our cost grows with experts, skew, depth and devices.

--sections=experts,skew,depth,devices
--experts=8,16,32,64,128,256    a layer's forward + backward at fixed T, d, h, k, relative to that with the first E;
                                only the gradient of the weights must grow, because every expert has one
--tokens=4096 --embed_dim=256 --expert_ffw_dim=256 --top_k=2    the layer in `experts` and `skew`
--depths=4,8,24                 seconds to trace and compile the train step, without the persistent cache
--devices=1,2,4,8               the train step on this many fake devices of one CPU, with experts and batch split over
                                all; they share its cores, so 1.0 is ideal. Bytes sent are counted in the compiled
                                program, for routing that takes one round
--rounds=8 --json=FILE
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags

from experiments.benchmarks import layer, problem, timing
from experiments.benchmarks.problem import Shape
from experiments.benchmarks.step import DEEPSEEK, config_like, random_batch
from moe_jax.config import Config, validate
from moe_jax.config.command import parse_flags

SKEWS: tuple[problem.Skew, ...] = ("uniform", "zipf", "collapsed")
MODEL = dict(num_layers=4, embed_dim=128, num_heads=4, num_experts=16, top_k=2, expert_ffw_dim=128, vocab_size=1024)
BATCH = dict(batch_size=8, sequence_length=128)
COMPILE_ROUNDS = 3  # at most, because compilation is slow


def relative(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Seconds of each contestant, and its ratio to the first in the same round."""
    times = timing.interleave(contestants, rounds)
    first = next(iter(times))
    return {
        "seconds": times,
        "over_" + first: {name: timing.ratio(times, first, name)._asdict() for name in times},
    }


def experts(shape: Shape, counts: list[int], rounds: int) -> dict[str, Any]:
    """A layer with growing numbers of experts, of which every token chooses the same number."""

    def one(count: int) -> Callable[[], Any]:
        wider = shape._replace(experts=count)
        return layer.ours(wider, problem.draw(wider, "uniform", "float32"), "float32", "sigmoid").run

    return relative({f"E={count}": one(count) for count in counts}, rounds)


def skew(shape: Shape, rounds: int) -> dict[str, Any]:
    """A layer whose tokens are spread over the experts, prefer some, or all choose the same k."""

    def one(kind: problem.Skew) -> Callable[[], Any]:
        return layer.ours(shape, problem.draw(shape, kind, "float32"), "float32", "sigmoid").run

    return relative({kind: one(kind) for kind in SKEWS}, rounds)


def depth(layers: list[int], rounds: int) -> dict[str, Any]:
    """Compile time of the train step with growing numbers of layers."""
    import jax

    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009, jax declares no type
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        configs = {f"L={n}": config_like(DEEPSEEK, MODEL | {"num_layers": n}, BATCH) for n in layers}
        return relative({name: functools.partial(_compile, config) for name, config in configs.items()}, rounds)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _compile(config: Config) -> None:
    import jax

    from moe_jax.training.compile import abstract_arguments, make_train_step

    jax.clear_caches()  # removes the last round's trace
    make_train_step(config).lower(*abstract_arguments(config)).compile()


def devices(counts: list[int], rounds: int) -> dict[str, Any]:
    """Run `devices_here` in a process of its own, because the number of fake devices is fixed when jax starts."""
    code = f"from experiments.benchmarks import scaling; scaling.print_devices({counts}, {rounds})"
    count = f"--xla_force_host_platform_device_count={max(counts)}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise ValueError(f"--devices={','.join(map(str, counts))} failed in its own process; see above.")
    return json.loads(child.stdout.splitlines()[-1])


def print_devices(counts: list[int], rounds: int) -> None:
    """Print the result of `devices_here` as a line of JSON."""
    print(json.dumps(devices_here(counts, rounds)))


def devices_here(counts: list[int], rounds: int) -> dict[str, Any]:
    """The train step with the same batch on growing numbers of this process's devices."""
    from moe_jax.planning import cost

    steps = {}
    sent = {}
    for count in counts:
        compiled, steps[f"{count} devices"] = _sharded_step(count)
        sent[f"{count} devices"] = cost.analyze(compiled.as_text()).sent
    return relative(steps, rounds) | {"bytes_sent_per_device": sent}


def _sharded_step(count: int) -> tuple[Any, Callable[[], Any]]:
    """The compiled train step on the first `count` devices, and a call that takes one step."""
    import jax

    from moe_jax.config import as_dict
    from moe_jax.mesh import batch_sharding, make_mesh
    from moe_jax.training.compile import make_train_step
    from moe_jax.training.state import init_state, step_key

    mesh_config = dict(replica=1, data=1, expert=count, tensor=1)
    config = validate(as_dict(config_like(DEEPSEEK, MODEL, BATCH)) | {"mesh": mesh_config})
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    state = init_state(config, mesh)
    key = step_key(config)
    batch = jax.device_put(random_batch(config), batch_sharding(mesh))
    compiled = make_train_step(config, mesh).lower(state, batch, key).compile()

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch, key))

    return compiled, step


def as_text(name: str, result: dict[str, Any]) -> str:
    """The results of one section as text."""
    over = next(key for key in result if key.startswith("over_"))
    sent = result.get("bytes_sent_per_device", {})
    rows = []
    for contestant, seconds in result["seconds"].items():
        milliseconds = timing.Spread.of([1e3 * s for s in seconds]).text(1)
        row = [contestant, milliseconds, timing.Spread(**result[over][contestant]).text()]
        rows.append([*row, f"{sent[contestant] / 2**20:.2f}"] if sent else row)
    head = ["", "ms", f"over {over.removeprefix('over_')}", *(["MiB sent per device"] if sent else [])]
    return f"{name}\n{timing.table(head, rows)}\n"


def numbers(flag: str, values: list[str], least: int = 1) -> list[int]:
    """The integers of a list flag.

    Raises:
        ValueError: a value is not an integer of at least `least`, or there is none.
    """
    if not values or not all(v.isdigit() and int(v) >= least for v in values):
        raise ValueError(
            f"--{flag}={','.join(values)} must be whole numbers of at least {least}, such as --{flag}=8,16."
        )
    return [int(v) for v in values]


def sections() -> dict[str, Callable[[], dict[str, Any]]]:
    """The sections to run, by name, with the settings of the flags.

    Raises:
        ValueError: a flag has an invalid value.
    """
    flag = flags.FLAGS
    shape = Shape(flag.tokens, flag.embed_dim, 16, flag.expert_ffw_dim, flag.top_k)
    if flag.top_k > shape.experts:
        raise ValueError(
            f"--top_k={flag.top_k} must be at most the {shape.experts} experts of the section skew; lower it."
        )
    counts = numbers("experts", flag.experts, flag.top_k)
    layers = numbers("depths", flag.depths)
    parts = numbers("devices", flag.devices)
    wrong = [n for n in parts if BATCH["batch_size"] % n or MODEL["num_experts"] % n]
    if wrong:
        raise ValueError(f"--devices={wrong[0]} must divide a batch of {BATCH['batch_size']}; write --devices=1,2,4,8.")
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "experts": lambda: experts(shape, counts, flag.rounds),
        "skew": lambda: skew(shape, flag.rounds),
        "depth": lambda: depth(layers, min(flag.rounds, COMPILE_ROUNDS)),
        "devices": lambda: devices(parts, flag.rounds),
    }
    unknown = [name for name in flag.sections if name not in known]
    if unknown or not flag.sections:
        raise ValueError(f"--sections={','.join(unknown)} must be a list from {', '.join(known)}.")
    return {name: known[name] for name in flag.sections}


@timing.command
def main(flag: Any) -> None:
    """Check the flags, then run section by section."""
    chosen = sections()
    facts: dict[str, Any] = timing.about(flag.rounds)
    print(f"{timing.heading(facts)}\n", flush=True)
    for name, run in chosen.items():
        facts[name] = run()
        print(as_text(name, facts[name]), flush=True)
        timing.save(flag.json, facts)


if __name__ == "__main__":
    timing.define_flags()
    flags.DEFINE_list("sections", "experts,skew,depth,devices", "The sections to run.")
    flags.DEFINE_list("experts", "8,16,32,64,128,256", "Numbers of experts; the others are compared to the first.")
    flags.DEFINE_list("depths", "4,8,24", "Numbers of layers.")
    flags.DEFINE_list("devices", "1,2,4,8", "Numbers of fake devices.")
    for name, value in dict(tokens=4096, embed_dim=256, expert_ffw_dim=256, top_k=2).items():
        flags.DEFINE_integer(name, value, f"{name} of the layer.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
