"""What must hold of the keys of attention."""

from moe_jax.config.mesh_rules import nearby
from moe_jax.config.rule import Rule
from moe_jax.config.schema import LongRopeConfig, ModelConfig, local_rotated_width, rotated_width


def _has_sinks_gate_or_bias(m: ModelConfig) -> bool:
    return m.attention_sinks or m.attention_gate != "none" or m.out_bias


def _has_rope_by_kind(m: ModelConfig) -> bool:
    """Whether local layers have another RoPE than global ones."""
    return m.rope_layers != "all" or m.local_rope.theta != 0


def _is_even(width: int) -> bool:
    return width >= 2 and width % 2 == 0


def _rotated_pairs(m: ModelConfig) -> int:
    return (m.qk_rope_head_dim if m.attention == "mla" else rotated_width(m)) // 2


def _fit_pairs(factors: tuple[float, ...], m: ModelConfig) -> bool:
    return len(factors) == _rotated_pairs(m) and min(factors) > 0


ATTENTION_RULES = (
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
        "{model.attention_sinks}, {model.attention_gate}, {model.out_bias}, {model.rope_layers} and "
        "{model.local_rope.theta} belong to grouped-query attention, but {model.attention}",
        "set model.attention_sinks=False, model.attention_gate='none', model.out_bias=False, model.rope_layers='all' "
        "and model.local_rope.theta=0.0",
        holds=lambda c: not (_has_sinks_gate_or_bias(c.model) or _has_rope_by_kind(c.model)),
        when=lambda c: c.model.attention == "mla",
    ),
    Rule(
        "{model.gate_activation} is of the gate of attention, but {model.attention_gate}",
        "set model.attention_gate='element' or 'head', or model.gate_activation='sigmoid'",
        holds=lambda c: c.model.gate_activation == "sigmoid",
        when=lambda c: c.model.attention_gate == "none",
    ),
    # windows
    Rule(
        "{model.window_pattern} must have the letters L (local) and G (global) only, and at least one L",
        "write 'L', or 'LLLG' for three local layers before each global one",
        holds=lambda c: set(c.model.window_pattern) in ({"L"}, {"L", "G"}),
    ),
    Rule(
        "{model.window_pattern}, {model.rope_layers} and {model.local_rope.theta} tell local layers from global ones, "
        "but {model.window} makes all of them global",
        "set model.window, or model.window_pattern='L', model.rope_layers='all' and model.local_rope.theta=0.0",
        holds=lambda c: c.model.window_pattern == "L" and not _has_rope_by_kind(c.model),
        when=lambda c: c.model.window == 0,
    ),
    Rule(
        "{model.local_rope.theta} must be 0 or at least 1",
        "set 0 for the same RoPE in all layers, or a base such as 10000.0",
        holds=lambda c: c.model.local_rope.theta == 0 or c.model.local_rope.theta >= 1,
    ),
    Rule(
        "{model.local_rope.partial_rotary_factor} is of the RoPE of local layers, but {model.local_rope.theta} gives "
        "them that of the others",
        "set model.local_rope.theta, or model.local_rope.partial_rotary_factor=1.0",
        holds=lambda c: c.model.local_rope.partial_rotary_factor == 1,
        when=lambda c: c.model.local_rope.theta == 0,
    ),
    Rule(
        "{model.local_rope.theta} is another RoPE than that of global layers, but {model.rope_layers} gives them none",
        "set model.local_rope.theta=0.0, and model.rope_theta to what local layers have",
        holds=lambda c: c.model.local_rope.theta == 0,
        when=lambda c: c.model.rope_layers == "local",
    ),
    # heads and RoPE
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
        holds=lambda c: _is_even(rotated_width(c.model)),
        when=lambda c: c.model.attention == "gqa",
    ),
    Rule(
        "{model.local_rope.partial_rotary_factor} of {model.head_dim} must be an even number above 0, because RoPE "
        "rotates pairs",
        "try 1.0",
        holds=lambda c: _is_even(local_rotated_width(c.model)),
        when=lambda c: c.model.local_rope.theta > 0,
    ),
    Rule(
        "{model.yarn.beta_fast} must be at least {model.yarn.beta_slow}",
        "try 32 and 1",
        holds=lambda c: c.model.yarn.beta_fast >= c.model.yarn.beta_slow,  # equal in Kimi-K2: frequencies then jump
    ),
    Rule(
        "{model.longrope.short_factor} must have a number above 0 for every pair of dimensions that RoPE rotates",
        lambda c: f"give {_rotated_pairs(c.model)} numbers, or () for RoPE as it was",
        holds=lambda c: _fit_pairs(c.model.longrope.short_factor, c.model),
        when=lambda c: c.model.longrope.short_factor != (),
    ),
    Rule(
        "{model.longrope.long_factor} must have a number above 0 for every pair of dimensions that RoPE rotates",
        lambda c: f"give {_rotated_pairs(c.model)} numbers, or () where no export needs them",
        holds=lambda c: _fit_pairs(c.model.longrope.long_factor, c.model),
        when=lambda c: c.model.longrope.long_factor != (),
    ),
    Rule(
        "{model.longrope.long_factor}, {model.longrope.short_mscale}, {model.longrope.long_mscale} and "
        "{model.longrope.original_length} belong to LongRoPE, but {model.longrope.short_factor} has no factors",
        "set model.longrope.short_factor, or model.longrope=dict()",
        holds=lambda c: c.model.longrope == LongRopeConfig(),
        when=lambda c: c.model.longrope.short_factor == (),
    ),
    Rule(
        "{model.longrope.short_factor} and {model.yarn.factor} are two ways to slow down RoPE",
        "set model.longrope.short_factor=() or model.yarn.factor=1.0",
        holds=lambda c: c.model.yarn.factor == 1,
        when=lambda c: c.model.longrope.short_factor != (),
    ),
    Rule(
        "{model.norm_after} puts all norms behind their layers, but {model.sandwich_norm} puts one on each side",
        "set one of them to False",
        holds=lambda c: not (c.model.norm_after and c.model.sandwich_norm),
    ),
)
