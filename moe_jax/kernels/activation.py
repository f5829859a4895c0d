"""The activation of feed-forward layers, dense or of an expert: SwiGLU, GeGLU, both clamped, or ReLU^2."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig, is_gated

# gelu's tanh approximation, g (1 + tanh(c (g + 0.044715 g^3))) / 2 with c = sqrt(2 / pi), is g sigmoid of twice that
GELU = 2 * math.sqrt(2 / math.pi)
FORMS: dict[str, dict[str, float]] = {  # model.activation -> what differs from SwiGLU
    "swiglu": {},
    "geglu": dict(alpha=GELU, beta=0.044715 * GELU),
    "swiglu_oai": dict(alpha=1.702, shift=1.0),
    "relu2": {},
}


class Activation(NamedTuple):
    """`g sigmoid(alpha g + beta g^3) (u + shift)`, with g = min(gate, limit) and u = clip(up, -limit, limit).

    The default is SwiGLU, `silu(gate) up`. A value at the limit has its gradient, one beyond it has none. With
    `gated=0` there is no gate: `max(up, 0)^2`, whatever the other numbers.
    Source: SwiGLU and GeGLU, arXiv 2002.05202; the tanh approximation, as in Gemma; limit 10, DeepSeek-V4 (arXiv
    2606.19348) section 4.2.3; alpha 1.702, shift 1 and limit 7, gpt-oss; ReLU^2, arXiv 2109.08668, in Nemotron.
    """

    alpha: float = 1.0
    beta: float = 0.0
    shift: float = 0.0
    limit: float = math.inf
    gated: float = 1.0

    @classmethod
    def of(cls, model: ModelConfig) -> "Activation":
        """That of all feed-forward layers of a model: dense ones, routed and shared experts."""
        limit = model.activation_limit or math.inf
        return cls(limit=limit, gated=float(is_gated(model)), **FORMS[model.activation])

    def __call__(
        self, gate: Float[Array, "*rows ffw"] | None, up: Float[Array, "*rows ffw"]
    ) -> Float[Array, "*rows ffw"]:
        """The hidden rows that `down` multiplies, in the dtype of up; the gate is None where there is none."""
        if gate is None:
            return jax.nn.relu(up) ** 2
        if self.limit < math.inf:  # `where`, because `jnp.clip` halves the gradient at the limit
            gate = jnp.where(gate > self.limit, self.limit, gate)
            up = jnp.where(jnp.abs(up) > self.limit, jnp.sign(up) * self.limit, up)
        inner = gate if self.alpha == 1 else self.alpha * gate
        if self.beta:
            inner = inner + self.beta * gate**3
        return gate * jax.nn.sigmoid(inner) * (up + self.shift if self.shift else up)


SWIGLU = Activation()
