"""Held-out loss and balance of a model."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.balance import Balancer, measures
from moe_jax.config import Config
from moe_jax.data import Batch, Corpus, evaluation_batches
from moe_jax.mesh import make_mesh
from moe_jax.runtime import processes
from moe_jax.runtime.prefetch import prefetched
from moe_jax.runtime.signals import Abandoned, Stopped, never
from moe_jax.runtime.watchdog import Watchdog
from moe_jax.training import compile
from moe_jax.training.compile import Evaluation
from moe_jax.training.state import TrainState


def evaluate(
    config: Config,
    state: TrainState,
    corpus: Corpus,
    mesh: Mesh | None = None,
    watchdog: Watchdog | None = None,
    balancer: Balancer | None = None,
    stopped: Stopped = never,
) -> dict[str, float | int]:
    """Evaluate loss, bits per byte (all and per domain) and balance over the held-out documents.

    Bits per byte is nats / (ln 2 x UTF-8 bytes of the targets), which is comparable across tokenizers. Of a corpus with
    weights it counts the targets that are trained on, once each; balance is that of all tokens. Violations are
    those of the loads of the whole set (MaxVio_global), by layer, then mean and worst over layers.

    Args:
        config: of the model and the batches.
        state: on the mesh.
        corpus: its "validation" streams are used.
        mesh: None for the config's mesh on all devices. With several processes each loads only its rows, and all
            get the same numbers.
        watchdog: watches every batch.
        balancer: selects experts in place of the config's; it reads the same state.
        stopped: the signal that ends the evaluation, as in `held_out`.

    Returns:
        eval/loss, eval/bits_per_byte, eval/bits_per_byte/<domain>. With experts also `measures.of_loads` of the whole
        set, as eval/max_violation; eval/max_violation/<domain>, mean over layers; eval/sequence_max_violation, the
        violation within a sequence, mean over layers and sequences, and eval/sequence_violation_floor, its value for
        a random router; eval/domain_information, the bits of information that a copy's expert carries about its
        domain, mean over layers. With a bias eval/bias_changed, the share of the decisions that would be different
        without it. Where copies can be dropped eval/drop_rate, their share, mean over layers.

    Raises:
        Abandoned: as `held_out`.
    """
    mesh = mesh or make_mesh(config.mesh)
    watchdog = watchdog or Watchdog(0)
    eval_step = compile.make_eval_step(config, mesh, balancer)
    totals = Totals(len(corpus.domains), config.model.num_experts)
    for number, batch in enumerate(held_out(config, corpus, mesh, stopped)):
        work = watchdog.watch("evaluation batch", number)
        result = eval_step(state, batch)
        work.result = result.nats
        totals.add(jax.device_get(result))
    return totals.losses(corpus.domains) | totals.balance(corpus.domains)


def held_out(config: Config, corpus: Corpus, mesh: Mesh, stopped: Stopped = never) -> Iterator[Batch]:
    """The held-out batches on the mesh, each of a micro-batch's size; each process loads only its rows.

    Raises:
        Abandoned: `stopped()` returned a signal when a batch was due; in every process at the same batch.
    """
    batch_size = config.batch_size // config.micro_batches
    batches = evaluation_batches(
        corpus,
        batch_size=batch_size,
        sequence_length=config.sequence_length,
        max_sequences_per_domain=config.data.eval_sequences,
    )

    whole = compile.abstract_batch(dataclasses.replace(config, batch_size=batch_size), mesh)

    def load(number: int) -> Batch:
        rows = functools.partial(batches.batch_at, number)
        return processes.from_rows(rows, whole)

    for _, batch in prefetched(load, 0, len(batches)):
        if number := stopped():
            raise Abandoned(number)
        yield batch


class Totals:
    """The sums of an evaluation on the host, in float64 and int64: by domain, by layer, and over sequences."""

    def __init__(self, num_domains: int, num_experts: int) -> None:
        self.num_experts = num_experts  # those that compute; loads of zero-computation experts come after them
        self.nats = np.zeros(num_domains)
        self.num_bytes = np.zeros(num_domains, np.int64)
        self.num_targets = 0
        self.lengths: collections.Counter[int] = collections.Counter()  # tokens of a sequence -> sequences
        self.by_sequence: dict[str, float] = collections.defaultdict(float)  # measure -> sum of its means over layers
        self.loads: Any = None  # [D, L, E]
        self.kept = 0  # decisions that the bias does not change
        self.chosen = 0  # all decisions
        self.dropped: Any = None  # [L], copies that no expert saw

    def add(self, sums: Evaluation) -> None:
        """Add one batch, already fetched to the host."""
        real = sums.domain >= 0
        domain = sums.domain[real]
        np.add.at(self.nats, domain, sums.nats[real].astype(np.float64))
        np.add.at(self.num_bytes, domain, sums.num_bytes[real])
        self.num_targets += int(sums.targets[real].sum())
        self.lengths.update(sums.tokens[real].tolist())
        if sums.row_loads is not None:
            self._add_loads(domain, sums.row_loads[real][..., : self.num_experts])
        if sums.kept is not None and sums.chosen is not None:
            self.kept += int(sums.kept.sum())
            self.chosen += int(sums.chosen.sum())
        if sums.dropped is not None:
            self.dropped = (0 if self.dropped is None else self.dropped) + sums.dropped.astype(np.int64)

    def _add_loads(self, domain: Any, row_loads: Any) -> None:
        if self.loads is None:
            self.loads = np.zeros((len(self.nats), *row_loads.shape[1:]), np.int64)
        np.add.at(self.loads, domain, row_loads)
        for name, values in measures.violations(row_loads).items():  # [B, L]
            self.by_sequence[name] += float(values.mean(-1).astype(np.float64).sum())

    @property
    def num_tokens(self) -> int:
        """The number of tokens that were computed."""
        return sum(length * count for length, count in self.lengths.items())

    def losses(self, domains: Sequence[str]) -> dict[str, float]:
        """eval/loss, and eval/bits_per_byte of all text and of each domain that has text; 0 where no target counts."""
        numbers = {
            "eval/loss": float(self.nats.sum()) / max(1, self.num_targets),
            "eval/bits_per_byte": float(self.nats.sum()) / (math.log(2) * max(1, int(self.num_bytes.sum()))),
        }
        for name, nats, num_bytes in zip(domains, self.nats, self.num_bytes, strict=True):
            if num_bytes:
                numbers[f"eval/bits_per_byte/{name}"] = float(nats) / (math.log(2) * int(num_bytes))
        return numbers

    def balance(self, domains: Sequence[str]) -> dict[str, float | int]:
        """Measures of balance of the whole set, by domain and by sequence; empty for a dense model."""
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
        if self.chosen:
            numbers["eval/bias_changed"] = 1.0 - self.kept / self.chosen
        return numbers

    def _by_sequence(self) -> dict[str, float]:
        lengths = np.array(list(self.lengths))
        counts = np.array(list(self.lengths.values()))
        floor = np.asarray(measures.violation_floor(lengths, self._copies, self.num_experts), np.float64)
        numbers = {f"eval/sequence_{name}": total / int(counts.sum()) for name, total in self.by_sequence.items()}
        return numbers | {"eval/sequence_violation_floor": float((floor * counts).sum() / counts.sum())}

    @property
    def _copies(self) -> float:
        """The number of computing experts that a token has in a layer, on average."""
        return self.loads.sum() / (self.loads.shape[1] * self.num_tokens)

    def _floor(self, loads: Any) -> Any:
        """The violation floor of loads [L, E], at the number of tokens behind them."""
        tokens = loads.sum() / (len(loads) * self._copies)
        return measures.violation_floor(tokens, self._copies, self.num_experts)
