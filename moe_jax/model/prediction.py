"""Multi-token prediction: the modules that predict the tokens after the next, their inputs, targets and loss."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from moe_jax.config import Config, ModelConfig
from moe_jax.data.batches import Batch
from moe_jax.model.block import Block
from moe_jax.model.forward import Inputs, Pass, Report, inputs_of
from moe_jax.model.layers import RMSNorm, normal


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

    def __call__(self, x: Array, embedded: Array, fwd: Pass) -> tuple[Float[Array, "batch seq embed"], Report | None]:
        """x [B, S, D] of the depth before, and the embedding of the token k places on; to this depth's, and Report."""
        known, seen = self.embedding_norm(embedded), self.hidden_norm(x)
        mixed = known @ self.from_embedding.astype(x.dtype) + seen @ self.from_hidden.astype(x.dtype)
        x, report, _ = self.block(mixed, None, fwd)
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


# --- its loss -----------------------------------------------------------------------------------------------


def ahead_targets(batch: Batch, depth: int) -> tuple[Int32[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """What depth k of multi-token prediction predicts at each place, t_{i+k+1}, and where: inside one document."""
    seen = ahead_of(inputs_of(batch), depth).segment_ids > 0
    return shifted(batch.targets, depth), seen & shifted(batch.mask, depth)


class AheadLoss(NamedTuple):
    """Of multi-token prediction: nats summed over its depths, and how many targets it has there."""

    nats: Float32[Array, ""]
    tokens: Int32[Array, ""]


def ahead_loss(
    batch: Batch, ahead: Sequence[Array], nats: Callable[[Array, Array, Array], Float32[Array, ""]]
) -> AheadLoss:
    """The loss over all depths, `ahead` what the head multiplies at each; `nats` of (x, targets, mask)."""
    total = AheadLoss(jnp.float32(0.0), jnp.int32(0))
    for depth, x in enumerate(ahead, 1):
        targets, mask = ahead_targets(batch, depth)
        total = AheadLoss(total.nats + nats(x, targets, mask), total.tokens + mask.sum(dtype=jnp.int32))
    return total


def language_nats(
    config: Config, step: Int32[Array, ""], nats: Float32[Array, ""], ahead: AheadLoss
) -> Float32[Array, ""]:
    """The nats that training lowers: of the next token, and lambda times the mean over the depths after it.

    Both are to be divided by the tokens of the step, as in DeepSeek-V3 (arXiv 2412.19437) eq. 24-25.
    """
    depth = config.model.mtp_depth
    return nats + prediction_weight(config, step) / depth * ahead.nats if depth else nats


def prediction_weight(config: Config, step: Int32[Array, ""]) -> Float32[Array, ""]:
    """lambda, the weight of multi-token prediction's mean loss over its depths. Source: DeepSeek-V3, section 4.2."""
    starts = jnp.array([round(share * config.num_steps) for share in config.mtp_milestones], jnp.int32)
    return jnp.array(config.mtp_weights, jnp.float32)[(starts <= step).sum(dtype=jnp.int32)]
