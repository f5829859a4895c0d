"""Laws of upcycling: what a model computes before and after, what its experts are made of, what is refused."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import upcycle
from moe_jax.config import as_dict, validate
from moe_jax.huggingface import LanguageModel
from moe_jax.huggingface.folders import open_weights
from moe_jax.model.abstract import abstract_weights
from moe_jax.model.upcycling import Recipe, changes, plan, upcycled
from moe_jax.runtime.checkpoint import committed
from moe_jax.runtime.leaves import path_name
from moe_jax.training import loop
from moe_jax.training.state import init_state

DENSE = dict(num_layers=1, num_experts=0, first_dense=0, num_shared_experts=0, init_std=0.3)
SPARSE = dict(num_layers=2, init_std=0.3)
EXACT = Recipe(noise=0.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)))


def model_of(**model):
    return tiny_config(model=model).model


def random_weights(model):
    """path -> array of a model whose every leaf is random, the bias included."""
    state = init_state(replace(tiny_config(), model=model))
    rng = np.random.default_rng(1)
    leaves = jax.tree_util.tree_leaves_with_path({"params": state.params, "bias": state.bias})
    return {path_name(p): np.asarray(a) + 0.05 * rng.normal(size=a.shape).astype(np.float32) for p, a in leaves}


def language_model(model, values):
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_weights(model))
    tree = jax.tree.unflatten(structure, [jnp.asarray(values[path_name(path)]) for path, _ in leaves])
    return LanguageModel(model, tree["params"], tree["bias"])


def weights(source, target, recipe=EXACT):
    """Random weights of the source, and those of the target made of them."""
    before = random_weights(source)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_weights(target))
    after = {path_name(path): np.full(leaf.shape, np.nan, leaf.dtype) for path, leaf in leaves}
    for leaf, index, value in upcycled(source, target, lambda leaf, index: before[leaf][index], recipe):
        assert np.isnan(after[leaf][index]).all()  # nothing is written twice
        after[leaf][index] = value
    assert not any(np.isnan(value).any() for value in after.values())
    return before, after


def logits(source, target, recipe=EXACT):
    """The logits of the source and of the target made of it."""
    made = weights(source, target, recipe)
    return [language_model(model, values)(TOKENS) for model, values in zip((source, target), made, strict=True)]


FROM_DENSE = {
    "whole copies, own parts of the router": dict(
        num_experts=4, top_k=2, expert_ffw_dim=24, router_bias=True, router_norm="scaled", expert_scale=True
    ),
    "slices": dict(num_experts=8, top_k=4, expert_ffw_dim=12, gate_scale=2.5, score="softmax"),
    "one copy, relu2": dict(num_experts=3, top_k=3, expert_ffw_dim=8, activation="relu2"),
    "first dense, every second": dict(
        num_layers=5, num_experts=4, top_k=2, expert_ffw_dim=24, first_dense=1, moe_every=2
    ),
    "shared experts, multi-token prediction": dict(
        num_experts=6, top_k=6, expert_ffw_dim=6, num_shared_experts=2, shared_ffw_dim=3, mtp_depth=1
    ),
    "biases": dict(num_experts=4, top_k=2, expert_ffw_dim=24, expert_bias=True),
}


def fast(table, *names):
    """The cases of a table, of which only the named ones run in the usual tests: each compiles two models."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", fast(FROM_DENSE, "slices", "shared experts, multi-token prediction"))
def test_a_dense_model_computes_the_same_afterwards(name):
    options = FROM_DENSE[name]
    same = {key: options[key] for key in ("activation", "mtp_depth", "num_layers") if key in options}
    source = model_of(**DENSE | same)
    target = model_of(**DENSE | options)
    assert changes(source, target, EXACT) == []
    before, after = logits(source, target)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * float(jnp.abs(before).max()))


FROM_EXPERTS = {
    "twice the experts and choices": (dict(), dict(num_experts=8, top_k=4)),
    "copies in slices": (
        dict(score="softmax"),
        dict(num_experts=16, top_k=8, expert_ffw_dim=4, shared_ffw_dim=8, gate_scale=3.0),
    ),
    "softmax gates as they are": (dict(score="softmax", normalize_gates=False), dict(num_experts=8, top_k=4)),
    "sigmoid gates as they are, biases": (
        dict(normalize_gates=False, expert_bias=True, router_bias=True),
        dict(num_experts=16, top_k=8, expert_ffw_dim=4, shared_ffw_dim=8),
    ),
}


