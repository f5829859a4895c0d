"""`python -m experiments.benchmarks.layer`: one MoE layer, forward + backward, against its peers and the limit.

    --shapes=a,b,c      a = (T 4096, d 512, E 64, h 256, k 6), b, c; on a GPU: gpu, v3_slice (the default there)
    --dtype=float32     or bfloat16 (the default on an accelerator): activations and expert weights; the router's
                        logits and scores are float32
    --skew=uniform      of the experts' loads; zipf; collapsed (every token chooses the same k)
    --peers=...         only some of the peers: transformers_deepseek_v3, transformers_qwen3_moe, torchtitan, maxtext
                        (whose dropless layer takes minutes per call on a CPU: `lax.ragged_dot` multiplies densely)
    --eager             also transformers' loop over experts
    --rounds=8 --json=FILE

Ours is `moe_jax.model.moe.MoE` under `jax.jit`: y and the gradients of x, router and expert weights for a given dy.
Every contestant gets the same numbers, and its outcome is compared with ours before anything is timed. The limit is
the useful FLOPs, 18 T k d h, over the best rate of a matmul of jax or torch in the same round, on a CPU in float32
whatever the dtype, elsewhere in the same dtype. Peers that are not installed are listed as absent;
`experiments.benchmarks.peers.INSTALL` has the command for each.
"""

import functools
import os
from collections.abc import Callable, Collection
from typing import Any, Literal

from absl import app, flags

from experiments.benchmarks import layer_peers, peers, problem, timing
from experiments.benchmarks.problem import Contestant, DType, Problem, Shape, Skew
from moe_jax.config.command import parse_flags

SHAPES = {
    "a": Shape(4096, 512, 64, 256, 6),
    "b": Shape(8192, 256, 16, 256, 2),
    "c": Shape(2048, 1024, 128, 512, 8),
    "gpu": Shape(16384, 2048, 64, 1408, 6),
    "v3_slice": Shape(16384, 7168, 32, 2048, 8),
    "tiny": Shape(64, 16, 8, 8, 2),
}
Score = Literal["sigmoid", "softmax"]
OURS = "moe_jax"
WITH_SOFTMAX = ("transformers_qwen3_moe", "maxtext")  # the others have sigmoid scores


def ours(shape: Shape, numbers: Problem, dtype: DType, score: Score) -> Contestant:
    """Our layer as a contestant, compiled by this call."""
    return layer_peers.in_jax(_forward_and_backward(), _module(shape, numbers, dtype, score), dtype)


def _module(shape: Shape, numbers: Problem, dtype: DType, score: Score) -> tuple[Any, Any, Any]:
    """The layer with the problem's weights, then x and dy, [1, T, d] each."""
    import jax.numpy as jnp
    from flax import nnx

    from moe_jax.config import ModelConfig
    from moe_jax.model.moe import MoE

    d, e, h, k = shape[1:]
    config = ModelConfig(
        embed_dim=d, num_experts=e, expert_ffw_dim=h, top_k=k, score=score, param_dtype=dtype, compute_dtype=dtype
    )
    layer = nnx.eval_shape(lambda: MoE(config, nnx.Rngs(0)))
    layer.router.set_value(jnp.asarray(numbers.router))
    layer.bias.set_value(jnp.zeros(e, jnp.float32))
    for name in ("gate", "up", "down"):
        getattr(layer, name).set_value(jnp.asarray(getattr(numbers, name), dtype))
    return layer, jnp.asarray(numbers.x, dtype)[None], jnp.asarray(numbers.dy, dtype)[None]


def _forward_and_backward() -> Callable[..., tuple]:
    """(layer, x, dy) -> y, and the gradients of x, router, gate, up, down."""
    import jax
    from flax import nnx

    from moe_jax import balance
    from moe_jax.model.forward import Pass, PerLayer
    from moe_jax.routing import Tokens

    no_inputs: Any = None  # a single layer reads none
    fwd = Pass(no_inputs, balance.make({}), PerLayer({}), jax.random.key(0), train=True)

    def run(layer: Any, x: Any, dy: Any) -> tuple:
        split: Any = nnx.split(layer, nnx.Param, ...)
        graph, params, rest = split

        def forward(params: Any, x: Any) -> Any:
            return nnx.merge(graph, params, rest)(x, Tokens(), fwd)[0]

        y, backward = jax.vjp(forward, params, x)
        weights, dx = backward(dy)
        return (y, dx, *(weights[name][...] for name in ("router", "gate", "up", "down")))

    return run


