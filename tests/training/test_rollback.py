"""Runs that go back from steps that were not kept, and what a kill at any moment leaves of that."""

import json
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_same_bits, tiny_config
from moe_jax import data
from moe_jax.config import GuardConfig, free_keys
from moe_jax.mesh import make_mesh
from moe_jax.runtime import checkpoint
from moe_jax.runtime.log import read_jsonl
from moe_jax.training import rollback
from moe_jax.training.compile import make_train_step
from moe_jax.training.guard import has_failed
from moe_jax.training.hooks import Hook
from moe_jax.training.loop import run
from moe_jax.training.rollback import Rollback, batch_of, known, recorded
from moe_jax.training.state import abstract_state, init_state, step_key

STEPS = 20
BAD = range(12, 15)  # batches of random tokens, which have a much higher loss


def config_of(**overrides):
    guard = dict(threshold=6.0, window=8, rollback=3) | overrides.pop("guard", {})
    settings = dict(num_steps=STEPS, save_every=5, data=dict(eval_sequences=1), model=dict(num_layers=1, first_dense=0))
    return tiny_config(**(settings | overrides), guard=guard, optimizer=dict(learning_rate=3e-3, schedule="constant"))


@contextmanager
def batches(bad, shift=lambda n: n):
    """While the block runs, step n of a run without a rollback has the batch `shift(n)`; those in `bad` are bad."""
    make = data.training_batches

    def spoiled(*args, **settings):
        batch_at = make(*args, **settings)

        def at(number, *rows):
            batch = batch_at(shift(number), *rows)
            if number not in bad:
                return batch
            # the same prediction everywhere, so that the gradient is several times that of text
            return batch._replace(tokens=np.full_like(batch.tokens, 200), targets=np.full_like(batch.targets, 201))

        return at

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "training_batches", spoiled)
        yield


@pytest.fixture
def bad():
    """Three batches in a row are bad."""
    with batches(BAD):
        yield


def saved(config, folder, step=STEPS):
    target = abstract_state(config, make_mesh(config.mesh))
    return jax.device_get(checkpoint.restore_step(folder / "checkpoints", step, target))


def curve(folder):
    """What does not depend on a clock of every line."""
    clocked = ("time/", "tokens_per_second", "gflops", "data_wait", "goodput")
    lines = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(clocked)} for line in lines]


def rollbacks(folder):
    return [tuple(r.values()) for r in json.loads((folder / "run.json").read_text())["rollbacks"]]


class Crash(Hook):
    """Fails before a step of a session that has gone back."""

    def before(self, context, now):
        if context.rollbacks and now.step == 12:
            raise RuntimeError("crash")
        return {}


# --- what a rollback does -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The workdir of a run that went back once, and was not interrupted."""
    folder = tmp_path_factory.mktemp("rollback") / "run"
    with batches(BAD):
        run(config_of(checkpoint=dict(keep=4)), folder, quiet=True)
    return folder


def test_a_run_goes_back_and_continues_as_if_the_batches_between_did_not_exist(reference, tmp_path):
    assert rollbacks(reference) == [(12, 15, 10, 5)]
    config = config_of()
    with batches((), shift=lambda n: n + 5 if n >= 10 else n):
        run(config, tmp_path / "plain", quiet=True)
    assert not (tmp_path / "plain" / "metrics.jsonl.1").exists()
    assert_same_bits(saved(config, reference), saved(config, tmp_path / "plain"))
    want = [line | {"rollbacks": int(line["step"] >= 10)} for line in curve(tmp_path / "plain")]
    assert curve(reference) == want
    # the steps that no longer count are in another file, and their time has a name
    old = read_jsonl(reference / "metrics.jsonl.1")
    assert [(line["step"], line["outliers"]) for line in old[9:]] == [
        (9, 0),
        (10, 0),
        (11, 0),
        (12, 1),
        (13, 2),
        (14, 3),
    ]
    assert json.loads((reference / "run.json").read_text())["time"]["rolled_back"] > 0


def test_a_branch_has_the_batches_of_its_trunk(reference, bad, tmp_path):
    branch = config_of(branch_from=f"{reference}@15")
    run(branch, tmp_path / "branch", quiet=True)
    assert_same_bits(saved(branch, tmp_path / "branch"), saved(branch, reference))
    assert rollbacks(tmp_path / "branch") == [(12, 15, 10, 5)]


def test_without_a_checkpoint_it_goes_back_to_its_beginning(bad, tmp_path):
    config = config_of(save_every=0)
    run(config, tmp_path, stop_at=16, quiet=True)
    assert rollbacks(tmp_path) == [(12, 15, 0, 15)]
    with batches((), shift=lambda n: n + 15):
        run(config, tmp_path / "plain", stop_at=16, quiet=True)
    assert_same_bits(saved(config, tmp_path, 16), saved(config, tmp_path / "plain", 16))


def test_a_checkpoint_amid_the_steps_that_fail_removes_none_before_them(bad, tmp_path):
    run(config_of(save_every=1, checkpoint=dict(keep=1)), tmp_path, stop_at=16, quiet=True)
    assert rollbacks(tmp_path) == [(12, 15, 12, 3)]
    assert checkpoint.committed(tmp_path / "checkpoints") == [16]