@pytest.mark.parametrize("name", fast(FROM_EXPERTS, "copies in slices"))
def test_experts_compute_the_same_with_all_their_copies_and_slices(name):
    own, options = FROM_EXPERTS[name]
    source, target = model_of(**SPARSE | own), model_of(**SPARSE | own | options)
    assert changes(source, target, EXACT) == []
    before, after = logits(source, target)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * float(jnp.abs(before).max()))


OTHERWISE = {
    "some slices of a copy": (DENSE, dict(num_experts=8, top_k=3, expert_ffw_dim=12), EXACT, "top_k=3"),
    "gates that sum to less": (
        DENSE,
        dict(num_experts=4, top_k=2, expert_ffw_dim=24, score="softmax", normalize_gates=False),
        EXACT,
        "normalize_gates",
    ),
    "gates that copies share": (
        SPARSE | dict(normalize_gates=False, sparsemixer=0.3, score="softmax"),
        dict(num_experts=8, top_k=4),
        EXACT,
        "model.sparsemixer=0.3",
    ),
    "a random router": (DENSE, dict(num_experts=8, top_k=2, expert_ffw_dim=12), Recipe("random"), "--router=random"),
    "new units": (DENSE, dict(num_experts=4, top_k=2, expert_ffw_dim=24), Recipe(reinit=0.5), "--reinit=0.5"),
    "as many choices as before": (SPARSE, dict(num_experts=8), EXACT, "model.top_k=2 is not 4"),
    "noise": (SPARSE, dict(num_experts=8, top_k=4), Recipe(noise=0.1), "--noise=0.1"),
    "groups": (
        SPARSE | dict(num_groups=2, top_groups=1),
        dict(num_experts=8, top_k=4),
        EXACT,
        "num_groups=2",
    ),
}


@pytest.mark.parametrize("name", fast(OTHERWISE, "some slices of a copy"))
def test_what_changes_the_output_is_reported(name):
    there, here, recipe, reason = OTHERWISE[name]
    source, target = model_of(**there), model_of(**there | here)
    assert any(reason in line for line in changes(source, target, recipe))
    before, after = logits(source, target, recipe)
    assert float(jnp.abs(after - before).max()) > 1e-3 * float(jnp.abs(before).max())


def test_an_expert_is_a_slice_of_its_original_and_routers_are_grouped_by_copy():
    target = model_of(**DENSE | dict(num_experts=6, top_k=2, expert_ffw_dim=12))
    before, after = weights(model_of(**DENSE), target)
    layer = "params/stacks/0/blocks/0/ffw/"
    for expert in range(6):
        units = slice(0, 12) if expert % 2 == 0 else slice(12, 24)
        np.testing.assert_array_equal(after[f"{layer}up"][0, expert], before[f"{layer}up"][0][:, units])
        np.testing.assert_array_equal(after[f"{layer}down"][0, expert], 2 * before[f"{layer}down"][0][units])
    router = after[f"{layer}router"][0]
    np.testing.assert_array_equal(router[:, ::2], router[:, 1::2])
    assert len(np.unique(router, axis=1).T) == 3
    assert abs(router.std() / 0.3 - 1) < 0.3


def test_copies_keep_their_column_of_the_router_and_their_bias():
    before, after = weights(model_of(**SPARSE), model_of(**SPARSE | dict(num_experts=8)), Recipe(noise=0.01))
    router, old = (values["params/stacks/1/blocks/0/ffw/router"] for values in (after, before))
    assert 0 < np.abs(router[..., 4:] - router[..., :4]).max() < 0.1 * np.abs(old).max()
    bias, old = (values["bias/stacks/1/blocks/0/ffw/bias"] for values in (after, before))
    np.testing.assert_array_equal(bias, np.concatenate([old, old], -1))


