"""The Transformer, chosen by config: dense, GShard/Switch, DeepSeekMoE or DeepSeek-V3 layers.

Layers of a kind are stacked and scanned, so compile time does not grow with depth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32, Key

from moe_jax.config import ModelConfig
from moe_jax.mesh import BATCH, GATHERED, axes_of, constrain, gather, is_expert_weight, is_sharded, spec
from moe_jax.model.layers import Cache, RMSNorm, SwiGLU, make_attention, normal
from moe_jax.model.moe import Balancing, MoE, Report
from moe_jax.routing import Rows, Tokens


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


class Block(nnx.Module):
    """Attention and a feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kind: str) -> None:
        self.attention_norm = RMSNorm(config, embed=config.embed_dim)
        self.attention = make_attention(config, rngs)
        self.ffw_norm = RMSNorm(config, embed=config.embed_dim)
        self.ffw = MoE(config, rngs) if kind == "moe" else SwiGLU(config, rngs, config.ffw_dim)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        cache: Cache | None,
        inputs: Inputs,
        balancing: Balancing,
        key: Key[Array, ""],
        train: bool,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Report | None, Cache | None]:
        """The residual stream after this layer, the Report if the layer routes, and the cache if there is one."""
        with jax.named_scope("attention"):
            h = self.attention_norm(x)
            if cache is None:
                mixed = self.attention(h, inputs.positions, inputs.segment_ids, mesh)
            else:
                mixed, cache = self.attention.extend(h, inputs.positions, cache, mesh)
            x = x + mixed
        h = self.ffw_norm(x)
        if isinstance(self.ffw, SwiGLU):
            return x + self.ffw(h, mesh), None, cache
        tokens = token_info(inputs, self.ffw.config.class_starts)
        y, report = self.ffw(h, tokens, balancing, key, train, mesh, dropless=cache is not None)
        return x + y, report, cache


class Unit(nnx.Module):
    """The consecutive layers that a scan repeats."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kinds: tuple[str, ...]) -> None:
        self.blocks = nnx.List([Block(config, rngs, kind) for kind in kinds])

    def __call__(
        self, x: Array, caches: tuple[Cache | None, ...], *args: Any
    ) -> tuple[Array, Report | None, tuple[Cache | None, ...]]:
        """All layers in order; the Report of the MoE layer, which is the last, and the caches of all."""
        report, after = None, []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, report, cache = block(x, cache, *args)
            after.append(cache)
        return x, report, tuple(after)


class Ahead(nnx.Module):
    """One depth of multi-token prediction: a layer on what was seen and the next token, both normed and mixed.

    `h^k_i = norm(layer(M [norm(h^{k-1}_i); norm(Emb(t_{i+k}))]))` predicts t_{i+k+1} through the model's own head.
    h^0 is what the model's head sees, as in the implementations that decode with published weights.

    Source: DeepSeek-V3 (arXiv 2412.19437) eq. 21-23.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.embed_dim
        self.embedding_norm = RMSNorm(config, embed=width)
        self.hidden_norm = RMSNorm(config, embed=width)
        self.from_embedding = normal(config, rngs, embed=width, mixed=width)
        self.from_hidden = normal(config, rngs, embed=width, mixed=width)
        self.block = Block(config, rngs, "moe" if config.num_experts else "dense")
        self.norm = RMSNorm(config, embed=width)

    def __call__(self, x: Array, embedded: Array, *args: Any) -> tuple[Float[Array, "batch seq embed"], Report | None]:
        """x [B, S, D] of the depth before, and the embedding of the token k places on; to this depth's, and Report."""
        known, seen = self.embedding_norm(embedded), self.hidden_norm(x)
        mixed = known @ self.from_embedding.astype(x.dtype) + seen @ self.from_hidden.astype(x.dtype)
        x, report, _ = self.block(mixed, None, *args)
        return self.norm(x), report


