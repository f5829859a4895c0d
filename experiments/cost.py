"""`python -m experiments.cost --config=configs/balance_cost.py`: the cost that each method adds to the compiled step.

Compiles the config's train step with each method and without any (which still reports loads), and compares XLA's
counts of FLOPs and bytes, which are exact and the same on every machine of a platform. `--methods=a,b` selects some.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from absl import app, flags

from moe_jax.config import Config, as_dict, resolve, validate
from moe_jax.config.balance import BALANCE_METHODS, smallest
from moe_jax.config.command import define_config_flag, fail, parse_flags


class Cost(NamedTuple):
    """FLOPs and bytes accessed of one compiled train step."""

    flops: float
    bytes: float


def compiled_cost(config: Config) -> Cost:
    """The cost of the config's train step on one device of this machine, as counted by the compiler."""
    import jax

    from moe_jax.training.compile import abstract_arguments, make_train_step

    config = resolve(config, 1, jax.devices()[0].platform)
    compiled = make_train_step(config).lower(*abstract_arguments(config)).compile()
    counted = compiled.cost_analysis()
    return Cost(counted["flops"], counted["bytes accessed"])


def costs(config: Config, methods: Iterable[str]) -> Iterator[tuple[str, Cost]]:
    """Yield (method, cost), one compilation after the other."""
    for method in methods:
        entries = {} if method == "none" else smallest(method, num_devices=2)
        model = {} if method == "none" else BALANCE_METHODS[method].requires
        whole = as_dict(config)
        yield method, compiled_cost(validate(whole | {"balance": entries, "model": whole["model"] | model}))


def main(_: list[str]) -> None:
    """Check the flags, compile, and print each row when it is known."""
    flag = flags.FLAGS
    try:
        config = validate(flag.config)
        unknown = [m for m in flag.methods if m not in BALANCE_METHODS]
        if unknown:
            raise ValueError(f"--methods names {unknown[0]!r}; the methods are {', '.join(BALANCE_METHODS)}.")
    except ValueError as error:
        fail(str(error))
    base = None
    print(f"{'method':20} {'GFLOP':>9} {'more':>9} {'GB':>9} {'more':>9}")
    try:
        for method, cost in costs(config, ["none", *flag.methods]):
            base = base or cost
            more = [f"{ours / theirs - 1:+9.4%}" for ours, theirs in zip(cost, base, strict=True)]
            print(f"{method:20} {cost.flops / 1e9:9.3f} {more[0]} {cost.bytes / 1e9:9.3f} {more[1]}", flush=True)
    except ValueError as error:  # a method that does not fit the config
        fail(str(error))


if __name__ == "__main__":
    define_config_flag("The config to compile.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_list("methods", sorted(BALANCE_METHODS), "The methods to compile.")
    app.run(main, flags_parser=parse_flags)
