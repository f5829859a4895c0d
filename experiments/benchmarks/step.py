"""`python -m experiments.benchmarks.step`: a train step against transformers on torch, in tokens per second.

    --size=31m                               the model and the batch: demo (1.4M parameters), 31m or 150m
    --num_layers=8 --embed_dim=256 ...       one of its sizes
    --dtype=float32                          float32 or bfloat16, the dtype of products; weights stay float32
    --attribute                              the time of the parts of our step, instead of the peers
    --against=COMMIT                         our step at that commit of this clone, instead of the peers
    --rounds=8 --json=FILE

A step is forward, backward, clipping by the norm of the gradient, AdamW (torch's fused one), and reading the loss. Each
peer is compared with a config of ours that does the same work:

* `transformers_qwen3_moe` is the same model: softmax scores, grouped-query attention with normalised queries and
  keys, no shared expert. It gets our weights, and the losses of the first three steps must agree.
* `transformers_deepseek_v3` has sigmoid scores and one shared expert, like our config for it, but multi-head latent
  attention where ours is grouped-query. Its heads have the same width, and its latent gives attention the same number
  of parameters (except for the norm of the latent) and the same FLOPs of scores and mixing. The losses can only be
  compared as those of two random models, both near ln V.

In bfloat16 each peer takes part twice: with bfloat16 weights and moments, and with float32 weights under autocast, as
ours. The losses of the same model then agree as far as bfloat16 does.

Our steps run in processes of their own, as our commands run them; the peers share one, as torch runs by default.
Neither side balances its experts. Our step also checks that everything is finite and reports loads and its other
metrics; the peers have no masks and no document boundaries.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments.benchmarks import commits, layer, peers, problem, profile, step_peers, timing
from moe_jax.config import Config, default, validate
from moe_jax.config.command import parse_flags

SIZES = dict(
    num_layers=8, embed_dim=256, num_heads=8, num_experts=16, top_k=2, expert_ffw_dim=256, vocab_size=8192
)  # of the model
BATCH = dict(batch_size=8, sequence_length=256)
# --size -> what differs from SIZES and BATCH
NAMED_SIZES: dict[str, dict[str, int]] = {
    "demo": dict(
        **dict(num_layers=4, embed_dim=96, num_heads=4, top_k=4, expert_ffw_dim=48, vocab_size=264),
        **dict(batch_size=8, sequence_length=128),
    ),
    "31m": {},
    "150m": dict(num_layers=12, embed_dim=512, expert_ffw_dim=448),
}
QWEN, DEEPSEEK = "transformers_qwen3_moe", "transformers_deepseek_v3"
OURS = {QWEN: "moe_jax_like_qwen3_moe", DEEPSEEK: "moe_jax_like_deepseek_v3"}
# --dtype -> relative difference allowed in the first steps of the same model in two frameworks
SAME_LOSS = {"float32": 1e-4, "bfloat16": 2**-7}
# --dtype -> how the peers compute in it, see `step_peers`
PRECISIONS: dict[str, tuple[step_peers.Precision, ...]] = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "autocast"),
}
SAME_SIZE = 1e-2  # relative difference allowed in the numbers of parameters, because the latent's width is an integer
NEAR_RANDOM = 0.05  # relative difference from ln V allowed in the losses of random models
CHECKED_STEPS = 3
LIMIT_ROUNDS = 5
HERE = "this tree"


class Trainer(NamedTuple):
    """Our model in training.

    step: takes a step, and returns its loss. num_params, params: the parameters, as they were before the first step.
    program: the compiled step as text.
    """

    step: Callable[[], float]
    num_params: int
    params: Any
    program: Callable[[], str] = str


def config_like(peer: str, sizes: dict[str, int], batch: dict[str, int], dtype: str = "float32") -> Config:
    """Our config that does the same work as the peer; see `settings_like`."""
    return validate(default(**settings_like(peer, sizes, batch, dtype)))


def settings_like(peer: str, sizes: dict[str, int], batch: dict[str, int], dtype: str) -> dict[str, Any]:
    """What our config that does the same work as the peer changes of the defaults.

    Raises:
        ValueError: the sizes do not fit together.
    """
    likes: dict[str, dict[str, Any]] = {
        QWEN: dict(score="softmax", qk_norm="head"),
        DEEPSEEK: dict(num_shared_experts=1),
    }
    heads = sizes["num_heads"]
    if heads % 2 or sizes["embed_dim"] % (4 * heads):
        raise ValueError(
            f"--num_heads={heads} must be even, and 4 x num_heads must divide --embed_dim={sizes['embed_dim']}; "
            "try 8 and 256."
        )
    shape = dict(num_kv_heads=heads // 2, head_dim=sizes["embed_dim"] // heads, ffw_dim=sizes["expert_ffw_dim"])
    model: dict[str, Any] = {**sizes, **shape, **likes[peer], "compute_dtype": dtype}
    optimizer = dict(schedule="constant", learning_rate=1e-3)
    return {**batch, "mesh": dict(data=1), "model": model, "optimizer": optimizer}


def random_batch(config: Config, seed: int = 0) -> Any:
    """A batch with one document per row, whose tokens are drawn uniformly; every target counts."""
    from moe_jax.data.batches import Batch

    rows = config.batch_size
    length = config.sequence_length
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, config.model.vocab_size, (rows, length + 1), np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        mask=np.ones((rows, length), bool),
        domain=np.zeros(rows, np.int32),
        num_bytes=np.full(rows, length, np.int32),
    )


def trainer(config: Config) -> Trainer:
    """Our train step as a user runs it, jitted with a donated state."""
    import jax

    from moe_jax.training.compile import make_train_step
    from moe_jax.training.state import init_state, step_key

    state = init_state(config)
    key = step_key(config)
    batch = jax.device_put(random_batch(config))
    params = jax.tree.map(np.asarray, state.params)
    run = make_train_step(config)

    def step() -> float:
        nonlocal state
        state, metrics = run(state, batch, key)
        jax.block_until_ready(state.params)
        return float(metrics["loss"])

    def program() -> str:
        return run.lower(state, batch, key).compile().as_text()

    return Trainer(step, sum(a.size for a in jax.tree.leaves(params)), params, program)


class Opponent(NamedTuple):
    """A peer that is installed, by the name of its rival among OURS, and how it computes."""

    rival: str
    precision: step_peers.Precision
    peer: step_peers.Peer


@contextlib.contextmanager
def in_own_process(settings: dict[str, Any]) -> Iterator[Trainer]:
    """A trainer in a process of its own, as our commands run it; the process ends with the block."""
    import jax

    from moe_jax.training.state import init_state

    params = jax.tree.map(np.asarray, init_state(validate(default(**settings))).params)
    with commits.Remote(commits.ROOT, settings) as remote:
        yield Trainer(remote.step, sum(a.size for a in jax.tree.leaves(params)), params)


def opponents(
    ours: dict[str, Trainer], sizes: dict[str, int], batch: dict[str, int], platform: str, dtype: str
) -> tuple[dict[str, Opponent], dict[str, str]]:
    """The installed peers, and why each of the other peers is absent."""
    configs = {peer: config_like(peer, sizes, batch, dtype) for peer in OURS}
    data = random_batch(configs[QWEN])
    tokens = data.tokens, data.targets

    def build(peer: str, precision: step_peers.Precision) -> Opponent:
        if peer == QWEN:
            made = step_peers.qwen3_moe(configs[QWEN], ours[QWEN].params, *tokens, platform, precision)
        else:
            made = step_peers.deepseek_v3(configs[DEEPSEEK], *tokens, platform, precision)
        return Opponent(peer, precision, made)

    builders = {}
    for peer in OURS:
        for precision in PRECISIONS[dtype]:
            name = peer if precision == "float32" else f"{peer}_{precision}"
            builders[name] = functools.partial(build, peer, precision)
    return peers.gather(builders)


def compare(
    peer: str, ours: Trainer, theirs: step_peers.Peer, vocab_size: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Take a few steps of both; return their numbers of parameters and their losses.

    Raises:
        ValueError: the two do not do the same work.
    """
    losses = [(ours.step(), theirs.step()) for _ in range(CHECKED_STEPS)]
    if abs(theirs.num_params / ours.num_params - 1) > SAME_SIZE:
        raise ValueError(
            f"{peer} has {theirs.num_params:,} parameters and moe_jax {ours.num_params:,}, which must be nearly equal; "
            "choose other sizes."
        )
    worst = max(abs(a / b - 1) for a, b in losses)
    if peer == DEEPSEEK:
        worst = max(abs(loss / math.log(vocab_size) - 1) for loss in losses[0])
    if not worst <= (NEAR_RANDOM if peer == DEEPSEEK else SAME_LOSS[dtype]):
        pairs = ", ".join(f"{a:.5f} and {b:.5f}" for a, b in losses)
        raise ValueError(f"the losses of moe_jax and {peer} are {pairs}: not the same training, nothing is timed.")
    return {"losses": losses, "params": {"moe_jax": ours.num_params, peer: theirs.num_params}}


