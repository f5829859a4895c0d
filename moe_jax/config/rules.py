"""Rules across the keys of a config, all of them in the order in which they are checked.

Those of a model alone are in `model_rules.py`, those of the optimizer in `optimizer_rules.py`, and those of scaling,
which read both, in `scaling_rules.py`.
"""

from collections.abc import Callable

from moe_jax.config.mesh_rules import check_mesh, nearby
from moe_jax.config.model_rules import MODEL_RULES
from moe_jax.config.optimizer_rules import OPTIMIZER_RULES
from moe_jax.config.rule import Rule, rises_within
from moe_jax.config.scaling_rules import SCALING_RULES
from moe_jax.config.schema import Config, ModelConfig, branch_point, num_moe_layers


def _selectors(c: Config) -> list[str]:
    """The labels of the methods that select experts themselves."""
    return [e.label for e in c.balance if e.options.selects]


def _check_balance_fits(c: Config) -> None:
    """Raise a ValueError where the model lacks something that a balancing method requires."""
    m = c.model
    layers = num_moe_layers(m)
    for e in c.balance:
        path = f"balance.{e.label}"
        o = e.options
        if o.layers and o.layers[1] > layers:
            raise ValueError(
                f"{path}.layers={o.layers} must end within the {layers} MoE layers of the model; lower its stop."
            )
        classes = getattr(o, "num_classes", 1)
        if o.moves_bias and classes != len(m.class_starts) + 1:
            raise ValueError(
                f"{path} has num_classes={classes}, which must be the {len(m.class_starts) + 1} of "
                f"model.class_starts={m.class_starts} (expert_threshold supports only one); change one."
            )
        if o.bounded_scores and m.score in ("sqrt_softplus", "relu"):
            raise ValueError(
                f"{path} counts scores between 0 and 1, but those of model.score={m.score!r} are unbounded; "
                "set model.score='sigmoid' or 'softmax'."
            )
        if o.all_alike and m.num_groups > 1 and m.top_groups < m.num_groups:
            raise ValueError(
                f"{path} supports no group limit, but model.top_groups={m.top_groups} of model.num_groups="
                f"{m.num_groups}; set model.top_groups={m.num_groups}, or another method."
            )
        if o.selects and m.random_second:
            raise ValueError(
                f"{path} does not rank a token's experts, so model.random_second=True has no second one to drop; "
                "set model.random_second=False."
            )
        if o.by_device:
            _check_logical_devices(path, o.num_devices or m.num_groups, m)
        for key, value in o.requires.items():
            if getattr(m, key) != value:
                raise ValueError(
                    f"{path} works with model.{key}={value!r} only, but it is {getattr(m, key)!r}; set it, or another "
                    "method."
                )
        slots = getattr(o, "slots", 0)
        if slots and not m.top_k <= slots <= m.num_experts:
            raise ValueError(
                f"{path}.slots={slots} must be from model.top_k={m.top_k}, the mean to be reached, to "
                f"model.num_experts={m.num_experts}; change it, or set 0 for no limit."
            )


def _check_logical_devices(path: str, devices: int, m: ModelConfig) -> None:
    if devices < 2 or m.num_experts % devices:
        raise ValueError(
            f"{path}.num_devices={devices} logical devices (0 takes model.num_groups={m.num_groups}) must be at least "
            f"2 and divide model.num_experts={m.num_experts}; set {path}.num_devices."
        )
    if m.num_zero_experts:
        raise ValueError(
            f"{path} needs every expert on a device, but model.num_zero_experts={m.num_zero_experts} are on none; "
            "set model.num_zero_experts=0, or another method."
        )


