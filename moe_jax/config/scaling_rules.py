"""What must hold of the keys of width and depth scaling."""

from collections.abc import Callable

from moe_jax.config.rule import Rule
from moe_jax.config.scaling import ScalingConfig
from moe_jax.config.schema import Config, ModelConfig, parts

OF_WIDTH = (
    *("base_ffw_dim", "base_expert_ffw_dim", "base_shared_ffw_dim", "base_latent_dim", "base_num_heads"),
    *("base_head_dim", "base_q_lora_rank", "base_kv_lora_rank"),
)


def _used(m: ModelConfig) -> dict[str, bool]:
    """Which sizes of the base the model has, too."""
    has = parts(m)
    return dict(
        base_ffw_dim="dense" in has,
        base_expert_ffw_dim="experts" in has,
        base_shared_ffw_dim="shared" in has and m.shared_ffw_dim > 0,
        base_latent_dim="experts" in has and m.latent_dim > 0,
        base_q_lora_rank=m.attention == "mla" and m.q_lora_rank > 0,
        base_kv_lora_rank=m.attention == "mla",
    )


def _check_sizes(c: Config) -> None:
    """Raise a ValueError where the base has a size that nothing reads."""
    s = c.model.scaling
    for key in (key for key in OF_WIDTH if getattr(s, key)):
        path = f"model.scaling.{key}={getattr(s, key)}"
        if not s.base_width:
            raise ValueError(
                f"{path} is a size of the base of scaling by width, but model.scaling.base_width=0 is none; set "
                f"base_width to the base's embed_dim, or {key}=0."
            )
        if not _used(c.model).get(key, True):
            raise ValueError(
                f"{path} is a size of the base, but nothing in the model has the width model."
                f"{key.removeprefix('base_')}={getattr(c.model, key.removeprefix('base_'))}; set it to 0."
            )


SCALING_RULES: tuple[Callable[[Config], None], ...] = (
    _check_sizes,
    Rule(
        "{model.scaling.depth_exponent} is of scaling by depth, but {model.scaling.base_depth} is none",
        "set base_depth to the base's num_layers, or depth_exponent=1.0",
        holds=lambda c: c.model.scaling.depth_exponent == ScalingConfig().depth_exponent,
        when=lambda c: c.model.scaling.base_depth == 0,
    ),
    Rule(
        "{model.scaling.base_head_dim} determines the factor of attention's logits, and so does "
        "{model.attention_multiplier}",
        "set one of them to 0",
        holds=lambda c: c.model.attention_multiplier == 0,
        when=lambda c: c.model.scaling.base_head_dim > 0,
    ),
    Rule(
        "{optimizer.muon.parts} has embedding or head, whose learning rates under Muon do not follow from "
        "{model.scaling.base_width}",
        "leave them to AdamW, or set model.scaling.base_width=0",
        holds=lambda c: not {"embedding", "head"} & set(c.optimizer.muon.parts),
        when=lambda c: c.optimizer.method == "muon" and c.model.scaling.base_width > 0,
    ),
)