def measure(
    sizes: dict[str, int], batch: dict[str, int], *, rounds: int, platform: str = "cpu", dtype: str = "float32"
) -> dict[str, Any]:
    """Compare and time everything; the result is ready for JSON.

    Raises:
        ValueError: a peer does not do the same work.
    """
    settings = {peer: settings_like(peer, sizes, batch, dtype) for peer in OURS}
    checked = {}
    with contextlib.ExitStack() as processes:
        ours = {peer: processes.enter_context(in_own_process(own)) for peer, own in settings.items()}
        here, absent = opponents(ours, sizes, batch, platform, dtype)
        for name, opponent in here.items():
            with in_own_process(settings[opponent.rival]) as fresh:  # as untrained as the peer
                checked[name] = compare(opponent.rival, fresh, opponent.peer, sizes["vocab_size"], dtype)
        contestants = {OURS[peer]: entry.step for peer, entry in ours.items()}
        contestants |= {name: opponent.peer.step for name, opponent in here.items()}
        times = timing.interleave(contestants, rounds)
    to_peer = {name: timing.ratio(times, OURS[opponent.rival], name) for name, opponent in here.items()}
    return {
        **{f"ratio_to_{peer}": spread.median for peer, spread in to_peer.items()},
        "num_params": {OURS[peer]: entry.num_params for peer, entry in ours.items()},
        "tokens_per_second": _speeds(times, batch),
        "ours_over": {peer: spread._asdict() for peer, spread in to_peer.items()},
        "compared": checked,
        "absent": absent,
        "seconds": times,
    }


