"""The Mixture-of-Experts layer: router, selection bias, routed and shared experts.

Forward reports and changes nothing: the bias is read here and written only by the train step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Key

from moe_jax import metrics
from moe_jax.balance import Balancer, State, Statistics
from moe_jax.config import ModelConfig
from moe_jax.dispatch import ExpertWeights, Traffic, apply_experts
from moe_jax.layers import SwiGLU, normal
from moe_jax.mesh import BATCH, per_shard
from moe_jax.routing import Routing, Tokens, drop_second, route


class RouterBias(nnx.Variable):
    """The selection bias, float32 [E]: by type not a Param, so no gradient, optimizer or decay can touch it."""


class Balancing(NamedTuple):
    """What balancing needs in a forward pass; State and Statistics stacked over the MoE layers [L, ...].

    statistics: those of the whole optimizer step where a loss reads them, None for this forward's own.
    """

    balancer: Balancer
    state: State
    statistics: Statistics | None = None


class Report(NamedTuple):
    """What one MoE layer tells: additive statistics, its balancing loss, and measures for the log."""

    statistics: Statistics
    loss: Float32[Array, ""]
    aux_loss: Float32[Array, ""]
    traffic: Traffic


class MoE(nnx.Module):
    """y = sum of gate x routed expert + sum of shared experts. Source: DeepSeekMoE (arXiv 2401.06066) eq. 9-11.

    The shared experts, always on and of the same kind, are one SwiGLU of their joint width.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, experts, ffw = config.embed_dim, config.num_experts, config.expert_ffw_dim
        self.router = normal(config, rngs, dtype="float32", embed=width, experts=experts)
        self.bias = RouterBias(jnp.zeros(experts, jnp.float32), dims=("experts",))
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
    ) -> tuple[Float[Array, "batch seq embed"], Report]:
        """x [B, S, D] to y [B, S, D] and the layer's Report; `balancing` is sliced to this layer."""
        flat = x.reshape(-1, x.shape[-1])
        select_key, second_key = jax.random.split(key)
        routing = self.route(flat, tokens, balancing.balancer, select_key, train, mesh)
        sent = drop_second(routing, second_key) if train and self.config.random_second else routing
        weights = ExpertWeights(*(w.astype(x.dtype) for w in (self.gate, self.up, self.down)))
        y, traffic = apply_experts(
            flat,
            sent,
            weights,
            mesh=mesh,
            backend=self.config.dispatch,
            num_rows=x.shape[0],
            capacity_factor=self.config.capacity_factor,
        )
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.reshape(x.shape), self._report(routing, balancing, traffic)

    def route(
        self,
        x: Float[Array, "tokens embed"],
        tokens: Tokens,
        balancer: Balancer,
        key: Array,
        train: bool,
        mesh: Mesh | None = None,
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
            wide = wide * jax.random.uniform(jitter_key, wide.shape, minval=low, maxval=high)
        logits = jnp.matmul(wide, self.router[...], precision=jax.lax.Precision.HIGHEST)

        def pick(logits: Array, bias: Array, tokens: Tokens) -> Routing:
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
                select=balancer.select,
                key=select_key,
                train=train,
            )

        if balancer.select is not None:
            return pick(logits, self.bias[...], tokens)

        def pick_here(*args: Any) -> Routing:
            routing = pick(*args)
            return routing._replace(loads=routing.loads[None])

        split = jax.tree.map(lambda _: P(BATCH), tokens)
        places: Any = Routing._make([P(BATCH)] * 5 + [P(), split])
        routing = per_shard(pick_here, mesh, (P(BATCH), P(), split), places)(logits, self.bias[...], tokens)
        return routing._replace(loads=routing.loads.sum(0))

    def _report(self, routing: Routing, balancing: Balancing, traffic: Traffic) -> Report:
        balancer, state, statistics = balancing
        own = balancer.observe(routing)
        joined = state | {"bias": routing.bias}
        loss = balancer.loss(routing, own if statistics is None else statistics, joined, self.router[...])
        aux_loss = jax.lax.stop_gradient(metrics.aux_loss_value(routing))
        return Report(own, loss, aux_loss, traffic)
