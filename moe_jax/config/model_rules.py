"""Rules across the keys of a model: rematerialisation, multi-token prediction, experts. Attention has its own file."""

import math
from collections.abc import Callable
from typing import Any

from moe_jax.config.attention_rules import ATTENTION_RULES
from moe_jax.config.mesh_rules import nearby
from moe_jax.config.rule import Rule, rises_within
from moe_jax.config.schema import REMAT_KEEP, Config, ModelConfig, is_gated


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


def longest(m: ModelConfig) -> float:
    """The most tokens of a sequence for which attention is that of the model; infinity without a limit."""
    by_rope = m.longrope.original_length if m.longrope.short_factor else math.inf
    return min(m.index_topk or math.inf, by_rope)


def check_length(m: ModelConfig, length: int, what: str = "sequence_length") -> None:
    """Raise a ValueError if a sequence is longer than those for which attention is that of the model (`longest`)."""
    if m.index_topk and length > m.index_topk:
        raise ValueError(
            f"{what}={length} must be at most model.index_topk={m.index_topk}: of a longer sequence the model's sparse "
            "attention sees some tokens only, but ours all; lower it."
        )
    long = m.longrope
    if long.short_factor and length > long.original_length:
        raise ValueError(
            f"{what}={length} must be at most model.longrope.original_length={long.original_length}: a longer sequence "
            "has other factors of RoPE, by which our model does not rotate; lower it."
        )


def _check_length(c: Config) -> None:
    check_length(c.model, c.sequence_length)


MODEL_RULES: tuple[Callable[[Config], None], ...] = (
    *ATTENTION_RULES,
    _check_length,
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
        holds=lambda c: rises_within(c.mtp_milestones, 1),
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
    Rule(
        "{model.sparsemixer} has gates that are not divided by their sum, but {model.normalize_gates}",
        "set model.normalize_gates=False, or model.sparsemixer=0.0",
        holds=lambda c: not c.model.normalize_gates,
        when=lambda c: c.model.num_experts > 0 and c.model.sparsemixer > 0,
    ),
    _check_groups,
    Rule(
        "{model.activation_limit} bounds a gate and what it multiplies, but {model.activation} has no gate",
        "set model.activation_limit=0.0",
        holds=lambda c: c.model.activation_limit == 0,
        when=lambda c: not is_gated(c.model),
    ),
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
)
