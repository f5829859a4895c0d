"""Dispatch: send every token copy to its expert, and combine what comes back, weighted by the gates."""

from moe_jax.dispatch.apply import apply_experts
from moe_jax.dispatch.experts import ExpertWeights, Traffic, dense_swiglu, swiglu, told

__all__ = ["ExpertWeights", "Traffic", "apply_experts", "dense_swiglu", "swiglu", "told"]
