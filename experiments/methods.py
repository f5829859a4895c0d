"""`python -m experiments.methods`: generate the table of all balancing methods.

Writes methods.md and its pictures into `--folder`. Names, equations and sources come from the code; state, statistics
and causality are measured by running the methods, and speed and level by `moe_jax.simulate`. The pictures reproduce
published results in the simulator: the chatter of the sign rule grows with its rate (Loss-Free Balancing, arXiv
2408.15664, figure 4), rules whose step shrinks with the error end lower (table 3), and an update of the wrong sign
collapses. The page shows the commands that draw them. The command takes several minutes on two cores.
"""

import concurrent.futures
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from moe_jax import balance
from moe_jax.balance.protocol import Balancer
from moe_jax.balance.registry import REGISTRY
from moe_jax.config import ModelConfig, balance_entries
from moe_jax.config.balance import BALANCE_METHODS, smallest
from moe_jax.config.command import fail, parse_flags
from moe_jax.config.paths import path_of
from moe_jax.runtime.files import write_whole
from moe_jax.simulator import arms, loop, settings, show, streams
from moe_jax.simulator.arms import Arm
from moe_jax.simulator.loop import Result
from moe_jax.simulator.settings import Settings

T = TypeVar("T")
SETTINGS = Settings(experts=64, top_k=6, tokens=4096, steps=400)
FEW_STEPS = 40  # for methods that do not change from step to step
SMALL = Settings(experts=24, top_k=2, tokens=64)  # for the test of causality
EVERY = 7  # it changes the tokens from every seventh one on
SHAPES = Settings(experts=72, top_k=6, tokens=96)  # sizes that are all different
DIMENSIONS = {72: "E", 6: "K", 96: "T", settings.VOCAB_SIZE: "V"}
FAMILIES = ("bias", "loss", "control", "router", "selector")


class Picture(NamedTuple):
    """A picture of a simulation: the name of its file, its caption, and the flags of the command."""

    name: str
    caption: str
    flags: tuple[str, ...]


SIZE = ("--experts=64", "--top_k=6")
PICTURES = (
    Picture(
        "simulate_rates",
        "The sign rule at four rates, with enough tokens that the floor is low: a low rate is slow, and a high rate "
        "chatters, well above the floor in proportion to the rate.",
        ("--balance=bias_sign", "--rates=1e-4,1e-3,1e-2,1e-1", *SIZE, "--tokens=16384", "--steps=600"),
    ),
    Picture(
        "simulate_rules",
        "Rules at their default rates, with a shift in the middle: bias_proportional, bias_rms and bias_pi settle "
        "sooner than the sign rule, and bias_smebu, at half its rate, later. The quantile rule has no rate and needs "
        "one or two steps; it ends slightly above the others, because it follows the noise of every batch.",
        (
            *(f"--balance={name}" for name in ("bias_sign", "bias_proportional", "bias_rms", "bias_smebu", "bias_pi")),
            *("--balance=quantile", *SIZE, "--tokens=4096", "--steps=1000", "--stream=shift"),
        ),
    ),
    Picture(
        "simulate_flipped",
        "The sign rule, the sign rule reversed, and no balancing: positive feedback collapses onto the experts with "
        "the highest loads at the start.",
        ("--balance=none", "--balance=bias_sign", "--sign=1,-1", *SIZE, "--tokens=4096", "--steps=500"),
    ),
)


# --- facts from the code ----------------------------------------------------------------------------------------


def composition(name: str) -> dict[str, dict[str, Any]]:
    """The smallest `config.balance` with the method, and with a target that it can reach."""
    mapping = smallest(name, num_devices=8)
    if hasattr(BALANCE_METHODS[name](), "target"):
        mapping[name]["target"] = round(loop.threshold(SETTINGS), 2)
    return mapping


def arm_of(name: str) -> Arm:
    """The method as an arm of the simulator."""
    mapping = composition(name)
    return Arm(arms.write_balance(mapping), balance_entries(mapping))


def suited(s: Settings, name: str) -> Settings:
    """The settings with the score that the method requires."""
    return dataclasses.replace(s, score=BALANCE_METHODS[name].requires.get("score", s.score))


def balancer_of(name: str, s: Settings) -> Balancer:
    """The method's composition, for one layer with the sizes of the settings."""
    config = settings.config_of(s, arm_of(name).entries)
    return balance.make(config.balance, config.model)


def method_of(name: str) -> Balancer:
    """The method alone, with its default options."""
    return REGISTRY[name].build(BALANCE_METHODS[name](), ModelConfig())


def family(name: str) -> str:
    """The method's family, by its functions: a factor on a loss, another router or selection, a bias, or a loss."""
    method = method_of(name)
    if method.factors is not None:
        return "control"
    if method.router is not None:
        return "router"
    if method.select is not None or method.drop is not None:
        return "selector"
    return "bias" if method.initial_bias is not None else "loss"


def equation(name: str) -> str:
    """The method's equations, each as code."""
    return "; ".join(f"`{formula}`" for formula in REGISTRY[name].equation.split("; "))


