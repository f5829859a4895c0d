"""The laws of the whole train step: one division, one update, all or nothing, whatever the micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import balance
from moe_jax.data.batches import Batch
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.training.compile import make_eval_step, make_train_step
from moe_jax.training.losses import model_row_nats
from moe_jax.training.micro_batches import split_batch
from moe_jax.training.state import abstract_state, init_state, read_bias, step_key, write_bias
from moe_jax.training.step import accumulate, advance, balance_update, first_non_finite

METHODS = {
    "bias": dict(bias_sign=dict(rate=0.01)),
    "losses": dict(aux_loss=dict(weight=0.3, scope="sequence"), z_loss=dict(weight=0.3)),
    "global": dict(
        biased=dict(method="aux_loss", weight=0.3, scope="global"),
        unbiased=dict(method="aux_loss", weight=0.3, scope="global", counts="unbiased"),
    ),
}


def random_batch(seed=0, rows=8, length=16, padding=()) -> Batch:
    """Random tokens, one document a row; `padding[i]` positions at the end of row i are padding."""
    rng = np.random.default_rng(seed)
    window = rng.integers(1, 256, (rows, length + 1)).astype(np.int32)
    valid = np.ones((rows, length), bool)
    for row, amount in enumerate(padding):
        valid[row, length - amount :] = False
    batch = Batch(
        tokens=np.where(valid, window[:, :-1], 0),
        targets=np.where(valid, window[:, 1:], 0),
        segment_ids=valid.astype(np.int32),
        positions=np.where(valid, np.arange(length, dtype=np.int32), 0),
        mask=valid,
        domain=np.zeros(rows, np.int32),
        num_bytes=valid.sum(1).astype(np.int32),
    )
    return Batch(*(jnp.asarray(a) for a in batch))


@functools.cache
def state_of(name: str):
    """An initial state with weights so large that routing has no near ties and gradients are not tiny."""
    config = tiny_config(balance=METHODS[name])
    state = init_state(config)
    return state._replace(params=jax.tree.map(lambda a: a * 3.0, state.params))


@functools.cache
def gradient_of(name: str, micro_batches: int, remat: str = "none"):
    policy = dict(remat="names", remat_offload=("attention",)) if remat == "names" else dict(remat=remat)
    config = tiny_config(balance=METHODS[name], micro_batches=micro_batches, model=policy)
    return jax.jit(functools.partial(accumulate, config))


UNEQUAL = (0, 15, 3, 9, 0, 12, 1, 14)  # rows i, i + 2, ... are a micro-batch of two: 79 and 55 valid tokens


def assert_trees_close(a, b, rtol=1e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(np.asarray(x)).max() + 1e-12
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["bias", "losses", "global"])
def test_micro_batches_with_unequal_padding_give_the_gradient_of_one_batch(name):
    state, batch, key = state_of(name), random_batch(padding=UNEQUAL), jax.random.key(1)
    one_sums, one = gradient_of(name, 1)(state, batch, key)
    two_sums, two = gradient_of(name, 2)(state, batch, key)
    assert_trees_close(one, two)
    np.testing.assert_allclose(one_sums.total_loss, two_sums.total_loss, rtol=1e-6)
    np.testing.assert_array_equal(one_sums.statistics["loads"], two_sums.statistics["loads"])


def test_a_mean_of_micro_batch_means_would_be_another_gradient():
    # the law above can fail: dividing each micro-batch by its own tokens is far from one batch
    batch, key = random_batch(padding=UNEQUAL), jax.random.key(1)
    micro = split_batch(batch, 2)
    halves = [jax.tree.map(lambda a, i=i: a[i], micro) for i in range(2)]
    one = gradient_of("bias", 1)(state_of("bias"), batch, key)[1]["head"]
    own = [gradient_of("bias", 1)(state_of("bias"), half, key)[1]["head"] for half in halves]
    assert np.abs((own[0] + own[1]) / 2 - one).max() > 0.05 * np.abs(one).max()


WEIGHTS = (0.0, 0.25, 1.0, 3.0)


def weighted_batch() -> Batch:
    batch = random_batch(padding=UNEQUAL)
    return batch._replace(mask=batch.mask * np.random.default_rng(1).choice(np.float32(WEIGHTS), batch.mask.shape))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_loss_is_the_weighted_mean_over_the_targets_of_the_whole_step(micro_batches):
    # the targets of each weight alone have nats and a gradient that are divided by their number
    state, batch, key = state_of("bias"), weighted_batch(), jax.random.key(1)
    nats, gradient = 0.0, 0.0
    for weight in WEIGHTS[1:]:
        sums, grads = gradient_of("bias", 1)(state, batch._replace(mask=batch.mask == weight), key)
        nats += weight * sums.nats
        gradient += weight * (batch.mask == weight).sum() * grads["head"]
    sums, grads = gradient_of("bias", micro_batches)(state, batch, key)
    np.testing.assert_allclose(sums.nats, nats, rtol=1e-6)
    np.testing.assert_allclose(sums.total_loss, nats / batch.mask.sum(), rtol=1e-6)
    assert_trees_close(grads["head"], gradient / batch.mask.sum())


def test_balancing_sees_every_token_whatever_its_target_weighs():
    state, key = state_of("losses"), jax.random.key(1)
    plain, weighted = (
        gradient_of("losses", 2)(state, batch, key)[0] for batch in (random_batch(padding=UNEQUAL), weighted_batch())
    )
    np.testing.assert_array_equal(plain.statistics["loads"], weighted.statistics["loads"])
    np.testing.assert_array_equal(plain.aux_loss, weighted.aux_loss)
    assert_trees_close(plain.losses, weighted.losses)


def test_a_step_in_which_no_target_counts_has_no_loss_and_no_gradient_and_moves_the_bias():
    batch = random_batch()
    state, metrics = stepped("bias", [batch._replace(mask=0.0 * batch.mask)])
    assert metrics["loss"] == metrics["total_loss"] == metrics["bits_per_byte"] == metrics["grad_norm"] == 0
    assert metrics["tokens"] == 8 * 16
    assert state.skipped == 0
    assert (read_bias(state.bias) != 0).any()


@pytest.mark.parametrize("remat", ["dots", "full", "names"])
@pytest.mark.parametrize("name", ["losses"])
def test_rematerialisation_changes_no_gradient_and_counts_nothing_twice(name, remat):
    state, batch, key = state_of(name), random_batch(padding=UNEQUAL), jax.random.key(1)
    plain_sums, plain = gradient_of(name, 1)(state, batch, key)
    sums, grads = gradient_of(name, 1, remat)(state, batch, key)
    assert_trees_close(plain, grads)
    np.testing.assert_array_equal(plain_sums.statistics["loads"], sums.statistics["loads"])


def test_loads_are_valid_tokens_times_top_k_in_every_layer():
    sums, _ = gradient_of("bias", 2)(state_of("bias"), random_batch(padding=UNEQUAL), jax.random.key(1))
    valid = 8 * 16 - sum(UNEQUAL)
    np.testing.assert_array_equal(sums.statistics["loads"].sum(-1), [2 * valid, 2 * valid])


def stepped(name: str, batches, state=None, **overrides):
    """The state after a step on each batch, and the last metrics."""
    config = tiny_config(balance=METHODS[name], **overrides)
    step, key = make_train_step(config), step_key(config)
    state = jax.tree.map(jnp.copy, state_of(name) if state is None else state)
    for batch in batches:
        state, metrics = step(state, batch, key)
    return state, metrics


def test_the_bias_moves_once_a_step_in_every_moe_layer_against_the_load():
    state, metrics = stepped("bias", [random_batch()])
    loads, bias = np.asarray(metrics["loads"]), np.asarray(read_bias(state.bias))
    mean = loads.mean(-1, keepdims=True)
    np.testing.assert_allclose(bias, 0.01 * np.sign(mean - loads), rtol=1e-6)
    assert (bias != 0).any(1).all()
    assert bias.dtype == np.float32


@pytest.mark.parametrize("micro_batches", [4])
def test_accumulation_moves_the_bias_once_not_once_a_micro_batch(micro_batches):
    state, metrics = stepped("bias", [random_batch()], micro_batches=micro_batches)
    loads = np.asarray(metrics["loads"])
    want = 0.01 * np.sign(loads.mean(-1, keepdims=True) - loads)
    np.testing.assert_allclose(read_bias(state.bias), want, rtol=1e-6)


def observed(config, state, bias, batch):
    """Nats of every row and reports of a forward pass with this bias."""
    fwd = Pass(inputs_of(batch), balance.make(config.balance), PerLayer(state.balance), jax.random.key(0), train=True)
    return model_row_nats(config, state.params, bias, fwd, batch)


def test_the_bias_has_no_gradient():
    config, state = tiny_config(balance=METHODS["bias"]), state_of("bias")

    def loss(bias):
        return observed(config, state, bias, random_batch())[0].sum()

    assert (read_bias(jax.jit(jax.grad(loss))(state.bias)) == 0).all()


def test_a_bias_changes_the_selection_and_thereby_the_loss():
    config, state = tiny_config(balance=METHODS["bias"]), state_of("bias")
    pushed = write_bias(state.bias, jnp.zeros((2, 4)).at[:, 3].set(10.0))
    run = jax.jit(lambda bias: observed(config, state, bias, random_batch()))
    (before, _), (after, report) = run(state.bias), run(pushed)
    np.testing.assert_array_equal(report.statistics["loads"][:, 3], [128, 128])  # every token, as one of two
    assert not np.allclose(before, after)


def test_the_bias_used_in_a_step_is_the_one_before_it():
    # loads of step 0 are those of the old (zero) bias: the same as a forward pass that never updates
    config, state = tiny_config(balance=METHODS["bias"]), state_of("bias")
    run = jax.jit(lambda batch: observed(config, state, state.bias, batch)[1])
    report = run(random_batch())
    _, metrics = stepped("bias", [random_batch()])
    np.testing.assert_array_equal(report.statistics["loads"], metrics["loads"])


def test_replayed_loads_give_bit_equal_biases_over_fifty_steps():
    config = tiny_config(balance=dict(bias_sign=dict(rate=1e-3, zero_mean=True)))
    rng = np.random.default_rng(0)
    loads = rng.integers(0, 100, (50, 4, 2, 4)).astype(np.int32)  # steps, micro-batches, layers, experts
    update = jax.jit(functools.partial(balance_update, config))
    whole = parts = init_state(config)
    for step in loads:
        whole = update(whole, {"loads": jnp.asarray(step.sum(0))})
        parts = update(parts, {"loads": functools.reduce(jnp.add, [jnp.asarray(s) for s in step])})
    np.testing.assert_array_equal(read_bias(whole.bias), read_bias(parts.bias))
    assert (read_bias(whole.bias) != 0).any()


def test_nothing_in_a_bfloat16_model_narrows_the_bias_or_the_loads():
    state, metrics = stepped(
        "bias",
        [random_batch(s) for s in range(3)],
        state=init_state(tiny_config(model=dict(param_dtype="bfloat16"), balance=METHODS["bias"])),
        model=dict(param_dtype="bfloat16", compute_dtype="bfloat16"),
    )
    assert read_bias(state.bias).dtype == jnp.float32
    assert metrics["loads"].dtype == jnp.int32
    assert jax.tree.leaves(state.params)[0].dtype == jnp.bfloat16
    assert np.isfinite(float(metrics["loss"]))


POISONS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["bias"])
def test_a_step_that_is_not_finite_moves_nothing_but_the_step_number(name, poison):
    state, _ = stepped(name, [random_batch(0)])
    sick = state._replace(params=state.params | {"embedding": state.params["embedding"].at[7].set(POISONS[poison])})
    batch = random_batch(1)
    batch = batch._replace(tokens=jnp.where(batch.mask, 7, 0))
    before = jax.tree.map(np.asarray, sick)
    after, metrics = stepped(name, [batch], sick)
    for field in ("params", "optimizer", "bias", "balance"):
        assert_equal_bits(getattr(before, field), getattr(after, field))
    assert int(after.step) == int(before.step) + 1
    assert int(after.skipped) == int(metrics["skipped"]) == 1
    healthy = after._replace(params=state.params)
    healthy, metrics = stepped(name, [random_batch(2)], healthy)
    assert (int(healthy.step), int(healthy.skipped), int(healthy.stuck)) == (3, 1, 0)
    assert np.isfinite(float(metrics["loss"]))
    assert not np.array_equal(read_bias(healthy.bias), read_bias(after.bias))


def assert_equal_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_gradient_that_overflows_where_the_loss_does_not_is_skipped_too():
    # with a head scaled to 1e30 the logits and the loss stay finite, but the squares of gradients do not
    state = state_of("bias")
    sick = state._replace(params=state.params | {"head": state.params["head"] * 1e30})
    after, metrics = stepped("bias", [random_batch()], sick)
    assert np.isfinite(float(metrics["loss"]))
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert int(after.skipped) == 1


def sick_in_head(moment, value):
    """A state with one number of the head's moments that is not finite."""

    def sick(state):
        adam = state.optimizer[1]
        moments = getattr(adam, moment)
        moments = moments | {"head": moments["head"].at[0, 0].set(value)}
        return state._replace(optimizer=(state.optimizer[0], adam._replace(**{moment: moments}), *state.optimizer[2:]))

    return sick


