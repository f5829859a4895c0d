"""The moving average of parameters and bias: its equation, what it leaves alone, and how it is read."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_same_bits, tiny_config
from moe_jax import convert, evaluate
from moe_jax.config import resolve
from moe_jax.data import open_corpus
from moe_jax.huggingface.model import load_hf
from moe_jax.mesh import make_mesh
from moe_jax.runtime import checkpoint
from moe_jax.training.branch import branch
from moe_jax.training.ema import share_kept
from moe_jax.training.loop import run
from moe_jax.training.state import abstract_state, init_state, state_shardings, with_options
from moe_jax.training.step import advance, all_or_nothing

MLA = dict(attention="mla", q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MODEL = dict(num_layers=1, first_dense=0) | MLA  # one that a family with a bias holds


def config_of(devices=1, **overrides):
    model = MODEL | overrides.pop("model", {})
    settings = dict(
        ema=dict(decay=0.2), balance=dict(bias_sign=dict(rate=1e-2)), optimizer=dict(learning_rate=1e-2), num_steps=3
    )
    return resolve(tiny_config(**(settings | overrides), model=model), devices, "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of three steps, with a checkpoint after each, and the states."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    config = config_of(save_every=1, checkpoint=dict(keep=3))
    run(config, folder, quiet=True)
    mesh = make_mesh(config.mesh)
    target = abstract_state(config, mesh)
    states = [checkpoint.restore_step(folder / "checkpoints", step, target, verify="auto") for step in (1, 2, 3)]
    return config, folder, [init_state(config, mesh), *states]


def test_the_average_of_parameters_and_bias_is_that_of_the_formula(trained):
    _, _, states = trained
    want = jax.tree.map(np.asarray, (states[0].params, states[0].bias))
    for step, state in enumerate(states[1:]):
        kept = min(0.2, (1 + step) / (10 + step))
        want = jax.tree.map(lambda old, new, k=kept: k * old + (1 - k) * new, want, (state.params, state.bias))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), tuple(state.ema), want)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (states[3].ema.bias, states[3].bias)), strict=True))


def test_the_share_kept_rises_to_the_decay():
    shares = [float(share_kept(config_of(ema=dict(decay=0.9)).ema, jnp.int32(step))) for step in (0, 8, 79, 80, 10**6)]
    assert shares == pytest.approx([0.1, 0.5, 80 / 89, 0.9, 0.9])


def test_it_changes_no_number_of_the_training_and_a_skipped_step_leaves_it_alone(trained):
    config, _, states = trained
    without = config_of(ema=dict(decay=0.0))
    state = states[1]
    grads = jax.tree.map(jnp.ones_like, state.params)
    rest = grads, None, jnp.float32(0.1), jax.random.key(0)
    moved = jax.jit(functools.partial(advance, config))(state, *rest)
    plain = jax.jit(functools.partial(advance, without))(state._replace(ema=None), *rest)
    assert plain.ema is None
    assert_same_bits(jax.device_get(moved._replace(ema=None)), jax.device_get(plain))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (moved.ema, state.ema)), strict=True))
    assert_same_bits(all_or_nothing(jnp.bool_(True), jnp.bool_(False), moved, state).ema, state.ema)


def test_it_is_float32_and_placed_like_what_it_averages():
    config = config_of(4, model=dict(param_dtype="bfloat16"), mesh=dict(data=2, expert=2))
    mesh = make_mesh(config.mesh)
    state = init_state(config, mesh)
    assert {str(a.dtype) for a in jax.tree.leaves(state.ema)} == {"float32"}
    places = state_shardings(config, mesh)
    assert (places.ema.params, places.ema.bias) == (places.params, places.bias)
    assert jax.tree.all(
        jax.tree.map(lambda a, place: a.sharding.is_equivalent_to(place, a.ndim), state.ema, places.ema)
    )
    described = jax.tree.map(lambda a: (a.shape, a.dtype), abstract_state(config, mesh).ema)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype), state.ema)


def test_evaluation_and_conversion_read_it_on_request(trained, tmp_path):
    config, folder, states = trained
    evaluate.run(config, folder)
    evaluate.run(config, folder, weights="ema")
    last, average = (json.loads((folder / f"evaluation{end}.json").read_text()) for end in ("", "_ema"))
    assert last["step"] == average["step"] == 3
    assert last["eval/loss"] != average["eval/loss"]
    for weights, (params, bias) in (("last", (states[3].params, states[3].bias)), ("ema", states[3].ema)):
        convert.run(folder, tmp_path / weights, None, "DeepseekV3ForCausalLM", weights)
        found = load_hf(tmp_path / weights)
        assert_same_bits(jax.device_get((found.params, found.bias)), jax.device_get((params, bias)))


def test_a_run_without_an_average_is_refused_by_a_sentence(tmp_path):
    config = config_of(ema=dict(decay=0.0))
    with pytest.raises(ValueError, match=r"--weights=ema reads an average, but the run has ema\.decay=0\.0"):
        evaluate.run(config, tmp_path, weights="ema")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ValueError, match="a Hugging Face folder has only one"):
        convert.run(tmp_path, tmp_path / "out", None, "", "ema")
    with pytest.raises(ValueError, match=r"ema\.decay=1\.0 must be below 1; try 0\.999"):
        config_of(ema=dict(decay=1.0))


@pytest.mark.parametrize(
    ("here", "same"),
    [({}, ("params", "bias")), (dict(balance=dict(bias_rms={})), ("params",)), (dict(ema=dict(decay=0.0)), None)],
    ids=str,
)
def test_a_branch_continues_the_average_of_its_trunk(trained, here, same):
    _, folder, states = trained
    config = config_of(branch_from=f"{folder}@2", **here)
    state = branch(config, make_mesh(config.mesh), open_corpus("")).state
    if same is None:
        assert state.ema is None
        return
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), state.ema, states[2].ema)
    kept = [name for name, own in equal._asdict().items() if jax.tree.all(own)]
    assert tuple(kept) == same
    if "bias" not in same:
        assert_same_bits(jax.device_get(state.ema.bias), jax.device_get(state.bias))


def test_where_there_was_none_it_begins_at_the_weights_in_buffers_of_its_own(trained):
    config, _, states = trained
    state = with_options(config, states[2]._replace(ema=None), make_mesh(config.mesh))
    assert_same_bits(jax.device_get(tuple(state.ema)), jax.device_get((state.params, state.bias)))
    own, weights = (
        {a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)} for tree in (state.ema, (state.params, state.bias))
    )
    assert not own & weights  # a step donates both
