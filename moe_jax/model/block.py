"""One block of the transformer, and how blocks are stacked."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig, local_layers
from moe_jax.config.multipliers import residual_multiplier
from moe_jax.model.attention import Cache, make_attention
from moe_jax.model.forward import Pass, Report, token_info
from moe_jax.model.kinds import Local
from moe_jax.model.layers import FeedForward, Norm, make_norm
from moe_jax.model.moe import MoE


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


def kinds_of_attention(config: ModelConfig) -> list[tuple[bool | np.ndarray, ...]]:
    """For each run of `layout`, and each layer of its unit, whether attention is local: of all repeats, or of each.

    A bool where all repeats agree, so that no other program is compiled; else bool [repeats], which is scanned.
    """
    local = np.array(local_layers(config))
    found = []
    for run in layout(config):
        count = run.repeats * len(run.kinds)
        columns = local[:count].reshape(run.repeats, -1).T
        found.append(tuple(bool(column[0]) if len(set(column)) == 1 else column for column in columns))
        local = local[count:]
    return found


class Place(NamedTuple):
    """Where a layer's leaves are: their common path, such as "stacks/0/blocks/1/", and its number in that stack.

    kind: "dense" or "moe".
    """

    path: str
    repeat: int
    kind: str


def places(config: ModelConfig) -> Iterator[Place]:
    """Every layer in its order, then those of multi-token prediction; one by one, as a file may claim any number."""
    for number, run in enumerate(layout(config)):
        for repeat in range(run.repeats):
            for block, kind in enumerate(run.kinds):
                yield Place(f"stacks/{number}/blocks/{block}/", repeat, kind)
    for depth in range(config.mtp_depth):
        yield Place("mtp/block/", depth, "moe" if config.num_experts else "dense")


class Block(nnx.Module):
    """Attention and a feed-forward layer, each behind a norm and added to the residual stream.

    With `norm_after` the norms are behind them instead (OLMo 2, arXiv 2501.00656, section 3.2), with `sandwich_norm`
    on both sides (CogView, arXiv 2105.13290, section 2.4).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kind: str) -> None:
        self.attention_norm = make_norm(config)
        self.attention = make_attention(config, rngs)
        self.ffw_norm = make_norm(config)
        self.ffw = MoE(config, rngs) if kind == "moe" else FeedForward(config, rngs, "dense", config.ffw_dim)
        sandwich = config.sandwich_norm
        self.attention_after_norm = make_norm(config) if sandwich else None
        self.ffw_after_norm = make_norm(config) if sandwich else None
        self.norm_after = config.norm_after
        self.multiplier = residual_multiplier(config)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        cache: Cache | None,
        fwd: Pass,
        local: Local = False,
    ) -> tuple[Float[Array, "batch seq embed"], Report | None, Cache | Array | None]:
        """The residual stream after this layer, its Report if it routes, and what attention leaves.

        That is its cache if it has one, and otherwise the largest logit of every head [H] if the pass asks for it.
        """
        with jax.named_scope("attention"):
            h = self._before(self.attention_norm, x)
            positions, segments = fwd.inputs.positions, fwd.inputs.segment_ids
            left: Cache | Array | None
            if cache is None:
                mixed, left = self.attention.observed(h, positions, segments, fwd.mesh, local, fwd.max_logits)
            else:
                mixed, left = self.attention.extend(h, positions, cache, fwd.mesh, local)
            x = checkpoint_name(x + self._after(self.attention_norm, self.attention_after_norm, mixed), "residual")
        h = self._before(self.ffw_norm, x)
        if isinstance(self.ffw, FeedForward):
            return x + self._after(self.ffw_norm, self.ffw_after_norm, self.ffw(h, fwd.mesh)), None, left
        tokens = token_info(fwd.inputs, self.ffw.config.class_starts, fwd.pieces)
        y, report = self.ffw(h, tokens, fwd, dropless=cache is not None)
        return x + self._after(self.ffw_norm, self.ffw_after_norm, y), report, left

    def _before(self, norm: Norm, x: Array) -> Array:
        return x if self.norm_after else norm(x)

    def _after(self, norm: Norm, second: Norm | None, x: Array) -> Array:
        x = norm(x) if self.norm_after else x if second is None else second(x)
        return x if self.multiplier == 1 else self.multiplier * x


class Unit(nnx.Module):
    """The consecutive layers that a scan repeats."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kinds: tuple[str, ...]) -> None:
        self.blocks = nnx.List([Block(config, rngs, kind) for kind in kinds])

    def __call__(
        self, x: Array, caches: tuple[Cache | None, ...], fwd: Pass, local: tuple[Local, ...]
    ) -> tuple[Array, Report | None, tuple[Cache | Array | None, ...]]:
        """All layers in order; the Report of the MoE layer, which is the last, and what attention leaves in each."""
        report = None
        after = []
        for block, cache, kind in zip(self.blocks, caches, local, strict=True):
            x, report, left = block(x, cache, fwd, kind)
            after.append(left)
        return x, report, tuple(after)
