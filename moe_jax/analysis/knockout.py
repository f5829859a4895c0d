"""Evaluate a trained model with some of its experts removed. Nothing is trained, and no model is changed.

A variant is the same model with another config, other values, or another rule of selecting experts.

Source: DeepSeekMoE (arXiv 2401.06066) sec. 4.5, shared experts removed, and Fig. 4, best routed experts masked.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32

from moe_jax import balance
from moe_jax.balance import Balancer
from moe_jax.config import Config, ModelConfig
from moe_jax.data import Corpus
from moe_jax.model.abstract import Tree
from moe_jax.routing import best, limit_groups
from moe_jax.runtime.signals import Stopped, never
from moe_jax.training.evaluation import evaluate
from moe_jax.training.state import TrainState

MASKED = (1, 2, 4)  # numbers of each token's best routed experts to remove


class Variant(NamedTuple):
    """What to evaluate in place of the unchanged model; a `balancer` of None is the config's own."""

    config: Config
    state: TrainState
    balancer: Balancer | None = None


def variants(config: Config, state: TrainState) -> dict[str, Variant]:
    """Every variant that this model has, by name.

    Without the shared experts; without them and with one routed expert more, which is as much computation if there is
    one shared expert; and without each token's best 1, 2 and 4 routed experts, with the best k of the others selected.
    Methods that select experts by a rule of their own do not rank them, so they have neither of the last two kinds.

    Raises:
        ValueError: nothing can be removed.
    """
    balancer = balance.make(config.balance, config.model)
    ranked = balancer.select is None or balancer.inference == "top_k"
    found = _without_shared(config, state, ranked) if config.model.num_shared_experts else {}
    if ranked:
        fitting = [n for n in MASKED if n + config.model.top_k <= _allowed(config.model)]
        found |= {f"without the best {n}": Variant(config, state, without_best(balancer, config, n)) for n in fitting}
    if not found:
        raise ValueError(
            "--ablate finds nothing to remove: the model has no shared experts, and no token could select other "
            "experts than it does; leave --ablate out."
        )
    return found


def _without_shared(config: Config, state: TrainState, ranked: bool) -> dict[str, Variant]:
    routed_only = state._replace(params=without_shared(state.params))
    found = {"without shared": Variant(config, routed_only)}
    if ranked and config.model.top_k < _allowed(config.model):
        more = replace(config, model=replace(config.model, top_k=config.model.top_k + 1))
        found["without shared, one routed more"] = Variant(more, routed_only)
    return found


def _allowed(model: ModelConfig) -> int:
    """The number of routed experts that a token can select from."""
    return model.num_experts // model.num_groups * model.top_groups


def without_shared(params: Tree) -> Tree:
    """The parameters with the output of the shared experts set to 0."""

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        shared = [getattr(part, "key", None) for part in path[-2:]] == ["shared", "down"]
        return jnp.zeros_like(leaf, device=leaf.sharding) if shared else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def without_best(balancer: Balancer, config: Config, count: int) -> Balancer:
    """The balancer, selecting as if each token's `count` routed experts with the highest scores did not exist."""
    m = config.model

    def select(
        scores: Float32[Array, "tokens experts"], biased: Array, *, top_k: int, **_: Any
    ) -> Int32[Array, "tokens slots"]:
        biased = limit_groups(biased, m.num_groups, m.top_groups, m.group_top)
        allowed = jnp.where(jnp.isfinite(biased), scores, -jnp.inf)[:, : m.num_experts]
        masked = jax.nn.one_hot(best(allowed, count), scores.shape[1], dtype=bool).any(1)
        return best(jnp.where(masked, -jnp.inf, biased), top_k)

    return balancer._replace(select=select, inference="same")


def ablate(
    config: Config,
    state: TrainState,
    corpus: Corpus,
    mesh: Mesh,
    whole: Mapping[str, float | int],
    stopped: Stopped = never,
) -> dict[str, dict[str, float | int]]:
    """Loss and bits per byte of the unchanged model, whose evaluation is `whole`, and of its variants.

    Raises:
        ValueError: nothing can be removed.
    """
    found = {"as it is": dict(whole)}
    for name, variant in variants(config, state).items():
        found[name] = evaluate(variant.config, variant.state, corpus, mesh, balancer=variant.balancer, stopped=stopped)
    keys = ("eval/loss", "eval/bits_per_byte")
    return {name: {key.removeprefix("eval/"): result[key] for key in keys} for name, result in found.items()}
