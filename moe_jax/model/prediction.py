"""Multi-token prediction: the modules that predict the tokens after the next, their inputs, targets and loss."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from moe_jax.config import Config, ModelConfig
from moe_jax.data.batches import Batch, total_of
from moe_jax.model.block import Block
from moe_jax.model.forward import Inputs, Pass, Report, inputs_of
from moe_jax.model.layers import make_norm, normal


class Ahead(nnx.Module):
    """One depth of multi-token prediction: a layer on a mix of the hidden state and a later token, both normalised.

    `h^k_i = norm(layer(M [norm(h^{k-1}_i); norm(Emb(t_{i+k}))]))` predicts t_{i+k+1} through the model's own head.
    h^0 is the input of the model's head, as in the implementations that decode with published weights.

    Source: DeepSeek-V3 (arXiv 2412.19437) eq. 21-23.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.embed_dim
        self.embedding_norm = make_norm(config)
        self.hidden_norm = make_norm(config)
        self.from_embedding = normal(config, rngs, "mtp", embed=width, mixed=width)
        self.from_hidden = normal(config, rngs, "mtp", embed=width, mixed=width)
        self.block = Block(config, rngs, "moe" if config.num_experts else "dense")
        self.norm = make_norm(config)

    def __call__(
        self, x: Array, embedded: Array, fwd: Pass
    ) -> tuple[Float[Array, "batch seq embed"], Report | None, Any]:
        """Map x [B, S, D] of the previous depth and the embedded tokens k places later to this depth's x and Report.

        The third value is what attention leaves, as from a block without a cache.
        """
        known, seen = self.embedding_norm(embedded), self.hidden_norm(x)
        mixed = known @ self.from_embedding.astype(x.dtype) + seen @ self.from_hidden.astype(x.dtype)
        x, report, max_logits = self.block(mixed, None, fwd)
        return self.norm(x), report, max_logits


AHEAD = 2**31  # folded into the key for multi-token prediction; larger than every layer's index


def ahead_of(inputs: Inputs, depth: int) -> Inputs:
    """The inputs of depth k of multi-token prediction: at each place the token k places later in its document.

    Where there is none the segment is 0, that of padding: n - k tokens of a document of n are seen, routed and counted.
    """
    tokens, later = (shifted(a, depth) for a in (inputs.tokens, inputs.segment_ids))
    return Inputs(tokens, inputs.positions, jnp.where(later == inputs.segment_ids, inputs.segment_ids, 0))


def shifted(x: Array, depth: int) -> Array:
    """[B, S] shifted `depth` places towards the start, with zeros at the end."""
    return jnp.pad(x[:, depth:], ((0, 0), (0, depth)))


# --- its loss -----------------------------------------------------------------------------------------------


def ahead_targets(batch: Batch, depth: int) -> tuple[Int32[Array, "batch seq"], Array]:
    """The targets t_{i+k+1} of depth k of multi-token prediction, and their mask: 0 outside of the token's document."""
    seen = ahead_of(inputs_of(batch), depth).segment_ids > 0
    mask = shifted(batch.mask, depth)
    return shifted(batch.targets, depth), jnp.where(seen, mask, jnp.zeros_like(mask))


class AheadLoss(NamedTuple):
    """The loss of multi-token prediction: nats, and how much its targets count, both summed over its depths."""

    nats: Float32[Array, ""]
    targets: Int32[Array, ""] | Float32[Array, ""]


def ahead_loss(
    batch: Batch, ahead: Sequence[Array], nats: Callable[[Array, Array, Array], Float32[Array, ""]]
) -> AheadLoss:
    """The loss of multi-token prediction, summed over its depths.

    Args:
        ahead: the vectors before the head [B, S, D], of every depth.
        nats: (x, targets, mask) -> the cross-entropy in nats, summed over the targets as much as each counts.
    """
    total = AheadLoss(jnp.float32(0.0), jnp.zeros_like(total_of(batch.mask)))
    for depth, x in enumerate(ahead, 1):
        targets, mask = ahead_targets(batch, depth)
        total = AheadLoss(total.nats + nats(x, targets, mask), total.targets + total_of(mask))
    return total


def language_nats(
    config: Config, step: Int32[Array, ""], nats: Float32[Array, ""], ahead: AheadLoss
) -> Float32[Array, ""]:
    """The nats that training minimises: those of the next token, plus lambda times the mean over later depths.

    The caller divides them by the targets of the step, as in DeepSeek-V3 (arXiv 2412.19437) eq. 24-25.
    """
    depth = config.model.mtp_depth
    if depth == 0:
        return nats
    return nats + prediction_weight(config, step) / depth * ahead.nats


def prediction_weight(config: Config, step: Int32[Array, ""]) -> Float32[Array, ""]:
    """lambda, the weight of multi-token prediction's mean loss over its depths. Source: DeepSeek-V3, section 4.2."""
    starts = jnp.array([round(share * config.num_steps) for share in config.mtp_milestones], jnp.int32)
    return jnp.array(config.mtp_weights, jnp.float32)[(starts <= step).sum(dtype=jnp.int32)]
