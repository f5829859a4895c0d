"""The dispatcher `local`: copies sorted by expert, on a device that has all experts."""

from jaxtyping import Array

from moe_jax.dispatch.work import Traffic, Work, register
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.routing import count


@register("local")
def local(work: Work) -> tuple[Array, Traffic]:
    """Sort the copies by expert and multiply each group of rows: the cost does not grow with E.

    Source: dropless sorting as in MegaBlocks (arXiv 2211.15841).
    """
    rows = rows_multiplied(count(work.expert_ids, work.num_experts), work.multiply.tile)
    y = work.multiply.routed(work.x, work.expert_ids, work.gates, work.weights)
    return y, Traffic.of(rows=rows, visits=work.visits())
