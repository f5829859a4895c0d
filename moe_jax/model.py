"""The Transformer, chosen by config: dense, GShard/Switch, DeepSeekMoE or DeepSeek-V3 layers.

Layers of a kind are stacked and scanned, so compile time does not grow with depth.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from moe_jax.config import ModelConfig
from moe_jax.layers import Attention, RMSNorm, SwiGLU, normal, visibility
from moe_jax.moe import Balancing, MoE, Report
from moe_jax.routing import Tokens


class Inputs(NamedTuple):
    """What a forward pass reads, [B, S] each: token ids, position in the document, document (0: padding)."""

    tokens: Int32[Array, "batch seq"]
    positions: Int32[Array, "batch seq"]
    segment_ids: Int32[Array, "batch seq"]


class Run(NamedTuple):
    """`repeats` copies of a unit of consecutive layers, each "dense" or "moe"."""

    kinds: tuple[str, ...]
    repeats: int


def layout(config: ModelConfig) -> tuple[Run, ...]:
    """Which layers are stacked together: `first_dense` dense ones, then units of `moe_every` ending in MoE.

    A unit has at most one MoE layer, its last, and all units with one are in one run.
    """
    if config.num_experts == 0:
        return (Run(("dense",), config.num_layers),)
    units, left = divmod(config.num_layers - config.first_dense, config.moe_every)
    body = Run(("dense",) * (config.moe_every - 1) + ("moe",), units)
    runs = (Run(("dense",), config.first_dense), body, Run(("dense",), left))
    return tuple(run for run in runs if run.repeats)


def num_moe_layers(config: ModelConfig) -> int:
    """L: how many layers route tokens to experts."""
    return sum(run.repeats for run in layout(config) if "moe" in run.kinds)


class Block(nnx.Module):
    """Attention and a feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kind: str) -> None:
        self.attention_norm = RMSNorm(config, embed=config.embed_dim)
        self.attention = Attention(config, rngs)
        self.ffw_norm = RMSNorm(config, embed=config.embed_dim)
        self.ffw = MoE(config, rngs) if kind == "moe" else SwiGLU(config, rngs, config.ffw_dim)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        inputs: Inputs,
        visible: Bool[Array, "batch 1 seq seq"],
        balancing: Balancing,
        key: Key[Array, ""],
        train: bool,
    ) -> tuple[Float[Array, "batch seq embed"], Report | None]:
        """The residual stream after this layer, and the Report if the layer routes."""
        x = x + self.attention(self.attention_norm(x), inputs.positions, visible)
        h = self.ffw_norm(x)
        if isinstance(self.ffw, SwiGLU):
            return x + self.ffw(h), None
        y, report = self.ffw(h, token_info(inputs), balancing, key, train)
        return x + y, report


class Unit(nnx.Module):
    """The consecutive layers that a scan repeats."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kinds: tuple[str, ...]) -> None:
        self.blocks = nnx.List([Block(config, rngs, kind) for kind in kinds])

    def __call__(self, x: Array, *args: Any) -> tuple[Array, Report | None]:
        """All layers in order; the Report of the MoE layer, which is the last."""
        report = None
        for block in self.blocks:
            x, report = block(x, *args)
        return x, report


class Transformer(nnx.Module):
    """Embedding, layers, norm, head. Call it on `Inputs` to get logits and the stacked Reports [L, ...]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.embedding = normal(config, rngs, vocab=config.vocab_size, embed=config.embed_dim)
        self.stacks = nnx.List([_stack(config, rngs, run) for run in layout(config)])
        self.final_norm = RMSNorm(config, embed=config.embed_dim)
        tied = config.tied_embeddings
        self.head = None if tied else normal(config, rngs, embed=config.embed_dim, vocab=config.vocab_size)
        self.config = nnx.static(config)

    def __call__(
        self, inputs: Inputs, balancing: Balancing, *, key: Key[Array, ""], train: bool = False
    ) -> tuple[Float32[Array, "batch seq vocab"], Report | None]:
        """Next-token logits and what the MoE layers report.

        Args:
            inputs: token ids, positions and segments, [B, S].
            balancing: the balancer with its state stacked over MoE layers; the bias is read from the model.
            key: randomness of this forward pass (router jitter, random second expert, selectors).
            train: False turns that randomness off.

        Returns:
            logits float32 [B, S, V]; Report with leaves [L, ...], or None for a dense model.
        """
        x = self.embedding[...].astype(self.config.compute_dtype)[inputs.tokens]
        visible = visibility(inputs.segment_ids)
        report = None
        for stack, run in zip(self.stacks, layout(self.config), strict=True):
            x, stack_report = self._scan(stack, run, x, inputs, visible, balancing, key, train)
            report = stack_report if stack_report is not None else report
        x = self.final_norm(x)
        head = self.embedding[...].T if self.head is None else self.head[...]
        logits = jnp.einsum("bsd,dv->bsv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits, report

    def _scan(
        self,
        stack: Unit,
        run: Run,
        x: Array,
        inputs: Inputs,
        visible: Array,
        balancing: Balancing,
        key: Array,
        train: bool,
    ) -> tuple[Array, Report | None]:
        routes = "moe" in run.kinds
        state, statistics = (balancing.state, balancing.statistics) if routes else ({}, None)

        def body(x: Array, layer: tuple) -> tuple[Array, Report | None]:
            unit, index, state, statistics = layer
            here = Balancing(balancing.balancer, state, statistics)
            return unit(x, inputs, visible, here, jax.random.fold_in(key, index), train)

        return jax.lax.scan(
            rematerialized(body, self.config.remat), x, (stack, jnp.arange(run.repeats), state, statistics)
        )


def token_info(inputs: Inputs) -> Tokens:
    """What routing may know of each token of the batch, flattened to [B S]."""
    rows = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[0])[:, None], inputs.tokens.shape)
    return Tokens(
        mask=(inputs.segment_ids > 0).ravel(),
        row=rows.ravel().astype(jnp.int32),
        ids=inputs.tokens.ravel(),
    )


def rematerialized(body, policy: str):  # noqa: ANN001, ANN201 - any scan body
    """The scan body, keeping for the backward pass all of it ("none"), matmul outputs ("dots") or its input."""
    if policy == "none":
        return body
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(body, policy=keep, prevent_cse=False)


def _stack(config: ModelConfig, rngs: nnx.Rngs, run: Run) -> Unit:
    return nnx.vmap(lambda r: Unit(config, r, run.kinds))(rngs.split(run.repeats))