SMEBU = dict(bias_smebu=dict(rate=0.01))
UPDATES = {  # loss and gradient are finite; a result of the update is not
    "a step beyond float32": (
        dict(learning_rate=3e38, weight_decay=1e3),
        lambda state: state,
        "moved parameter embedding",
    ),
    "a first moment": ({}, sick_in_head("mu", np.nan), "moved parameter head"),
    "a second moment": ({}, sick_in_head("nu", np.inf), "moved moment 1/nu/head"),  # of a parameter that would not move
    "a balancer's momentum": (
        {},
        lambda state: state._replace(balance=state.balance | {"bias_smebu": jnp.full((2, 4), jnp.nan)}),
        "moved bias of stacks/1/blocks/0/ffw/bias",
    ),
}


@pytest.mark.parametrize("what", UPDATES)
def test_an_update_that_is_not_finite_moves_nothing_and_is_named(what):
    optimizer, make_sick, name = UPDATES[what]
    config = tiny_config(balance=SMEBU, optimizer=optimizer)
    state, batch = make_sick(init_state(config)), random_batch()
    before = jax.tree.map(np.asarray, state)
    assert first_non_finite(config, state, batch) == name
    after, metrics = make_train_step(config)(state, batch, step_key(config))
    assert np.isfinite(float(metrics["loss"])) and np.isfinite(float(metrics["grad_norm"]))
    for field in ("params", "optimizer", "bias", "balance"):
        assert_equal_bits(getattr(before, field), getattr(after, field))
    assert (int(after.step), int(after.skipped), int(after.stuck)) == (1, 1, 1)


