"""`python -m moe_jax.simulate --balance=bias_sign --experts=256 --top_k=8 --drift=0.01`: balancing without a model.

Runs any way of balancing against a stream of router logits, thousands of steps a minute on a CPU, draws max
violation over time and tells how fast each comes to balance, how near, and how calmly. Which rule, at which rate,
for so many experts and tokens? `--balance` may be given several times, `--rates=1e-4,1e-3,1e-2` repeats each by rate:

    --balance=bias_sign:rate=1e-3,zero_mean=True    a method with options, as in `config.balance`
    --balance=bias_sign+aux_loss:weight=1e-3        several together
    --balance=second:method=aux_loss,layers=(0,1)   a label of one's own
    --balance=none                                  no balancing

Streams (`--stream`; numbers are in units of the spread of logits over tokens, of which `--skew` is the spread of
the experts' popularity): `skewed` experts differ in popularity; `drifting` it does a random walk; `bursty` some
experts are popular for a while; `domains` batches switch between domains; `shift` it is drawn anew in the middle;
`adversarial` the most loaded expert becomes more popular. `--scores=FOLDER` replays what a run with
`record_scores_every` wrote into WORKDIR/scores.

A loss acts on its router: here on an offset for each expert, which all tokens share, by
offset -= router_rate x E x gradient. No language model pulls against it, so any loss that is lower for smaller
differences in popularity finds balance here, the sooner the larger its weight; what it costs is not seen. Losses on
the router's weights alone do nothing here.
"""

import ast
import dataclasses
import functools
import math
import re
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import app, flags

from moe_jax.config import Config, article, balance_entries, validate
from moe_jax.config.balance import BalanceEntry
from moe_jax.config.command import fail, parse_flags
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import output_of, path_of, write_json
from moe_jax.runtime.workdir import read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from moe_jax.balance import Balancer
    from moe_jax.routing import Routing
    from moe_jax.simulator.streams import Stream

# every synthetic stream with the settings that it alone reads, in the order of its function's arguments
STREAMS = {
    "skewed": ("skew",),
    "drifting": ("skew", "drift"),
    "bursty": ("skew", "burst", "period"),
    "domains": ("skew", "domains", "period"),
    "shift": ("skew", "shift_step"),
    "adversarial": ("skew", "drift", "bound"),
}
VOCAB_SIZE = 4096  # of synthetic token ids
FINAL = 0.2  # the part of a run, at its end, that is called its steady state


def setting(default: Any, help_text: str, low: float = 1) -> Any:
    """A field of `Settings` and a flag: `low` is the least value."""
    return field(default=default, metadata={"help": help_text, "low": low})


@dataclass(frozen=True)
class Settings:
    """One simulation. Every field is a flag of its name."""

    experts: int = setting(256, "E, experts of the layer.", 2)
    top_k: int = setting(8, "Experts a token.")
    tokens: int = setting(4096, "T, tokens a step.")
    sequences: int = setting(8, "Into how many sequences a step's tokens are split.")
    steps: int = setting(2000, "Steps to simulate.", 10)
    seed: int = setting(0, "Of the first run; --seeds=N runs this one and the N - 1 after it.", 0)
    score: str = setting("sigmoid", "Affinity: sigmoid, softmax or sqrt_softplus.", 0)
    stream: str = setting("skewed", "How experts' popularity changes: " + ", ".join(STREAMS) + ".", 0)
    noise: float = setting(1.0, "Standard deviation of a logit over tokens; scales the logits.", 1e-9)
    skew: float = setting(0.5, "Standard deviation of popularity over experts, in units of --noise.", 0)
    drift: float = setting(0.01, "Of a step in popularity, in units of --noise; alone it sets --stream=drifting.", 0)
    burst: float = setting(2.0, "How much more popular an expert is in a burst, in units of --noise.", 0)
    period: int = setting(100, "How many steps a burst or a domain lasts.")
    domains: int = setting(4, "How many domains there are.", 2)
    bound: float = setting(2.0, "Largest popularity under --stream=adversarial, in units of --noise.", 0)
    router_rate: float = setting(10.0, "How fast losses move the router.", 0)
    within: float = setting(0.1, "Settled is a moving mean of max violation at most this above the floor.", 0)
    window: int = setting(20, "How many steps that mean is over.")

    @property
    def shift_step(self) -> int:
        """The step at which the stream `shift` changes."""
        return self.steps // 2