def matmuls(shape: Shape, dtype: DType, platform: str) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Matmuls by jax and torch that measure the machine's limit, like a layer's and square; and the FLOPs of each."""
    side, repeats, dtype = (2048, 1, "float32") if platform == "cpu" else (8192, 10, dtype)
    sizes = {"layer": (shape.tokens, shape.embed, 4 * shape.ffw), "square": (side, side, side)}
    runs: dict[str, Callable[[], Any]] = {}
    work: dict[str, float] = {}
    for kind, (m, k, n) in sizes.items():
        of_jax = functools.partial(_jax_matmul, m, k, n, dtype, repeats)
        of_torch = functools.partial(_torch_matmul, m, k, n, dtype, repeats, platform)
        here, _ = peers.gather({f"matmul_{kind}_jax": of_jax, f"matmul_{kind}_torch": of_torch})
        runs |= here
        work |= dict.fromkeys(here, 2.0 * m * k * n * repeats)
    return runs, work


def _jax_matmul(m: int, k: int, n: int, dtype: DType, repeats: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready([product(a, b) for _ in range(repeats)])


def _torch_matmul(m: int, k: int, n: int, dtype: DType, repeats: int, platform: str) -> Callable[[], Any]:
    torch = peers.torch_here(platform)
    where = dict(dtype=getattr(torch, dtype), device="cuda" if platform == "gpu" else "cpu")
    a, b = torch.ones(m, k, **where), torch.ones(k, n, **where)

    def run() -> None:
        for _ in range(repeats):
            a @ b
        if platform == "gpu":
            torch.cuda.synchronize()

    return run


def measure(
    shape: Shape,
    *,
    dtype: DType,
    skew: Skew,
    rounds: int,
    names: Collection[str] = layer_peers.PEERS,
    platform: str = "cpu",
) -> dict[str, Any]:
    """Measure one shape against the named peers; the result is ready for JSON.

    Raises:
        ValueError: a peer's outcome differs from ours.
    """
    numbers = problem.draw(shape, skew, dtype)
    task = layer_peers.Task(shape, numbers, dtype, platform)
    builders = layer_peers.builders(task)
    rivals, absent = peers.gather({name: builders[name] for name in names})
    entries = {OURS: ours(shape, numbers, dtype, "sigmoid"), **rivals}
    differences = compare(entries, lambda: ours(shape, numbers, dtype, "softmax"))
    memory = {name: entry.memory() for name, entry in entries.items()}
    limits, work = matmuls(shape, dtype, platform)
    times = timing.interleave({name: entry.run for name, entry in entries.items()} | limits, rounds)
    result = summary(shape, times, work, list(rivals))
    return result | {"absent": absent, "differences": differences, "memory_bytes": memory}


def compare(entries: dict[str, Contestant], with_softmax: Callable[[], Contestant]) -> dict[str, float]:
    """Every peer's largest relative difference from our layer with the same scores."""
    outcomes = {"sigmoid": entries[OURS].read(entries[OURS].run())}
    found = {}
    for name, entry in entries.items():
        score = "softmax" if name in WITH_SOFTMAX else "sigmoid"
        if score not in outcomes:
            same = with_softmax()
            outcomes[score] = same.read(same.run())
        if name != OURS:
            found[name] = problem.check(name, entry.read(entry.run()), outcomes[score], entry.tolerance)
    return found


