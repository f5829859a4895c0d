"""`python -m moe_jax.evaluate --workdir=DIR`: the whole held-out set, per domain; nothing moves.

Uses the config the run was started with; `--config=FILE` evaluates its checkpoint under another, for other
data or another batch size, say. `--data=DIR` takes another prepared corpus, as one made with a converted model's
tokenizer, `--sequence_length=N` longer windows, `--eval_sequences=N` only the first N sequences of each domain. On a
cluster the same command runs in every process, as training does; on other devices than the run's, the mesh is
data-parallel unless a config says otherwise.

`--specialisation` adds which experts each domain uses and which are used together (specialisation.json, .png);
`--ablate` what the model loses without its shared or its best routed experts (ablation.json). Where the run stored
its routing at several evaluations (`measure_every`), how early it settled is told too (saturation.json).
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from moe_jax.config import DROPLESS, Config, MeshConfig, num_moe_layers, resolve, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.runtime import processes
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import is_writable, sha256_of, workdir_of, write_json, write_whole
from moe_jax.runtime.prefetch import prefetched
from moe_jax.runtime.signals import Abandoned, Stopped, never, noted
from moe_jax.runtime.watchdog import Watchdog
from moe_jax.runtime.workdir import TOKENIZER, config_of_run, identity_of, read_run

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.analysis.specialisation import Survey
    from moe_jax.balance import Balancer
    from moe_jax.data import Batch, Corpus
    from moe_jax.training.state import TrainState
    from moe_jax.training.step import Evaluation


def evaluate(
    config: Config,
    state: "TrainState",
    corpus: "Corpus",
    mesh: "Mesh | None" = None,
    watchdog: Watchdog | None = None,
    balancer: "Balancer | None" = None,
    stopped: Stopped = never,
) -> dict[str, float | int]:
    """Loss, bits per byte (all and per domain) and balance over the held-out documents.

    Bits per byte is nats / (ln 2 x UTF-8 bytes of the targets): comparable across tokenizers. Violations
    count loads over the whole set (MaxVio_global), per layer, then mean and worst over layers.

    Args:
        config: of the model and the batches.
        state: on the mesh.
        corpus: its "validation" streams are used.
        mesh: the config's on all devices if None. With several processes each loads only its rows, and all
            get the same numbers.
        watchdog: sees every batch.
        balancer: chooses experts in place of the config's; it reads the same state.
        stopped: whether to give up, as in `held_out`.

    Returns:
        eval/loss, eval/bits_per_byte, eval/bits_per_byte/<domain>; with experts also what `metrics.of_loads` gives
        of the whole set, as eval/max_violation; eval/max_violation/<domain>, mean over layers;
        eval/sequence_max_violation, the mean over layers and sequences of a sequence's own, and
        eval/sequence_violation_floor, what chance would make of it; eval/domain_information, bits that a copy's
        expert tells about its domain, mean over layers; with a bias eval/bias_changed, the share of the decisions
        that would be others without it; where copies can be dropped eval/drop_rate, their share, mean over layers.

    Raises:
        Abandoned: as `held_out`.
    """
    import jax

    from moe_jax.mesh import make_mesh
    from moe_jax.training.step import make_eval_step

    mesh, watchdog = mesh or make_mesh(config.mesh), watchdog or Watchdog(0)
    eval_step = make_eval_step(config, mesh, balancer)
    totals = Totals(len(corpus.domains), config.model.num_experts)
    for number, batch in enumerate(held_out(config, corpus, mesh, stopped)):
        work = watchdog.watch("evaluation batch", number)
        result = eval_step(state, batch)
        work.result = result.nats
        totals.add(jax.device_get(result))
    return totals.losses(corpus.domains) | totals.balance(corpus.domains)


def held_out(config: Config, corpus: "Corpus", mesh: "Mesh", stopped: Stopped = never) -> Iterator["Batch"]:
    """The held-out batches on the mesh, of a micro-batch's size; each process loads only its rows.

    Raises:
        Abandoned: `stopped()` names a signal when a batch is due; in every process at the same one.
    """
    from moe_jax.data import evaluation_batches
    from moe_jax.mesh import batch_sharding

    batch_size = config.batch_size // config.micro_batches
    batches = evaluation_batches(
        corpus,
        batch_size=batch_size,
        sequence_length=config.sequence_length,
        max_sequences_per_domain=config.data.eval_sequences,
    )

    def load(number: int) -> "Batch":
        rows = functools.partial(batches.batch_at, number)
        return processes.from_rows(rows, batch_size, batch_sharding(mesh))

    for _, batch in prefetched(load, 0, len(batches)):
        if number := stopped():
            raise Abandoned(number)
        yield batch


class Totals:
    """What evaluation adds up on the host, in float64 and int64: by domain, by layer, and over sequences."""

    def __init__(self, num_domains: int, num_experts: int) -> None:
        import numpy as np

        self.num_experts = num_experts  # those that compute; loads of zero-computation experts come after them
        self.nats, self.num_bytes = np.zeros(num_domains), np.zeros(num_domains, np.int64)
        self.lengths: collections.Counter[int] = collections.Counter()  # valid tokens of a sequence -> sequences
        self.by_sequence: dict[str, float] = collections.defaultdict(float)  # of violations over layers, the sums
        self.loads: Any = None  # [D, L, E]
        self.kept = self.chosen = 0  # decisions that the bias does not change, and all
        self.dropped: Any = None  # [L], copies that no expert saw

    def add(self, sums: "Evaluation") -> None:
        """Count one batch, fetched."""
        import numpy as np

        real = sums.domain >= 0
        domain = sums.domain[real]
        np.add.at(self.nats, domain, sums.nats[real].astype(np.float64))
        np.add.at(self.num_bytes, domain, sums.num_bytes[real])
        self.lengths.update(sums.tokens[real].tolist())
        if sums.row_loads is not None:
            self._add_loads(domain, sums.row_loads[real][..., : self.num_experts])
        if sums.kept is not None and sums.chosen is not None:
            self.kept, self.chosen = self.kept + int(sums.kept.sum()), self.chosen + int(sums.chosen.sum())
        if sums.dropped is not None:
            self.dropped = (0 if self.dropped is None else self.dropped) + sums.dropped.astype(np.int64)

    def _add_loads(self, domain: Any, row_loads: Any) -> None:
        import numpy as np

        from moe_jax.balance import measures

        if self.loads is None:
            self.loads = np.zeros((len(self.nats), *row_loads.shape[1:]), np.int64)
        np.add.at(self.loads, domain, row_loads)
        for name, values in measures.violations(row_loads).items():  # [B, L]
            self.by_sequence[name] += float(values.mean(-1).astype(np.float64).sum())

    @property
    def num_tokens(self) -> int:
        """The valid targets."""
        return sum(length * count for length, count in self.lengths.items())

    def losses(self, domains: Sequence[str]) -> dict[str, float]:
        """eval/loss and bits per byte, of all and of each domain with text."""
        numbers = {
            "eval/loss": float(self.nats.sum()) / self.num_tokens,
            "eval/bits_per_byte": float(self.nats.sum()) / (math.log(2) * int(self.num_bytes.sum())),
        }
        for name, nats, num_bytes in zip(domains, self.nats, self.num_bytes, strict=True):
            if num_bytes:
                numbers[f"eval/bits_per_byte/{name}"] = float(nats) / (math.log(2) * int(num_bytes))
        return numbers

    def balance(self, domains: Sequence[str]) -> dict[str, float | int]:
        """How even loads are, in all, by domain and by sequence; nothing for a dense model."""
        from moe_jax.balance import measures

        if self.loads is None:
            return {}
        whole = measures.of_loads(self.loads.sum(0), self.num_experts, self.num_tokens)
        numbers = {f"eval/{name}": value.item() for name, value in whole.items()}
        for name, loads in zip(domains, self.loads, strict=True):
            if loads.any():
                measured = measures.over_layers(measures.violations(loads))
                numbers |= {f"eval/{measure}/{name}": value.item() for measure, value in measured.items()}
                numbers[f"eval/violation_floor/{name}"] = float(self._floor(loads))
        information = measures.mutual_information(self.loads.swapaxes(0, 1))
        numbers["eval/domain_information"] = float(information.mean())
        numbers |= self._by_sequence()
        if self.dropped is not None:
            numbers["eval/drop_rate"] = float((self.dropped / self.loads.sum((0, 2))).mean())
        return numbers | ({"eval/bias_changed": 1.0 - self.kept / self.chosen} if self.chosen else {})

    def _by_sequence(self) -> dict[str, float]:
        import numpy as np

        from moe_jax.balance import measures

        lengths, counts = np.array(list(self.lengths)), np.array(list(self.lengths.values()))
        floor = np.asarray(measures.violation_floor(lengths, self._copies, self.num_experts), np.float64)
        numbers = {f"eval/sequence_{name}": total / int(counts.sum()) for name, total in self.by_sequence.items()}
        return numbers | {"eval/sequence_violation_floor": float((floor * counts).sum() / counts.sum())}

    @property
    def _copies(self) -> float:
        """How many real experts a token has in a layer, on average."""
        return self.loads.sum() / (self.loads.shape[1] * self.num_tokens)

    def _floor(self, loads: Any) -> Any:
        """The violation floor of loads [L, E]: at as many tokens as made them."""
        from moe_jax.balance import measures

        tokens = loads.sum() / (len(loads) * self._copies)
        return measures.violation_floor(tokens, self._copies, self.num_experts)


def store_routing(
    config: Config,
    state: "TrainState",
    corpus: "Corpus",
    mesh: "Mesh",
    workdir: Path,
    watchdog: Watchdog | None = None,
    stopped: Stopped = never,
) -> None:
    """Write which experts the tokens of the first held-out batch have now, to workdir/routing/<step>.npy.

    uint16 [L, T, S], by process 0, if `config.measure_every` > 0; every process must call it. What the evaluate
    command computes router saturation from.
    """
    import jax

    from moe_jax.analysis.specialisation import make_choices_step, store_ids

    if not config.measure_every:
        return
    work = (watchdog or Watchdog(0)).watch("routing of evaluation", 0)
    chosen = make_choices_step(config, mesh)(state, next(held_out(config, corpus, mesh, stopped))).expert_ids
    work.result = chosen
    if processes.index() == 0:
        store_ids(workdir, int(state.step), jax.device_get(chosen), _name_of_first_batch(config, corpus))


def _name_of_first_batch(config: Config, corpus: "Corpus") -> str:
    """A name that is another wherever the first held-out batch may have other tokens: all that decides them."""
    rows = config.batch_size // config.micro_batches
    decides = [corpus.fingerprint, config.data.eval_sequences, rows, config.sequence_length]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def survey(config: Config, state: "TrainState", corpus: "Corpus", mesh: "Mesh", stopped: Stopped = never) -> "Survey":
    """Which experts each held-out domain uses, and which are used together."""
    import jax
    import numpy as np

    from moe_jax.analysis.specialisation import Survey, make_choices_step

    step, layers, experts = make_choices_step(config, mesh), num_moe_layers(config.model), config.model.num_experts
    loads = np.zeros((len(corpus.domains), layers, experts), np.int64)
    pairs = np.zeros((layers, experts, experts), np.int64)
    for batch in held_out(config, corpus, mesh, stopped):
        domain, row_loads, new = jax.device_get(step(state, batch)[1:])
        np.add.at(loads, domain[domain >= 0], row_loads[domain >= 0])
        pairs += new
    return Survey(corpus.domains, loads, pairs)


def ablate(
    config: Config,
    state: "TrainState",
    corpus: "Corpus",
    mesh: "Mesh",
    whole: Mapping[str, float | int],
    stopped: Stopped = never,
) -> dict[str, dict[str, float | int]]:
    """Loss and bits per byte of the model as it is, whose evaluation is `whole`, and of its variants.

    Raises:
        ValueError: there is nothing to take away.
    """
    from moe_jax.analysis.knockout import variants

    found = {"as it is": dict(whole)}
    for name, variant in variants(config, state).items():
        found[name] = evaluate(variant.config, variant.state, corpus, mesh, balancer=variant.balancer, stopped=stopped)
    keys = ("eval/loss", "eval/bits_per_byte")
    return {name: {key.removeprefix("eval/"): result[key] for key in keys} for name, result in found.items()}


def restore_run(config: Config, workdir: Path, mesh: "Mesh") -> tuple["TrainState", dict[str, Any]] | None:
    """The newest checkpoint of the workdir as (state, extra), on this mesh; None if there is none."""
    from moe_jax.runtime import checkpoint
    from moe_jax.training.state import abstract_state

    options = config.checkpoint
    target = abstract_state(config, mesh)
    return checkpoint.restore(workdir / "checkpoints", target, verify=options.verify, fallback=options.fallback)


def restore_model(config: Config, workdir: Path, mesh: "Mesh") -> "TrainState | None":
    """The newest checkpoint's model, of a run or converted, on this mesh, without an optimizer; None if there is none.

    Where the checkpoint holds weights only, balancing remembers what it does before step 0.
    """
    import jax
    import jax.numpy as jnp

    from moe_jax.mesh import replicated
    from moe_jax.runtime import checkpoint
    from moe_jax.training.state import TrainState, abstract_state, initial_balance

    options, target = config.checkpoint, abstract_state(config, mesh)
    fields = {name: getattr(target, name) for name in ("step", "params", "bias", "balance")}
    found = checkpoint.restore_weights(
        workdir / "checkpoints", fields, verify=options.verify, fallback=options.fallback
    )
    if found is None:
        return None
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    fresh = {"step": zero, "balance": functools.partial(initial_balance, config), "skipped": zero, "stuck": zero}
    missing = {name: make for name, make in fresh.items() if name not in found[0]}
    made = jax.jit(lambda: {name: make() for name, make in missing.items()}, out_shardings=replicated(mesh))()
    return TrainState(**found[0], **made, optimizer={})


def print_ablation(result: Mapping[str, Mapping[str, float | int]]) -> None:
    """The variants as a table, with what each costs."""
    from rich.console import Console
    from rich.table import Table

    table, whole = Table("model", "loss", "bits per byte", "difference"), result["as it is"]["bits_per_byte"]
    for name, values in result.items():
        bits = values["bits_per_byte"]
        table.add_row(name, f"{values['loss']:.4f}", f"{bits:.4f}", f"{bits - whole:+.4f}")
    Console().print(table)


def print_saturation(result: Mapping[str, Any]) -> None:
    """How much of the last routing each stored step had, in per cent: mean over layers, first and last layer."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "eval/saturation", "first MoE layer", "last", caption="share of the last step's choices")
    for step, layers in zip(result["steps"], result["saturation"], strict=True):
        shares = (sum(layers) / len(layers), layers[0], layers[-1])
        table.add_row(str(step), *(f"{100 * share:.1f} %" for share in shares))
    Console().print(table)