class Arm(NamedTuple):
    """One way of balancing under test: its text in the grammar of `--balance`; a sign of -1 turns it round."""

    name: str
    entries: tuple[BalanceEntry, ...]
    sign: int = 1


class Recording(NamedTuple):
    """Router logits of one MoE layer: float [N, T, E], bool [N, T], int32 [N, T]; L is how many layers there were."""

    logits: np.ndarray
    mask: np.ndarray
    ids: np.ndarray
    num_layers: int


class Trace(NamedTuple):
    """What is seen of every step, float32 [steps].

    violation, dead: max violation of the loads, and how many experts had no token. bias_range, bias_change, flips:
    of the bias after the step, largest minus smallest; the root mean square of its change; and the share of experts
    for which that went the other way than in the step before.
    """

    violation: np.ndarray
    dead: np.ndarray
    bias_range: np.ndarray
    bias_change: np.ndarray
    flips: np.ndarray


class Summary(NamedTuple):
    """A run in numbers; steps are counted from 0, of recovery from the shift. None: not within the run.

    settled: the first step of the first window from which on the mean of max violation over a window stays below
        the threshold; before the shift, if there is one.
    recovered, peak: the same, and the highest max violation, after the shift.
    final, chatter, bias_change, flips, dead: means over the last fifth. Chatter is the root mean square of the
        change of max violation from step to step, bias_change that of the biases.
    bias_range: largest minus smallest bias at the end.
    """

    settled: int | None
    recovered: int | None
    peak: float | None
    final: float
    chatter: float
    bias_change: float
    flips: float
    dead: float
    bias_range: float


class Result(NamedTuple):
    """An arm with a Trace and a Summary for each seed."""

    arm: Arm
    traces: list[Trace]
    summaries: list[Summary]


# --- the grammar ------------------------------------------------------------------------------------------------


def parse_balance(text: str) -> dict[str, dict[str, Any]]:
    """`config.balance` of `method:option=value,option=value+method`; "none" is empty.

    Raises:
        ValueError: the text is not of that form; methods and options are checked by the config's own rules.
    """
    if text == "none":
        return {}
    mapping: dict[str, dict[str, Any]] = {}
    for part in re.split(r"\+(?=[A-Za-z_]\w*(?:[:+]|$))", text):  # not that of 1e+3
        label, _, options = part.partition(":")
        if not label or label in mapping:
            raise ValueError(
                f"--balance={text} must name each part once, as method or label:method=...; "
                f"{f'{label!r} is there twice' if label else 'a name is missing'}."
            )
        pairs = re.split(r",(?![^()]*\))", options) if options else []  # the commas of (0, 3) stay
        mapping[label] = dict(_option(pair, text) for pair in pairs)
    return mapping


def write_balance(mapping: Mapping[str, Mapping[str, Any]]) -> str:
    """The text that `parse_balance` reads as `mapping`."""
    parts = (
        label + ":" * bool(options) + ",".join(f"{key}={value}" for key, value in options.items())
        for label, options in mapping.items()
    )
    return "+".join(parts) or "none"


def _option(pair: str, text: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not key or not equals:
        raise ValueError(f"--balance={text} must have option=value after its colon, not {pair!r}; write rate=1e-3.")
    try:
        return key.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError):
        return key.strip(), value.strip()  # a word, as in scope=sequence


def arms_of(texts: Sequence[str], rates: Sequence[float] = (), signs: Sequence[int] = (1,)) -> list[Arm]:
    """Every text at every rate with every sign; "none" has one only.

    Raises:
        ValueError: a text is wrong, or has not one rate to be set.
    """
    arms = []
    for text in dict.fromkeys(texts):
        mapping = parse_balance(text)
        try:
            versions = [_with_rate(mapping, rate) for rate in rates] or [mapping]
            made = [(write_balance(v), balance_entries(v)) for v in versions]
        except ValueError as error:
            raise ValueError(f"--balance={text}: {error}") from None
        arms += [
            Arm(name + ", turned round" * (sign < 0), entries, sign)
            for name, entries in made
            for sign in signs
            if entries or sign > 0  # of nothing there is nothing to turn
        ]
    return arms


