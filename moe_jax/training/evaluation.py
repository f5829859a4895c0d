"""Held-out loss and balance of a model."""

import collections
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moe_jax.config import Config
from moe_jax.runtime import processes
from moe_jax.runtime.prefetch import prefetched
from moe_jax.runtime.signals import Abandoned, Stopped, never
from moe_jax.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.balance import Balancer
    from moe_jax.data import Batch, Corpus
    from moe_jax.training.compile import Evaluation
    from moe_jax.training.state import TrainState


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
        expert says about its domain, mean over layers; with a bias eval/bias_changed, the share of the decisions
        that would be others without it; where copies can be dropped eval/drop_rate, their share, mean over layers.

    Raises:
        Abandoned: as `held_out`.
    """
    import jax

    from moe_jax.mesh import make_mesh
    from moe_jax.training.compile import make_eval_step

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
