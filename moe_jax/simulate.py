"""`python -m moe_jax.simulate --balance=bias_sign --experts=256 --top_k=8 --drift=0.01`: balancing without a model.

Runs any balancing method on a stream of router logits, thousands of steps a minute on a CPU, draws max violation over
time, and reports how fast, how closely and how steadily each method balances. This shows which method, at which rate,
suits a number of experts and tokens. `--balance` may be repeated; `--rates=1e-4,1e-3,1e-2` repeats each at each rate:

    --balance=bias_sign:rate=1e-3,zero_mean=True    a method with options, as in `config.balance`
    --balance=bias_sign+aux_loss:weight=1e-3        several together
    --balance=second:method=aux_loss,layers=(0,1)   a label of your choice
    --balance=none                                  no balancing

Streams (`--stream`; numbers are in units of the spread of logits over tokens; `--skew` is the spread of the experts'
popularity in these units): in `skewed` experts differ in popularity; in `drifting` popularity does a random walk; in
`bursty` some experts are popular for a while; in `domains` batches switch between domains; in `shift` popularity
changes in the middle; in `adversarial` the most loaded expert becomes more popular. `--scores=FOLDER` replays the
logits that a run with `record_scores_every` wrote into WORKDIR/scores.

In a model a loss acts on the router. Here it acts on an offset for each expert, shared by all tokens, by
offset -= router_rate x E x gradient. No language model counteracts it, so any loss that decreases with the differences
in popularity reaches balance here, the sooner the larger its weight; its cost to the model is not visible. Losses on
the router's weights alone have no effect here.
"""

import dataclasses
import math
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from rich.console import Console

from moe_jax.config import article
from moe_jax.config.command import fail, parse_flags
from moe_jax.config.paths import path_of
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import output_of, write_json
from moe_jax.runtime.workdir import read_config
from moe_jax.simulator.arms import Arm, arms_of
from moe_jax.simulator.loop import FINAL, best_arm, floor, simulate, threshold
from moe_jax.simulator.settings import STREAMS, Recording, Settings, check, config_of, read_scores
from moe_jax.simulator.show import as_json, describe_run, draw, make_table

PICTURES = (".png", ".pdf", ".svg")
FILE_COLUMNS = 200  # the width of tables that are not written to a terminal


def check_unused(given: set[str], s: Settings, scores: str) -> None:
    """Raise a ValueError for a flag that was set and would be ignored."""
    only_some = {name for names in STREAMS.values() for name in names if name != "shift_step"}
    synthetic = only_some | {"experts", "tokens", "stream", "noise"}
    if scores and (extra := sorted(given & synthetic)):
        raise ValueError(f"--{extra[0]} is for synthetic streams, and --scores={scores} replays one; leave one out.")
    if not scores and "layer" in given:
        raise ValueError("--layer is a layer of recorded scores; give --scores=FOLDER too, or leave it out.")
    for name in sorted(given & only_some - set(STREAMS.get(s.stream, only_some))):
        readers = [stream for stream, names in STREAMS.items() if name in names]
        raise ValueError(f"--{name} is not read by --stream={s.stream}; choose {' or '.join(readers)}.")


class Task(NamedTuple):
    """The settings, arms and recording that the flags describe."""

    settings: Settings
    arms: list[Arm]
    recording: Recording | None


def read_flags() -> Task:
    """Read and check the flags, before jax is loaded.

    Raises:
        ValueError: a flag is wrong.
    """
    flag = flags.FLAGS
    values = {f.name: getattr(flag, f.name) for f in fields(Settings)}
    given = {name for name in flag if flag[name].present}
    if flag.drift > 0 and "drift" in given and "stream" not in given:
        values["stream"] = "drifting"
    s = Settings(**(values | _of_the_run(path_of(flag.scores, "--scores"), given)))
    check_unused(given, s, flag.scores)
    check(s)
    if flag.seeds < 1:
        raise ValueError(f"--seeds={flag.seeds} must be at least 1; raise it.")
    if s.seed + flag.seeds > 2**31:
        raise ValueError(f"--seed={s.seed} and --seeds={flag.seeds} must stay below 2^31; lower --seed.")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name}={value} must be a finite number; give one.")
    if flag.out and Path(flag.out).suffix.lower() not in PICTURES:
        raise ValueError(f"--out={flag.out} must end in {', '.join(PICTURES)}; name it simulation.png.")
    arms = arms_of(flag.balance, _numbers("rates", float), _numbers("sign", int))
    if {arm.sign for arm in arms} - {1, -1}:
        raise ValueError(f"--sign={','.join(flag.sign)} must be 1, or -1 to reverse the balancing; or both.")
    for name in ("json", "out"):
        if text := str(flag[name].value):
            output_of(text, f"--{name}")
    if flag.scores:
        recording = read_scores(path_of(flag.scores, "--scores"), flag.layer)
        tokens, experts = recording.logits.shape[1:]
        s = dataclasses.replace(s, tokens=tokens, experts=experts, sequences=s.sequences if "sequences" in given else 1)
        check(s)
    else:
        recording = None
    for arm in arms:
        config_of(s, arm.entries)
    return Task(s, arms, recording)


