"""The keys of width and depth scaling: the sizes of the small model whose hyperparameters a larger one takes over."""

from dataclasses import dataclass

from moe_jax.config.fields import number


@dataclass(frozen=True)
class ScalingConfig:
    """The base: the model at which hyperparameters were tuned. 0 for its width, or for its depth, scales nothing by it.

    Every `base_KEY` is the base's `model.KEY`. A hidden width that is 0 was in proportion to `embed_dim`, and a
    `base_head_dim` of 0 was the same as the model's. What follows from them is in `config.multipliers`.

    Source: width, Tensor Programs V (arXiv 2203.03466), Table 8 for Adam; depth, CompleteP (arXiv 2505.01618).
    """

    base_width: int = number(0, 0)  # embed_dim of the base; 0: no scaling by width
    base_depth: int = number(0, 0)  # num_layers of the base; 0: no scaling by depth
    # alpha: attention and feed-forward add (layers / base_depth)^-alpha of their result; CompleteP: 1, depth-muP: 0.5
    depth_exponent: float = number(1.0, 0.5, 1.0)
    base_ffw_dim: int = number(0, 0)
    base_expert_ffw_dim: int = number(0, 0)  # also of shared experts, where shared_ffw_dim is 0
    base_shared_ffw_dim: int = number(0, 0)
    base_latent_dim: int = number(0, 0)
    base_num_heads: int = number(0, 0)
    base_head_dim: int = number(0, 0)  # of a query; mla: both parts of it together
    base_q_lora_rank: int = number(0, 0)
    base_kv_lora_rank: int = number(0, 0)