def _with_rate(mapping: dict[str, dict[str, Any]], rate: float) -> dict[str, dict[str, Any]]:
    entries = balance_entries(mapping)
    rated = [e.label for e in entries if hasattr(e.options, "rate")]
    if len(rated) != 1:
        raise ValueError(
            f"--rates sets the rate of one method, and here {' and '.join(rated) or 'none'} has one; "
            "write the rates into --balance instead."
        )
    return {label: {**o, "rate": rate} if label == rated[0] else o for label, o in mapping.items()}


# --- what is asked for ------------------------------------------------------------------------------------------


def check(s: Settings) -> None:
    """Raise a ValueError for a setting that is out of range or does not go with another."""
    for f in fields(Settings):
        value, low = getattr(s, f.name), f.metadata["low"]
        if not isinstance(value, str) and not value >= low:
            raise ValueError(f"--{f.name}={value} must be at least {low:g}; raise it.")
    if s.top_k > s.experts:
        raise ValueError(f"--top_k={s.top_k} must be at most --experts={s.experts}; lower it.")
    if s.tokens % s.sequences:
        raise ValueError(f"--tokens={s.tokens} must be divisible by --sequences={s.sequences}; change one.")
    if s.stream not in STREAMS:
        raise ValueError(f"--stream={s.stream} must be one of {', '.join(STREAMS)}; choose one.")
    if s.window > s.shift_step:
        raise ValueError(f"--window={s.window} must be at most half of --steps={s.steps}; lower it.")


def check_unused(given: set[str], s: Settings, scores: str) -> None:
    """Raise a ValueError for a flag that was given and would be ignored."""
    only_some = {name for names in STREAMS.values() for name in names if name != "shift_step"}
    synthetic = only_some | {"experts", "tokens", "stream", "noise"}
    if scores and (extra := sorted(given & synthetic)):
        raise ValueError(f"--{extra[0]} is for synthetic streams, and --scores={scores} replays one; leave one out.")
    if not scores and "layer" in given:
        raise ValueError("--layer is a layer of recorded scores; give --scores=FOLDER too, or leave it out.")
    for name in sorted(given & only_some - set(STREAMS.get(s.stream, only_some))):
        readers = [stream for stream, names in STREAMS.items() if name in names]
        raise ValueError(f"--{name} is not read by --stream={s.stream}; choose {' or '.join(readers)}.")


