"""A trained model with something taken away, to see what it was worth: nothing is trained, and no model is changed.

A variant is the same model under another config, with other values, or with another rule of choosing experts.

Source: DeepSeekMoE (arXiv 2401.06066) sec. 4.5: shared experts removed, and Fig. 4, best routed experts masked.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax import balance
from moe_jax.balance import Balancer
from moe_jax.config import Config, ModelConfig
from moe_jax.model.abstract import Tree
from moe_jax.routing import best, limit_groups
from moe_jax.runtime.signals import Stopped, never
from moe_jax.training.evaluation import evaluate
from moe_jax.training.state import TrainState

MASKED = (1, 2, 4)  # how many of each token's best routed experts are taken away

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.data import Corpus


class Variant(NamedTuple):
    """What to evaluate in place of the model as it is; a `balancer` of None is the config's own."""

    config: Config
    state: TrainState
    balancer: Balancer | None = None


def variants(config: Config, state: TrainState) -> dict[str, Variant]:
    """Every variant that this model has, by name.

    Without its shared experts; without them and with one routed expert more, which is as much computation if there
    is one; and without each token's best 1, 2 and 4 routed experts, of the others the best k are chosen. Methods that
    choose experts by a rule of their own know no next best, and have neither of the last two kinds.

    Raises:
        ValueError: nothing can be taken away.
    """
    balancer = balance.make(config.balance, config.model)
    ranked = balancer.select is None or balancer.inference == "top_k"
    found = _without_shared(config, state, ranked) if config.model.num_shared_experts else {}
    if ranked:
        fitting = [n for n in MASKED if n + config.model.top_k <= _allowed(config.model)]
        found |= {f"without the best {n}": Variant(config, state, without_best(balancer, config, n)) for n in fitting}
    if not found:
        raise ValueError(
            "--ablate finds nothing to take away: the model has no shared experts, and no token could choose others "
            "than it does; leave --ablate out."
        )
    return found


def _without_shared(config: Config, state: TrainState, ranked: bool) -> dict[str, Variant]:
    alone = state._replace(params=without_shared(state.params))
    found = {"without shared": Variant(config, alone)}
    if ranked and config.model.top_k < _allowed(config.model):
        more = replace(config, model=replace(config.model, top_k=config.model.top_k + 1))
        found["without shared, one routed more"] = Variant(more, alone)
    return found


def _allowed(model: ModelConfig) -> int:
    """Among how many routed experts a token chooses."""
    return model.num_experts // model.num_groups * model.top_groups


def without_shared(params: Tree) -> Tree:
    """The parameters with shared experts whose output is 0."""

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        shared = [getattr(part, "key", None) for part in path[-2:]] == ["shared", "down"]
        return jnp.zeros_like(leaf, device=leaf.sharding) if shared else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def without_best(balancer: Balancer, config: Config, count: int) -> Balancer:
    """The balancer, choosing as if each token's `count` routed experts of the highest score were not there."""
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
    state: "TrainState",
    corpus: "Corpus",
    mesh: "Mesh",
    whole: Mapping[str, float | int],
    stopped: Stopped = never,
) -> dict[str, dict[str, float | int]]:
    """Loss and bits per byte of the model as it is, whose evaluation is `whole`, and of its variants.

    Raises:
        ValueError: there is nothing to take away.
    """
    pass

    found = {"as it is": dict(whole)}
    for name, variant in variants(config, state).items():
        found[name] = evaluate(variant.config, variant.state, corpus, mesh, balancer=variant.balancer, stopped=stopped)
    keys = ("eval/loss", "eval/bits_per_byte")
    return {name: {key.removeprefix("eval/"): result[key] for key in keys} for name, result in found.items()}
