"""Methods that balance experts: `make(config.balance)` builds one `Balancer`; `names()` lists the methods."""

from moe_jax.balance import bias, capacity, coupling, dynamic, losses, phi, routers, selectors, sequence
from moe_jax.balance.protocol import Balancer, Seen, State, Statistics, chain
from moe_jax.balance.registry import (
    make,
    names,
    needs_running_statistics,
    needs_step_statistics,
    register,
)

__all__ = [
    "Balancer",
    "Seen",
    "State",
    "Statistics",
    "bias",
    "capacity",
    "chain",
    "coupling",
    "dynamic",
    "losses",
    "make",
    "names",
    "needs_running_statistics",
    "needs_step_statistics",
    "phi",
    "register",
    "routers",
    "selectors",
    "sequence",
]