def source(name: str) -> str:
    """Links to the papers and essays in the method's source; its first clause if there are none."""
    text = REGISTRY[name].source
    papers = [f"[{number}](https://arxiv.org/abs/{number})" for number in re.findall(r"\b\d{4}\.\d{5}\b", text)]
    essays = [f"[kexue {n}](https://kexue.fm/archives/{n})" for n in re.findall(r"kexue\.fm\D{1,10}?(\d{4,5})", text)]
    return ", ".join(dict.fromkeys(papers + essays)) or re.split(r"[,.;] ", text)[0]


# --- measurements -----------------------------------------------------------------------------------------------


def shapes(tree: Mapping[str, Any], name: str) -> str:
    """Names, dtypes and shapes, with letters for the sizes of `SHAPES`; the method's own entries are called "own"."""
    tree = {"own" if key == name else key: value for key, value in tree.items()}
    cells = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dims = ", ".join(DIMENSIONS.get(size, str(size)) for size in leaf.shape)
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        cells.append(f"{where} {leaf.dtype}[{dims}]")
    return ", ".join(cells)


def forward(balancer: Balancer, s: Settings, logits: Any, state: Any, ids: Any) -> tuple[Any, Any]:
    """Route one layer's tokens: experts [T, S], where a dropped copy is an empty slot, and statistics."""
    tokens = streams.rows_of(s.sequences, s.tokens)._replace(ids=ids)
    key = jax.random.key(0)
    routing = loop.routed(balancer, s, logits, tokens, state, key)
    if balancer.drop is None:
        return routing.expert_ids, balancer.observe(routing)
    keep = balancer.drop(routing, state, key, True)
    return jnp.where(keep, routing.expert_ids, s.experts), balancer.observe(routing)


def state_and_statistics(name: str) -> tuple[str, str]:
    """The shapes of the method's state and of its statistics."""
    s = suited(SHAPES, name)
    balancer = balancer_of(name, s)

    def run(logits: Any, ids: Any) -> tuple[Any, Any]:
        state = balancer.init(s.experts)
        return state, forward(balancer, s, logits, state, ids)[1]

    logits = jax.ShapeDtypeStruct((s.tokens, s.experts), jnp.float32)
    state, statistics = jax.eval_shape(run, logits, jax.ShapeDtypeStruct((s.tokens,), jnp.int32))
    shared = {"direction"} if method_of(name).initial_bias is not None else {"direction", "bias"}
    kept = {key: value for key, value in state.items() if key not in shared}
    return shapes(kept, name) or "none", shapes(statistics, name)


def settings_of(name: str) -> Settings:
    """The settings of a method's simulation: fewer steps if it changes nothing from one step to the next."""
    method = method_of(name)
    learns = method.own_loss is not None or method.own_update is not Balancer().own_update
    return suited(SETTINGS if learns else dataclasses.replace(SETTINGS, steps=FEW_STEPS), name)


def is_causal(name: str) -> bool:
    """Whether changes of later tokens of a batch leave a token's experts unchanged, in a state after three steps."""
    s = suited(SMALL, name)
    balancer = balancer_of(name, s)
    run = jax.jit(functools.partial(forward, balancer, s))
    random = np.random.default_rng(0)

    def draw() -> np.ndarray:
        return random.normal(size=(s.tokens, s.experts)).astype(np.float32)

    ids = random.integers(0, settings.VOCAB_SIZE, s.tokens, dtype=np.int32)
    state = balancer.init(s.experts)
    for step in range(3):
        state = balancer.update(run(draw(), state, ids)[1], state, jnp.int32(step))
    logits = draw()
    before = np.asarray(run(logits, state, ids)[0])
    for t in range(1, s.tokens, EVERY):
        changed = logits.copy()
        other_ids = ids.copy()
        changed[t:] = 3.0 * draw()[t:]
        other_ids[t:] = random.integers(0, settings.VOCAB_SIZE, s.tokens - t)
        if (np.asarray(run(changed, state, other_ids)[0])[:t] != before[:t]).any():
            return False
    return True


# --- the page ---------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a pipe in a cell, which would end it, becomes the Unicode bar of a norm or absolute value."""

    def escaped(cell: str) -> str:
        return cell.replace("||", "\N{DOUBLE VERTICAL LINE}").replace("|", "\N{DIVIDES}")

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(escaped, cells))} |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])


HEADER = (
    "method",
    "family",
    "equation",
    "source",
    "state",
    "statistics of a step",
    "causal",
    "inference",
    "settled after",
    "final / floor",
)


def row(name: str, result: Result, low: float) -> list[str]:
    """The table's row for one method."""
    state, statistics = state_and_statistics(name)
    causal = "yes" if is_causal(name) else "no"
    inference = balancer_of(name, suited(SETTINGS, name)).inference
    about = [f"`{name}`", family(name), equation(name), source(name), state, statistics, causal, inference]
    return about + speed_and_level(result, low)


def speed_and_level(result: Result, low: float) -> list[str]:
    """The number of steps until the method settled, and its final level over the floor."""
    settled = show.cell([summary.settled for summary in result.summaries], steps=True)
    return [settled, show.cell([summary.final / low for summary in result.summaries], steps=False)]


