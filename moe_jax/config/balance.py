"""The options of every balancing method: what may be written under `config.balance`, without jax.

`moe_jax.balance` implements the methods. Here stand their names, their options with type, range and default,
and what a method's options must fulfil by themselves.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from moe_jax.config.fields import number

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Options:
    """Options of every method. `layers=(start, stop)` are the MoE layers it acts in, counted from 0; () is all.

    The class says what is so whatever the options: whether the method moves the bias; selects experts itself; gives
    every token `top_k` of them; treats all experts alike, without groups or zero-computation experts; needs scores
    between 0 and 1.
    """

    layers: tuple[int, ...] = ()

    moves_bias: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    fixed_slots: ClassVar[bool] = True
    all_alike: ClassVar[bool] = False
    bounded_scores: ClassVar[bool] = False

    @property
    def beside(self) -> tuple[str, ...]:
        """The labels of the methods that it needs beside it."""
        return ()

    @property
    def by_device(self) -> bool:
        """Whether it needs logical devices: `num_devices` groups of consecutive experts."""
        return False

    @property
    def reads_top_k(self) -> bool:
        """Whether it reads which experts would be a token's k best."""
        return False

    @property
    def by_micro_batch(self) -> bool:
        """Whether the numbers depend on how a step is split into micro-batches: what is computed is not additive."""
        return False