def _of_the_run(scores: Path, given: set[str]) -> dict[str, Any]:
    """`score` and `top_k` of the run that recorded the logits, if its config exists and the flags are not set."""
    file = scores.parent / "config.json"
    if scores == Path() or not file.is_file():
        return {}
    model = read_config(file)["model"]
    if zero := model.get("num_zero_experts", 0):
        raise ValueError(
            f"--scores={scores} has {zero} zero-computation experts, which the simulator does not support."
        )
    if model.get("select_by", "scores") != "scores":
        raise ValueError(f"--scores={scores} is of a run that selects by logits, which the simulator does not support.")
    return {name: model[name] for name in ("score", "top_k") if name not in given}


def _numbers(name: str, kind: type) -> list[Any]:
    texts: Any = flags.FLAGS[name].value
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise ValueError(f"--{name}={','.join(texts)} must have {article(kind)} between commas.") from None


def main(_: list[str]) -> None:
    """Simulate every arm, print the table and draw the picture."""
    flag = flags.FLAGS
    keep_compiled()
    try:
        s, arms, recording = read_flags()
    except ValueError as error:
        fail(str(error))
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else FILE_COLUMNS)
    started = time.perf_counter()
    results = []
    for arm in arms:
        results.append(simulate(arm, s, flag.seeds, recording, flag.layer))
        console.print(f"{arm.name}: done after {time.perf_counter() - started:.0f} s", style="dim", markup=False)
    title = describe_run(s, flag.scores, flag.seeds)
    low = floor(s, recording)
    limit = threshold(s, recording)
    console.print(make_table(results, s, title))
    console.print(
        f"settled: the mean of max violation over {s.window} steps stays below {limit:.3g}, the floor {low:.3g} of a "
        f"uniform random router + {s.within:g}; final level, chatter (root mean square of the change from step to "
        f"step), bias change (likewise), flips (share of experts whose bias turned) and dead (experts without a "
        f"token) are of the last {FINAL:.0%} of {s.steps} steps"
    )
    console.print(best_arm(results, s))
    if flag.out:
        draw(results, s, low, title, output_of(flag.out, "--out"))
        console.print(f"wrote {flag.out}")
    if flag.json:
        found = as_json(results, s, flag.scores) | {"floor": low, "threshold": limit}
        write_json(output_of(flag.json, "--json"), found)


def define_flags() -> None:
    """Define the flags; those of `Settings` have the names and defaults of its fields."""
    define: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for f in fields(Settings):
        define[type(f.default)](f.name, f.default, f.metadata["help"])
    flags.DEFINE_multi_string("balance", None, "METHOD[:OPTION=VALUE,...][+METHOD...], or none; may be repeated.")
    flags.DEFINE_list("rates", [], "Repeat every method with each of these rates.")
    flags.DEFINE_list("sign", ["1"], "-1 reverses the balancing; 1,-1 runs both.")
    flags.DEFINE_integer("seeds", 1, "Number of runs of each arm, with different streams.")
    flags.DEFINE_string("scores", "", "Replay the router logits recorded in this folder.")
    flags.DEFINE_integer("layer", 0, "The MoE layer of the recorded logits.")
    flags.DEFINE_string("out", "simulate.png", "Draw to this file; empty for none.")
    flags.DEFINE_string("json", "", "Also write the numbers to this file.")
    flags.mark_flags_as_required(["balance"])


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
