"""The balancing methods' names and options, with type, range and default: what `config.balance` may contain.

Options of a whole family are in `config/options.py`, those of selectors in `config/selector_options.py`.
`moe_jax.balance` implements the methods; `config/balance_rules.py` checks their options.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from moe_jax.config.fields import number
from moe_jax.config.options import BiasOptions, LossOptions, Options, Schedule
from moe_jax.config.selector_options import (
    Bip,
    DeviceCapacity,
    ExpertChoice,
    ExpertThreshold,
    Forced,
    Hash,
    MovingQuantile,
    Random,
    Relu,
    Sinkhorn,
    TopP,
)

# --- the bias family ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BiasSign(BiasOptions):
    """Options of `bias_sign`; `flipped` moves the bias of an overloaded expert up: a control, which must collapse."""

    flipped: bool = False


@dataclass(frozen=True)
class BiasProportional(BiasOptions):
    """Options of `bias_proportional`; `error` is the unit: relative to the mean load, to all copies, or in copies."""

    rate: float = number(1e-2, 0.0)
    error: Literal["relative", "fraction", "count"] = "relative"


@dataclass(frozen=True)
class BiasMultiplicative(BiasOptions):
    """Options of `bias_multiplicative`."""

    requires: ClassVar[Mapping[str, Any]] = {"select_by": "scores"}  # a factor above 1 would lower a logit below 0


@dataclass(frozen=True)
class BiasRms(BiasOptions):
    """Options of `bias_rms`."""


@dataclass(frozen=True)
class BiasPi(BiasOptions):
    """Options of `bias_pi`; `gain` weighs the last error, which is added to the sum of all (0 in LongCat-Flash)."""

    rate: float = number(1e-1, 0.0)
    gain: float = number(0.0, 0.0)


@dataclass(frozen=True)
class BiasSmebu(BiasOptions):
    """Options of `bias_smebu`: `kappa` is the slope of the soft clamp, `beta` the momentum."""

    rate: float = number(5e-4, 0.0)
    zero_mean: bool = True
    kappa: float = number(2.0, 0.0)
    beta: float = number(0.5, 0.0, 0.9999)


@dataclass(frozen=True)
class Quantile(Options):
    """Options of `quantile`; each step moves the bias by the share `damping` of its distance to the balanced bias.

    That bias is a quantile of all tokens of the step, or the mean over its sequences of the quantiles of each.
    """

    moves_bias = True
    all_alike = True
    bounded_scores = True
    requires: ClassVar[Mapping[str, Any]] = {"select_by": "scores"}

    quantiles_of: Literal["step", "sequence"] = "step"
    damping: float = number(1.0, 0.0, 1.0)
    bins: int = number(1000, 10, 1_000_000)
    zero_mean: bool = True
    warmup_steps: int = number(0, 0)
    schedule: Schedule = "constant"
    freeze_step: int | None = number(None, 0)
    num_classes: int = number(1, 1)


# --- losses ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuxLoss(LossOptions):
    """Options of `aux_loss`; the levels "device" and "communication" need `num_devices` or `model.num_groups`."""

    level: Literal["expert", "device", "communication"] = "expert"
    scope: Literal["sequence", "microbatch", "global", "global_running"] = "microbatch"
    normalize: bool = True
    counts: Literal["biased", "unbiased"] = "biased"
    num_devices: int = number(0, 0)  # logical groups of consecutive experts; 0: model.num_groups

    @property
    def by_device(self) -> bool:
        """Devices, or visits to them, are balanced."""
        return self.level != "expert"

    @property
    def reads_top_k(self) -> bool:
        """The unbiased counts are of the top k."""
        return self.counts == "unbiased"

    @property
    def by_micro_batch(self) -> bool:
        """Counts are multiplied by scores; counts of a sequence or of the step do not depend on the micro-batch."""
        return self.scope in ("microbatch", "global_running")


@dataclass(frozen=True)
class ZLoss(LossOptions):
    """Options of `z_loss`."""

    balances = False

    weight: float = number(1e-3, 0.0)


@dataclass(frozen=True)
class ImportanceLoss(LossOptions):
    """Options of `importance_loss`."""

    @property
    def by_micro_batch(self) -> bool:
        """The square of a sum over the micro-batch."""
        return True


@dataclass(frozen=True)
class LoadLoss(LossOptions):
    """Options of `load_loss`; `noise_std` is in units of the logits, and 0 means 1 / number of experts."""

    noise_std: float = number(0.0, 0.0)

    @property
    def reads_top_k(self) -> bool:
        """The loss estimates each expert's probability of being among the top k."""
        return True

    @property
    def by_micro_batch(self) -> bool:
        """The square of a sum over the micro-batch."""
        return True


