"""Rules across the keys of a config."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from moe_jax.config.mesh_rules import check_mesh, nearby
from moe_jax.config.schema import REMAT_KEEP, Config, ModelConfig, branch_point, num_moe_layers, rotated_width

Text = str | Callable[[Config], str]  # `{key}` in it is replaced by `key=value`


@dataclass(frozen=True)
class Rule:
    """A rule for the configs for which `when` is true, and the sentence where it is broken: `must; fix.`"""

    must: Text
    fix: Text
    holds: Callable[[Config], bool]
    when: Callable[[Config], bool] = lambda c: True

    def __call__(self, c: Config) -> None:
        """Raise a ValueError with the sentence if the config breaks the rule."""
        if not self.when(c) or self.holds(c):
            return
        sentence = "; ".join(text if isinstance(text, str) else text(c) for text in (self.must, self.fix))
        raise ValueError(re.sub(r"\{([\w.]+)\}", lambda key: f"{key[1]}={attrgetter(key[1])(c)!r}", f"{sentence}."))


def _rises_within(values: tuple[float, ...], end: float) -> bool:
    """Whether the values increase strictly and are all between 0 and `end`."""
    return list(values) == sorted(set(values)) and all(0 < value < end for value in values)


def _selectors(c: Config) -> list[str]:
    """The labels of the methods that select experts themselves."""
    return [e.label for e in c.balance if e.options.selects]


# --- rules with several cases ---------------------------------------------------------------------------------


def check_groups(num_experts: int, router: Any, path: str = "") -> None:
    """Raise a ValueError where `top_k`, `num_groups`, `top_groups` and `group_top` of a router do not fit together."""
    top_k = router.top_k
    num_groups = router.num_groups
    top_groups = router.top_groups
    group_top = router.group_top
    if num_experts % num_groups:
        raise ValueError(
            f"{path}num_experts={num_experts} must be divisible by {path}num_groups={num_groups}; "
            f"try {nearby(num_experts, num_groups)}."
        )
    size = num_experts // num_groups
    if not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"{path}top_groups={top_groups} must be from 1 to {path}num_groups={num_groups}; lower top_groups."
        )
    if not 1 <= top_k <= top_groups * size:  # more would select experts outside the allowed groups
        raise ValueError(
            f"{path}top_k={top_k} must be from 1 to the {top_groups * size} experts of {path}top_groups={top_groups} "
            f"groups of {size}; raise top_groups or lower top_k."
        )
    if num_groups > 1 and not 1 <= group_top <= size:
        raise ValueError(
            f"{path}group_top={group_top} must be from 1 to the {size} experts of a group; "
            f"set {path}group_top={size} or fewer groups."
        )


def _check_groups(c: Config) -> None:
    if c.model.num_experts:
        check_groups(c.model.num_experts, c.model, "model.")


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


# --- all rules, in the order in which they are checked --------------------------------------------------------


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
    # attention
    Rule(
        "{model.qk_rope_head_dim} must be even, because RoPE rotates pairs",
        lambda c: f"try {c.model.qk_rope_head_dim + 1}",
        holds=lambda c: c.model.qk_rope_head_dim % 2 == 0,
        when=lambda c: c.model.attention == "mla",
    ),
    Rule(
        "{model.qk_norm} belongs to grouped-query attention, but {model.attention} normalizes its latents",
        "set model.qk_norm='none'",
        holds=lambda c: c.model.qk_norm == "none",
        when=lambda c: c.model.attention == "mla",
    ),
    Rule(
        "{model.qkv_bias}, {model.partial_rotary_factor} and {model.attention_multiplier} belong to grouped-query "
        "attention, but {model.attention}",
        "set model.qkv_bias=False, model.partial_rotary_factor=1.0 and model.attention_multiplier=0.0",
        holds=lambda c: (
            (c.model.qkv_bias, c.model.partial_rotary_factor, c.model.attention_multiplier) == (False, 1, 0)
        ),
        when=lambda c: c.model.attention == "mla",
    ),
    Rule(
        "{model.num_heads} must be divisible by {model.num_kv_heads}",
        lambda c: f"try {nearby(c.model.num_heads, c.model.num_kv_heads)}",
        holds=lambda c: c.model.num_heads % c.model.num_kv_heads == 0,
        when=lambda c: c.model.attention == "gqa",
    ),
    Rule(
        "{model.head_dim} must be even, because RoPE rotates pairs",
        lambda c: f"try {c.model.head_dim + 1}",
        holds=lambda c: c.model.head_dim % 2 == 0,
        when=lambda c: c.model.attention == "gqa",
    ),
    Rule(
        "{model.partial_rotary_factor} of {model.head_dim} must be an even number above 0, because RoPE rotates pairs",
        lambda c: f"try {max(1, rotated_width(c.model) // 2) * 2 / c.model.head_dim:g}",
        holds=lambda c: rotated_width(c.model) >= 2 and rotated_width(c.model) % 2 == 0,
        when=lambda c: c.model.attention == "gqa",
    ),
    Rule(
        "{model.yarn.beta_fast} must be at least {model.yarn.beta_slow}",
        "try 32 and 1",
        holds=lambda c: c.model.yarn.beta_fast >= c.model.yarn.beta_slow,  # equal in Kimi-K2: frequencies then jump
    ),
    # rematerialisation
    Rule(
        "{model.remat_keep} and {model.remat_offload} apply to rematerialisation by names, but {model.remat}",
        f"set model.remat='names', or the two to {REMAT_KEEP} and ()",
        holds=lambda c: c.model.remat_keep == REMAT_KEEP and not c.model.remat_offload,
        when=lambda c: c.model.remat != "names",
    ),
    Rule(
        "{model.remat_keep} must have different names, at least one",
        "write one, such as ('rows',), or set model.remat='full', which keeps none",
        holds=lambda c: 0 < len(c.model.remat_keep) == len(set(c.model.remat_keep)),
    ),
    Rule(
        "{model.remat_offload} must be different names out of {model.remat_keep}",
        "add them to remat_keep, or write ()",
        holds=lambda c: len(set(c.model.remat_keep) & set(c.model.remat_offload)) == len(c.model.remat_offload),
    ),
    # multi-token prediction
    Rule(
        "{model.mtp_depth} must be below {sequence_length}, so that there is a token to predict",
        "lower it",
        holds=lambda c: c.model.mtp_depth < c.sequence_length,
    ),
    Rule(
        "{mtp_weights} must have one weight more than {mtp_milestones}, each at least 0",
        "write (0.3,) and (), or (0.3, 0.1) and (0.676,)",
        holds=lambda c: len(c.mtp_weights) == len(c.mtp_milestones) + 1 and all(w >= 0 for w in c.mtp_weights),
    ),
    Rule(
        "{mtp_milestones} must rise strictly between 0 and 1 (shares of num_steps)",
        "try (0.676,)",
        holds=lambda c: _rises_within(c.mtp_milestones, 1),
    ),
    # experts
    Rule(
        "{model.top_k} must be at most {model.num_experts}",
        "lower top_k or raise num_experts",
        holds=lambda c: c.model.top_k <= c.model.num_experts,
        when=lambda c: c.model.num_experts > 0,
    ),
    Rule(
        "{model.first_dense} and {model.moe_every} leave no MoE layer among {model.num_layers}",
        "lower them, or set model.num_experts=0 for a dense model",
        holds=lambda c: c.model.first_dense + c.model.moe_every <= c.model.num_layers,
        when=lambda c: c.model.num_experts > 0,
    ),
    Rule(
        "{model.random_second} is GShard's rule for a second expert, but {model.top_k}",
        "set top_k=2 or random_second=False",
        holds=lambda c: not c.model.random_second or c.model.top_k == 2,
        when=lambda c: c.model.num_experts > 0,
    ),
    Rule(
        "{model.normalize_gates} with {model.top_k} makes every gate the constant gate_scale, so that the router would "
        "get no gradient from the language model",
        "set model.normalize_gates=False",
        holds=lambda c: c.model.num_experts <= 1 or c.model.top_k > 1 or not c.model.normalize_gates,
    ),
    Rule(
        "{model.shared_gate} and {model.shared_ffw_dim} are of shared experts, but {model.num_shared_experts} has none",
        "set model.num_shared_experts=1, or model.shared_gate=False and model.shared_ffw_dim=0",
        holds=lambda c: c.model.num_shared_experts > 0 or not (c.model.shared_gate or c.model.shared_ffw_dim),
        when=lambda c: c.model.num_experts > 0,
    ),
    _check_groups,
    Rule(
        "{model.quantization} quantizes the products of routed experts, but {model.num_experts} has none",
        "set model.quantization='none'",
        holds=lambda c: c.model.num_experts > 0,
        when=lambda c: c.model.quantization != "none",
    ),
    Rule(
        "{model.cpu_kernel} computes in float32 and bfloat16 but not in {model.quantization}",
        "set model.cpu_kernel='auto', or model.quantization='none'",
        holds=lambda c: c.model.cpu_kernel != "native",
        when=lambda c: c.model.quantization != "none",
    ),
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
        holds=lambda c: _rises_within(c.model.class_starts, c.model.vocab_size),
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
    # optimizer
    Rule(
        "{optimizer.warmup_steps} must be at most {num_steps}",
        lambda c: f"try {max(1, c.num_steps // 10)}",
        holds=lambda c: c.optimizer.warmup_steps <= c.num_steps,
    ),
    Rule(
        "{optimizer.milestones} must rise strictly between 0 and 1 (shares of num_steps)",
        "try (0.8, 0.9)",
        holds=lambda c: _rises_within(c.optimizer.milestones, 1),
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
    check_mesh,
)
