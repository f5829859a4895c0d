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
from moe_jax.layers import Attention, RMSNorm, SwiGLU, normal
from moe_jax.mesh import BATCH, GATHERED, axes_of, constrain, gather, is_expert_weight, is_sharded, spec
from moe_jax.moe import Balancing, MoE, Report
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
        self.attention = Attention(config, rngs)
        self.ffw_norm = RMSNorm(config, embed=config.embed_dim)
        self.ffw = MoE(config, rngs) if kind == "moe" else SwiGLU(config, rngs, config.ffw_dim)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        inputs: Inputs,
        balancing: Balancing,
        key: Key[Array, ""],
        train: bool,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Report | None]:
        """The residual stream after this layer, and the Report if the layer routes."""
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x), inputs.positions, inputs.segment_ids, mesh)
        h = self.ffw_norm(x)
        if isinstance(self.ffw, SwiGLU):
            return x + self.ffw(h, mesh), None
        y, report = self.ffw(h, token_info(inputs, self.ffw.config.class_starts), balancing, key, train, mesh)
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
        x, report = self.before_head(inputs, balancing, key=key, train=train, mesh=mesh)
        with jax.named_scope("head"):
            return jnp.einsum("bsd,dv->bsv", x, self.head_weight(mesh), preferred_element_type=jnp.float32), report

    def before_head(
        self, inputs: Inputs, balancing: Balancing, *, key: Array, train: bool = False, mesh: Mesh | None = None
    ) -> tuple[Float[Array, "batch seq embed"], Report | None]:
        """As the call, but what the head multiplies, [B, S, D] in the compute dtype."""
        table = self.embedding[...].astype(self.config.compute_dtype)
        x = look_up(table, inputs.tokens, mesh)
        report = None
        for stack, run in zip(self.stacks, layout(self.config), strict=True):
            x, stack_report = self._scan(stack, run, x, inputs, balancing, key, train, mesh)
            report = stack_report if stack_report is not None else report
        return self.final_norm(x), report

    def head_weight(self, mesh: Mesh | None = None) -> Float[Array, "embed vocab"]:
        """[D, V] in the compute dtype, gathered from its shards."""
        head = at_use(self.embedding if self.head is None else self.head, mesh, self.config.compute_dtype)[...]
        return (head.T if self.head is None else head).astype(self.config.compute_dtype)

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
    ) -> tuple[Array, Report | None]:
        routes = "moe" in run.kinds
        _, *by_layer = balancing if routes else Balancing(balancing.balancer, {})

        def body(x: Array, layer: tuple) -> tuple[Array, Report | None]:
            unit, index, by_layer = layer
            here = Balancing(balancing.balancer, *by_layer)
            unit = at_use(unit, mesh, self.config.compute_dtype)
            x, report = unit(x, inputs, here, jax.random.fold_in(key, index), train, mesh)
            return constrain(x, mesh, P(BATCH)), report

        body = rematerialized(body, self.config.remat, is_sharded(mesh))
        layers = stack, jnp.arange(run.repeats), by_layer
        return jax.lax.scan(body, x, layers, unroll=self.config.unroll_layers)


def token_info(inputs: Inputs, class_starts: tuple[int, ...] = ()) -> Tokens:
    """What routing may know of each token of the batch, flattened to [B S]; its class by its id."""
    kind = (inputs.tokens[..., None] >= jnp.asarray(class_starts)).sum(-1, dtype=jnp.int32) if class_starts else None
    rows = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[0])[:, None], inputs.tokens.shape)
    return Tokens(
        mask=(inputs.segment_ids > 0).ravel(),
        row=rows.ravel().astype(jnp.int32),
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


def _stack(config: ModelConfig, rngs: nnx.Rngs, run: Run) -> Unit:
    return nnx.vmap(lambda r: Unit(config, r, run.kinds))(rngs.split(run.repeats))
