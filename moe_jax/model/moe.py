"""The Mixture-of-Experts layer: router, selection bias, routed and shared experts.

Forward reports and changes nothing: the bias is read here and written only by the train step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from moe_jax.balance import Balancer, State, Statistics, measures
from moe_jax.config import DISPATCHERS, ModelConfig
from moe_jax.dispatch import ExpertWeights, Traffic, apply_experts
from moe_jax.mesh import BATCH, per_shard
from moe_jax.model.layers import SwiGLU, normal
from moe_jax.routing import Routing, Tokens, count, counts_by_row, drop_second, route


class RouterBias(nnx.Variable):
    """The selection bias, float32 [E]: by type not a Param, so no gradient, optimizer or decay can touch it."""


class Details(NamedTuple):
    """What measuring reads of one layer's routing, and training does not: without a reader it is not computed.

    routing: of the micro-batch. unbiased_ids: what its tokens would choose by their scores alone. next_ids: under
    the bias that the update from this micro-batch alone gives. row_loads: copies per expert of every sequence.
    """

    routing: Routing
    unbiased_ids: Int32[Array, "tokens slots"]
    next_ids: Int32[Array, "tokens slots"]
    row_loads: Int32[Array, "batch experts"]


class Balancing(NamedTuple):
    """What balancing needs in a forward pass; all but the balancer stacked over the MoE layers [L, ...].

    statistics: those of the whole optimizer step where a loss reads them, None for this forward's own.
    earlier: those of the step's micro-batches before this one, where a loss reads the sum so far.
    offset: added to the layers' inputs [L, B, S, D], zeros by which to differentiate; None for nothing.
    step: the optimizer step [L], the same for all, where the next bias is asked for; None for 0.
    """

    balancer: Balancer
    state: State
    statistics: Statistics | None = None
    earlier: Statistics | None = None
    offset: Array | None = None
    step: Array | None = None


class Report(NamedTuple):
    """What one MoE layer tells: additive statistics, its balancing losses, and measures for the log."""

    statistics: Statistics
    losses: dict[str, Float32[Array, ""]]
    aux_loss: Float32[Array, ""]
    traffic: Traffic
    details: Details

    @property
    def loss(self) -> Float32[Array, "*layers"]:
        """The sum of the layer's losses; 0 for methods without one."""
        return sum(self.losses.values(), jnp.zeros_like(self.aux_loss))


