"""Ways to balance experts: `make(config.balance)` gives one `Balancer`; `names()` lists the methods."""

from moe_jax.balance import bias, losses, selectors
from moe_jax.balance.base import (
    Balancer,
    State,
    Statistics,
    make,
    names,
    needs_running_statistics,
    needs_step_statistics,
    register,
)
from moe_jax.balance.method import Method

__all__ = [
    "Balancer",
    "Method",
    "State",
    "Statistics",
    "bias",
    "losses",
    "make",
    "names",
    "needs_running_statistics",
    "needs_step_statistics",
    "register",
    "selectors",
]