# --- the bias family ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BiasOptions(Options):
    """Options of every method that moves the selection bias by a rate.

    The rate warms up over `warmup_steps` and is 0 from `freeze_step` on, to which `schedule` leads. `ema` > 0
    smooths loads over steps. `zero_mean` takes the mean from each increment. `num_classes` > 1 keeps one bias for
    every class of tokens (`model.class_starts`).
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
class BiasSign(BiasOptions):
    """Options of `bias_sign`."""


@dataclass(frozen=True)
class BiasProportional(BiasOptions):
    """Options of `bias_proportional`; `error` is the unit: of the mean load, of all copies, or copies."""

    rate: float = number(1e-2, 0.0)
    error: Literal["relative", "fraction", "count"] = "relative"


@dataclass(frozen=True)
class BiasMultiplicative(BiasOptions):
    """Options of `bias_multiplicative`."""


@dataclass(frozen=True)
class BiasRms(BiasOptions):
    """Options of `bias_rms`."""


@dataclass(frozen=True)
class BiasPi(BiasOptions):
    """Options of `bias_pi`; `gain` weighs the last error itself beside the sum of all (0 in LongCat-Flash)."""

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
    """Options of `quantile`: a step goes the share `damping` of the way to the balanced bias."""

    moves_bias = True
    all_alike = True
    bounded_scores = True

    damping: float = number(1.0, 0.0, 1.0)
    bins: int = number(1000, 10, 1_000_000)
    zero_mean: bool = True
    warmup_steps: int = number(0, 0)
    schedule: Schedule = "constant"
    freeze_step: int | None = number(None, 0)
    num_classes: int = number(1, 1)


# --- losses ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossOptions(Options):
    """Options of every loss; its weight is shaped over steps as the rate of a bias is."""

    balances: ClassVar[bool] = True

    weight: float = number(1e-2, 0.0)
    warmup_steps: int = number(0, 0)
    schedule: Schedule = "constant"
    freeze_step: int | None = number(None, 0)


@dataclass(frozen=True)
class AuxLoss(LossOptions):
    """Options of `aux_loss`; the levels device and communication need `num_devices` or `model.num_groups`."""

    level: Literal["expert", "device", "communication"] = "expert"
    scope: Literal["sequence", "microbatch", "global", "global_running"] = "microbatch"
    normalize: bool = True
    counts: Literal["biased", "unbiased"] = "biased"
    num_devices: int = number(0, 0)  # logical groups of consecutive experts; 0: model.num_groups

    @property
    def by_device(self) -> bool:
        """What is balanced is devices, or visits to them."""
        return self.level != "expert"

    @property
    def reads_top_k(self) -> bool:
        """The counts without the bias."""
        return self.counts == "unbiased"

    @property
    def by_micro_batch(self) -> bool:
        """A product of counts and scores of the scope; those of a sequence or of the step know no micro-batch."""
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
    """Options of `load_loss`; `noise_std` is in units of the logits, 0 means 1 / number of experts."""

    noise_std: float = number(0.0, 0.0)

    @property
    def reads_top_k(self) -> bool:
        """Probabilities of being among them."""
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
class TargetViolation(Options):
    """Options of `target_violation`: the loss labelled `controls` gets the weight that holds `target`."""

    controls: str = "aux_loss"
    target: float = number(0.1, 1e-6)
    rate: float = number(0.05, 0.0, 10.0)  # largest change of log(weight) in a step
    limit: float = number(1e4, 1.0)  # the weight stays within this factor of the loss's own, either way

    @property
    def beside(self) -> tuple[str, ...]:
        """The loss that it controls."""
        return (self.controls,)


# --- selectors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelectorOptions(Options):
    """Options of every method that selects experts itself."""

    selects = True
    all_alike = True


@dataclass(frozen=True)
class ExpertChoice(SelectorOptions):
    """Options of `expert_choice`; the scope says among which tokens an expert chooses."""

    fixed_slots = False

    scope: Literal["sequence", "microbatch"] = "microbatch"
    capacity_factor: float = number(1.0, 0.01)

    @property
    def by_micro_batch(self) -> bool:
        """Experts choose among the tokens of the scope."""
        return self.scope == "microbatch"


@dataclass(frozen=True)
class Sinkhorn(SelectorOptions):
    """Options of `sinkhorn`."""

    iterations: int = number(10, 1, 1000)

    @property
    def by_micro_batch(self) -> bool:
        """The factors are of the whole micro-batch."""
        return True


@dataclass(frozen=True)
class Bip(SelectorOptions):
    """Options of `bip`."""

    iterations: int = number(4, 1, 1000)

    @property
    def by_micro_batch(self) -> bool:
        """The prices are of the whole micro-batch."""
        return True


@dataclass(frozen=True)
class ExpertThreshold(SelectorOptions):
    """Options of `expert_threshold`; a token has at most `slots` experts, the best ones (0: as many as want it)."""

    moves_bias = True
    fixed_slots = False
    bounded_scores = True

    ema: float = number(0.99, 0.0, 0.9999)
    bins: int = number(1000, 10, 1_000_000)
    slots: int = number(0, 0)
    freeze_step: int | None = number(None, 0)


@dataclass(frozen=True)
class Hash(SelectorOptions):
    """Options of `hash`."""


@dataclass(frozen=True)
class Random(SelectorOptions):
    """Options of `random`."""

    @property
    def by_micro_batch(self) -> bool:
        """Draws by the number of the token in the micro-batch."""
        return True


@dataclass(frozen=True)
class Forced(SelectorOptions):
    """Options of `forced`."""

    @property
    def by_micro_batch(self) -> bool:
        """Takes turns by the number of the token in the micro-batch."""
        return True


@dataclass(frozen=True)
class DeviceCapacity(Options):
    """Options of `device_capacity`; `protected` is the share of sequences that are never dropped."""

    num_devices: int = number(0, 0)  # logical groups of consecutive experts; 0: model.num_groups
    capacity_factor: float = number(1.0, 0.01)
    protected: float = number(0.1, 0.0, 1.0)

    @property
    def by_device(self) -> bool:
        """A device has a budget."""
        return True

    @property
    def by_micro_batch(self) -> bool:
        """Copies compete for budgets of the whole micro-batch."""
        return True


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
    "target_violation": TargetViolation,
    "expert_choice": ExpertChoice,
    "sinkhorn": Sinkhorn,
    "bip": Bip,
    "expert_threshold": ExpertThreshold,
    "hash": Hash,
    "random": Random,
    "forced": Forced,
    "device_capacity": DeviceCapacity,
}


class BalanceEntry(NamedTuple):
    """One line of `config.balance`: `label` names its state and statistics, `method` what it does."""

    label: str
    method: str
    options: Any


def smallest(method: str, num_devices: int) -> dict[str, dict[str, Any]]:
    """The method with what it cannot do without: the loss that it controls, and logical devices."""
    options = BALANCE_METHODS[method]()
    own = {"num_devices": num_devices} if options.by_device else {}
    return {method: own} | {label: {} for label in options.beside}


def check_options(path: str, options: Options) -> None:
    """Raise a ValueError where a method's options contradict each other."""
    o: Any = options
    if o.layers and (len(o.layers) != 2 or not 0 <= o.layers[0] < o.layers[1]):
        raise ValueError(
            f"{path}.layers={o.layers} must be (start, stop), MoE layers counted from 0 with start < stop; "
            "write (0, 3) for the first three, or () for all."
        )
    schedule, freeze = getattr(o, "schedule", "constant"), getattr(o, "freeze_step", None)
    if schedule != "constant" and freeze is None:
        raise ValueError(f"{path}.schedule={schedule!r} must know where it reaches 0; set {path}.freeze_step.")
    if freeze is not None and getattr(o, "warmup_steps", 0) > freeze:
        raise ValueError(
            f"{path}.warmup_steps={o.warmup_steps} must be at most {path}.freeze_step={freeze}; "
            "lower the first or raise the second."
        )
    if isinstance(options, BiasPi) and options.rate == 0 and options.gain > 0:
        raise ValueError(
            f"{path}.gain={options.gain} would move the bias at {path}.rate=0, which means that it rests; "
            "set gain=0, or a small rate."
        )
    if getattr(o, "num_devices", 0) == 1:
        raise ValueError(f"{path}.num_devices=1 is one group, which is always in balance; set 2 or more, or 0.")
    if isinstance(options, AuxLoss) and options.level == "expert" and options.num_devices:
        raise ValueError(
            f"{path}.num_devices={options.num_devices} is read by level='device' and 'communication' only; "
            f"set {path}.level, or num_devices=0."
        )