class MoE(nnx.Module):
    """y = sum of gate x routed expert + sum of shared experts. Source: DeepSeekMoE (arXiv 2401.06066) eq. 9-11.

    The shared experts, always on and of the same kind, are one SwiGLU of their joint width.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, experts, ffw = config.embed_dim, config.num_experts, config.expert_ffw_dim
        choices, classes = experts + config.num_zero_experts, len(config.class_starts) + 1
        self.router = normal(config, rngs, dtype="float32", embed=width, experts=choices)
        shape, dims = ((choices,), ("experts",)) if classes == 1 else ((classes, choices), ("classes", "experts"))
        self.bias = RouterBias(jnp.zeros(shape, jnp.float32), dims=dims)
        self.gate = normal(config, rngs, experts=experts, embed=width, ffw=ffw)
        self.up = normal(config, rngs, experts=experts, embed=width, ffw=ffw)
        self.down = normal(config, rngs, experts=experts, ffw=ffw, embed=width)
        self.shared = SwiGLU(config, rngs, config.num_shared_experts * ffw) if config.num_shared_experts else None
        self.config = nnx.static(config)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        tokens: Tokens,
        balancing: Balancing,
        key: Key[Array, ""],
        train: bool,
        mesh: Mesh | None = None,
        dropless: bool = False,
    ) -> tuple[Float[Array, "batch seq embed"], Report]:
        """x [B, S, D] to y [B, S, D] and the layer's Report; `balancing` is sliced to this layer.

        With `dropless` no copy is dropped, though the config or a method would.
        """
        c, balancer = self.config, balancing.balancer
        drop = None if dropless else balancer.drop
        if balancing.offset is not None:
            x = x + balancing.offset.astype(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        select_key, second_key = jax.random.split(key)
        state = balancing.state | {"bias": self.bias[...]}
        with jax.named_scope("router"):
            routing = self.route(flat, tokens, balancer, select_key, train, mesh, state)
        sent = drop_second(routing, second_key) if train and c.random_second else routing
        if drop is not None:
            sent = only(sent, drop(sent, state, second_key, train))
        weights = ExpertWeights(*(w.astype(x.dtype) for w in (self.gate, self.up, self.down)))
        y, traffic = apply_experts(
            flat,
            real_part(sent, c.num_experts),
            weights,
            mesh=mesh,
            backend="auto" if dropless and not DISPATCHERS[c.dispatch].dropless else c.dispatch,
            num_sequences=x.shape[0],
            capacity_factor=c.capacity_factor,
            cpu_kernel=c.cpu_kernel,
            quantization=c.quantization,
        )
        if drop is not None:
            lost = count(routing.expert_ids, c.num_experts) - count(sent.expert_ids, c.num_experts)
            traffic = traffic._replace(dropped=traffic.dropped + lost.sum(dtype=jnp.int32))
        if c.num_zero_experts:
            y = y + through_zero_experts(flat, sent, c.num_experts)
        if self.shared is not None:
            y = y + self.shared(flat, mesh)
        losses, own = self._balance(routing, balancing, state)
        aux_loss = jax.lax.stop_gradient(measures.aux_loss_value(routing, c.num_experts))
        details = self._details(routing, own, balancing, state, x.shape[0], mesh)
        return y.reshape(x.shape), Report(own, losses, aux_loss, traffic, details)

    def route(
        self,
        x: Float[Array, "tokens embed"],
        tokens: Tokens,
        balancer: Balancer,
        key: Array,
        train: bool,
        mesh: Mesh | None = None,
        state: State | None = None,
    ) -> Routing:
        """The routing of [T, D] vectors, before anything is dropped; router in float32, jitter in training only.

        Each device routes its own tokens, for XLA would gather all scores to sort them; a selector of its own
        may need to see the whole batch, and does.
        """
        c = self.config
        jitter_key, select_key = jax.random.split(key)
        wide = x.astype(jnp.float32)
        if train and c.router_jitter > 0:
            low, high = 1.0 - c.router_jitter, 1.0 + c.router_jitter
            wide = wide * jax.random.uniform(jitter_key, wide.shape, jnp.float32, low, high)
        logits = jnp.matmul(wide, self.router[...], precision=jax.lax.Precision.HIGHEST)
        state = {"bias": self.bias[...]} if state is None else state
        if balancer.select is not None and (train or balancer.inference == "same"):
            select = functools.partial(balancer.select, state=state)
            return self.pick(logits, state["bias"], tokens, balancer, select=select, key=select_key, train=train)
        return self.pick_by_bias(logits, state["bias"], tokens, balancer, mesh)

    def pick_by_bias(
        self, logits: Array, bias: Array, tokens: Tokens, balancer: Balancer, mesh: Mesh | None = None
    ) -> Routing:
        """Route by the k best biased scores, every device its own tokens."""

        def pick_here(logits: Array, bias: Array, tokens: Tokens) -> Routing:
            routing = self.pick(logits, bias, tokens, balancer)
            return routing._replace(loads=routing.loads[None])

        split = jax.tree.map(lambda _: P(BATCH), tokens)
        places: Any = Routing._make([P(BATCH)] * 5 + [P(), split])
        routing = per_shard(pick_here, mesh, (P(BATCH), P(), split), places)(logits, bias, tokens)
        return routing._replace(loads=routing.loads.sum(0, dtype=jnp.int32))

    def pick(self, logits: Array, bias: Array, tokens: Tokens, balancer: Balancer, **how: Any) -> Routing:
        """`route` as the config says."""
        c = self.config
        return route(
            logits,
            bias,
            top_k=c.top_k,
            score=c.score,
            num_groups=c.num_groups,
            top_groups=c.top_groups,
            group_top=c.group_top,
            normalize_gates=c.normalize_gates,
            gate_scale=c.gate_scale,
            tokens=tokens,
            combine=balancer.combine,
            **how,
        )

    def _balance(
        self, routing: Routing, balancing: Balancing, state: State
    ) -> tuple[dict[str, Float32[Array, ""]], Statistics]:
        """The balancing losses, and what this forward pass adds to the statistics of the step."""
        own = seen = balancing.balancer.observe(routing)
        if balancing.statistics is not None:
            seen = balancing.statistics
        if balancing.earlier is not None:
            seen = jax.tree.map(jnp.add, own, balancing.earlier)
        return balancing.balancer.losses(routing, seen, state, self.router[...]), own

    def _details(
        self,
        routing: Routing,
        own: Statistics,
        balancing: Balancing,
        state: State,
        num_rows: int,
        mesh: Mesh | None,
    ) -> Details:
        routing = jax.lax.stop_gradient(routing)
        balancer, num_choices = balancing.balancer, routing.loads.shape[0]
        step = jnp.int32(0) if balancing.step is None else balancing.step

        def chosen_under(bias: Array) -> Array:
            return self.pick_by_bias(routing.logits, bias, routing.tokens, balancer, mesh).expert_ids

        return Details(
            routing,
            unbiased_ids=chosen_under(balancer.init(num_choices)["bias"]),
            next_ids=chosen_under(balancer.update(own, state, step)["bias"]),
            row_loads=counts_by_row(routing.expert_ids, num_rows, num_choices),
        )


def only(routing: Routing, keep: Bool[Array, "tokens slots"]) -> Routing:
    """The routing without the copies that are not kept; `loads` still counts them."""
    num_choices = routing.loads.shape[0]
    return routing._replace(
        expert_ids=jnp.where(keep, routing.expert_ids, num_choices), gates=jnp.where(keep, routing.gates, 0.0)
    )


def real_part(routing: Routing, num_experts: int) -> Routing:
    """The routing to experts that compute: copies for the others become empty slots."""
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