def two_at_a_time(function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """The function's results for the items, in order; two threads suffice, as compiled loops release Python's lock."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def methods_table(seeds: int) -> str:
    """A row without balancing, then one for every registered method, by family."""
    names = sorted(REGISTRY, key=lambda name: (FAMILIES.index(family(name)), name))

    def run(name: str) -> Result:
        return loop.simulate(arm_of(name), settings_of(name), seeds)

    results = two_at_a_time(run, names)
    low = loop.floor(SETTINGS)
    unbalanced = loop.simulate(Arm("none", ()), SETTINGS, seeds)
    first = ["none", *"-------", *speed_and_level(unbalanced, low)]
    rows = [row(name, result, low) for name, result in zip(names, results, strict=True)]
    return markdown_table(HEADER, [first, *rows])


def draw(picture: Picture, folder: Path) -> str:
    """Draw a picture by the command that the page shows with it; return its part of the page, with its numbers."""
    command = ["-m", "moe_jax.simulate", *picture.flags]
    with tempfile.TemporaryDirectory() as scratch:
        numbers = Path(scratch) / "numbers.json"
        files = [f"--out={folder / picture.name}.png", f"--json={numbers}"]
        subprocess.run([sys.executable, *command, *files], check=True, stdout=subprocess.DEVNULL)
        results = json.loads(numbers.read_text())
    text = " ".join(["python", *command, f"--out={picture.name}.png"])
    image = f"![max violation over steps]({picture.name}.png)\n\n{picture.caption}"
    return f"{image}\n\n```\n{text}\n```\n\n{numbers_table(results)}"


def numbers_table(results: Mapping[str, Any]) -> str:
    """The simulator's table as Markdown, with a row for every arm."""
    shifted = results["settings"]["stream"] == "shift"
    columns = {k: v for k, v in show.COLUMNS.items() if shifted or k not in ("recovered", "peak")}
    rows = []
    for arm in results["methods"]:
        values = ([seed[key] for seed in arm["seeds"]] for key in columns)
        cells = (show.cell(v, key in show.STEPS) for key, v in zip(columns, values, strict=True))
        rows.append([f"`{arm['balance']}`", *cells])
    return markdown_table(["balance", *columns.values()], rows)


PAGE = """# Ways to balance experts

Generated by `python -m experiments.methods`; do not edit.

E experts, K experts per token, T tokens per step, V token ids. *State* is kept from step to step; its entry `bias` is
the selection bias. *Statistics* are summed over micro-batches and devices. *Causal*: changing later tokens of a batch
changed no earlier token's experts (measured). *Inference*: evaluation selects by biased top-k, or the same way.

The last two columns are measured in the simulator at default options, as mean ± standard deviation over {seeds} seeds,
with {what}.
*Settled*: the first step from which on the mean of max violation over {window} steps stays below {limit:.3g}, which is
{within:g} above the floor {floor:.3g} of a uniform random router. *Final*: the mean of max violation over the last
fifth of {steps} steps. A loss moves an offset of each expert's logits by `router_rate x E x gradient` per step, with
router_rate={router_rate:g}. No language model counteracts it: any loss that is lower for smaller differences in
popularity reaches balance here, and its cost to the language model is not visible; a loss that reads only weights has
no effect. The logits are given, so another router has none either. A method that requires a score is run
with it, and one that changes nothing from step to step for {few} steps.

{table}

Methods run with options other than the defaults, which would have no effect here: {others}.

## Published results, in the simulator

{pictures}
"""


def page(folder: Path, seeds: int) -> str:
    """The text of the whole page; draws its pictures into the folder."""
    s = SETTINGS
    others = [f"`{arm_of(n).name}`" for n in sorted(REGISTRY) if arm_of(n).name != n]
    return PAGE.format(
        seeds=seeds,
        what=show.describe_run(s, "", seeds).rpartition(";")[0],
        window=s.window,
        limit=loop.threshold(s),
        within=s.within,
        floor=loop.floor(s),
        steps=s.steps,
        few=FEW_STEPS,
        router_rate=s.router_rate,
        others=", ".join(others) or "none",
        table=methods_table(seeds),
        pictures="\n\n".join(two_at_a_time(functools.partial(draw, folder=folder), PICTURES)),
    )


def main(_: list[str]) -> None:
    """Write the page."""
    try:
        folder = path_of(flags.FLAGS.folder, "--folder")
    except ValueError as error:
        fail(str(error))
    if not folder.is_dir():
        fail(f"--folder={folder} must be an existing folder; create it first.")
    if flags.FLAGS.seeds < 1:
        fail(f"--seeds={flags.FLAGS.seeds} must be at least 1; raise it.")
    write_whole(folder / "methods.md", page(folder, flags.FLAGS.seeds))


if __name__ == "__main__":
    flags.DEFINE_string("folder", "experiments/results", "The folder for methods.md and its pictures.")
    flags.DEFINE_integer("seeds", 3, "Number of seeds with which each method is run.")
    app.run(main, flags_parser=parse_flags)