def test_new_units_are_the_same_in_all_matrices_of_an_expert_and_differ_between_experts():
    target = model_of(**DENSE | dict(num_experts=4, top_k=2, expert_ffw_dim=24))
    before, after = weights(model_of(**DENSE), target, Recipe(reinit=0.25))
    layer = "params/stacks/0/blocks/0/ffw/"
    renewed = []
    for expert in range(4):
        changed = {
            name: (after[f"{layer}{name}"][0, expert] != before[f"{layer}{name}"][0]).any(1 if name == "down" else 0)
            for name in ("gate", "up", "down")
        }
        np.testing.assert_array_equal(changed["gate"], changed["up"])
        np.testing.assert_array_equal(changed["gate"], changed["down"])
        assert changed["gate"].sum() == 6
        renewed.append(tuple(changed["gate"]))
    assert len(set(renewed)) > 1


REFUSED = {
    "no experts": (DENSE, {}, "model.num_experts=0 must be above 0"),
    "another width": (DENSE, dict(num_experts=4, embed_dim=32), "model.embed_dim=32 (there 16)"),
    "a latent": (DENSE, dict(num_experts=4, latent_dim=8), "model.latent_dim=8 (there 0)"),
    "a width that does not divide": (
        DENSE,
        dict(num_experts=4, expert_ffw_dim=7),
        "must divide the width of the layer in --input, 24;",
    ),
    "shared experts that leave nothing": (
        DENSE,
        dict(num_experts=4, num_shared_experts=3),
        "24 less 24 of the shared experts",
    ),
    "a number of experts that does not divide": (
        DENSE,
        dict(num_experts=9, expert_ffw_dim=12),
        "model.num_experts=9 must be a multiple of 2",
    ),
    "fewer experts": (SPARSE, dict(num_experts=2), "model.num_experts=2 must be a multiple of 4"),
    "another score": (SPARSE, dict(num_experts=8, score="softmax"), "model.score='softmax' (there 'sigmoid')"),
    "narrower shared experts": (SPARSE, dict(num_experts=8, expert_ffw_dim=4), "model.shared_ffw_dim=0 must leave"),
    "zero-computation experts": (SPARSE | dict(num_zero_experts=2), dict(num_experts=8), "model.num_zero_experts=2"),
    "gates of 0": (DENSE, dict(num_experts=4, expert_ffw_dim=24, score="relu"), "model.score='relu' gives"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_fit_are_refused(name):
    there, here, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan(model_of(**there), replace(model_of(**there), **here))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(reinit=1.5), "--reinit=1.5 must be a share from 0 to 1"),
        (dict(noise=-1.0), "--noise=-1.0 must be a finite number"),
        (dict(noise=float("nan")), "--noise=nan must be a finite number"),
        (dict(seed=-1), "--seed=-1 must be at least 0"),
    ],
)
def test_a_recipe_out_of_range_is_refused(options, sentence):
    source, target = model_of(**DENSE), model_of(**DENSE | dict(num_experts=4, expert_ffw_dim=24))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        list(upcycled(source, target, lambda *_: np.zeros(()), Recipe(**options)))


def test_a_run_starts_from_an_upcycled_workdir(tmp_path, capsys):
    dense = tiny_config(num_steps=1, model=DENSE)
    loop.run(dense, tmp_path / "dense")
    changed = as_dict(dense) | dict(balance=dict(bias_sign={}), init_from=str(tmp_path / "sparse"))
    own = dict(num_experts=4, top_k=2, expert_ffw_dim=24)
    config = validate(changed | {"model": changed["model"] | own})
    upcycle.run(config, tmp_path / "dense", tmp_path / "sparse", {})
    assert "it computes what the input computes" in capsys.readouterr().out
    _, read = open_weights(tmp_path / "sparse", config, "last")
    _, before = open_weights(tmp_path / "dense", dense, "last")
    for leaf, index, value in upcycled(dense.model, config.model, before, Recipe()):
        np.testing.assert_array_equal(read(leaf, index), value)
    loop.run(config, tmp_path / "run")
    assert committed(tmp_path / "run" / "checkpoints") == [1]
    with pytest.raises(ValueError, match="is not an empty folder"):
        upcycle.run(config, tmp_path / "dense", tmp_path / "sparse", {})
