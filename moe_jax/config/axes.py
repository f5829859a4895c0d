"""The axes of the device mesh, and ONE table for parameters and activations: logical dimension -> mesh axes.

An axis splits devices (`replica data expert sequence tensor`), a dim names an axis of an array (`embed ffw ...`). The
config's `data` is three axes of the mesh, one for each dimension of a torus; elsewhere two of them have size 1.
The sequences of a batch are split over replica, data and expert, and each is cut into pieces over `sequence`; experts
are placed on `expert`; weights are split fully, so that a device keeps one part in data x expert x sequence x tensor of
them; replica repeats everything, across slow links.
Imports no jax: the rules of a config and `moe_jax.mesh` read the same table.
"""

from collections.abc import Sequence
from dataclasses import fields

from moe_jax.config.schema import MeshConfig

CONFIG_AXES = tuple(f.name for f in fields(MeshConfig))  # outermost first
DATA = ("data", "data_y", "data_z")  # weights are gathered over one after the other, from the last to the first
AXES = tuple(axis for name in CONFIG_AXES for axis in (DATA if name == "data" else (name,)))
BATCH = ("replica", *DATA, "expert")  # the axes that the rows of a batch are split over
TOKENS = (*BATCH, "sequence")  # the axes that its tokens are split over
# A matrix that ends a layer of attention or a feed-forward layer has the first two of DATA in the other order. The last
# stage of a gather moves the most bytes: over the links of one dimension for some matrices, of another for the rest.
TURNED = ("data_y", "data", "data_z")
BETWEEN_SLICES = "replica"  # the only axis that may cross the network between slices

# The axes that may split a dimension, tried in this order. An axis is skipped if an earlier dimension of the same
# array took it, or if it does not divide the dimension: so rows of a weight are split by `data` and columns by
# `expert`, because 7168 does not split 2048 ways.
# The axes of a dim that TOKENS has too are in that order, from the last of which to the first parameters are gathered;
# but for TURNED.
# In an activation the batch takes all axes except `tensor`, which is left for the heads: one table serves both.
# Rows of activations are pieces: row b C + c of [B C, S / C] is piece c of sequence b, so that tokens stay in the order
# of the batch [B, S] however it is cut. Only attention puts pieces together, and gives each device some of the heads.
TABLE: dict[str, tuple[str, ...]] = {
    # of parameters
    "experts": ("expert",),
    "embed": (*DATA, "sequence"),
    "ffw": ("tensor", "expert"),
    "heads": ("tensor", "expert"),
    "kv_heads": ("tensor", "expert"),
    "head_dim": ("expert",),
    "latent": (*DATA, "expert", "sequence"),
    "query_latent": (*DATA, "expert", "sequence"),
    "mixed": ("expert",),
    "vocab": ("tensor", "expert"),
    "one": (),
    # of activations
    "batch": BATCH,  # sequences
    "length": ("sequence",),  # the tokens of a sequence
    "pieces": TOKENS,  # of all sequences
    "tokens": TOKENS,  # of all sequences
    "shards": TOKENS,  # one entry from each part of the tokens
    "all_heads": ("tensor",),  # the heads of pieces ...
    "own_heads": ("tensor", "sequence"),  # ... and of whole sequences
    "whole": (),
    # stacked in front
    "layers": (),
    "micro_batches": (),
}


def axes_of_dim(dims: Sequence[str], index: int) -> tuple[str, ...]:
    """The axes that may split one dimension of an array with these dims, in the order in which they are tried."""
    mine = TABLE[dims[index]]
    if dims[index] == "embed" and index and dims[index - 1] in ("ffw", "head_dim"):
        return tuple(TURNED[DATA.index(axis)] if axis in DATA else axis for axis in mine)
    return mine
