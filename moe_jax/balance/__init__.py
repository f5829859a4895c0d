"""Ways to balance experts: `make(config.balance)` gives one `Balancer`; `names()` lists the methods."""

from moe_jax.balance import bias, losses  # importing registers the methods
from moe_jax.balance.base import Balancer, Method, State, Statistics, make, names, needs_step_statistics

__all__ = [
    "Balancer",
    "Method",
    "State",
    "Statistics",
    "bias",
    "losses",
    "make",
    "names",
    "needs_step_statistics",
]
