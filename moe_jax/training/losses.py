"""The loss of a batch: next-token cross-entropy, and that of multi-token prediction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32

from moe_jax.config import Config
from moe_jax.data.batches import Batch
from moe_jax.kernels import head
from moe_jax.mesh import is_sharded
from moe_jax.model.abstract import Tree, abstract_model
from moe_jax.model.block import Inputs
from moe_jax.model.moe import Balancing, Report
from moe_jax.model.prediction import ahead_of, shifted


def forward(
    config: Config,
    params: Tree,
    bias: Tree,
    balancing: Balancing,
    batch: Batch,
    key: Array,
    train: bool = True,
    mesh: Mesh | None = None,
) -> tuple[Float32[Array, "batch"], Report | None]:
    """The cross-entropy of every row in nats, summed over its valid targets, and the layers' reports."""
    model = nnx.merge(abstract_model(config.model).graphdef, params, bias)
    logits, report = model(_inputs(batch), balancing, key=key, train=train, mesh=mesh)
    return head.row_nats(logits, batch.targets, batch.mask), report


class AheadLoss(NamedTuple):
    """Of multi-token prediction: nats summed over its depths, and how many targets it has there."""

    nats: Float32[Array, ""]
    tokens: Int32[Array, ""]


def summed_forward(
    config: Config, params: Tree, bias: Tree, balancing: Balancing, batch: Batch, key: Array, mesh: Mesh | None = None
) -> tuple[Float32[Array, ""], AheadLoss, Report | None]:
    """`forward` in training, with the sum of the nats, which on one device needs no logits in memory."""
    model = nnx.merge(abstract_model(config.model).graphdef, params, bias)
    x, ahead, report = model.before_head(_inputs(batch), balancing, key=key, train=True, mesh=mesh)

    def nats(x: Array, targets: Array, mask: Array) -> Array:
        if is_sharded(mesh):
            return head.row_nats(model.logits(x, mesh), targets, mask).sum()
        with jax.named_scope("head"):
            return head.summed_nats(x, model.head_weight(mesh), targets, mask)

    later = AheadLoss(jnp.float32(0.0), jnp.int32(0))
    for depth in range(config.model.mtp_depth):
        targets, mask = ahead_targets(batch, depth + 1)
        later = AheadLoss(later.nats + nats(ahead[depth], targets, mask), later.tokens + mask.sum(dtype=jnp.int32))
    return nats(x, batch.targets, batch.mask), later, report


def ahead_targets(batch: Batch, depth: int) -> tuple[Int32[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """What depth k of multi-token prediction predicts at each place, t_{i+k+1}, and where: inside one document."""
    seen = ahead_of(_inputs(batch), depth).segment_ids > 0
    return shifted(batch.targets, depth), seen & shifted(batch.mask, depth)


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


def _inputs(batch: Batch) -> Inputs:
    return Inputs(batch.tokens, batch.positions, batch.segment_ids)