def summary(shape: Shape, times: timing.Times, work: dict[str, float], rivals: list[str]) -> dict[str, Any]:
    """The ratios, the rate at the limit, and every time."""
    limit = timing.best_rates(times, work)
    to_limit = {name: timing.ratio_to_limit(times, name, shape.flops, limit) for name in (OURS, *rivals)}
    to_peer = {name: timing.ratio(times, OURS, name) for name in rivals}
    medians = {"ratio_to_limit": to_limit[OURS].median} | {f"ratio_to_{n}": r.median for n, r in to_peer.items()}
    return {
        "shape": shape._asdict(),
        **medians,
        "limit_gflops": timing.Spread.of([rate / 1e9 for rate in limit])._asdict(),
        "to_limit": {name: spread._asdict() for name, spread in to_limit.items()},
        "ours_over": {name: spread._asdict() for name, spread in to_peer.items()},
        "seconds": times,
    }


def as_text(name: str, result: dict[str, Any]) -> str:
    """The results of one shape as text."""
    shape = Shape(**result["shape"])
    limit = timing.Spread(**result["limit_gflops"])
    rows = []
    for contestant, to_limit in result["to_limit"].items():
        over = result["ours_over"].get(contestant)
        memory = result["memory_bytes"][contestant]
        rows.append(
            [
                contestant,
                timing.Spread.of([1e3 * s for s in result["seconds"][contestant]]).text(1),
                timing.Spread(**to_limit).text(),
                timing.Spread(**over).text() if over else "",
                f"{memory / 2**20:,.0f}" if memory is not None else "?",
            ]
        )
    head = ["", "ms", "of the limit", "ours over theirs", "peak MiB"]
    absent = [f"{peer} is absent: {why}" for peer, why in result["absent"].items()]
    title = f"{name} = ({shape.text()}), limit {limit.text(0)} GFLOP/s"
    return "\n".join([title, timing.table(head, rows), *absent])


def chosen(names: list[str]) -> dict[str, Shape]:
    """Shapes by name.

    Raises:
        ValueError: an unknown name, or none.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown or not names:
        wrong = ",".join(unknown or names)
        raise ValueError(f"--shapes={wrong} must be a list from {', '.join(SHAPES)}; write --shapes=a,b.")
    return {name: SHAPES[name] for name in names}


def rivals_of_flags() -> list[str]:
    """The peers that `--peers` and `--eager` select.

    Raises:
        ValueError: an unknown name.
    """
    names = [*flags.FLAGS.peers, *([layer_peers.EAGER] if flags.FLAGS.eager else [])]
    unknown = [name for name in names if name not in (*layer_peers.PEERS, layer_peers.EAGER)]
    if unknown:
        raise ValueError(f"--peers={unknown[0]} must be a list from {', '.join(layer_peers.PEERS)}.")
    return names


@timing.command
def main(flag: Any) -> None:
    """Check the flags, measure shape by shape, and print each result when it is known."""
    # jax and torch share the GPU's memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = rivals_of_flags()
    chosen(flag.shapes or ["a"])
    import jax

    platform = jax.devices()[0].platform
    shapes = chosen(flag.shapes or (["a", "b", "c"] if platform == "cpu" else ["gpu", "v3_slice"]))
    dtype: DType = flag.dtype or ("float32" if platform == "cpu" else "bfloat16")
    facts = timing.about(flag.rounds) | {"platform": platform, "dtype": dtype, "skew": flag.skew}
    print(f"{timing.heading(facts)}\n{dtype}, {flag.skew} loads, forward + backward\n", flush=True)
    results = {}
    for name, shape in shapes.items():
        result = measure(shape, dtype=dtype, skew=flag.skew, rounds=flag.rounds, names=names, platform=platform)
        results[name] = result | {key: facts[key] for key in ("rounds", "versions")}
        print(as_text(name, result) + "\n", flush=True)
        timing.save(flag.json, facts | {"shapes": results})


if __name__ == "__main__":
    timing.define_flags()
    flags.DEFINE_list("shapes", None, f"The shapes to measure: {', '.join(SHAPES)}.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "The dtype of activations and expert weights.")
    flags.DEFINE_enum("skew", "uniform", ["uniform", "zipf", "collapsed"], "The skew of the experts' loads.")
    flags.DEFINE_list("peers", list(layer_peers.PEERS), "The peers to time.")
    flags.DEFINE_bool("eager", False, "Also time transformers' loop over experts.")
    app.run(main, flags_parser=parse_flags)
