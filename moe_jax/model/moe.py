"""The Mixture-of-Experts layer: router, selection bias, routed and shared experts.

A forward pass changes nothing: it reads the bias, which only the train step writes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32

from moe_jax.balance import Balancer, State, Statistics, measures
from moe_jax.config import DISPATCHERS, ModelConfig, is_gated, num_choices, routed_width, shared_width
from moe_jax.dispatch import ExpertWeights, apply_experts, responses
from moe_jax.kernels.activation import Activation
from moe_jax.mesh import per_shard, spec, specs
from moe_jax.model.forward import Details, Pass, Report
from moe_jax.model.layers import FeedForward, filled, normal, over_rms
from moe_jax.routing import RouterConfig, Routing, Tokens, count, counts_by_row, drop_second, route


class RouterBias(nnx.Variable):
    """The selection bias, float32 [E]: not a Param, so no gradient, optimizer or weight decay can reach it."""


class MoE(nnx.Module):
    """y = sum of gate x routed expert + sum of shared experts. Source: DeepSeekMoE (arXiv 2401.06066) eq. 9-11.

    The shared experts, which see every token, are one feed-forward layer of their joint width; with `shared_gate` their
    output is multiplied by sigmoid(w . x), as in Qwen2-MoE (arXiv 2407.10671). With `latent_dim` routed experts work on
    a latent, y = W_up sum of gate x routed expert(W_down x) + ..., so that experts, and the rows that travel to them,
    are narrower; the router reads x. Source: LatentMoE (arXiv 2601.18089).

    What the router has beside its weight is float32, like that: with `router_bias` a bias of its logits (gpt-oss), with
    `router_norm="scaled"` a scale of what it reads, and with `expert_scale` a factor for each expert on its gates
    (Gemma 4, whose router reads the residual stream). With `expert_bias` routed experts have biases (gpt-oss), and with
    `gate_on="input"` y = sum of routed expert(gate x) (Llama 4).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        embed, width = config.embed_dim, routed_width(config)
        experts, ffw = config.num_experts, config.expert_ffw_dim
        choices = num_choices(config)
        classes = len(config.class_starts) + 1
        self.router = normal(config, rngs, "router", dtype="float32", embed=embed, experts=choices)
        beside = functools.partial(filled, config, part="router", dtype="float32")
        self.router_bias = beside(0.0, experts=choices) if config.router_bias else None
        self.router_norm = beside(1.0, embed=embed) if config.router_norm == "scaled" else None
        self.expert_scale = beside(1.0, experts=choices) if config.expert_scale else None
        shape, dims = ((choices,), ("experts",)) if classes == 1 else ((classes, choices), ("classes", "experts"))
        self.bias = RouterBias(jnp.zeros(shape, jnp.float32), dims=dims)
        matrix = functools.partial(normal, config, rngs, "experts", experts=experts)
        self.gate = matrix(embed=width, ffw=ffw) if is_gated(config) else None
        self.up = matrix(embed=width, ffw=ffw)
        self.down = matrix(ffw=ffw, embed=width)
        bias = functools.partial(filled, config, 0.0, "experts", config.param_dtype, experts=experts)
        self.gate_bias = bias(ffw=ffw) if config.expert_bias and is_gated(config) else None
        self.up_bias = bias(ffw=ffw) if config.expert_bias else None
        self.down_bias = bias(embed=width) if config.expert_bias else None
        self.shared = FeedForward(config, rngs, "shared", shared_width(config)) if config.num_shared_experts else None
        self.shared_gate = normal(config, rngs, "shared", embed=embed, one=1) if config.shared_gate else None
        latent = config.latent_dim
        self.latent_down = normal(config, rngs, "experts", embed=embed, latent=latent) if latent else None
        self.latent_up = normal(config, rngs, "experts", latent=latent, embed=embed) if latent else None
        self.config = nnx.static(config)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        tokens: Tokens,
        fwd: Pass,
        dropless: bool = False,
    ) -> tuple[Float[Array, "batch seq embed"], Report]:
        """Map x [B, S, D] to y [B, S, D] and the layer's Report; `fwd` is the pass as this layer reads it.

        With `dropless` no copy is dropped, even if the config or a balancing method drops some.
        """
        c = self.config
        drop = None if dropless else fwd.balancer.drop
        flat = x.reshape(-1, x.shape[-1])
        if fwd.per_layer.offset is not None:
            flat = flat + fwd.per_layer.offset.astype(x.dtype)
        num_sequences = x.shape[0] // fwd.pieces
        select_key, second_key = jax.random.split(fwd.key)
        state = self._state(fwd)
        with jax.named_scope("router"):
            routing = self.routing(flat, tokens, fwd._replace(key=select_key))
        sent = drop_second(routing, second_key) if fwd.train and c.random_second else routing
        if drop is not None:
            sent = only(sent, drop(sent, state, second_key, fwd.train))
        held = (getattr(self, name) for name in ExpertWeights._fields)
        narrowed: Any = (None if w is None else w.astype(x.dtype) for w in held)
        weights = ExpertWeights(*narrowed)
        y, traffic = apply_experts(
            self._narrowed(flat),
            real_part(sent, c.num_experts),
            weights,
            mesh=fwd.mesh,
            dispatcher="auto" if dropless and not DISPATCHERS[c.dispatch].dropless else c.dispatch,
            num_sequences=num_sequences,
            capacity_factor=c.capacity_factor,
            cpu_kernel=c.cpu_kernel,
            quantization=c.quantization,
            activation=Activation.of(c),
            gate_on=c.gate_on,
        )
        y = self._widened(y)
        if drop is not None:
            lost = count(routing.expert_ids, c.num_experts) - count(sent.expert_ids, c.num_experts)
            traffic = traffic._replace(dropped=traffic.dropped + lost.sum(dtype=jnp.int32))
        if c.num_zero_experts:
            y = y + through_zero_experts(flat, sent, c.num_experts)
        if self.shared is not None:
            shared = self.shared(flat, fwd.mesh)
            if self.shared_gate is not None:
                shared = jax.nn.sigmoid(flat @ self.shared_gate.astype(x.dtype)) * shared
            y = y + shared
        losses, own = self._losses(flat, routing, fwd, state)
        aux_loss = jax.lax.stop_gradient(measures.aux_loss_value(routing, c.num_experts))
        details = self._details(routing, own, fwd, state, num_sequences)
        return y.reshape(x.shape), Report(own, losses, aux_loss, traffic, details)

    def _narrowed(self, x: Float[Array, "tokens embed"]) -> Float[Array, "tokens width"]:
        """What routed experts read: x, or its latent."""
        return x if self.latent_down is None else x @ self.latent_down.astype(x.dtype)

    def _widened(self, y: Float[Array, "tokens width"]) -> Float[Array, "tokens embed"]:
        """What the layer adds of the routed experts' sum; that of a latent is kept with the rows, for the gradient."""
        return y if self.latent_up is None else checkpoint_name(y, "rows") @ self.latent_up.astype(y.dtype)

    def routing(self, x: Float[Array, "tokens embed"], tokens: Tokens, fwd: Pass) -> Routing:
        """The routing of x [T, D] before any copy is dropped; in float32, with jitter in training only.

        Each device routes its own tokens, because XLA would gather all scores to sort them. Not so with a method that
        selects experts itself, because it may need the whole batch.
        """
        c = self.config
        balancer = fwd.balancer
        state = self._state(fwd)
        jitter_key, select_key = jax.random.split(fwd.key)
        wide = self._read_by_router(x.astype(jnp.float32))
        if fwd.train and c.router_jitter > 0:
            low, high = 1.0 - c.router_jitter, 1.0 + c.router_jitter
            wide = wide * jax.random.uniform(jitter_key, wide.shape, jnp.float32, low, high)
        logits = jnp.matmul(wide, self._router(balancer, state), precision=jax.lax.Precision.HIGHEST)
        if self.router_bias is not None:
            logits = logits + self.router_bias[...][None]
        if balancer.select is None or (not fwd.train and balancer.inference == "top_k"):
            return self._routing_by_bias(logits, state["bias"], tokens, fwd, fwd.per_layer.chosen)
        return route(
            logits,
            RouterConfig.of(c),
            state["bias"],
            expert_scale=None if self.expert_scale is None else self.expert_scale[...],
            tokens=tokens,
            select=functools.partial(balancer.select, state=state),
            combine=balancer.combine,
            key=select_key,
            train=fwd.train,
        )

    def _routing_by_bias(
        self, logits: Array, bias: Array, tokens: Tokens, fwd: Pass, chosen: Array | None = None
    ) -> Routing:
        """`route` by the k best biased scores, except of `chosen` tokens, on every device for its own tokens."""

        def on_shard(logits: Array, bias: Array, scale: Array | None, tokens: Tokens, chosen: Array | None) -> Routing:
            how: Any = dict(expert_scale=scale, tokens=tokens, combine=fwd.balancer.combine, chosen=chosen)
            routing = route(logits, RouterConfig.of(self.config), bias, **how)
            return routing._replace(loads=routing.loads[None])  # [1, E], of this shard

        layout = specs(Routing.dims())
        scale = None if self.expert_scale is None else self.expert_scale[...]
        in_specs = layout.logits, layout.bias, spec(), layout.tokens, layout.expert_ids
        out_specs = layout._replace(loads=spec("shards"))
        routing = per_shard(on_shard, fwd.mesh, in_specs, out_specs)(logits, bias, scale, tokens, chosen)
        return routing._replace(loads=routing.loads.sum(0, dtype=jnp.int32))

    def _read_by_router(self, x: Float32[Array, "tokens embed"]) -> Float32[Array, "tokens embed"]:
        """What the router multiplies: x, or its norm, times the config's factor."""
        c = self.config
        if c.router_norm != "none":
            x = over_rms(x, c.norm_eps)
        if self.router_norm is not None:
            x = x * self.router_norm[...][None]
        return x if c.router_scale == 1 else c.router_scale * x

    def _state(self, fwd: Pass) -> State:
        """The balancer's state of this layer, with the bias that the model holds."""
        return fwd.per_layer.state | {"bias": self.bias[...]}

    def _router(self, balancer: Balancer, state: State) -> Float32[Array, "embed experts"]:
        """The router's weight: the learned one, or what the balancer puts in its place."""
        learned = self.router[...]
        return learned if balancer.router is None else balancer.router(learned, state)

    def _losses(
        self, x: Float[Array, "tokens embed"], routing: Routing, fwd: Pass, state: State
    ) -> tuple[dict[str, Float32[Array, ""]], Statistics]:
        """The balancing losses, and what this forward pass adds to the statistics of the step."""
        own = fwd.balancer.observe(routing, self._read_by_router(x.astype(jnp.float32)))
        seen = own
        if fwd.per_layer.statistics is not None:
            seen = fwd.per_layer.statistics
        if fwd.per_layer.earlier is not None:
            seen = jax.tree.map(jnp.add, own, fwd.per_layer.earlier)
        weight = self._router(fwd.balancer, state)
        return fwd.balancer.losses(routing, seen, state, weight, functools.partial(self._responses, mesh=fwd.mesh)), own

    def _responses(self, x: Float32[Array, "vectors embed"], mesh: Mesh | None) -> Float32[Array, "vectors experts"]:
        """How strongly the routed experts respond to vectors, for `Seen.responses`."""
        return responses(self._narrowed(x), (self.up if self.gate is None else self.gate)[...], mesh)

    def _details(
        self,
        routing: Routing,
        own: Statistics,
        fwd: Pass,
        state: State,
        num_rows: int,
    ) -> Details:
        routing = jax.lax.stop_gradient(routing)
        balancer = fwd.balancer
        num_choices = routing.loads.shape[0]
        step = jnp.int32(0) if fwd.per_layer.step is None else fwd.per_layer.step

        def chosen_under(bias: Array) -> Array:
            return self._routing_by_bias(routing.logits, bias, routing.tokens, fwd).expert_ids

        return Details(
            routing,
            unbiased_ids=chosen_under(balancer.init(num_choices)["bias"]),
            next_ids=chosen_under(balancer.update(own, state, step)["bias"]),
            row_loads=counts_by_row(routing.expert_ids, num_rows, num_choices),
        )


def only(routing: Routing, keep: Bool[Array, "tokens slots"]) -> Routing:
    """The routing with empty slots for copies that are not kept; `loads` still counts them."""
    num_choices = routing.loads.shape[0]
    return routing._replace(
        expert_ids=jnp.where(keep, routing.expert_ids, num_choices), gates=jnp.where(keep, routing.gates, 0.0)
    )


def real_part(routing: Routing, num_experts: int) -> Routing:
    """The routing to experts with weights: copies for zero-computation experts become empty slots."""
    real = routing.expert_ids < num_experts
    return routing._replace(
        expert_ids=jnp.where(real, routing.expert_ids, num_experts),
        gates=jnp.where(real, routing.gates, 0.0),
        loads=routing.loads[:num_experts],
    )


def through_zero_experts(
    x: Float[Array, "tokens embed"], routing: Routing, num_experts: int
) -> Float[Array, "tokens embed"]:
    """A token times the sum of its zero-computation experts' gates. Source: LongCat-Flash (arXiv 2509.01322)."""
    chosen = (routing.expert_ids >= num_experts) & (routing.expert_ids < routing.loads.shape[0])
    return jnp.where(chosen, routing.gates, 0.0).sum(1, keepdims=True).astype(x.dtype) * x
