"""The closed loop of a balancer and a stream of router logits, and its measures."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_jax.simulator.arms import Arm
from moe_jax.simulator.settings import STREAMS, VOCAB_SIZE, Recording, Settings, config_of

if TYPE_CHECKING:
    from moe_jax.balance import Balancer
    from moe_jax.routing import Routing
    from moe_jax.simulator.streams import Stream


FINAL = 0.2  # the share of a run, at its end, that counts as its steady state
ROUTER_DIM = 32  # width of the fixed router of losses on the router's weights


class Trace(NamedTuple):
    """Measures of every step, float32 [steps].

    violation, dead: max violation of the loads, and the number of experts without a token. bias_range: largest minus
    smallest bias after the step. bias_change: root mean square of its change. flips: the share of experts whose bias
    changed in the other direction than in the step before.
    """

    violation: np.ndarray
    dead: np.ndarray
    bias_range: np.ndarray
    bias_change: np.ndarray
    flips: np.ndarray


class Summary(NamedTuple):
    """A run in numbers. Steps are counted from 0, those of recovery from the shift; None: not within the run.

    settled: the first step of the first window from which on the mean of max violation over a window stays below
        the threshold; before the shift, if there is one.
    recovered, peak: the same after the shift, and the highest max violation after it.
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


def make_stream(s: Settings, recording: Recording | None = None) -> "Stream":
    """The stream that the settings name, or the replay of a recording."""
    import jax.numpy as jnp

    from moe_jax.simulator import streams

    if recording is not None:
        logits, mask, ids = map(jnp.asarray, recording[:3])
        return streams.recorded(logits, mask, ids, s.sequences)
    offsets = getattr(streams, s.stream)(s.experts, *(getattr(s, name) for name in STREAMS[s.stream]))
    return streams.synthetic(offsets, s.tokens, s.experts, s.sequences, s.noise, VOCAB_SIZE)


def routed(balancer: "Balancer", s: Settings, logits: Any, tokens: Any, state: Any, key: Any) -> "Routing":
    """The routing of one layer, as in training."""
    from moe_jax.routing import RouterConfig, route

    select = None if balancer.select is None else functools.partial(balancer.select, state=state)
    return route(
        logits,
        RouterConfig(s.top_k, s.score, normalize_gates=s.top_k > 1),
        state["bias"],
        tokens=tokens,
        select=select,
        combine=balancer.combine,
        key=key,
        train=True,
    )


def closed_loop(
    balancer: "Balancer", stream: "Stream", s: Settings, sign: int = 1, layer: int = 0
) -> Callable[[int], Trace]:
    """(seed) -> Trace, compiled once: the stream is routed, and its loads update the balancer, as in a training step.

    `sign=-1` reverses the balancer's changes of bias and router.
    """
    import jax
    import jax.numpy as jnp

    from moe_jax.balance.measures import bias_range, dead_experts, flip_rate, max_violation
    from moe_jax.dispatch import responses

    # both fixed, for losses on them: the router, and first matrices of experts
    router = jax.random.normal(jax.random.key(0), (ROUTER_DIM, s.experts), jnp.float32)
    first = jax.random.normal(jax.random.key(1), (s.experts, ROUTER_DIM, ROUTER_DIM), jnp.float32)

    def forward(offset: Any, logits: Any, tokens: Any, state: Any, key: Any) -> tuple[Any, Any]:
        routing = routed(balancer, s, logits + offset[None], tokens, state, key)
        statistics = balancer.observe(routing)
        return balancer.loss(routing, statistics, state, router, lambda x: responses(x, first)), statistics

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
        zeros = jnp.zeros(s.experts, jnp.float32)
        no_loads = jnp.zeros(s.experts, jnp.int32)
        start = stream.init(world_key), zeros, balancer.init(s.experts, layer), no_loads, zeros
        steps = jnp.arange(s.steps, dtype=jnp.int32), jax.random.split(steps_key, s.steps)
        return jax.lax.scan(step, start, steps)[1]

    return lambda seed: Trace(*map(np.asarray, run(seed)))


def simulate(arm: Arm, s: Settings, seeds: int = 1, recording: Recording | None = None, layer: int = 0) -> Result:
    """Run an arm in the closed loop, once for each seed; all arms see the same streams.

    Raises:
        ValueError: the arm does not fit the settings.
    """
    from moe_jax import balance

    known = {} if recording is None else dict(num_layers=recording.num_layers, vocab_size=int(recording.ids.max()) + 1)
    config = config_of(s, arm.entries, **known)
    run = closed_loop(balance.make(config.balance, config.model), make_stream(s, recording), s, arm.sign, layer)
    traces = [run(seed) for seed in range(s.seed, s.seed + seeds)]
    return Result(arm, traces, [summarize(trace, s, threshold(s, recording)) for trace in traces])


# --- numbers ----------------------------------------------------------------------------------------------------


def floor(s: Settings, recording: Recording | None = None) -> float:
    """The max violation that a uniform random router has by chance, with the tokens of a step."""
    from moe_jax.balance.measures import violation_floor

    tokens = s.tokens if recording is None else round(float(recording.mask.sum(1).mean()))
    return float(violation_floor(tokens, s.top_k, s.experts))


def threshold(s: Settings, recording: Recording | None = None) -> float:
    """The level below which a moving mean of max violation counts as settled."""
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
    """The summary of a trace; `limit` is the level below which it counts as settled."""
    before = trace.violation
    after = None
    if s.stream == "shift":
        before = trace.violation[: s.shift_step]
        after = trace.violation[s.shift_step :]
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


def best_arm(results: Sequence[Result], s: Settings) -> str:
    """A sentence with the arm of the lowest final level, among those that settled (and recovered) with every seed."""

    def steady(result: Result) -> bool:
        needed = ("settled", "recovered") if s.stream == "shift" else ("settled",)
        return all(getattr(summary, key) is not None for summary in result.summaries for key in needed)

    def level(result: Result) -> float:
        return float(np.mean([summary.final for summary in result.summaries]))

    found = sorted(filter(steady, results), key=level)
    if not found:
        return f"None settled within {s.steps} steps; try other rates, or more --steps."
    among = f"of the {len(found)} of {len(results)} that settled"
    return f"Lowest final level {among}: {found[0].arm.name}, {level(found[0]):.3g}."
