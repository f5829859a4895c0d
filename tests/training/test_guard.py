"""Steps that are outliers are skipped, and what that leaves alone."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_same_bits, tiny_config
from moe_jax.config import GuardConfig
from moe_jax.data import open_corpus, training_batches
from moe_jax.mesh import make_mesh
from moe_jax.runtime import checkpoint
from moe_jax.training.compile import make_train_step
from moe_jax.training.guard import advance, initial, is_outlier
from moe_jax.training.loop import run
from moe_jax.training.state import abstract_state, init_state, step_key
from moe_jax.training.step import all_or_nothing

CONFIG = GuardConfig(threshold=6.0, window=16, most=3)


@functools.partial(jax.jit, static_argnums=0)
def observe(config, guard, loss, norm):
    """The guard after a step, and whether the step was skipped as an outlier."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    outlier = finite & is_outlier(config, guard, loss, norm)
    return advance(config, guard, finite, outlier, loss, norm), outlier


def watched(losses, norms=None, config=CONFIG):
    """The guard after these steps, and which of them were skipped."""
    guard = initial(config)
    skipped = []
    for loss, norm in zip(losses, np.ones(len(losses)) if norms is None else norms, strict=True):
        guard, outlier = observe(config, guard, jnp.float32(loss), jnp.float32(norm))
        skipped.append(bool(outlier))
    return guard, np.flatnonzero(skipped).tolist()


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(3.0, 0.1, count)


def test_a_spike_of_loss_or_gradient_is_skipped_and_never_enters_the_window():
    losses = noise(40)
    losses[30] = 4.5  # fifteen deviations
    guard, skipped = watched(losses)
    assert skipped == [30]
    assert (int(guard.outliers), int(guard.in_a_row), int(guard.seen)) == (1, 0, 39)
    assert 4.5 not in np.asarray(guard.losses)
    assert watched(noise(40), norms=np.where(np.arange(40) == 20, 9.0, noise(40, 1)))[1] == [20]


def test_the_threshold_is_in_robust_deviations_of_the_window():
    losses = noise(16)
    median = np.median(losses)
    deviation = 1.4826 * np.median(np.abs(losses - median))
    for times, want in ((5.9, []), (6.1, [16])):
        assert watched([*losses, median + times * deviation])[1] == want
    assert watched([*losses, 0.0])[1] == []  # a better loss is no outlier


def test_nothing_is_skipped_before_the_window_is_full():
    assert watched([*noise(15), 100.0])[1] == []
    assert watched([*noise(16), 100.0])[1] == [16]


def test_one_spike_in_the_window_does_not_hide_the_next():
    losses = np.append(noise(32), 4.5)
    losses[3] = 1000.0  # kept, because the window was not full
    assert watched(losses)[1] == [32]


def test_a_flat_window_skips_nothing_within_a_thousandth():
    assert watched([*np.full(16, 3.0), 3.01])[1] == []
    assert watched([*np.full(16, 3.0), 3.1])[1] == [16]


def test_a_new_level_is_accepted_after_a_few_and_the_window_begins_anew():
    losses = [*noise(20), *(noise(30) + 3.0), 30.0]
    guard, skipped = watched(losses)
    assert skipped == [20, 21, 22, 50]
    assert int(guard.seen) == 27
    assert np.asarray(guard.losses).min() > 5.0


def test_what_is_not_finite_changes_nothing():
    before, _ = watched(noise(20))
    for loss, norm in ((np.nan, 1.0), (3.0, np.inf)):
        after, outlier = observe(CONFIG, before, jnp.float32(loss), jnp.float32(norm))
        assert not outlier
        assert_same_bits(jax.device_get(after), jax.device_get(before))


def test_a_skipped_step_keeps_every_bit_counts_and_is_not_stuck():
    state = init_state(tiny_config())
    moved = state._replace(params=jax.tree.map(lambda a: a + 1, state.params))
    for finite, keep, want in ((True, False, (1, 1, 0)), (False, False, (1, 1, 1)), (True, True, (1, 0, 0))):
        after = all_or_nothing(jnp.bool_(finite), jnp.bool_(keep), moved, state)
        assert (int(after.step), int(after.skipped), int(after.stuck)) == want
        assert_same_bits(after.params, (moved if keep else state).params)


def test_its_options_without_a_threshold_are_refused():
    words = r"guard\.window=64 and guard\.most=5 apply to a guard, but guard\.threshold=0\.0 is none"
    with pytest.raises(ValueError, match=words):
        tiny_config(guard=dict(window=64))


# --- the whole step -------------------------------------------------------------------------------------------


def test_a_run_skips_a_spike_logs_it_and_resumes_with_its_window(tmp_path):
    settings = dict(guard=dict(threshold=6.0, window=8), num_steps=12, model=dict(num_layers=1, first_dense=0))
    config = tiny_config(**settings, optimizer=dict(learning_rate=1e-3), save_every=10)
    run(config, tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["outliers"] for line in lines] == [0] * 12
    state = checkpoint.restore(tmp_path / "run" / "checkpoints", abstract_state(config, make_mesh(config.mesh)))[0]
    assert int(state.guard.seen) == 12
    losses = [line["loss"] for line in lines[-8:]]
    np.testing.assert_array_equal(np.sort(state.guard.losses), np.sort(np.float32(losses)))
    step = make_train_step(config, make_mesh(config.mesh))
    batch_at = training_batches(open_corpus(""), seed=0, batch_size=8, sequence_length=16)
    batch = batch_at(12)
    quiet = state._replace(guard=state.guard._replace(losses=state.guard.losses / 2))  # so that any loss is an outlier
    after, values = step(jax.tree.map(jnp.copy, quiet), batch, step_key(config))
    assert (int(values["outliers"]), int(values["skipped"]), int(after.step)) == (1, 1, 13)
    assert_same_bits(jax.device_get((after.params, after.bias)), jax.device_get((quiet.params, quiet.bias)))
