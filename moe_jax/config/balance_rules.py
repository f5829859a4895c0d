"""What must hold in `config.balance` whatever the model: within one method's options, and across methods.

What the model requires of a method is in `config/rules.py`.
"""

from typing import Any

from moe_jax.config.balance import AuxLoss, BalanceEntry, BiasPi, LossOptions, Quantile
from moe_jax.config.options import Options

MOST_BINS = 2**16  # with 2^15 sequences a step, of which a sum of bins is below 2^31


def check_options(path: str, options: Options) -> None:
    """Raise a ValueError where a method's options contradict each other."""
    o: Any = options
    if o.layers and (len(o.layers) != 2 or not 0 <= o.layers[0] < o.layers[1]):
        raise ValueError(
            f"{path}.layers={o.layers} must be (start, stop), MoE layers counted from 0 with start < stop; "
            "write (0, 3) for the first three, or () for all."
        )
    schedule = getattr(o, "schedule", "constant")
    freeze = getattr(o, "freeze_step", None)
    if schedule != "constant" and freeze is None:
        raise ValueError(f"{path}.schedule={schedule!r} needs the step at which it reaches 0; set {path}.freeze_step.")
    if freeze is not None and getattr(o, "warmup_steps", 0) > freeze:
        raise ValueError(
            f"{path}.warmup_steps={o.warmup_steps} must be at most {path}.freeze_step={freeze}; "
            "lower the first or raise the second."
        )
    if isinstance(options, BiasPi) and options.rate == 0 and options.gain > 0:
        raise ValueError(
            f"{path}.gain={options.gain} would move the bias at {path}.rate=0, which must leave it unchanged; "
            "set gain=0, or a small rate."
        )
    if isinstance(options, Quantile) and options.quantiles_of == "sequence" and options.bins > MOST_BINS:
        raise ValueError(
            f"{path}.bins={options.bins} must be at most {MOST_BINS} with {path}.quantiles_of='sequence', which adds "
            "up bins as integers; lower it."
        )
    if getattr(o, "num_devices", 0) == 1:
        raise ValueError(f"{path}.num_devices=1 is one group, which is always in balance; set 2 or more, or 0.")
    if isinstance(options, AuxLoss) and options.level == "expert" and options.num_devices:
        raise ValueError(
            f"{path}.num_devices={options.num_devices} is read by level='device' and 'communication' only; "
            f"set {path}.level, or num_devices=0."
        )


def check_together(entries: tuple[BalanceEntry, ...]) -> None:
    """Raise a ValueError where methods of one `config.balance` contradict each other, whatever the model."""
    at_most_one("own the bias", [e.label for e in entries if e.options.moves_bias])
    selectors = [e for e in entries if e.options.selects]
    at_most_one("select experts", [e.label for e in selectors])
    for e in entries:
        if e.options.beside:
            _check_controlled(e, entries)
    for selector in selectors:
        for owner in entries:
            if not owner.options.moves_bias or owner == selector or not overlap(selector.options, owner.options):
                continue
            if not selector.options.reads_bias:
                raise ValueError(
                    f"balance.{selector.label} selects without the bias, so that balance.{owner.label} would have no "
                    "effect; remove one, or give them different layers=(start, stop)."
                )
            if isinstance(owner.options, Quantile):
                raise ValueError(
                    f"balance.{owner.label} computes the bias for a choice by scores plus bias alone, from which "
                    f"balance.{selector.label} subtracts; use a bias that follows the loads, such as bias_sign."
                )
    for e in entries:
        free = [s.label for s in selectors if not s.options.fixed_slots and overlap(s.options, e.options)]
        if e.options.reads_top_k and free:
            raise ValueError(
                f"balance.{e.label} needs the top k experts of a token, but under balance.{free[0]} a token has no "
                "fixed number of experts; remove one, or give them different layers=(start, stop)."
            )
    scopes = {e.options.scope for e in entries if isinstance(e.options, AuxLoss)}
    if {"global", "global_running"} <= scopes:
        raise ValueError(
            "balance has auxiliary losses with scope 'global' and with 'global_running', but a step's counts are "
            "either collected beforehand or updated as it runs; give all of them the same scope."
        )


def overlap(a: Options, b: Options) -> bool:
    """Whether both may act in the same layer."""
    if not a.layers or not b.layers:
        return True
    return max(a.layers[0], b.layers[0]) < min(a.layers[1], b.layers[1])


def at_most_one(what: str, labels: list[str]) -> None:
    """Raise a ValueError if more than one method, listed by label, would do what only one may."""
    if len(labels) > 1:
        raise ValueError(f"balance has {' and '.join(labels)}, but only one method may {what}; remove all but one.")


def _check_controlled(entry: BalanceEntry, entries: tuple[BalanceEntry, ...]) -> None:
    losses = [e.label for e in entries if isinstance(e.options, LossOptions)]
    if entry.options.controls not in losses:
        raise ValueError(
            f"balance.{entry.label}.controls={entry.options.controls!r} must be the label of a loss in the same "
            f"balance, which has {', '.join(losses) or 'none'}; add aux_loss=dict() or name another."
        )
    (controlled,) = (e for e in entries if e.label == entry.options.controls)
    if not controlled.options.balances or controlled.options.weight == 0:
        raise ValueError(
            f"balance.{entry.label}.controls={controlled.label!r} must be a loss that balances and has a weight above "
            "0, because no other can reach a target; name another, or raise its weight."
        )
    if not overlap(entry.options, controlled.options):
        raise ValueError(
            f"balance.{entry.label}.layers={entry.options.layers} must overlap balance.{controlled.label}.layers="
            f"{controlled.options.layers}, whose loss it controls; change one."
        )
    rivals = [e for e in entries if e.options.beside == entry.options.beside]
    if len(rivals) > 1:
        raise ValueError(
            f"balance has {' and '.join(e.label for e in rivals)}, which control the same loss "
            f"{entry.options.controls!r}; remove one."
        )