@dataclass(frozen=True)
class OrthogonalLoss(LossOptions):
    """Options of `orthogonal_loss`."""

    weight: float = number(1e-3, 0.0)


@dataclass(frozen=True)
class SimilarityLoss(LossOptions):
    """Options of `similarity_loss`."""

    weight: float = number(1e-1, 0.0)


@dataclass(frozen=True)
class PhiLoss(LossOptions):
    """Options of `phi_loss`: the convex `potential`, and the decay `ema` of the average over steps."""

    weight: float = number(1e-1, 0.0)
    potential: Literal["negative_entropy", "euclidean"] = "negative_entropy"
    ema: float = number(0.99, 0.0, 0.9999)


@dataclass(frozen=True)
class CouplingLoss(LossOptions):
    """Options of `coupling_loss`; `noise` is the share of the largest noise at which a column keeps its place."""

    balances = False

    weight: float = number(1.0, 0.0)
    alpha: float = number(1.0, 0.0)
    noise: float = number(1.0, 0.0, 1.0)
    seed: int = number(0, 0)


@dataclass(frozen=True)
class FrozenRouter(Options):
    """Options of `frozen_router`; `seed` draws its weights, others for every layer."""

    requires: ClassVar[Mapping[str, Any]] = {"router_bias": False}  # which would be learned

    seed: int = number(0, 0)


@dataclass(frozen=True)
class KmeansRouter(Options):
    """Options of `kmeans_router`: the decay `ema` of the centroids by step, and the `seed` of the first ones."""

    requires: ClassVar[Mapping[str, Any]] = {"router_bias": False}  # which would be learned

    ema: float = number(0.99, 0.0, 0.9999)
    seed: int = number(0, 0)


@dataclass(frozen=True)
class TargetViolation(Options):
    """Options of `target_violation`, which adjusts the weight of the loss labelled `controls` to hold `target`."""

    controls: str = "aux_loss"
    target: float = number(0.1, 1e-6)
    rate: float = number(0.05, 0.0, 10.0)  # largest change of log(weight) in a step
    limit: float = number(1e4, 1.0)  # largest factor between the adjusted weight and the loss's own, up or down

    @property
    def beside(self) -> tuple[str, ...]:
        """The label of the controlled loss."""
        return (self.controls,)


BALANCE_METHODS: dict[str, type[Options]] = {
    "bias_sign": BiasSign,
    "bias_proportional": BiasProportional,
    "bias_multiplicative": BiasMultiplicative,
    "bias_rms": BiasRms,
    "bias_pi": BiasPi,
    "bias_smebu": BiasSmebu,
    "quantile": Quantile,
    "aux_loss": AuxLoss,
    "z_loss": ZLoss,
    "importance_loss": ImportanceLoss,
    "load_loss": LoadLoss,
    "orthogonal_loss": OrthogonalLoss,
    "similarity_loss": SimilarityLoss,
    "phi_loss": PhiLoss,
    "coupling_loss": CouplingLoss,
    "target_violation": TargetViolation,
    "frozen_router": FrozenRouter,
    "kmeans_router": KmeansRouter,
    "expert_choice": ExpertChoice,
    "sinkhorn": Sinkhorn,
    "bip": Bip,
    "expert_threshold": ExpertThreshold,
    "relu": Relu,
    "top_p": TopP,
    "moving_quantile": MovingQuantile,
    "hash": Hash,
    "random": Random,
    "forced": Forced,
    "device_capacity": DeviceCapacity,
}


class BalanceEntry(NamedTuple):
    """One entry of `config.balance`: `label` names its state and statistics, `method` selects the implementation."""

    label: str
    method: str
    options: Any


def smallest(method: str, num_devices: int) -> dict[str, dict[str, Any]]:
    """The smallest `config.balance` that contains the method, with the loss that it controls and logical devices."""
    options = BALANCE_METHODS[method]()
    own = {"num_devices": num_devices} if options.by_device else {}
    return {method: own} | {label: {} for label in options.beside}
