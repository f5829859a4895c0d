"""Dispatch: send every token copy to its expert, and combine what comes back, weighted by the gates."""

from moe_jax.dispatch import capacity, dense, gathered, local, ragged, rounds
from moe_jax.dispatch.apply import apply_experts
from moe_jax.dispatch.experts import Multiply, feed_forward, kernel_note
from moe_jax.dispatch.response import responses
from moe_jax.dispatch.work import DISPATCH_FUNCTIONS, Traffic, Work, register
from moe_jax.kernels.weights import ExpertWeights

__all__ = [
    "DISPATCH_FUNCTIONS",
    "ExpertWeights",
    "Multiply",
    "Traffic",
    "Work",
    "apply_experts",
    "capacity",
    "dense",
    "feed_forward",
    "gathered",
    "kernel_note",
    "local",
    "ragged",
    "register",
    "responses",
    "rounds",
]
