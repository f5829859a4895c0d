"""Rules across the keys of the optimizer, and between them and the model's."""

from collections.abc import Callable
from dataclasses import fields

from moe_jax.config.optimizer import GroupConfig, GroupsConfig, GuardConfig, MuonConfig
from moe_jax.config.rule import Rule, rises_within
from moe_jax.config.schema import Config, parts


def _check_groups(c: Config) -> None:
    """Raise a ValueError where a group of parameters has no effect, or contradicts itself or the model."""
    present = parts(c.model)
    for part in (f.name for f in fields(GroupsConfig)):
        group: GroupConfig = getattr(c.optimizer.groups, part)
        path = f"optimizer.groups.{part}"
        if group != GroupConfig() and part not in present:
            raise ValueError(
                f"{path} is set, but the model has no such part (only {', '.join(present)}); leave it at its defaults."
            )
        if group.frozen and group != GroupConfig(frozen=True):
            raise ValueError(
                f"{path}.frozen=True leaves nothing to {path}.learning_rate={group.learning_rate!r} and "
                f"{path}.weight_decay={group.weight_decay!r}; set both to 1.0, or frozen=False."
            )
        if group.weight_decay != 1 and part == "norms":
            raise ValueError(
                f"{path}.weight_decay={group.weight_decay!r} must be 1.0, because scales of norms never decay; set it."
            )
        if group.weight_decay != 1 and c.optimizer.weight_decay == 0:
            raise ValueError(
                f"{path}.weight_decay={group.weight_decay!r} is a factor of optimizer.weight_decay=0.0; raise the "
                "latter, or set the factor to 1.0."
            )
    if all(getattr(c.optimizer.groups, part).frozen for part in present):
        raise ValueError(
            f"optimizer.groups freezes all parts of the model ({', '.join(present)}), so that nothing would be "
            "trained; set frozen=False for one of them."
        )


def _check_muon(c: Config) -> None:
    """Raise a ValueError where Muon would have nothing to move, or is set without being used."""
    muon = c.optimizer.muon
    if c.optimizer.method != "muon":
        if muon != MuonConfig():
            raise ValueError(
                f"optimizer.muon is set, but optimizer.method={c.optimizer.method!r} does not use it; set "
                "optimizer.method='muon', or leave optimizer.muon at its defaults."
            )
        return
    movable = set(parts(c.model)) & set(muon.parts)
    if "norms" in muon.parts or len(set(muon.parts)) < len(muon.parts) or not movable:
        raise ValueError(
            f"optimizer.muon.parts={muon.parts} must be different parts with matrices (not norms), of which the model "
            f"has at least one; write {MuonConfig().parts}."
        )


OPTIMIZER_RULES: tuple[Callable[[Config], None], ...] = (
    Rule(
        "{optimizer.warmup_steps} must be at most {num_steps}",
        lambda c: f"try {max(1, c.num_steps // 10)}",
        holds=lambda c: c.optimizer.warmup_steps <= c.num_steps,
    ),
    Rule(
        "{optimizer.milestones} must rise strictly between 0 and 1 (shares of num_steps)",
        "try (0.8, 0.9)",
        holds=lambda c: rises_within(c.optimizer.milestones, 1),
        when=lambda c: c.optimizer.schedule == "multistep",
    ),
    Rule(
        "{optimizer.warmup_steps} and the decay of {optimizer.decay_fraction} must fit into {num_steps}",
        "lower one of them",
        holds=lambda c: c.optimizer.warmup_steps + round(c.optimizer.decay_fraction * c.num_steps) <= c.num_steps,
        when=lambda c: c.optimizer.schedule == "wsd",
    ),
    Rule(
        "{optimizer.eps} must be above 0 in float32 (at least 2^-126), because Adam divides 0 by it where a parameter "
        "has no gradient",
        "try 1e-8",
        holds=lambda c: c.optimizer.eps >= 2**-126,
    ),
    Rule(
        "{optimizer.rounding} rounds parameters or moments in bfloat16, but {model.param_dtype} and "
        "{optimizer.moment_dtype}",
        "set one of them to 'bfloat16', or optimizer.rounding='nearest'",
        holds=lambda c: "bfloat16" in (c.model.param_dtype, c.optimizer.moment_dtype),
        when=lambda c: c.optimizer.rounding == "stochastic",
    ),
    Rule("{optimizer.b1} must be below 1", "try 0.95", holds=lambda c: c.optimizer.b1 < 1),
    Rule("{optimizer.b2} must be below 1", "try 0.95", holds=lambda c: c.optimizer.b2 < 1),
    Rule(
        "{optimizer.muon.momentum} must be below 1",
        "try 0.95",
        holds=lambda c: c.optimizer.muon.momentum < 1,
    ),
    Rule(
        "{optimizer.qk_clip} shrinks queries and keys, but {model.qk_norm} makes logits independent of their size",
        "set optimizer.qk_clip=0.0, or model.qk_norm='none'",
        holds=lambda c: c.model.qk_norm == "none",
        when=lambda c: c.optimizer.qk_clip > 0,
    ),
    Rule(
        "{optimizer.qk_clip} shrinks queries and keys, but {optimizer.groups.attention.frozen} leaves them as they are",
        "set optimizer.qk_clip=0.0",
        holds=lambda c: not c.optimizer.groups.attention.frozen,
        when=lambda c: c.optimizer.qk_clip > 0,
    ),
    _check_muon,
    _check_groups,
    Rule(
        "{guard.rollback} goes back from steps that a guard skips, but {guard.threshold} is none",
        "set guard.threshold=6.0, or guard.rollback=0",
        holds=lambda c: c.guard.threshold > 0,
        when=lambda c: c.guard.rollback > 0,
    ),
    Rule(
        "{guard.rollback} is never reached by outliers, because after {guard.most} in a row the next step is kept",
        "set guard.most to guard.rollback or more, or guard.rollback=0",
        holds=lambda c: c.guard.rollback <= c.guard.most,
    ),
    Rule(
        "{guard.rollbacks} limits what {guard.rollback} never does",
        "set guard.rollback=3, or guard.rollbacks=3",
        holds=lambda c: c.guard.rollbacks == GuardConfig().rollbacks,
        when=lambda c: c.guard.rollback == 0,
    ),
    Rule(
        "{guard.window} and {guard.most} apply to a guard, but {guard.threshold} is none",
        "set guard.threshold=6.0, or the two to 128 and 5",
        holds=lambda c: c.guard == GuardConfig(),
        when=lambda c: c.guard.threshold == 0,
    ),
    Rule("{ema.decay} must be below 1", "try 0.999", holds=lambda c: c.ema.decay < 1),
)
