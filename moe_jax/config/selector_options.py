"""The options of methods that choose experts otherwise than by the k best biased scores, and of the one that drops."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_jax.config.fields import number
from moe_jax.config.options import LossOptions, Options, SelectorOptions


@dataclass(frozen=True)
class ExpertChoice(SelectorOptions):
    """Options of `expert_choice`; `scope` is the set of tokens from which an expert chooses."""

    fixed_slots = False

    scope: Literal["sequence", "microbatch"] = "microbatch"
    capacity_factor: float = number(1.0, 0.01)

    @property
    def by_micro_batch(self) -> bool:
        """Experts choose from the tokens of the scope."""
        return self.scope == "microbatch"


@dataclass(frozen=True)
class Sinkhorn(SelectorOptions):
    """Options of `sinkhorn`."""

    iterations: int = number(10, 1, 1000)

    @property
    def by_micro_batch(self) -> bool:
        """The factors are computed from the whole micro-batch."""
        return True


@dataclass(frozen=True)
class Bip(SelectorOptions):
    """Options of `bip`."""

    iterations: int = number(4, 1, 1000)

    @property
    def by_micro_batch(self) -> bool:
        """The prices are computed from the whole micro-batch."""
        return True


@dataclass(frozen=True)
class ExpertThreshold(SelectorOptions):
    """Options of `expert_threshold`; a token gets at most its `slots` best experts (0: every expert that passes)."""

    moves_bias = True
    fixed_slots = False
    bounded_scores = True

    ema: float = number(0.99, 0.0, 0.9999)
    bins: int = number(1000, 10, 1_000_000)
    slots: int = number(0, 0)
    freeze_step: int | None = number(None, 0)


@dataclass(frozen=True)
class Relu(SelectorOptions, LossOptions):
    """Options of `relu`: `weight` is the first coefficient, which changes by `factor` in a step, and by `limit` in all.

    A token gets at most its `slots` best experts (0: every expert with a positive score).
    """

    fixed_slots = False
    requires: ClassVar[Mapping[str, Any]] = {**SelectorOptions.requires, "score": "relu"}

    weight: float = number(1e-8, 1e-30)
    factor: float = number(1.2, 1.0)
    limit: float = number(1e12, 1.0)
    slots: int = number(0, 0)

    @property
    def by_micro_batch(self) -> bool:
        """Counts are multiplied by scores."""
        return True


@dataclass(frozen=True)
class TopP(SelectorOptions):
    """Options of `top_p`: the gains of its controller; a token gets at most its `slots` best experts (0: no limit)."""

    fixed_slots = False

    proportional: float = number(0.1, 0.0, 10.0)
    integral: float = number(0.1, 0.0, 10.0)
    slots: int = number(0, 0)
    freeze_step: int | None = number(None, 0)


@dataclass(frozen=True)
class MovingQuantile(SelectorOptions):
    """Options of `moving_quantile`: the `strength` of its thresholds, the decay `ema` per token, and the bins."""

    reads_bias = True
    bounded_scores = True

    strength: float = number(0.3, 0.0, 1.0)
    ema: float = number(0.99, 0.0, 0.9999)
    bins: int = number(100, 10, 10_000)


@dataclass(frozen=True)
class Hash(SelectorOptions):
    """Options of `hash`."""


@dataclass(frozen=True)
class Random(SelectorOptions):
    """Options of `random`."""

    @property
    def by_micro_batch(self) -> bool:
        """The draw depends on the index of the token in the micro-batch."""
        return True


@dataclass(frozen=True)
class Forced(SelectorOptions):
    """Options of `forced`."""

    @property
    def by_micro_batch(self) -> bool:
        """The expert depends on the index of the token in the micro-batch."""
        return True


@dataclass(frozen=True)
class DeviceCapacity(Options):
    """Options of `device_capacity`; `protected` is the share of sequences from which nothing is dropped."""

    num_devices: int = number(0, 0)  # logical groups of consecutive experts; 0: model.num_groups
    capacity_factor: float = number(1.0, 0.01)
    protected: float = number(0.1, 0.0, 1.0)

    @property
    def by_device(self) -> bool:
        """Each device has a budget."""
        return True

    @property
    def by_micro_batch(self) -> bool:
        """The copies of a micro-batch compete for its budgets."""
        return True