def test_a_finite_step_has_no_non_finite_tensor():
    config = tiny_config(balance=SMEBU)
    assert first_non_finite(config, init_state(config), random_batch()) == "nothing any more"


def moved_by(rate, model=None, **optimizer):
    """Every parameter before and after a step at a tiny rate, as float32; initial weights are bfloat16 numbers."""
    config = tiny_config(model=model or {}, optimizer=optimizer | dict(learning_rate=rate, weight_decay=0.0))
    narrow = init_state(tiny_config(model=dict(param_dtype="bfloat16"))).params
    state = init_state(config)
    state = state._replace(params=jax.tree.map(lambda a, b: a.astype(b.dtype), narrow, state.params))
    before = [np.asarray(a, np.float32).ravel() for a in jax.tree.leaves(state.params)]
    after = make_train_step(config)(state, random_batch(), step_key(config))[0]
    moved = [np.asarray(a, np.float32).ravel() for a in jax.tree.leaves(after.params)]
    return np.concatenate(before), np.concatenate(moved)


NARROW = dict(param_dtype="bfloat16")


def test_at_a_tiny_rate_float32_parameters_move_and_bfloat16_ones_only_by_chance():
    # the same gradients, and no weight decay: steps of 1e-5 from weights of 0.02, where bfloat16 has steps of 1e-4
    before, wide = moved_by(1e-5)
    seen = wide != before  # rows of bytes that do not occur do not move
    assert seen.mean() > 0.8
    _, lost = moved_by(1e-5, NARROW)
    assert (lost != before)[seen].mean() < 0.2
    _, chance = moved_by(1e-5, NARROW, rounding="stochastic")
    assert 0.05 < (chance != before)[seen].mean() < 0.6
    wanted, had = (wide - before)[seen], (chance - before)[seen]
    # on average the whole update; with 14,000 parameters its standard deviation is about 0.03
    np.testing.assert_allclose((wanted * had).sum() / (wanted**2).sum(), 1.0, atol=0.15)


