"""The axes of the device mesh, and ONE table for parameters and activations: logical dimension -> mesh axes.

An axis splits devices (`replica data expert tensor`), a dim names an axis of an array (`embed ffw experts ...`).
The batch is split over replica, data and expert; experts are placed on `expert`; weights are split fully, so that
a device keeps one part in data x expert x tensor of them; replica repeats everything, across slow links.
Imports no jax: the rules of a config and `moe_jax.mesh` read the same table.
"""

from dataclasses import fields

from moe_jax.config.schema import MeshConfig

AXES = tuple(f.name for f in fields(MeshConfig))  # outermost first
BATCH = ("replica", "data", "expert")  # the axes that the rows of a batch are split over
BETWEEN_SLICES = "replica"  # the only axis that may cross the network between slices

# The axes that may split a dimension, tried in this order. An axis is skipped if an earlier dimension of the same
# array took it, or if it does not divide the dimension: so rows of a weight are split by `data` and columns by
# `expert`, because 7168 does not split 2048 ways.
# In an activation the batch takes all axes except `tensor`, which is left for the heads: one table serves both.
TABLE: dict[str, tuple[str, ...]] = {
    # of parameters
    "experts": ("expert",),
    "embed": ("data",),
    "ffw": ("tensor", "expert"),
    "heads": ("tensor", "expert"),
    "kv_heads": ("tensor", "expert"),
    "head_dim": ("expert",),
    "latent": ("data", "expert"),
    "mixed": ("expert",),
    "vocab": ("tensor", "expert"),
    # of activations
    "batch": BATCH,
    "sequence": (),
    "tokens": BATCH,  # batch x sequence in one axis
    "shards": BATCH,  # one entry from each part of the batch
    # stacked in front
    "layers": (),
    "micro_batches": (),
}