def print_table(result: Mapping[str, float | int]) -> None:
    """The evaluation as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out", "value")
    for name, value in result.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def on_these_devices(config: Config) -> Config:
    """The config with its mesh, or where that does not fit with a data-parallel one of as many devices as can be.

    Raises:
        ValueError: several processes, whose devices the mesh does not fit; or a platform without a collective.
    """
    import jax

    devices, platform = jax.device_count(), jax.devices()[0].platform
    if config.model.dispatch in DROPLESS:
        config = replace(config, model=replace(config.model, dispatch="auto"))
    try:
        return resolve(config, devices, platform)
    except ValueError:
        if jax.process_count() > 1:
            raise
    for data in range(devices, 1, -1):
        with contextlib.suppress(ValueError):
            return resolve(replace(config, mesh=MeshConfig(data=data)), devices, platform)
    return resolve(replace(config, mesh=MeshConfig(data=1)), devices, platform)


def run(config: Config, workdir: Path, *, specialisation: bool = False, ablation: bool = False) -> None:
    """Restore the newest checkpoint, evaluate, print, and write evaluation.json and what else was asked for.

    Raises:
        ValueError, OSError: no or a damaged checkpoint, bad data, a mesh that does not fit, or nothing to measure.
    """
    from moe_jax.data import open_corpus
    from moe_jax.mesh import make_mesh

    check_asked(config, specialisation, ablation)
    processes.by_first(lambda: check_writable(workdir, specialisation))
    corpus = processes.by_all(lambda: open_corpus(config.data.path, config.data.verify))
    check_tokenizer(config, workdir, corpus)
    _note_other_data(workdir, corpus)
    config = on_these_devices(config)
    mesh = make_mesh(config.mesh)
    state = restore_model(config, workdir, mesh)
    if state is None:
        raise ValueError(f"--workdir={workdir} has no finished checkpoint; train first.")
    # a signal ends a process alone by itself; of several all must end, and JAX has taken SIGTERM over
    with noted() if processes.count() > 1 else contextlib.nullcontext(never) as stopped:
        whole = evaluate(config, state, corpus, mesh, stopped=stopped)
        tell(workdir, "evaluation", {"step": int(state.step), **whole}, print_table)
        if specialisation:
            draw_survey(workdir, survey(config, state, corpus, mesh, stopped))
        if ablation:
            tell(workdir, "ablation", ablate(config, state, corpus, mesh, whole, stopped), print_ablation)
    tell_saturation(config, workdir)


def _note_other_data(workdir: Path, corpus: "Corpus") -> None:
    """Print a line where the text is not held out of what the run trained on, but of other data."""
    identity = identity_of(read_run(workdir))
    if identity is not None and identity.corpus != corpus.fingerprint and processes.index() == 0:
        print(
            f"the text is of other data (fingerprint {corpus.fingerprint[:16]}) than the run was trained on "
            f"({identity.corpus[:16]})",
            flush=True,
        )


def check_tokenizer(config: Config, workdir: Path, corpus: "Corpus") -> None:
    """Raise a ValueError where a converted model would read another vocabulary than its own."""
    if has_another_tokenizer(workdir, corpus):
        raise ValueError(
            f"--workdir={workdir} has a tokenizer of its own, but data.path={config.data.path!r} is of "
            f"{corpus.tokenizer.name!r}; run moe_jax.data.prepare with --tokenizer={workdir / TOKENIZER}, and give "
            "its folder as --data."
        )


def has_another_tokenizer(workdir: Path, corpus: "Corpus") -> bool:
    """Whether the workdir came with a tokenizer, and the corpus is of another."""
    own = workdir / TOKENIZER / "tokenizer.json"
    return own.is_file() and sha256_of(own)[:16] not in corpus.tokenizer.name


def check_asked(config: Config, specialisation: bool, ablation: bool) -> None:
    """Raise a ValueError where a dense model is asked about its experts."""
    for flag, asked in (("--specialisation", specialisation), ("--ablate", ablation)):
        if asked and not config.model.num_experts:
            raise ValueError(f"{flag} is about experts, and model.num_experts=0 has none; leave {flag} out.")


def check_writable(workdir: Path, specialisation: bool) -> None:
    """Say that an evaluation in somebody else's folder is not kept; a ValueError where files are what is wanted."""
    if is_writable(workdir):
        return
    if specialisation:
        raise ValueError(f"--specialisation writes into --workdir={workdir}, which cannot be written; copy the run.")
    print(f"{workdir} cannot be written: results are printed, and not kept", flush=True)