def _check_zero_experts(c: Config) -> None:
    m = c.model
    if not m.num_zero_experts or m.num_experts == 0:
        return
    if m.num_groups > 1:
        raise ValueError(
            f"model.num_zero_experts={m.num_zero_experts} belong to no group, but model.num_groups={m.num_groups}; "
            "set one of them to its default."
        )
    for e in c.balance:
        if e.options.all_alike:
            raise ValueError(
                f"balance.{e.label} treats all experts alike, but model.num_zero_experts={m.num_zero_experts} are to "
                f"get model.zero_share={m.zero_share} of the copies; set model.num_zero_experts=0, or another method."
            )


RULES: tuple[Callable[[Config], None], ...] = (
    Rule(
        "{batch_size} must be divisible by {micro_batches}",
        lambda c: f"try {nearby(c.batch_size, c.micro_batches)}",
        holds=lambda c: c.batch_size % c.micro_batches == 0,
    ),
    Rule(
        "{num_steps} must be above the step of {branch_from}, from which the run continues",
        "raise num_steps",
        holds=lambda c: not c.branch_from or branch_point(c)[1] < c.num_steps,
    ),
    Rule(
        "{branch_from} and {init_from} both say how the run begins",
        "leave one of them empty",
        holds=lambda c: not (c.branch_from and c.init_from),
    ),
    *MODEL_RULES,
    # balance
    Rule(
        lambda c: f"balance has {', '.join(e.label for e in c.balance)}, but {{model.num_experts}} has none to balance",
        "set balance={} or model.num_experts",
        holds=lambda c: not c.balance,
        when=lambda c: c.model.num_experts == 0,
    ),
    _check_balance_fits,
    Rule(
        "{anticipation.delay} chooses the experts of later steps, but {model.num_experts} has none",
        "set anticipation.delay=0, or model.num_experts",
        holds=lambda c: c.model.num_experts > 0,
        when=lambda c: c.anticipation.delay > 0,
    ),
    Rule(
        lambda c: f"{{anticipation.delay}} chooses experts ahead, but balance.{_selectors(c)[0]} selects them itself",
        "set anticipation.delay=0, or another method",
        holds=lambda c: not _selectors(c),
        when=lambda c: c.anticipation.delay > 0,
    ),
    Rule(
        "{anticipation.spike} switches on what {anticipation.delay} switches off",
        "set anticipation.delay to 1 or more, or anticipation.spike=0",
        holds=lambda c: c.anticipation.spike == 0,
        when=lambda c: c.anticipation.delay == 0,
    ),
    Rule(
        "{model.class_starts} must rise strictly between 0 and {model.vocab_size}",
        "write (), or the first token id of each further class",
        holds=lambda c: rises_within(c.model.class_starts, c.model.vocab_size),
    ),
    Rule(
        "{model.class_starts} gives each class of tokens its own bias, but balance has no method that moves a bias",
        "set model.class_starts=(), or add bias_sign=dict(num_classes=...)",
        holds=lambda c: not c.model.class_starts or any(e.options.moves_bias for e in c.balance),
    ),
    _check_zero_experts,
    Rule(
        "{model.score} selects the experts for which it is not 0, as balance.relu does, but balance does not have it",
        "add relu={}, or set model.score='sigmoid'",
        holds=lambda c: any(e.method == "relu" for e in c.balance),
        when=lambda c: c.model.num_experts > 0 and c.model.score == "relu",
    ),
    # measuring
    Rule(
        "{measure_every} measures routing, but {model.num_experts} has none",
        "set measure_every=0",
        holds=lambda c: c.measure_every == 0,
        when=lambda c: c.model.num_experts == 0,
    ),
    Rule(
        "{record_scores_every} records routing, but {model.num_experts} has none",
        "set record_scores_every=0",
        holds=lambda c: c.record_scores_every == 0,
        when=lambda c: c.model.num_experts == 0,
    ),
    Rule(
        "{measure_every} must be a multiple of {log_every}, because both are logged together",
        lambda c: f"try {nearby(c.measure_every, c.log_every)}",
        holds=lambda c: c.measure_every % c.log_every == 0,
    ),
    *OPTIMIZER_RULES,
    *SCALING_RULES,
    check_mesh,
)
