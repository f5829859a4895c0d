"""The loss of a batch: the cross-entropies of next-token and of multi-token prediction."""

import jax
from flax import nnx
from jaxtyping import Array, Float32

from moe_jax.config import Config
from moe_jax.data.batches import Batch
from moe_jax.kernels import head
from moe_jax.model.abstract import Tree, abstract_model
from moe_jax.model.forward import MaxLogits, Pass, Report
from moe_jax.model.pieces import cut
from moe_jax.model.prediction import AheadLoss, ahead_loss


def model_row_nats(
    config: Config, params: Tree, bias: Tree, fwd: Pass, batch: Batch
) -> tuple[Float32[Array, "batch"], Report | None]:
    """Run the model: the cross-entropy of every row in nats, summed over its targets as much as each counts, and
    the layers' reports.

    Args:
        fwd: the forward pass of the batch, with `inputs_of(batch)`.
    """
    model = nnx.merge(abstract_model(config.model).graphdef, params, bias)
    logits, report = model(fwd)
    nats = head.row_nats(logits, *cut((batch.targets, batch.mask), fwd.mesh))
    return nats.reshape(len(batch.targets), -1).sum(1), report


def model_summed_nats(
    config: Config, params: Tree, bias: Tree, fwd: Pass, batch: Batch
) -> tuple[Float32[Array, ""], AheadLoss, Report | None, MaxLogits | None]:
    """Run the model: the sum of `model_row_nats`, multi-token prediction's loss, and what the layers report.

    The logits of all tokens are never in memory at once.
    """
    model = nnx.merge(abstract_model(config.model).graphdef, params, bias)
    x, ahead, report, max_logits = model.before_head(fwd)

    def nats(x: Array, targets: Array, mask: Array) -> Float32[Array, ""]:
        with jax.named_scope("head"):
            vectors, weight = model.factors(x)
            targets, mask = cut((targets, mask), fwd.mesh)
            return head.summed_nats(vectors, weight, targets, mask, config.model.cpu_kernel, fwd.mesh)

    depths = range(config.model.mtp_depth)
    later = ahead_loss(batch, [ahead[depth] for depth in depths], nats)
    return nats(x, batch.targets, batch.mask), later, report, max_logits