def test_stochastic_rounding_is_the_same_every_time_and_another_at_every_step():
    once, again = (moved_by(1e-5, NARROW, rounding="stochastic")[1] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    config = tiny_config(optimizer=dict(rounding="stochastic"), model=NARROW)
    state, key = init_state(config), jax.random.fold_in(step_key(config), 0)
    grads = jax.tree.map(jnp.ones_like, state.params)
    run = jax.jit(lambda key: advance(config, state, grads, None, jnp.float32(1e-5), key).params["head"])
    assert (run(key) != run(jax.random.fold_in(step_key(config), 1))).any()


def test_evaluation_moves_nothing():
    config, state = tiny_config(balance=METHODS["bias"]), state_of("bias")
    before = jax.tree.map(np.asarray, state)
    make_eval_step(config)(state, random_batch())
    assert_equal_bits(before, state)


def test_evaluation_counts_padding_nowhere():
    config, state = tiny_config(balance=METHODS["bias"]), state_of("bias")
    result = make_eval_step(config)(state, random_batch(padding=(16, 16, 16, 16)))
    np.testing.assert_array_equal(result.tokens, [0] * 4 + [16] * 4)
    np.testing.assert_array_equal(result.nats[:4], 0.0)
    np.testing.assert_array_equal(result.loads.sum(-1), [128, 128])  # 4 rows x 16 tokens x top-2


def routers(state):
    """The routers' weights, of all MoE layers."""
    leaves = zip(*map(jax.tree.leaves, (abstract_model(tiny_config().model).dims, state.params)), strict=True)
    return np.concatenate([np.asarray(leaf).ravel() for dims, leaf in leaves if dims.part == "router"])


@pytest.mark.parametrize("frozen", [dict(rate=0.0), dict(rate=0.01, freeze_step=0)])
def test_a_frozen_bias_stays(frozen):
    config = tiny_config(balance=dict(bias_sign=frozen))
    router = routers(init_state(config))
    state = make_train_step(config)(init_state(config), random_batch(), step_key(config))[0]
    assert (read_bias(state.bias) == 0).all()
    assert (routers(state) != router).any()  # only the bias is frozen


def test_an_auxiliary_loss_is_logged_unscaled_and_not_times_the_micro_batches():
    one = stepped("bias", [random_batch()])[1]["moe/aux_loss"]
    four = stepped("bias", [random_batch()], micro_batches=4)[1]["moe/aux_loss"]
    # measured where it is not trained on; the f of a quarter batch is noisier than that of the whole
    assert 0.98 < float(one) < 1.2
    assert 0.98 < float(four) < 1.3


def test_total_loss_is_cross_entropy_plus_the_weighed_balancing_losses():
    _, none = stepped("bias", [random_batch()])
    _, aux = stepped("global", [random_batch()])
    np.testing.assert_allclose(none["total_loss"], none["loss"], rtol=1e-6)
    # two layers, twice 0.3 x sum f P (bias 0: biased and unbiased counts agree); with one micro-batch the
    # logged mean over layers is the same f P
    want = aux["loss"] + 2 * 2 * 0.3 * aux["moe/aux_loss"]
    np.testing.assert_allclose(aux["total_loss"], want, rtol=1e-5)


def test_bits_per_byte_is_nats_over_ln_2_and_bytes():
    batch = random_batch()
    batch = batch._replace(num_bytes=jnp.full(8, 10))  # 80 bytes for 128 targets
    _, metrics = stepped("bias", [batch])
    np.testing.assert_allclose(metrics["bits_per_byte"], metrics["loss"] * 128 / (np.log(2) * 80), rtol=1e-5)


def test_experts_that_no_token_reaches_have_gradients_of_exactly_zero():
    state = state_of("bias")
    away = state._replace(bias=write_bias(state.bias, jnp.zeros((2, 4)).at[:, 0].set(-10.0)))
    _, grads = gradient_of("bias", 1)(away, random_batch(), jax.random.key(1))
    experts = grads["stacks"][1]["blocks"][0]["ffw"]
    for name in ("gate", "up", "down"):
        assert (experts[name][:, 0] == 0).all()
        assert (experts[name][:, 1:] != 0).any()


def test_the_compiled_program_does_not_grow_with_depth():
    def operations(num_layers):
        config = tiny_config(model=dict(num_layers=num_layers))
        state = abstract_state(config)
        text = make_train_step(config).lower(state, random_batch(), step_key(config)).as_text()
        return text.count("\n")

    assert operations(8) == operations(4)


def test_every_parameter_has_dimensions_of_its_own_rank():
    model = abstract_model(tiny_config().model)
    for leaf, dims in zip(jax.tree.leaves(model.params), jax.tree.leaves(model.dims), strict=True):
        assert len(leaf.shape) - len(dims.names) in (0, 1)  # one more where layers are stacked
