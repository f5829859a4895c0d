"""Multi-token prediction: the modules that predict the tokens after the next."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig
from moe_jax.model.block import Block, Inputs
from moe_jax.model.layers import RMSNorm, normal
from moe_jax.model.moe import Report


class Ahead(nnx.Module):
    """One depth of multi-token prediction: a layer on what was seen and the next token, both normed and mixed.

    `h^k_i = norm(layer(M [norm(h^{k-1}_i); norm(Emb(t_{i+k}))]))` predicts t_{i+k+1} through the model's own head.
    h^0 is what the model's head sees, as in the implementations that decode with published weights.

    Source: DeepSeek-V3 (arXiv 2412.19437) eq. 21-23.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.embed_dim
        self.embedding_norm = RMSNorm(config, embed=width)
        self.hidden_norm = RMSNorm(config, embed=width)
        self.from_embedding = normal(config, rngs, embed=width, mixed=width)
        self.from_hidden = normal(config, rngs, embed=width, mixed=width)
        self.block = Block(config, rngs, "moe" if config.num_experts else "dense")
        self.norm = RMSNorm(config, embed=width)

    def __call__(self, x: Array, embedded: Array, *args: Any) -> tuple[Float[Array, "batch seq embed"], Report | None]:
        """x [B, S, D] of the depth before, and the embedding of the token k places on; to this depth's, and Report."""
        known, seen = self.embedding_norm(embedded), self.hidden_norm(x)
        mixed = known @ self.from_embedding.astype(x.dtype) + seen @ self.from_hidden.astype(x.dtype)
        x, report, _ = self.block(mixed, None, *args)
        return self.norm(x), report


AHEAD = 2**31  # the stream of randomness of multi-token prediction, after those of layers


def ahead_of(inputs: Inputs, depth: int) -> Inputs:
    """What depth k of multi-token prediction reads at each place: the token k on, if it is of the same document.

    Elsewhere the segment is 0, as padding's: of a document of n tokens n - k are seen, routed and counted.
    """
    tokens, later = (shifted(a, depth) for a in (inputs.tokens, inputs.segment_ids))
    return Inputs(tokens, inputs.positions, jnp.where(later == inputs.segment_ids, inputs.segment_ids, 0))


def shifted(x: Array, depth: int) -> Array:
    """[B, S] moved `depth` places towards the start; zeros come in."""
    return jnp.pad(x[:, depth:], ((0, 0), (0, depth)))