def _speeds(times: timing.Times, batch: dict[str, int]) -> dict[str, dict[str, float]]:
    num_tokens = batch["batch_size"] * batch["sequence_length"]
    return {name: timing.Spread.of([num_tokens / s for s in seconds])._asdict() for name, seconds in times.items()}


def as_text(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = []
    for name, speed in result["tokens_per_second"].items():
        over = result["ours_over"].get(name)
        rows.append([name, timing.Spread(**speed).text(0), timing.Spread(**over).text() if over else ""])
    absent = [f"{peer} is absent: {why}" for peer, why in result["absent"].items()]
    params = ", ".join(f"{name} {n / 1e6:.1f}M" for name, n in result["num_params"].items())
    return "\n".join([f"parameters: {params}", timing.table(["", "tokens/s", "ours over theirs"], rows), *absent])


# --- two commits ------------------------------------------------------------------------------------------------


def against(
    commit: str, sizes: dict[str, int], batch: dict[str, int], *, rounds: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Time our step here and at another commit, each in a process of its own, in interleaved rounds.

    Raises:
        ValueError: no such commit, or a step that fails there.
    """
    settings = settings_like(DEEPSEEK, sizes, batch, dtype)
    with (
        commits.checked_out(commit) as folder,
        commits.Remote(commits.ROOT, settings) as here,
        commits.Remote(folder, settings) as there,
    ):
        times = timing.interleave({HERE: here.step, commit: there.step}, rounds)
    return {
        "ours_over": {commit: timing.ratio(times, HERE, commit)._asdict()},
        "tokens_per_second": _speeds(times, batch),
        "losses": {HERE: here.losses, commit: there.losses},
        "seconds": times,
    }


def commits_as_text(result: dict[str, Any]) -> str:
    """The comparison of two commits as text, with the losses of the first steps."""
    rows = []
    for name, speed in result["tokens_per_second"].items():
        over = result["ours_over"].get(name)
        losses = " ".join(f"{loss:.6f}" for loss in result["losses"][name][:CHECKED_STEPS])
        rows.append([name, timing.Spread(**speed).text(0), timing.Spread(**over).text() if over else "", losses])
    return timing.table(["", "tokens/s", "here over there", "first losses"], rows)


# --- the parts of our step --------------------------------------------------------------------------------------


def attribute(sizes: dict[str, int], batch: dict[str, int], *, rounds: int, dtype: str = "float32") -> dict[str, Any]:
    """Where the time of our step goes: seconds by part and by operation, and the rate of parts over the limit's."""
    config = config_like(DEEPSEEK, sizes, batch, dtype)
    entry = trainer(config)
    found = profile.profile(entry.step, profile.parts_of(entry.program()), rounds)
    flops = profile.flops_of_parts(config)
    limit = _limit(config)
    rates = {part: flops[part] / found.parts[part] for part in flops if found.parts[part]}
    return {
        "seconds": {"step": found.step, **found.parts},
        "operations": [[part, name, seconds] for (part, name), seconds in found.operations.items()],
        "processors": found.processors,
        "limit_gflops": limit / 1e9,
        "to_limit": {part: rate / limit for part, rate in rates.items()}
        | {"step": sum(flops.values()) / found.step / limit},
    }


def _limit(config: Config) -> float:
    """FLOPs per second of the best float32 matmul of jax or torch, as the layer's benchmark measures it."""
    import jax

    m = config.model
    tokens = config.batch_size * config.sequence_length
    shape = problem.Shape(tokens, m.embed_dim, m.num_experts, m.expert_ffw_dim, m.top_k)
    runs, work = layer.matmuls(shape, "float32", jax.devices()[0].platform)
    return max(timing.best_rates(timing.interleave(runs, LIMIT_ROUNDS), work))


def parts_as_text(result: dict[str, Any], most: int = 16) -> str:
    """The attribution as text, with the `most` expensive operations."""
    step = result["seconds"]["step"]
    rows = []
    for part, seconds in result["seconds"].items():
        rate = result["to_limit"].get(part)
        rows.append([part, f"{1e3 * seconds:.1f}", f"{seconds / step:.0%}", "" if rate is None else f"{rate:.2f}"])
    largest = sorted(result["operations"], key=lambda one: -one[2])[:most]
    operations = [[f"{part}: {name}", f"{1e3 * s:.1f}", f"{s / step:.0%}"] for part, name, s in largest]
    return "\n".join(
        [
            f"{result['processors']:.2f} processors at work on average; limit {result['limit_gflops']:.0f} GFLOP/s",
            timing.table(["", "ms per step", "of the step", "of the limit"], rows),
            "",
            timing.table(["largest operations", "ms per step", "of the step"], operations),
        ]
    )


def define_size_flags() -> None:
    """Define `--size`, and a flag for every entry of SIZES and BATCH."""
    flags.DEFINE_enum("size", "31m", list(NAMED_SIZES), "The model and the batch.")
    for name in SIZES | BATCH:
        flags.DEFINE_integer(name, None, f"The model's or the batch's {name}, if not that of --size.", lower_bound=1)


def sizes_of_flags() -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of the model and of the batch that the flags select."""
    flag = flags.FLAGS
    given = {name: getattr(flag, name) for name in SIZES | BATCH if getattr(flag, name) is not None}
    sizes = SIZES | BATCH | NAMED_SIZES[flag.size] | given
    return {name: sizes[name] for name in SIZES}, {name: sizes[name] for name in BATCH}


@timing.command
def main(flag: Any) -> None:
    """Check the flags, compare, time, and print the result."""
    if flag.attribute and flag.against:
        raise ValueError(f"--attribute and --against={flag.against} are two different comparisons; leave one out.")
    sizes, batch = sizes_of_flags()
    config_like(QWEN, sizes, batch)
    facts = timing.about(flag.rounds) | {"dtype": flag.dtype, "sizes": sizes | batch}
    print(f"{timing.heading(facts)}\n", flush=True)
    if flag.against:
        result = against(flag.against, sizes, batch, rounds=flag.rounds, dtype=flag.dtype)
        print(commits_as_text(result))
    else:
        import jax

        facts["platform"] = jax.devices()[0].platform
        if flag.attribute:
            result = attribute(sizes, batch, rounds=flag.rounds, dtype=flag.dtype)
            print(parts_as_text(result))
        else:
            result = measure(sizes, batch, rounds=flag.rounds, platform=facts["platform"], dtype=flag.dtype)
            print(as_text(result))
    timing.save(flag.json, facts | result)


if __name__ == "__main__":
    timing.define_flags()
    define_size_flags()
    flags.DEFINE_enum("dtype", "float32", list(PRECISIONS), "The dtype of products.")
    flags.DEFINE_bool("attribute", False, "Time the parts of our step instead of the peers.")
    flags.DEFINE_string("against", "", "A commit of this clone whose step is timed instead of the peers.")
    app.run(main, flags_parser=parse_flags)