def config_of(s: Settings, entries: tuple[BalanceEntry, ...], num_layers: int = 1, vocab_size: int = 0) -> Config:
    """The settings as a config, which checks what a method asks of its model.

    Raises:
        ValueError: it asks for something else.
    """
    model = dict(
        num_experts=s.experts,
        top_k=s.top_k,
        score=s.score,
        normalize_gates=s.top_k > 1,
        num_layers=num_layers,
        vocab_size=vocab_size or VOCAB_SIZE,
    )
    plain = dict(model=model, batch_size=s.sequences, sequence_length=s.tokens // s.sequences)
    mapping = {e.label: {"method": e.method} | dataclasses.asdict(e.options) for e in entries}
    return validate({**plain, "balance": mapping})


def read_scores(folder: Path, layer: int) -> Recording:
    """The recorded logits of one layer, in the order of their steps.

    Args:
        folder: with <step>.npz, each with logits [L, T, E], mask [T] and ids [T].
        layer: 0 <= layer < L.

    Raises:
        ValueError: no files, or one that has not this form.
    """
    files = sorted((f for f in folder.glob("*.npz") if f.stem.isdigit()), key=lambda f: int(f.stem))
    if not files:
        raise ValueError(
            f"--scores={folder} must be a folder with <step>.npz, and has none; "
            "set config.record_scores_every in a training run, which writes WORKDIR/scores."
        )
    steps = [_read_step(file) for file in files]
    shape = steps[0]["logits"].shape
    for file, step in zip(files, steps, strict=True):
        if step["logits"].shape != shape:
            raise ValueError(
                f"{file} has logits of shape {step['logits'].shape}, but {files[0]} of {shape}; "
                "give a folder with the scores of one run."
            )
    if not 0 <= layer < shape[0]:
        raise ValueError(f"--layer={layer} must be from 0 to {shape[0] - 1}, the layers in {files[0]}; change it.")
    logits = np.stack([step["logits"][layer] for step in steps])
    mask, ids = (np.stack([step[key] for step in steps]) for key in ("mask", "ids"))
    return Recording(logits, mask, ids.astype(np.int32), shape[0])


def _read_step(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as arrays:
            step = {key: arrays[key] for key in ("logits", "mask", "ids")}
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ValueError(f"{file} must hold logits, mask and ids; it could not be read: {error}.") from None
    logits, mask, ids = step["logits"], step["mask"], step["ids"]
    kinds = logits.dtype.kind, mask.dtype.kind, ids.dtype.kind
    if kinds != ("f", "b", "i") or logits.ndim != 3 or not mask.shape == ids.shape == logits.shape[1:2]:
        raise ValueError(
            f"{file} has logits {logits.dtype}{list(logits.shape)}, mask {mask.dtype}{list(mask.shape)} and ids "
            f"{ids.dtype}{list(ids.shape)}, but they must be float [L, T, E], bool [T] and int [T]; record it anew."
        )
    return step


# --- the loop ---------------------------------------------------------------------------------------------------


def make_stream(s: Settings, recording: Recording | None = None) -> "Stream":
    """The stream that the settings name, or a replay."""
    import jax.numpy as jnp

    from moe_jax.simulator import streams

    if recording is not None:
        logits, mask, ids = map(jnp.asarray, recording[:3])
        return streams.recorded(logits, mask, ids, s.sequences)
    offsets = getattr(streams, s.stream)(s.experts, *(getattr(s, name) for name in STREAMS[s.stream]))
    return streams.synthetic(offsets, s.tokens, s.experts, s.sequences, s.noise, VOCAB_SIZE)


def routed(balancer: "Balancer", s: Settings, logits: Any, tokens: Any, state: Any, key: Any) -> "Routing":
    """One layer's routing in training."""
    from moe_jax.routing import route

    select = None if balancer.select is None else functools.partial(balancer.select, state=state)
    return route(
        logits,
        state["bias"],
        top_k=s.top_k,
        score=s.score,
        normalize_gates=s.top_k > 1,
        tokens=tokens,
        select=select,
        combine=balancer.combine,
        key=key,
        train=True,
    )


def closed_loop(
    balancer: "Balancer", stream: "Stream", s: Settings, sign: int = 1, layer: int = 0
) -> Callable[[int], Trace]:
    """(seed) -> Trace, compiled once: the stream is routed, its loads move the balancer, as a training step does.

    `sign=-1` turns what the balancer does to bias and router the wrong way round.
    """
    import jax
    import jax.numpy as jnp

    from moe_jax.balance.measures import bias_range, dead_experts, flip_rate, max_violation

    router = jax.random.normal(jax.random.key(0), (32, s.experts), jnp.float32)  # for losses on it; it stays

    def forward(offset: Any, logits: Any, tokens: Any, state: Any, key: Any) -> tuple[Any, Any]:
        routing = routed(balancer, s, logits + offset[None], tokens, state, key)
        statistics = balancer.observe(routing)
        return balancer.loss(routing, statistics, state, router), statistics

    def step(carry: tuple[Any, ...], inputs: tuple[Any, Any]) -> tuple[tuple[Any, ...], Trace]:
        world, offset, state, last_loads, last_direction = carry
        index, key = inputs
        stream_key, select_key = jax.random.split(key)
        world, logits, tokens = stream.next(world, stream_key, index, last_loads)
        gradient, statistics = jax.grad(forward, has_aux=True)(offset, logits, tokens, state, select_key)
        new = balancer.update(statistics, state, index)
        change = sign * (new["bias"] - state["bias"])
        new["bias"] = state["bias"] + change
        direction = jnp.sign(change)
        loads = statistics["loads"]
        of_loads: Any = max_violation(loads), dead_experts(loads).astype(jnp.float32)
        of_bias: Any = bias_range(new["bias"]), jnp.sqrt((change**2).mean()), flip_rate(last_direction, direction)
        offset = offset - sign * s.router_rate * s.experts * gradient
        return (world, offset, new, loads, direction), Trace(*of_loads, *of_bias)

    @jax.jit
    def run(seed: Any) -> Trace:
        world_key, steps_key = jax.random.split(jax.random.key(seed))
        nothing, none = jnp.zeros(s.experts, jnp.float32), jnp.zeros(s.experts, jnp.int32)
        start = stream.init(world_key), nothing, balancer.init(s.experts, layer), none, nothing
        steps = jnp.arange(s.steps, dtype=jnp.int32), jax.random.split(steps_key, s.steps)
        return jax.lax.scan(step, start, steps)[1]

    return lambda seed: Trace(*map(np.asarray, run(seed)))


def simulate(arm: Arm, s: Settings, seeds: int = 1, recording: Recording | None = None, layer: int = 0) -> Result:
    """The arm in the closed loop, once for each seed; seeds of different arms see the same streams.

    Raises:
        ValueError: the arm does not go with the settings.
    """
    from moe_jax import balance

    known = {} if recording is None else dict(num_layers=recording.num_layers, vocab_size=int(recording.ids.max()) + 1)
    config = config_of(s, arm.entries, **known)
    run = closed_loop(balance.make(config.balance, config.model), make_stream(s, recording), s, arm.sign, layer)
    traces = [run(seed) for seed in range(s.seed, s.seed + seeds)]
    return Result(arm, traces, [summarize(trace, s, threshold(s, recording)) for trace in traces])


# --- numbers ----------------------------------------------------------------------------------------------------


def floor(s: Settings, recording: Recording | None = None) -> float:
    """The max violation that a uniform random router has by chance, for the tokens of a step."""
    from moe_jax.balance.measures import violation_floor

    tokens = s.tokens if recording is None else round(float(recording.mask.sum(1).mean()))
    return float(violation_floor(tokens, s.top_k, s.experts))


def threshold(s: Settings, recording: Recording | None = None) -> float:
    """What a moving mean of max violation must stay below to be called settled."""
    return floor(s, recording) + s.within


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """[..., N] -> [..., N - window + 1]: element n is the mean of values n to n + window - 1."""
    return np.lib.stride_tricks.sliding_window_view(values, window, axis=-1).mean(-1)


def settling(violation: np.ndarray, limit: float, window: int) -> int | None:
    """The first step from which on the mean over `window` steps stays at or below the limit; None if it does not."""
    above = np.flatnonzero(moving_mean(violation, window) > limit)
    settled = int(above[-1]) + 1 if above.size else 0
    return settled if settled <= violation.size - window else None


def summarize(trace: Trace, s: Settings, limit: float) -> Summary:
    """A run in numbers."""
    shifted = s.stream == "shift"
    before, after = (
        (trace.violation[: s.shift_step], trace.violation[s.shift_step :]) if shifted else (trace.violation, None)
    )
    end = slice(-max(2, round(FINAL * s.steps)), None)
    return Summary(
        settled=settling(before, limit, s.window),
        recovered=None if after is None else settling(after, limit, s.window),
        peak=None if after is None else float(after.max()),
        final=float(trace.violation[end].mean()),
        chatter=float(np.sqrt((np.diff(trace.violation[end]) ** 2).mean())),
        bias_change=float(np.sqrt((trace.bias_change[end] ** 2).mean())),
        flips=float(trace.flips[end].mean()),
        dead=float(trace.dead[end].mean()),
        bias_range=float(trace.bias_range[-1]),
    )


def best(results: Sequence[Result], s: Settings) -> str:
    """The sentence that names the lowest final level among the arms that settled, and recovered, on every seed."""

    def steady(result: Result) -> bool:
        asked = ("settled", "recovered") if s.stream == "shift" else ("settled",)
        return all(getattr(summary, key) is not None for summary in result.summaries for key in asked)

    def level(result: Result) -> float:
        return float(np.mean([summary.final for summary in result.summaries]))

    found = sorted(filter(steady, results), key=level)
    if not found:
        return f"None settled within {s.steps} steps; try other rates, or more --steps."
    among = f"of the {len(found)} of {len(results)} that settled"
    return f"Lowest final level {among}: {found[0].arm.name}, {level(found[0]):.3g}."


# --- what is shown ----------------------------------------------------------------------------------------------

COLUMNS = {
    "settled": "settled after",
    "recovered": "recovered after",
    "peak": "peak after shift",
    "final": "final level",
    "chatter": "chatter",
    "bias_change": "bias change",
    "flips": "flips",
    "dead": "dead",
    "bias_range": "bias range",
}
STEPS = ("settled", "recovered")  # numbers of steps, or never


def cell(values: Sequence[float | None], steps: bool, spread: bool = True) -> str:
    """The mean, its standard deviation over several seeds, and how many have a value if not all do."""
    known = np.asarray([v for v in values if v is not None], float)
    if not known.size:
        return "never" if steps else "-"
    mean = f"{known.mean():.0f}" if steps else f"{known.mean():.3g}"
    more = f" ± {known.std(ddof=1):.{'0f' if steps else '1g'}}" if spread and known.size > 1 else ""
    return mean + more + (f" ({known.size} of {len(values)})" if known.size < len(values) else "")


def make_table(results: Sequence[Result], s: Settings, title: str) -> "Table":
    """A row for every arm."""
    from rich.table import Table

    shown = [key for key in COLUMNS if s.stream == "shift" or key not in ("recovered", "peak")]
    table = Table("balance", *(COLUMNS[key] for key in shown), title=title, title_justify="left")
    for result in results:
        values = {key: [getattr(summary, key) for summary in result.summaries] for key in shown}
        cells = (cell(v, key in STEPS, key in (*STEPS, "peak", "final")) for key, v in values.items())
        table.add_row(result.arm.name, *cells)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return table


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5AA6", "#222222")  # Okabe and Ito's
MANY = 4  # more arms than these are drawn without single steps


def draw(results: Sequence[Result], s: Settings, low: float, title: str, file: Path) -> None:
    """Max violation over steps as a PNG: thick a mean over steps and seeds, thin each step of the first seed."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 4.8), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for i, result in enumerate(results):
            look = dict(color=COLOURS[i % len(COLOURS)], linestyle=("-", (0, (4, 1)))[i // len(COLOURS) % 2])
            _curve(axes, result, s, len(results) <= MANY, look)
        axes.axhline(low, color="#555555", linestyle="--", linewidth=1.3, label=f"uniform random router, {low:.2g}")
        if s.stream == "shift":
            axes.axvline(s.shift_step, color="#999999", linestyle=":", linewidth=1.3, label="shift")
        _label(figure, axes, title)
        figure.savefig(file, dpi=130)


def _curve(axes: "Axes", result: Result, s: Settings, single: bool, look: Mapping[str, Any]) -> None:
    seen = np.stack([trace.violation for trace in result.traces])
    if single:
        axes.plot(seen[0], color=look["color"], alpha=0.18, linewidth=0.7)
    # what was before the shift has no part in a mean after it
    parts = np.split(seen.mean(0), [s.shift_step]) if s.stream == "shift" else [seen.mean(0)]
    mean = np.concatenate([centred_mean(part, s.window) for part in parts])
    axes.plot(mean, linewidth=1.9, label=result.arm.name, **look)


def centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over about `window` steps around each, fewer at the ends: step n never sees one before n / 2."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    before = np.minimum(window // 2, at // 2)
    after = np.minimum(before, at[::-1])
    return (sums[at + after + 1] - sums[at - before]) / (before + after + 1)


def _label(figure: "Figure", axes: "Axes", title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(yscale="log", xlabel="step", ylabel="max violation of a step's loads")
    axes.set_title(title, loc="left", fontsize=10)
    axes.margins(x=0.01)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    labels = [str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")]
    columns = max(1, min(len(labels), 120 // (max(map(len, labels)) + 8)))
    figure.legend(loc="outside lower center", ncols=columns)


def told(s: Settings, scores: str, seeds: int) -> str:
    """What was simulated, in a line."""
    what = f"E={s.experts}, top_k={s.top_k}, T={s.tokens}, {s.score}"
    numbers = ", ".join(f"{name}={getattr(s, name):g}" for name in STREAMS[s.stream])
    source = f"scores of {scores}" if scores else f"stream {s.stream} ({numbers}, noise={s.noise:g})"
    return f"{what}; {source}; {seeds} seed{'s' * (seeds > 1)}"


def as_json(results: Sequence[Result], s: Settings, scores: str) -> dict[str, Any]:
    """Settings and summaries as JSON values."""
    rows = [
        {"balance": r.arm.name, "sign": r.arm.sign, "seeds": [summary._asdict() for summary in r.summaries]}
        for r in results
    ]
    return {"settings": dataclasses.asdict(s), "scores": scores, "methods": rows}


# --- the command ------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What the command line asks for."""

    settings: Settings
    arms: list[Arm]
    recording: Recording | None


def asked() -> Asked:
    """The flags, checked before jax is loaded.

    Raises:
        ValueError: they are wrong.
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
        raise ValueError(f"--sign={','.join(flag.sign)} must be 1, or -1 to turn the balancing round; or both.")
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
    return Asked(s, arms, recording)


PICTURES = (".png", ".pdf", ".svg")


def _of_the_run(scores: Path, given: set[str]) -> dict[str, Any]:
    """`score` and `top_k` of the run that recorded the scores, where its config is there and no flag says otherwise."""
    file = scores.parent / "config.json"
    if scores == Path() or not file.is_file():
        return {}
    model = read_config(file)["model"]
    if zero := model.get("num_zero_experts", 0):
        raise ValueError(
            f"--scores={scores} has {zero} zero-computation experts, of which the simulator knows nothing."
        )
    return {name: model[name] for name in ("score", "top_k") if name not in given}


def _numbers(name: str, kind: type) -> list[Any]:
    texts: Any = flags.FLAGS[name].value
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise ValueError(f"--{name}={','.join(texts)} must have {article(kind)} between commas.") from None


def main(_: list[str]) -> None:
    """Simulate, print, draw."""
    flag = flags.FLAGS
    keep_compiled()
    try:
        s, arms, recording = asked()
    except ValueError as error:
        fail(str(error))
    from rich.console import Console

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    started = time.perf_counter()
    results = []
    for arm in arms:
        results.append(simulate(arm, s, flag.seeds, recording, flag.layer))
        console.print(f"{arm.name}: done after {time.perf_counter() - started:.0f} s", style="dim", markup=False)
    title, low, limit = told(s, flag.scores, flag.seeds), floor(s, recording), threshold(s, recording)
    console.print(make_table(results, s, title))
    console.print(
        f"settled: the mean of max violation over {s.window} steps stays below {limit:.3g}, the floor {low:.3g} of a "
        f"uniform random router + {s.within:g}; final level, chatter (root mean square of the change from step to "
        f"step), bias change (likewise), flips (share of experts whose bias turned) and dead (experts without a "
        f"token) are of the last {FINAL:.0%} of {s.steps} steps"
    )
    console.print(best(results, s))
    if flag.out:
        draw(results, s, low, title, output_of(flag.out, "--out"))
        console.print(f"drawn: {flag.out}")
    if flag.json:
        found = as_json(results, s, flag.scores) | {"floor": low, "threshold": limit}
        write_json(output_of(flag.json, "--json"), found)


def define_flags() -> None:
    """The flags; those of `Settings` have its names and defaults."""
    define: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for f in fields(Settings):
        define[type(f.default)](f.name, f.default, f.metadata["help"])
    flags.DEFINE_multi_string("balance", None, "METHOD[:OPTION=VALUE,...][+METHOD...], or none; may be repeated.")
    flags.DEFINE_list("rates", [], "Repeat every method with each of these rates.")
    flags.DEFINE_list("sign", ["1"], "-1 turns balancing the wrong way round; 1,-1 shows both.")
    flags.DEFINE_integer("seeds", 1, "How many runs of each, with different streams.")
    flags.DEFINE_string("scores", "", "Replay the recorded router logits in this folder instead.")
    flags.DEFINE_integer("layer", 0, "Which MoE layer of the recorded logits.")
    flags.DEFINE_string("out", "simulate.png", "Draw into this PNG; empty for none.")
    flags.DEFINE_string("json", "", "Also write the numbers to this file.")
    flags.mark_flags_as_required(["balance"])


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
