"""The input of a forward pass besides the parameters (`Pass`), and what its MoE layers report (`Report`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, Key

from moe_jax.balance import Balancer, State, Statistics
from moe_jax.data.batches import Batch
from moe_jax.dispatch import Traffic
from moe_jax.model.pieces import cut, num_pieces
from moe_jax.routing import Routing, Rows, Tokens

# --- what goes in ---------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The tokens of a forward pass, [B, S] each: ids, positions in their document, documents (0: padding).

    As a layer reads them: [B C, S / C], in the C pieces into which the mesh cuts every sequence.
    """

    tokens: Int32[Array, "batch seq"]
    positions: Int32[Array, "batch seq"]
    segment_ids: Int32[Array, "batch seq"]


def inputs_of(batch: Batch) -> Inputs:
    """The part of a batch that the model reads."""
    return Inputs(batch.tokens, batch.positions, batch.segment_ids)


def next_inputs(tokens: Int32[Array, "batch seq"], positions: Int32[Array, "batch seq"]) -> Inputs:
    """The inputs of `Transformer.extend`: the next tokens of one document a row; those at position -1 are padding."""
    return Inputs(tokens, positions, (positions >= 0).astype(jnp.int32))


class PerLayer(NamedTuple):
    """The part of a `Pass` that differs between MoE layers: leaves [L, ...], or without L as a layer reads it.

    state: the balancer's; the bias is read from the model.
    statistics: those of the whole optimizer step, if a loss reads them; None: those of this forward pass.
    earlier: those of the step's micro-batches before this one, if a loss reads the sum so far.
    chosen: int16 [L, B S, K], experts that were chosen before this pass, -1 where this pass chooses; None: everywhere.
    offset: [L, B S, D], added to the layers' inputs: zeros, to differentiate by; None adds nothing.
    step: the optimizer step [L], the same for all layers, for `Details.next_ids`; None is 0.
    """

    state: State
    statistics: Statistics | None = None
    earlier: Statistics | None = None
    chosen: Array | None = None
    offset: Array | None = None
    step: Array | None = None


NOTHING = PerLayer({})  # for layers that do not route


class Pass(NamedTuple):
    """One forward pass: all that its layers read besides the parameters and the residual stream.

    inputs: token ids, positions and segments, [B, S].
    balancer: how experts are chosen and balanced.
    per_layer: what each MoE layer has of its own.
    key: the randomness of this pass (router jitter, random second expert, selectors).
    train: False turns that randomness off, except in the method `random`, which consists of it.
    mesh: where parameters and tokens are placed; None for one device.
    max_logits: whether attention reports the largest logit of every head.
    pieces: C, of how many rows of `inputs` a sequence consists; 1 until the Transformer cuts them.
    """

    inputs: Inputs
    balancer: Balancer
    per_layer: PerLayer
    key: Key[Array, ""]
    train: bool = False
    mesh: Mesh | None = None
    max_logits: bool = False
    pieces: int = 1

    def only(self, layers: slice) -> "Pass":
        """The pass restricted to some of the MoE layers."""
        return self._replace(per_layer=jax.tree.map(lambda leaf: leaf[layers], self.per_layer))

    def layer(self, index: Int32[Array, ""], per_layer: PerLayer) -> "Pass":
        """The pass as layer `index` of a stack reads it, with its own part and its own randomness."""
        return self._replace(per_layer=per_layer, key=jax.random.fold_in(self.key, index))

    def cut(self) -> "Pass":
        """The pass over the pieces of its sequences."""
        return self._replace(inputs=cut(self.inputs, self.mesh), pieces=num_pieces(self.mesh))


def token_info(inputs: Inputs, class_starts: tuple[int, ...] = (), pieces: int = 1) -> Tokens:
    """What routing may know of each token of the batch, flattened to [B S]; its class follows from its id.

    Args:
        inputs: in `pieces` rows a sequence.
    """
    kind: Any = sum((inputs.tokens >= start).astype(jnp.int32) for start in class_starts) if class_starts else None
    rows = jax.lax.broadcasted_iota(jnp.int32, inputs.tokens.shape, 0) // pieces
    return Tokens(
        mask=(inputs.segment_ids > 0).ravel(),
        row=rows.ravel(),
        ids=inputs.tokens.ravel(),
        kind=None if kind is None else kind.ravel(),
        rows=Rows(len(rows) // pieces),
    )


# --- what comes out -------------------------------------------------------------------------------------------


class Details(NamedTuple):
    """One layer's routing, token by token, in a `Report`: produced by the MoE layer, and not used for training.

    Evaluation and the measurements of `moe_jax.analysis` read it; where nothing does, XLA does not compute it.

    routing: of the micro-batch.
    unbiased_ids: the experts that its tokens would choose by their scores alone.
    next_ids: those that they would choose under the bias after an update from this micro-batch alone.
    row_loads: copies per expert of every sequence.
    """

    routing: Routing
    unbiased_ids: Int32[Array, "tokens slots"]
    next_ids: Int32[Array, "tokens slots"]
    row_loads: Int32[Array, "batch experts"]


class Report(NamedTuple):
    """What an MoE layer reports of a forward pass; the Transformer stacks those of its layers, leaves [L, ...].

    The train step adds up all but the details over its micro-batches (`StepSums`); evaluation and analysis read the
    details.

    statistics: of the balancer, additive over micro-batches and shards; its update moves the bias by their sum.
    losses: the balancing losses by label, which training adds to the language model's.
    aux_loss: the value of the plain auxiliary loss, for the log, whatever the config balances by.
    traffic: the cost of dispatch.
    details: the routing of every token.
    """

    statistics: Statistics
    losses: dict[str, Float32[Array, "*layers"]]
    aux_loss: Float32[Array, "*layers"]
    traffic: Traffic
    details: Details


class MaxLogits(NamedTuple):
    """The largest logit of every head of attention in a forward pass, float32, with the layers as they are stacked.

    stacks: [repeats, H] for each layer of the unit of each stack. ahead: [depth, H] of multi-token prediction.
    """

    stacks: tuple[tuple[Float32[Array, "repeats heads"], ...], ...]
    ahead: Float32[Array, "depth heads"] | None = None
