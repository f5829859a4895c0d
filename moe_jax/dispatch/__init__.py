"""Dispatch: send every token copy to its expert, and combine what comes back, weighted by the gates."""

from moe_jax.dispatch import capacity, local, transports
from moe_jax.dispatch.apply import apply_experts
from moe_jax.dispatch.experts import ExpertWeights, Multiply, dense_swiglu, kernel_note, swiglu
from moe_jax.dispatch.work import BACKENDS, Traffic, Work, register

__all__ = [
    "BACKENDS",
    "ExpertWeights",
    "Multiply",
    "Traffic",
    "Work",
    "apply_experts",
    "capacity",
    "dense_swiglu",
    "kernel_note",
    "local",
    "register",
    "swiglu",
    "transports",
]