class Transformer(nnx.Module):
    """Embedding, layers, norm, head. Call it on `Inputs` to get logits and the stacked Reports [L, ...].

    L counts the MoE layers of multi-token prediction, which come last.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.embedding = normal(config, rngs, vocab=config.vocab_size, embed=config.embed_dim)
        self.stacks = nnx.List([_stack(rngs, run.repeats, Unit, config, run.kinds) for run in layout(config)])
        self.final_norm = RMSNorm(config, embed=config.embed_dim)
        tied = config.tied_embeddings
        self.head = None if tied else normal(config, rngs, embed=config.embed_dim, vocab=config.vocab_size)
        self.mtp = _stack(rngs, config.mtp_depth, Ahead, config) if config.mtp_depth else None
        self.config = nnx.static(config)

    def __call__(
        self,
        inputs: Inputs,
        balancing: Balancing,
        *,
        key: Key[Array, ""],
        train: bool = False,
        mesh: Mesh | None = None,
    ) -> tuple[Float32[Array, "batch seq vocab"], Report | None]:
        """Next-token logits and what the MoE layers report.

        Args:
            inputs: token ids, positions and segments, [B, S].
            balancing: the balancer with its state stacked over MoE layers; the bias is read from the model.
            key: randomness of this forward pass (router jitter, random second expert, selectors).
            train: False turns that randomness off.
            mesh: where parameters and rows of the batch lie; None for one device.

        Returns:
            logits float32 [B, S, V]; Report with leaves [L, ...], or None for a dense model.
        """
        x, _, report = self.before_head(inputs, balancing, key=key, train=train, mesh=mesh)
        return self.logits(x, mesh), report

    def before_head(
        self, inputs: Inputs, balancing: Balancing, *, key: Array, train: bool = False, mesh: Mesh | None = None
    ) -> tuple[Float[Array, "batch seq embed"], Float[Array, "depth batch seq embed"] | None, Report | None]:
        """As the call, but what the head multiplies, in the compute dtype: [B, S, D], and of multi-token prediction."""
        own, later = self._split(balancing)
        x, report, _ = self._layers(inputs, own, key, train, mesh)
        x = self.final_norm(x)
        if self.mtp is None:
            return x, None, report
        with jax.named_scope("ahead"):
            ahead, more = self._ahead(x, inputs, later, jax.random.fold_in(key, AHEAD), train, mesh)
        if report is not None:
            report = jax.tree.map(lambda *parts: jnp.concatenate(parts), report, more)
        return x, ahead, report

    def extend(
        self,
        tokens: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
        cache: Any,
        balancing: Balancing,
        *,
        last_only: bool = False,
        key: Key[Array, ""] | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float32[Array, "batch out vocab"], Report | None, Any]:
        """Decode: the logits of tokens that see what the cache holds, and enter it.

        A prompt is one call with all its tokens; then follow calls with one token a row. The logits are those of the
        call on the whole sequence. No copy is dropped, whatever the config says of training.

        Args:
            tokens: int32 [B, N], the next tokens of one document a row.
            positions: int32 [B, N], each token's place in its row, below the cache's length; -1 is padding, which
                enters nothing and is routed nowhere.
            cache: of `init_cache`, or as the last call returned it.
            balancing: as in the call.
            last_only: logits of each row's token of the highest position only: a prompt's others need no room.
            key: for selectors that draw.
            mesh: where parameters and rows of the batch lie; None for one device.

        Returns:
            logits float32 [B, N, V], or [B, 1, V]; Report with leaves [L, ...] without multi-token prediction; the
            cache.
        """
        inputs = Inputs(tokens, positions, (positions >= 0).astype(jnp.int32))
        own = self._split(balancing)[0]
        key = jax.random.key(0) if key is None else key
        x, report, cache = self._layers(inputs, own, key, False, mesh, cache)
        if last_only:
            x = jnp.take_along_axis(x, positions.argmax(1)[:, None, None], 1)
        return self.logits(self.final_norm(x), mesh), report, cache

    def init_cache(self, batch: int, length: int) -> Any:
        """What `extend` fills, for so many rows of so many tokens: for each stack the layers' caches, stacked."""

        def of_run(stack: Unit, run: Run) -> tuple[Cache, ...]:
            one = tuple(block.attention.init_cache(batch, length) for block in stack.blocks)
            return jax.tree.map(lambda a: jnp.zeros((run.repeats, *a.shape), a.dtype), one)

        return [of_run(*pair) for pair in zip(self.stacks, layout(self.config), strict=True)]

    def logits(self, x: Float[Array, "*batch embed"], mesh: Mesh | None = None) -> Float32[Array, "*batch vocab"]:
        """What the head makes of vectors before it."""
        with jax.named_scope("head"):
            return jnp.einsum("...d,dv->...v", x, self.head_weight(mesh), preferred_element_type=jnp.float32)

    def head_weight(self, mesh: Mesh | None = None) -> Float[Array, "embed vocab"]:
        """[D, V] in the compute dtype, gathered from its shards."""
        head = at_use(self.embedding if self.head is None else self.head, mesh, self.config.compute_dtype)[...]
        return (head.T if self.head is None else head).astype(self.config.compute_dtype)

    def _embed(self, tokens: Array, mesh: Mesh | None) -> Float[Array, "batch seq embed"]:
        return look_up(self.embedding[...].astype(self.config.compute_dtype), tokens, mesh)

    def _split(self, balancing: Balancing) -> tuple[Balancing, Balancing]:
        """What the layers get of it, and what multi-token prediction gets: its layers are the last."""
        depth = self.config.mtp_depth
        if not depth:
            return balancing, balancing
        balancer, *by_layer = balancing
        first, last = (jax.tree.map(lambda a, p=part: a[p], by_layer) for part in (slice(-depth), slice(-depth, None)))
        return Balancing(balancer, *first), Balancing(balancer, *last)

    def _layers(
        self,
        inputs: Inputs,
        balancing: Balancing,
        key: Array,
        train: bool,
        mesh: Mesh | None,
        cache: Any = None,
    ) -> tuple[Array, Report | None, Any]:
        """Embedding and all layers of the model proper; with a cache also what is in it afterwards."""
        x, report, after = self._embed(inputs.tokens, mesh), None, []
        runs = layout(self.config)
        cache = [(None,) * len(run.kinds) for run in runs] if cache is None else cache
        for stack, run, caches in zip(self.stacks, runs, cache, strict=True):
            x, stack_report, caches = self._scan(stack, run, x, inputs, balancing, key, train, mesh, caches)
            report = stack_report if stack_report is not None else report
            after.append(caches)
        return x, report, after

    def _scan(
        self,
        stack: Unit,
        run: Run,
        x: Array,
        inputs: Inputs,
        balancing: Balancing,
        key: Array,
        train: bool,
        mesh: Mesh | None,
        caches: tuple[Cache | None, ...],
    ) -> tuple[Array, Report | None, tuple[Cache | None, ...]]:
        routes = "moe" in run.kinds
        _, *by_layer = balancing if routes else Balancing(balancing.balancer, {})

        def body(x: Array, layer: tuple) -> tuple[Array, Any]:
            unit, index, by_layer, caches = layer
            here = Balancing(balancing.balancer, *by_layer)
            unit = at_use(unit, mesh, self.config.compute_dtype)
            x, *rest = unit(x, caches, inputs, here, jax.random.fold_in(key, index), train, mesh)
            return constrain(x, mesh, P(BATCH)), rest

        body = rematerialized(body, self.config.remat, is_sharded(mesh))
        layers = stack, jnp.arange(run.repeats, dtype=jnp.int32), by_layer, caches
        x, (report, after) = jax.lax.scan(body, x, layers, unroll=self.config.unroll_layers)
        return x, report, after

    def _ahead(
        self, x: Array, inputs: Inputs, balancing: Balancing, key: Array, train: bool, mesh: Mesh | None
    ) -> tuple[Float[Array, "depth batch seq embed"], Report | None]:
        """Every depth of multi-token prediction in turn."""
        _, *by_layer = balancing if self.config.num_experts else Balancing(balancing.balancer, {})

        def body(x: Array, depth: tuple) -> tuple[Array, Any]:
            module, index, by_layer, inputs = depth
            here = Balancing(balancing.balancer, *by_layer)
            module = at_use(module, mesh, self.config.compute_dtype)
            embedded = self._embed(inputs.tokens, mesh)
            x, report = module(x, embedded, inputs, here, jax.random.fold_in(key, index), train, mesh)
            x = constrain(x, mesh, P(BATCH))
            return x, (x, report)

        body = rematerialized(body, self.config.remat, is_sharded(mesh))
        depth = self.config.mtp_depth
        read = jax.tree.map(lambda *each: jnp.stack(each), *(ahead_of(inputs, k + 1) for k in range(depth)))
        return jax.lax.scan(body, x, (self.mtp, jnp.arange(depth, dtype=jnp.int32), by_layer, read))[1]