def test_after_the_last_rollback_that_is_allowed_the_run_ends_with_a_sentence(tmp_path):
    words = r"the steps 10 to 12 were outliers or not finite, and guard\.rollbacks=1 allows no rollback after the 1 so"
    with batches(range(12, 99)), pytest.raises(FloatingPointError, match=words):
        run(config_of(guard=dict(rollbacks=1)), tmp_path, quiet=True)
    assert json.loads((tmp_path / "run.json").read_text())["diverged"].startswith("the steps 10 to 12")
    assert rollbacks(tmp_path) == [(12, 15, 10, 5)]
    with batches(range(12, 18)):
        run(config_of(guard=dict(rollbacks=2)), tmp_path, stop_at=13, quiet=True)
    assert rollbacks(tmp_path) == [(12, 15, 10, 5), (10, 13, 10, 8)]


# --- a kill at any moment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["amid", "unnoticed", "going back", "after"])
def test_a_run_that_is_killed_has_the_numbers_of_one_that_is_not(reference, bad, moment, tmp_path, monkeypatch):
    config, folder = config_of(), tmp_path / "killed"
    if moment == "amid":
        run(config, folder, stop_at=14, quiet=True)
        assert saved(config, folder, 14).stuck == 2
    elif moment == "unnoticed":  # no line is logged between the failure and the end
        run(config_of(log_every=10), folder, stop_at=17, quiet=True)
        state = saved(config, folder, 17)
        assert (state.stuck, state.guard.outliers) == (5, 3)
    elif moment == "going back":
        with monkeypatch.context() as patch:
            patch.delattr(rollback, "write_run")
            with pytest.raises(NameError):
                run(config, folder, quiet=True)
        assert "rollbacks" not in json.loads((folder / "run.json").read_text())
    else:
        with pytest.raises(RuntimeError, match="crash"):
            run(config, folder, hooks=[Crash()], quiet=True)
        assert rollbacks(folder) == [(12, 15, 10, 5)]
    run(config, folder, quiet=True)
    assert rollbacks(folder) == [(12, 15, 10, 5)]
    assert_same_bits(saved(config, folder), saved(config, reference))
    after = [[line for line in curve(where) if line["step"] >= 10] for where in (folder, reference)]
    assert after[0] == after[1]


def test_experts_that_were_chosen_for_other_batches_are_forgotten_whether_or_not_the_run_is_killed(bad, tmp_path):
    config = config_of(anticipation=dict(delay=2), micro_batches=2)
    run(config, tmp_path / "one", quiet=True)
    assert [line["moe/anticipated"] for line in read_jsonl(tmp_path / "one" / "metrics.jsonl")[8:14]] == [
        1,
        1,
        0,
        0,
        1,
        1,
    ]
    with pytest.raises(RuntimeError, match="crash"):
        run(config, tmp_path / "two", hooks=[Crash()], quiet=True)
    run(config, tmp_path / "two", quiet=True)
    assert_same_bits(saved(config, tmp_path / "two"), saved(config, tmp_path / "one"))


# --- its parts ------------------------------------------------------------------------------------------------


def test_the_batch_of_a_step_is_that_of_the_last_rollback_to_it_or_before():
    one, two, three = Rollback(12, 15, 10, 5), Rollback(24, 27, 20, 12), Rollback(21, 24, 5, 31)
    assert [batch_of([one], n) for n in (9, 10, 20)] == [9, 15, 25]
    assert [batch_of([one, two], n) for n in (9, 10, 20)] == [9, 15, 32]
    assert [batch_of([one, two, three], n) for n in (4, 5, 10, 20)] == [4, 36, 41, 51]


def test_run_json_and_the_checkpoint_may_be_older_than_each_other():
    one, two = Rollback(12, 15, 10, 5), Rollback(24, 27, 20, 12)
    for records in (({}, recorded([one, two])), (recorded([one, two]), recorded([one])), (recorded([one, two]), {})):
        assert known(*records) == (one, two)
    assert known({}, {}) == () and recorded([]) == {}


def test_no_step_is_kept_after_the_failure_and_other_steps_end_the_row():
    config = config_of()
    mesh = make_mesh(config.mesh)
    state = init_state(config, mesh)
    step = make_train_step(config, mesh)
    batch = data.training_batches(data.open_corpus(""), seed=0, batch_size=8, sequence_length=16)(0)
    for stuck, want in ((2, 0), (3, 4)):
        before = jax.tree.map(jnp.copy, state)
        after, _ = step(before._replace(stuck=before.stuck + stuck), batch, step_key(config))
        assert int(after.stuck) == want
        if want:
            assert_same_bits(jax.device_get((after.params, after.guard)), jax.device_get((state.params, state.guard)))
    assert not has_failed(GuardConfig(threshold=6.0), 10**6)


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        (dict(threshold=0.0), r"guard\.rollback=3 goes back from steps that a guard skips, but guard\.threshold=0\.0"),
        (dict(most=2), r"guard\.rollback=3 is never reached by outliers, because after guard\.most=2 in a row"),
        (dict(rollback=0, rollbacks=5), r"guard\.rollbacks=5 limits what guard\.rollback=0 never does"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(guard, words):
    with pytest.raises(ValueError, match=words):
        config_of(guard=guard)


def test_the_number_of_rollbacks_may_be_raised_while_a_run_is_under_way():
    assert {"guard.rollbacks"} == {key for key in free_keys(config_of()) if key.startswith("guard")}