def tell(workdir: Path, name: str, result: Mapping[str, Any], show: Callable[[Any], None]) -> None:
    """Print a result and write it to workdir/<name>.json, if that can be written; process 0 does."""
    if processes.index() == 0:
        show(result)
        try:
            write_json(workdir / f"{name}.json", result)
        except OSError as error:
            print(f"{workdir / name}.json was not written: {error.strerror or error}")


def draw_survey(workdir: Path, found: "Survey") -> None:
    """Write specialisation.json and specialisation.png; process 0 does."""
    from moe_jax.analysis.specialisation import as_json, draw

    if processes.index() == 0:
        write_json(workdir / "specialisation.json", as_json(found))
        picture = io.BytesIO()
        draw(found).savefig(picture, format="png", dpi=100)
        write_whole(workdir / "specialisation.png", picture.getvalue())
        print(f"wrote {workdir / 'specialisation.json'} and specialisation.png")


def tell_saturation(config: Config, workdir: Path) -> None:
    """Print router saturation and write saturation.json, or say what is missing, where a run stored its routing."""
    from moe_jax.analysis.specialisation import saturation, stored_steps

    if processes.index() != 0 or not stored_steps(workdir):
        return
    try:
        result = saturation(workdir, config.model.num_experts + config.model.num_zero_experts)
    except ValueError as error:
        print(f"no router saturation: {error}")
    else:
        tell(workdir, "saturation", result, print_saturation)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    flag = flags.FLAGS
    keep_compiled()
    try:
        workdir = workdir_of(flag.workdir)
        config = validate(flag.config) if flag.config is not None else config_of_run(workdir)
        if flag.eval_sequences < 0:
            raise ValueError(f"--eval_sequences={flag.eval_sequences} must be at least 0; 0 takes all.")
        if flag.sequence_length < 0:
            raise ValueError(f"--sequence_length={flag.sequence_length} must be at least 1, or 0 for the config's.")
        path, length = flag.data or config.data.path, flag.sequence_length or config.sequence_length
        data = replace(config.data, path=path, eval_sequences=flag.eval_sequences)
        config = replace(config, data=data, sequence_length=length)
        with processes.joined(config.heartbeat_seconds, lambda: "evaluation"):
            try:
                run(config, workdir, specialisation=flag.specialisation, ablation=flag.ablate)
            except Abandoned as stop:
                raise SystemExit(128 + stop.number) from None
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_integer("eval_sequences", 0, "Held-out sequences per domain; 0 takes all.")
    flags.DEFINE_string("data", "", "A prepared folder to evaluate on; the config's if left out.")
    flags.DEFINE_integer("sequence_length", 0, "Tokens of a window; 0 takes the config's.")
    flags.DEFINE_bool("specialisation", False, "Also which experts each domain uses, and which are used together.")
    flags.DEFINE_bool("ablate", False, "Also what is lost without the shared, or the best routed, experts.")
    define_config_flag("Another config to evaluate under.")
    app.run(main, flags_parser=parse_flags)