AHEAD = 2**31  # the stream of randomness of multi-token prediction, after those of layers


def ahead_of(inputs: Inputs, depth: int) -> Inputs:
    """What depth k of multi-token prediction reads at each place: the token k on, if it is of the same document.

    Elsewhere the segment is 0, as padding's: of a document of n tokens n - k are seen, routed and counted.
    """
    tokens, later = (shifted(a, depth) for a in (inputs.tokens, inputs.segment_ids))
    return Inputs(tokens, inputs.positions, jnp.where(later == inputs.segment_ids, inputs.segment_ids, 0))


def shifted(x: Array, depth: int) -> Array:
    """[B, S] moved `depth` places towards the start; zeros come in."""
    return jnp.pad(x[:, depth:], ((0, 0), (0, depth)))


def token_info(inputs: Inputs, class_starts: tuple[int, ...] = ()) -> Tokens:
    """What routing may know of each token of the batch, flattened to [B S]; its class by its id."""
    kind: Any = sum((inputs.tokens >= start).astype(jnp.int32) for start in class_starts) if class_starts else None
    rows = jax.lax.broadcasted_iota(jnp.int32, inputs.tokens.shape, 0)
    return Tokens(
        mask=(inputs.segment_ids > 0).ravel(),
        row=rows.ravel(),
        ids=inputs.tokens.ravel(),
        kind=None if kind is None else kind.ravel(),
        rows=Rows(len(rows)),
    )


