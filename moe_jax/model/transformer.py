"""The Transformer, chosen by config: dense, GShard/Switch, DeepSeekMoE or DeepSeek-V3 layers.

Layers of a kind are stacked and scanned, so compile time does not grow with depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from moe_jax.config import ModelConfig
from moe_jax.config.multipliers import logits_divisor, without_depth
from moe_jax.kernels.head import WEIGHT_DIMS
from moe_jax.mesh import constrain, gather, is_sharded, spec
from moe_jax.model.attention import Cache
from moe_jax.model.block import Run, Unit, kinds_of_attention, layout
from moe_jax.model.forward import NOTHING, MaxLogits, Pass, Report
from moe_jax.model.layers import filled, make_norm, normal
from moe_jax.model.placing import at_use, look_up, rematerialized, stacked
from moe_jax.model.prediction import AHEAD, Ahead, ahead_of
from moe_jax.model.shrinking import shrink_logits


class Transformer(nnx.Module):
    """Embedding, layers, norm, head. Call it on a `Pass` to get logits and the stacked Reports [L, ...].

    L counts the MoE layers of multi-token prediction, which come last.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        outside = without_depth(config)
        self.embedding = normal(outside, rngs, "embedding", vocab=config.vocab_size, embed=config.embed_dim)
        self.stacks = nnx.List([stacked(rngs, run.repeats, Unit, config, run.kinds) for run in layout(config)])
        self.final_norm = make_norm(outside)
        tied = config.tied_embeddings
        self.head = None if tied else normal(outside, rngs, "head", embed=config.embed_dim, vocab=config.vocab_size)
        biased = config.head_bias
        self.head_bias = filled(outside, 0.0, "head", config.param_dtype, vocab=config.vocab_size) if biased else None
        self.mtp = stacked(rngs, config.mtp_depth, Ahead, outside) if config.mtp_depth else None
        self.config = nnx.static(config)

    def __call__(self, fwd: Pass) -> tuple[Float32[Array, "batch seq vocab"], Report | None]:
        """Next-token logits and what the MoE layers report.

        Returns:
            logits float32 [B, S, V], in the pieces of `Pass.cut`; Report with leaves [L, ...], or None for a dense
            model.
        """
        x, _, report, _ = self.before_head(fwd)
        return self.logits(x, fwd.mesh), report

    def before_head(
        self, fwd: Pass
    ) -> tuple[
        Float[Array, "batch seq embed"],
        Float[Array, "depth batch seq embed"] | None,
        Report | None,
        MaxLogits | None,
    ]:
        """The vectors that the head multiplies, in the compute dtype: of the next token [B, S, D], and of multi-token
        prediction; the layers' Report; and the largest logits, if the pass asks for them. Vectors are in the pieces of
        `Pass.cut`.
        """
        x, report, left = self._layers(self._main_pass(fwd).cut())
        x = self.final_norm(x)
        max_logits = MaxLogits(tuple(left)) if fwd.max_logits else None
        if self.mtp is None:
            return x, None, report, max_logits
        with jax.named_scope("ahead"):
            ahead, more, of_ahead = self._ahead(x, self._ahead_pass(fwd))
        if report is not None:
            report = jax.tree.map(lambda *parts: jnp.concatenate(parts), report, more)
        return x, ahead, report, None if max_logits is None else max_logits._replace(ahead=of_ahead)

    def shrink_logits(self, share: MaxLogits) -> None:
        """Make the logits of every head of attention `share` times what they are, in place."""
        for stack, of_unit in zip(self.stacks, share.stacks, strict=True):
            for block, of_layers in zip(stack.blocks, of_unit, strict=True):
                shrink_logits(block.attention, of_layers)
        if self.mtp is not None and share.ahead is not None:
            shrink_logits(self.mtp.block.attention, share.ahead)

    def extend(
        self, fwd: Pass, cache: Any, *, last_only: bool = False
    ) -> tuple[Float32[Array, "batch out vocab"], Report | None, Any]:
        """Decode: the logits of tokens that see those in the cache, and are added to it.

        A prompt is one call with all its tokens, followed by calls with one token a row. The logits are those of the
        call on the whole sequence. No copy is dropped, whatever the config sets for training.

        Args:
            fwd: with the `next_inputs`: the next tokens of one document a row, [B, N], each at its position in the row,
                below the cache's length; padding, at -1, is neither cached nor routed.
            cache: that of `init_cache`, or as the last call returned it.
            last_only: only the logits of each row's last token, since those of a whole prompt would take memory.

        Returns:
            logits float32 [B, N, V], or [B, 1, V]; Report with leaves [L, ...] without multi-token prediction; the
            cache.
        """
        x, report, cache = self._layers(self._main_pass(fwd), cache)
        if last_only:
            x = jnp.take_along_axis(x, fwd.inputs.positions.argmax(1)[:, None, None], 1)
        return self.logits(self.final_norm(x), fwd.mesh), report, cache

    def init_cache(self, batch: int, length: int) -> Any:
        """The empty cache of `extend`, for `batch` rows of `length` tokens: the layers' caches, stacked by stack."""

        def of_run(stack: Unit, run: Run) -> tuple[Cache, ...]:
            one = tuple(block.attention.init_cache(batch, length) for block in stack.blocks)
            return jax.tree.map(lambda a: jnp.zeros((run.repeats, *a.shape), a.dtype), one)

        return [of_run(*pair) for pair in zip(self.stacks, layout(self.config), strict=True)]

    def logits(self, x: Float[Array, "*batch embed"], mesh: Mesh | None = None) -> Float32[Array, "*batch vocab"]:
        """The logits of vectors before the head."""
        with jax.named_scope("head"):
            head = gather(self.head_weight(), mesh, WEIGHT_DIMS)
            logits = jnp.einsum("...d,dv->...v", x, head, preferred_element_type=jnp.float32)
            bias = self._bias_of_logits()
            return logits if bias is None else logits + bias.astype(jnp.float32)

    def head_weight(self) -> Float[Array, "embed vocab"]:
        """[D, V] in the compute dtype, divided by `logits_divisor`, and split over the mesh like a parameter."""
        c = self.config
        head = (self.embedding[...].T if self.head is None else self.head[...]).astype(c.compute_dtype)
        divisor = logits_divisor(c)
        return head if divisor == 1 else head / divisor

    def factors(
        self, x: Float[Array, "*batch embed"]
    ) -> tuple[Float[Array, "*batch width"], Float[Array, "width vocab"]]:
        """Two arrays whose product is the logits: x and the head, with a bias [x, 1] and the head above the bias."""
        head, bias = self.head_weight(), self._bias_of_logits()
        if bias is None:
            return x, head
        ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
        return jnp.concatenate([x, ones], -1), jnp.concatenate([head, bias[None]])

    def _bias_of_logits(self) -> Float[Array, "vocab"] | None:
        """[V] in the compute dtype, divided by `logits_scaling`."""
        if self.head_bias is None:
            return None
        bias = self.head_bias[...].astype(self.config.compute_dtype)
        return bias if self.config.logits_scaling == 1 else bias / self.config.logits_scaling

    def _embed(self, tokens: Array, mesh: Mesh | None) -> Float[Array, "batch seq embed"]:
        c = self.config
        x = look_up(self.embedding[...].astype(c.compute_dtype), tokens, mesh)
        return x if c.embedding_multiplier == 1 else c.embedding_multiplier * x

    def _main_pass(self, fwd: Pass) -> Pass:
        """The pass without the layers of multi-token prediction, which are the last."""
        depth = self.config.mtp_depth
        return fwd.only(slice(-depth)) if depth else fwd

    def _ahead_pass(self, fwd: Pass) -> Pass:
        """The pass through the layers of multi-token prediction only, with their own randomness."""
        last = fwd.only(slice(-self.config.mtp_depth, None))
        return last._replace(key=jax.random.fold_in(fwd.key, AHEAD))

    def _layers(self, fwd: Pass, cache: Any = None) -> tuple[Array, Report | None, Any]:
        """Embedding and all layers except multi-token prediction's, and what attention leaves: such as its cache."""
        x = self._embed(fwd.inputs.tokens, fwd.mesh)
        report = None
        after = []
        runs = layout(self.config)
        cache = [(None,) * len(run.kinds) for run in runs] if cache is None else cache
        for stack, run, kinds, caches in zip(self.stacks, runs, kinds_of_attention(self.config), cache, strict=True):
            x, stack_report, caches = self._scan(stack, run, kinds, x, fwd, caches)
            report = stack_report if stack_report is not None else report
            after.append(caches)
        return x, report, after

    def _scan(
        self, stack: Unit, run: Run, kinds: tuple, x: Array, fwd: Pass, caches: tuple[Cache | None, ...]
    ) -> tuple[Array, Report | None, tuple[Cache | Array | None, ...]]:
        """All layers of a stack in turn."""
        scanned = tuple(None if isinstance(kind, bool) else jnp.asarray(kind) for kind in kinds)

        def body(x: Array, layer: tuple) -> tuple[Array, Any]:
            unit, index, per_layer, caches, own = layer
            unit = at_use(unit, fwd.mesh, self.config.compute_dtype)
            local = tuple(kind if one is None else one for kind, one in zip(kinds, own, strict=True))
            x, *rest = unit(x, caches, fwd.layer(index, per_layer), local)
            return constrain(x, fwd.mesh, spec("pieces")), rest

        body = rematerialized(body, self.config, is_sharded(fwd.mesh))
        per_layer = fwd.per_layer if "moe" in run.kinds else NOTHING
        layers = stack, jnp.arange(run.repeats, dtype=jnp.int32), per_layer, caches, scanned
        x, (report, after) = jax.lax.scan(body, x, layers, unroll=self.config.unroll_layers)
        return x, report, after

    def _ahead(self, x: Array, fwd: Pass) -> tuple[Float[Array, "depth batch seq embed"], Report | None, Array | None]:
        """Every depth of multi-token prediction in turn."""
        depth = self.config.mtp_depth
        # shifted before they are cut, so that a piece has the tokens that come after it
        passes = [fwd._replace(inputs=ahead_of(fwd.inputs, k + 1)).cut() for k in range(depth)]

        def body(x: Array, depth: tuple) -> tuple[Array, Any]:
            module, index, per_layer, inputs = depth
            module = at_use(module, fwd.mesh, self.config.compute_dtype)
            embedded = self._embed(inputs.tokens, fwd.mesh)
            x, report, max_logits = module(x, embedded, passes[0].layer(index, per_layer)._replace(inputs=inputs))
            x = constrain(x, fwd.mesh, spec("pieces"))
            return x, (x, report, max_logits)

        body = rematerialized(body, self.config, is_sharded(fwd.mesh))
        per_layer = fwd.per_layer if self.config.num_experts else NOTHING
        read = jax.tree.map(lambda *each: jnp.stack(each), *(each.inputs for each in passes))
        return jax.lax.scan(body, x, (self.mtp, jnp.arange(depth, dtype=jnp.int32), per_layer, read))[1]