def check_together(entries: tuple[BalanceEntry, ...]) -> None:
    """Raise a ValueError where methods of one composition contradict each other, whatever the model."""
    at_most_one("own the bias", [e.label for e in entries if e.options.moves_bias])
    selectors = [e for e in entries if e.options.selects]
    at_most_one("select experts", [e.label for e in selectors])
    for e in entries:
        if e.options.beside:
            _check_controlled(e, entries)
    for selector in selectors:
        for owner in entries:
            if owner.options.moves_bias and owner != selector and overlap(selector.options, owner.options):
                raise ValueError(
                    f"balance.{selector.label} selects without the bias, which balance.{owner.label} would move for "
                    "nothing; remove one, or give them different layers=(start, stop)."
                )
    for e in entries:
        free = [s.label for s in selectors if not s.options.fixed_slots and overlap(s.options, e.options)]
        if e.options.reads_top_k and free:
            raise ValueError(
                f"balance.{e.label} reads who would be among a token's k best, but under balance.{free[0]} a token has "
                "no fixed number of experts; remove one, or give them different layers=(start, stop)."
            )
    scopes = {e.options.scope for e in entries if isinstance(e.options, AuxLoss)}
    if {"global", "global_running"} <= scopes:
        raise ValueError(
            "balance has auxiliary losses of scope 'global' and of 'global_running', but a step's counts are either "
            "collected beforehand or run along; give all of them one of the two."
        )


def overlap(a: Options, b: Options) -> bool:
    """True if there may be a layer in which both act."""
    if not a.layers or not b.layers:
        return True
    return max(a.layers[0], b.layers[0]) < min(a.layers[1], b.layers[1])


def at_most_one(what: str, labels: list[str]) -> None:
    """Raise a ValueError where several methods would do what only one can."""
    if len(labels) > 1:
        raise ValueError(f"balance has {' and '.join(labels)}, but only one method may {what}; remove all but one.")


def _check_controlled(entry: BalanceEntry, entries: tuple[BalanceEntry, ...]) -> None:
    losses = [e.label for e in entries if isinstance(e.options, LossOptions)]
    if entry.options.controls not in losses:
        raise ValueError(
            f"balance.{entry.label}.controls={entry.options.controls!r} must be the label of a loss in the same "
            f"balance, of which there {'is ' + ', '.join(losses) if losses else 'is none'}; "
            "add aux_loss=dict() or name another."
        )
    (controlled,) = (e for e in entries if e.label == entry.options.controls)
    if not controlled.options.balances or controlled.options.weight == 0:
        raise ValueError(
            f"balance.{entry.label}.controls={controlled.label!r} must be a loss that balances, with a weight above 0, "
            "or its weight can reach no target; name another, or raise its weight."
        )
    if not overlap(entry.options, controlled.options):
        raise ValueError(
            f"balance.{entry.label}.layers={entry.options.layers} must meet balance.{controlled.label}.layers="
            f"{controlled.options.layers}, whose loss it controls; change one."
        )
    rivals = [e for e in entries if e.options.beside == entry.options.beside]
    if len(rivals) > 1:
        raise ValueError(
            f"balance has {' and '.join(e.label for e in rivals)}, which control the same loss "
            f"{entry.options.controls!r}; remove one."
        )