def look_up(
    table: Float[Array, "vocab embed"], tokens: Int32[Array, "batch seq"], mesh: Mesh | None
) -> Float[Array, "batch seq embed"]:
    """The tokens' rows of the table, which every device gathers from its shards (their gradient scatters).

    Where `tensor` splits the vocabulary, each part looks up its own tokens and the sum has them all.
    """
    if not is_sharded(mesh):
        return table[tokens]
    place = spec(mesh, ("vocab", "embed"), table.shape)
    rows, columns = map(axes_of, place)

    def on_shard(part: Array, tokens: Array) -> Array:
        for axis, names in ((1, columns), (0, tuple(name for name in rows if name != "tensor"))):
            part = jax.lax.all_gather(part, names, axis=axis, tiled=True) if names else part
        if "tensor" not in rows:
            return part[tokens]
        first = jax.lax.axis_index("tensor") * part.shape[0]
        own = jnp.where(tokens >= first, tokens - first, part.shape[0])
        return jax.lax.psum(part.at[own].get(mode="fill", fill_value=0), "tensor")

    return jax.shard_map(on_shard, mesh=mesh, in_specs=(place, P(BATCH)), out_specs=P(BATCH))(table, tokens)


def at_use(module: Any, mesh: Mesh | None, dtype: str) -> Any:
    """The parameters of a module as it multiplies by them: gathered from their shards, in the compute dtype.

    The one place where that happens; experts' weights are gathered by dispatch.
    """

    def one(variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        dims = variable.get_metadata()["dims"]
        if is_expert_weight(dims):
            return variable
        narrow = len(dims) > 1 and "experts" not in dims  # the router stays float32
        value = variable[...].astype(dtype) if narrow else variable[...]
        return variable.replace(gather(value, mesh, dims))

    if not is_sharded(mesh):
        return module
    return jax.tree.map(one, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def rematerialized(body: Callable, policy: str, sharded: bool = False) -> Callable:
    """The scan body, keeping for the backward pass all of it ("none"), matmul outputs ("dots") or its input.

    Weights gathered from shards are never kept: every layer's would lie whole on every device.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        keep = policies.save_anything_except_these_names(GATHERED)
        return jax.checkpoint(body, policy=keep, prevent_cse=False) if sharded else body
    keep = policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(body, policy=keep, prevent_cse=False)


def _stack(rngs: nnx.Rngs, repeats: int, kind: type, config: ModelConfig, *args: Any) -> Any:
    """So many modules of a kind as one, layers in front."""
    return nnx.vmap(lambda r: kind(config, r, *args))(rngs.split(repeats))
