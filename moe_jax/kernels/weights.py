"""The weights of experts: matrices, and biases of those that have them. E experts, D embed, F expert ffw."""

from typing import NamedTuple

from jaxtyping import Array, Float


class ExpertWeights(NamedTuple):
    """up [E, D, F] and down [E, F, D], a gate [E, D, F] where the activation has one; without E a dense layer's.

    Biases of gate and up [E, F] and of down [E, D]: None where the experts have none.
    """

    gate: Float[Array, "*experts embed ffw"] | None
    up: Float[Array, "*experts embed ffw"]
    down: Float[Array, "*experts ffw embed"]
    gate_bias: Float[Array, "*experts ffw"] | None = None
    up_bias: Float[Array, "*experts ffw"] | None = None
    down_bias: Float[Array, "*experts embed"] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]


# the logical dimensions of each field, by which `moe_jax.mesh` splits them
DIMS = {
    "gate": ("experts", "embed", "ffw"),
    "up": ("experts", "embed", "ffw"),
    "down": ("experts", "ffw", "embed"),
    "gate_bias": ("experts", "ffw"),
    "up_bias": ("experts", "ffw"),
    "down_bias": ("experts", "embed"),
}
