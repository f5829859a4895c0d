"""The options that every balancing method has, or every one of its family, and what holds whatever the options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_jax.config.fields import number

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Options:
    """Options of every method. `layers=(start, stop)` are the MoE layers it acts in, counted from 0; () means all.

    The class variables hold whatever the options: whether the method moves the bias (`moves_bias`); selects experts
    itself (`selects`), by the biased scores (`reads_bias`); gives every token exactly `top_k` of them (`fixed_slots`);
    treats all experts alike, without groups or zero-computation experts (`all_alike`); needs scores between 0 and 1
    (`bounded_scores`); and the only values of keys of `config.model` with which it works (`requires`).
    """

    layers: tuple[int, ...] = ()

    moves_bias: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    reads_bias: ClassVar[bool] = False
    fixed_slots: ClassVar[bool] = True
    all_alike: ClassVar[bool] = False
    bounded_scores: ClassVar[bool] = False
    requires: ClassVar[Mapping[str, Any]] = {}

    @property
    def beside(self) -> tuple[str, ...]:
        """The labels of other methods that this one requires."""
        return ()

    @property
    def by_device(self) -> bool:
        """Whether the method needs logical devices, which are `num_devices` groups of consecutive experts."""
        return False

    @property
    def reads_top_k(self) -> bool:
        """Whether the method uses each token's top k experts without the bias."""
        return False

    @property
    def by_micro_batch(self) -> bool:
        """Whether the numbers depend on the split of a step into micro-batches, because they are not additive."""
        return False


@dataclass(frozen=True)
class BiasOptions(Options):
    """Options of every method that moves the selection bias by a rate.

    The rate warms up over `warmup_steps`, then follows `schedule` down to 0 at `freeze_step`. `ema` > 0 smooths loads
    over steps. `zero_mean` subtracts the mean from each increment. `num_classes` > 1 keeps a separate bias for each
    class of tokens (`model.class_starts`).
    """

    moves_bias = True

    rate: float = number(1e-3, 0.0)
    warmup_steps: int = number(0, 0)
    schedule: Schedule = "constant"
    freeze_step: int | None = number(None, 0)
    ema: float = number(0.0, 0.0, 0.9999)
    zero_mean: bool = False
    num_classes: int = number(1, 1)


@dataclass(frozen=True)
class LossOptions(Options):
    """Options of every loss; its weight follows the same warmup and schedule as the rate of a bias."""

    balances: ClassVar[bool] = True

    weight: float = number(1e-2, 0.0)
    warmup_steps: int = number(0, 0)
    schedule: Schedule = "constant"
    freeze_step: int | None = number(None, 0)


@dataclass(frozen=True)
class SelectorOptions(Options):
    """Options of every method that selects experts itself."""

    selects = True
    all_alike = True
    requires: ClassVar[Mapping[str, Any]] = {"select_by": "scores"}
