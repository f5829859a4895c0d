"""Laws of knock-outs: the right experts are removed, the rest is unchanged, and impossible variants are left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import balance
from moe_jax.analysis.knockout import variants, without_best, without_shared
from moe_jax.routing import RouterConfig, route
from moe_jax.training.state import init_state

SCORES = np.asarray([[0.9, 0.8, 0.3, 0.1], [0.2, 0.4, 0.6, 0.7]], np.float32)
LOGITS = np.log(SCORES / (1 - SCORES))  # of the sigmoid


def chosen(config, count, bias=None):
    """The expert ids that LOGITS give without each token's best `count` experts."""
    balancer = without_best(balance.make(config.balance, config.model), config, count)
    router = RouterConfig.of(config.model)
    select = functools.partial(balancer.select, state=None)
    return route(jnp.asarray(LOGITS), router, bias, select=select).expert_ids


def test_the_next_best_experts_take_the_place_of_the_masked_ones():
    config = tiny_config()  # top 2 of 4
    np.testing.assert_array_equal(chosen(config, 0), [[0, 1], [3, 2]])
    np.testing.assert_array_equal(chosen(config, 1), [[1, 2], [2, 1]])
    np.testing.assert_array_equal(chosen(config, 2), [[2, 3], [1, 0]])


def test_the_highest_scores_are_masked_and_the_bias_still_selects_among_the_others():
    # the bias lifts expert 3 above 0, but by score expert 0 is still the first token's best, and is masked
    bias = jnp.asarray([0.0, -0.6, 0.0, 5.0])
    np.testing.assert_array_equal(chosen(tiny_config(), 1, bias), [[3, 2], [2, 0]])


def test_masked_experts_do_not_open_groups_that_were_closed():
    # groups (0, 1) and (2, 3): each token may use its best group only, and has one expert left there
    config = tiny_config(model=dict(num_groups=2, top_groups=1, group_top=1, top_k=1, normalize_gates=False))
    np.testing.assert_array_equal(chosen(config, 1), [[1], [2]])


def test_without_shared_experts_their_output_is_zero_and_nothing_else_changes():
    state = init_state(tiny_config())
    paths = jax.tree_util.tree_leaves_with_path(state.params)
    after = jax.tree.leaves(without_shared(state.params))
    changed = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for (p, a), b in zip(paths, after, strict=True)
        if (a != b).any()
    ]
    assert changed == ["stacks/1/blocks/0/ffw/shared/down"]
    assert all(
        not b.any()
        for (p, _), b in zip(paths, after, strict=True)
        if p[-2:] and "shared/down" in jax.tree_util.keystr(p, simple=True, separator="/")
    )


def names(**model):
    balancing = model.pop("balance", {})
    config = tiny_config(model=model, balance=balancing)
    return list(variants(config, init_state(config)))


def test_only_variants_that_leave_enough_experts_are_evaluated():
    shared = ["without shared", "without shared, one routed more"]
    assert names() == [*shared, "without the best 1", "without the best 2"]  # 4 experts, top 2
    assert names(num_experts=8) == [*shared, *(f"without the best {n}" for n in (1, 2, 4))]
    assert names(num_experts=8, num_groups=4, top_groups=1) == ["without shared"]  # 2 experts are allowed, 2 chosen
    assert names(num_shared_experts=0, top_k=3) == ["without the best 1"]


def test_a_model_with_nothing_to_remove_is_refused():
    with pytest.raises(ValueError, match="--ablate finds nothing to remove"):
        names(num_shared_experts=0, top_k=4)


def test_one_routed_expert_more_is_one_more():
    config = tiny_config()
    state = init_state(config)
    more = variants(config, state)["without shared, one routed more"]
    assert more.config.model.top_k == 3
    assert more.config.model.num_experts == 4 and more.balancer is None
