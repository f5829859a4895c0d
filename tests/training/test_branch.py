"""A branch begins with the whole state of a trunk's checkpoint, under a balance of its own."""

import dataclasses
import hashlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drills import rig

from conftest import assert_same_bits, tiny_config
from moe_jax import evaluate
from moe_jax.balance.selectors import balanced_table
from moe_jax.config import as_dict
from moe_jax.data import open_corpus, token_frequencies
from moe_jax.mesh import make_mesh
from moe_jax.model.abstract import abstract_model
from moe_jax.runtime.checkpoint import committed, restore_step
from moe_jax.runtime.log import read_jsonl
from moe_jax.runtime.manifest import read_manifest
from moe_jax.runtime.workdir import config_of_run
from moe_jax.training.branch import check_branch, own_balance, reset_notes
from moe_jax.training.hooks import Hook
from moe_jax.training.loop import run
from moe_jax.training.start import start
from moe_jax.training.state import abstract_state, initial_layers, read_bias, write_bias

AT = 5  # the step at which branches leave their trunk
SHORT = dict(num_steps=8, eval_every=AT)
TRUNK = rig.drill_config(**SHORT)  # saved after 5 and 8 steps


def contents(folder):
    """name -> (sha256, time of the last change) of every file below a folder."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {f: (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """The workdir of a run with a bias and an auxiliary loss."""
    workdir = tmp_path_factory.mktemp("branch") / "the trunk@home"
    run(TRUNK, workdir, quiet=True)
    return workdir


def branched(trunk, step=AT, **overrides):
    """The config of TRUNK, as a branch."""
    return rig.drill_config(**(SHORT | dict(branch_from=f"{trunk}@{step}") | overrides))


def begun(config, workdir):
    """What a run of the config begins with."""
    return start(config, make_mesh(config.mesh), workdir, open_corpus())


# --- going on as the trunk ------------------------------------------------------------------------------------


def test_a_branch_like_its_trunk_continues_bit_for_bit_and_leaves_it_untouched(trunk, tmp_path):
    before = contents(trunk)
    run(branched(trunk), tmp_path / "run", quiet=True)
    assert contents(trunk) == before
    assert rig.curve(tmp_path / "run") == rig.curve(trunk)[AT:]  # tokens_seen too
    assert rig.layers(tmp_path / "run") == rig.layers(trunk)[AT:]
    assert rig.final_hash(TRUNK, tmp_path / "run") == rig.final_hash(TRUNK, trunk)


def test_the_log_of_a_branch_begins_at_its_step_whatever_the_interval(trunk, tmp_path):
    run(branched(trunk, log_every=4), tmp_path, quiet=True)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [5, 7]


def test_the_seed_of_a_branch_is_that_of_its_batches(trunk, tmp_path):
    run(branched(trunk, seed=1), tmp_path, stop_at=AT + 1, quiet=True)
    ours, theirs = rig.curve(tmp_path)[0], rig.curve(trunk)[AT]
    assert ours["loss"] != theirs["loss"]
    assert ours["tokens_seen"] == theirs["tokens_seen"]


@pytest.mark.parametrize("source", ["gone", "empty"])
def test_a_branch_that_was_stopped_resumes_from_its_own_checkpoint(trunk, tmp_path, capsys, source):
    there = shutil.copytree(trunk, tmp_path / "trunk")
    config = branched(there)
    run(config, tmp_path / "run", stop_at=6, quiet=True)
    if source == "gone":
        shutil.rmtree(there)
    else:
        config = dataclasses.replace(config, branch_from="")
    run(config, tmp_path / "run")
    assert ("no longer has the checkpoint of this run's start" in capsys.readouterr().out) == (source == "gone")
    assert rig.curve(tmp_path / "run") == rig.curve(trunk)[AT:]
    assert rig.final_hash(TRUNK, tmp_path / "run") == rig.final_hash(TRUNK, trunk)


class Crash(Hook):
    """Fails after a step."""

    def after(self, context, now):
        if now.done == AT + 2:
            raise RuntimeError("crash")


def test_a_branch_that_crashed_before_its_first_save_begins_again_at_its_step(trunk, tmp_path):
    config = branched(trunk, save_every=0)
    with pytest.raises(RuntimeError, match=r"crash"):
        run(config, tmp_path, hooks=[Crash()], quiet=True)
    assert committed(tmp_path / "checkpoints") == []
    run(config, tmp_path, quiet=True)
    assert rig.curve(tmp_path) == rig.curve(trunk)[AT:]


def test_a_branch_needs_no_trunk_to_be_evaluated(trunk, tmp_path, capsys):
    there = shutil.copytree(trunk, tmp_path / "trunk")
    run(branched(there), tmp_path / "run", stop_at=6, quiet=True)
    shutil.rmtree(there)
    evaluate.run(config_of_run(tmp_path / "run"), tmp_path / "run")
    assert "bits" in capsys.readouterr().out


# --- devices and optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [dict(data=4, expert=2), dict(replica=2)], ids=str)
def test_a_branch_begins_on_another_mesh_than_its_trunk(trunk, tmp_path, mesh):
    config = branched(trunk, mesh=dict(data=1) | mesh, balance=dict(bias_rms={}))
    state = begun(config, tmp_path).state
    there = restore_step(trunk / "checkpoints", AT, abstract_state(TRUNK))
    for name in ("step", "skipped", "stuck", "params", "optimizer", "bias"):
        assert_same_bits(getattr(state, name), getattr(there, name))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {make_mesh(config.mesh)}
    assert np.asarray(read_bias(state.bias)).any()


def test_moments_go_on_with_or_without_clipping_and_decay(trunk, tmp_path):
    config = branched(trunk, optimizer=dict(clip_norm=0.0, weight_decay=0.0))
    moments = begun(config, tmp_path).state.optimizer
    there = restore_step(trunk / "checkpoints", AT, abstract_state(TRUNK)).optimizer
    assert jax.tree.structure(moments) == jax.tree.structure(abstract_state(config).optimizer)
    assert jax.tree.structure(moments) != jax.tree.structure(there)
    assert_same_bits(jax.tree.leaves(moments), jax.tree.leaves(there))


def test_only_the_dtype_of_moments_changes_what_an_optimizer_stores():
    other = dict(learning_rate=1.0, schedule="wsd", clip_norm=0.0, weight_decay=0.0, b1=0.5, moment_dtype="bfloat16")

    def stored(name):
        changed = dataclasses.replace(TRUNK.optimizer, **({name: other[name]} if name in other else {}))
        leaves = jax.tree.leaves(abstract_state(dataclasses.replace(TRUNK, optimizer=changed)).optimizer)
        return [(leaf.shape, leaf.dtype) for leaf in leaves]

    assert [name for name in other if stored(name) != stored("")] == ["moment_dtype"]


# --- the balance ----------------------------------------------------------------------------------------------


def of(balance, **overrides):
    return tiny_config(balance=balance, **overrides)


def layers_of(config):
    """The balancer state of a trunk, in which no number is the initial one."""
    draw = np.random.default_rng(0)

    def moved(leaf):
        return leaf if leaf.dtype == bool else leaf + draw.integers(1, 9, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(moved, initial_layers(config))


def balanced(before, now):
    """(a trunk's balancer state, that of a branch, that before step 0, the printed lines) for two configs."""
    there = layers_of(before)
    bias = write_bias(abstract_model(before.model).bias, there["bias"])
    layers = {label: value for label, value in there.items() if label != "bias"}
    bias, layers = own_balance(now, before, jnp.int32(AT), bias, layers)
    return there, layers | {"bias": read_bias(bias)}, initial_layers(now), " ".join(reset_notes(now, before))


ADDED = dict(bias_sign={})
TIMES = dict(bias_multiplicative={})
THRESHOLD = dict(expert_threshold={})
LOSS = dict(aux_loss={})
KINDS = [  # trunk, branch, whether the bias goes on
    (ADDED, dict(bias_rms=dict(rate=0.5)), True),
    (dict(own=dict(method="bias_pi", gain=1.0)), dict(bias_sign=dict(rate=0.0), z_loss={}), True),
    (TIMES, dict(bias_multiplicative=dict(rate=0.5)), True),
    (THRESHOLD, dict(expert_threshold=dict(ema=0.5)), True),
    (ADDED, LOSS, False),
    (LOSS, ADDED, False),
    (TIMES, LOSS, False),
    (ADDED, TIMES, False),
    (TIMES, ADDED, False),
    (ADDED, THRESHOLD, False),
    (THRESHOLD, ADDED, False),
    (ADDED, {}, False),
]


@pytest.mark.parametrize(("before", "now", "goes_on"), KINDS, ids=str)
def test_the_bias_goes_on_between_methods_that_move_one_of_the_same_kind(before, now, goes_on):
    there, here, fresh, said = balanced(of(before), of(now))
    for name in {"bias", "direction"} & here.keys():
        assert_same_bits(here[name], (there if goes_on else fresh)[name])
    assert ("the bias begins at its initial value" in said) == (not goes_on)


@pytest.mark.parametrize("classes", [1, 2])
def test_the_bias_goes_on_in_every_module_and_for_every_class_of_tokens(classes):
    model = dict(mtp_depth=1, class_starts=(100,) if classes == 2 else ())
    before, now = (of({method: dict(num_classes=classes)}, model=model) for method in ("bias_sign", "bias_rms"))
    there, here, _, _ = balanced(before, now)
    assert here["bias"].shape == (3, *[2] * (classes - 1), 4)
    assert_same_bits(here, there)


def test_the_bias_goes_on_only_in_the_layers_in_which_a_method_moves_it():
    there, here, _, said = balanced(of(dict(bias_smebu={})), of(dict(bias_smebu=dict(layers=(1, 2)))))
    np.testing.assert_array_equal(here["bias"], [[0.0] * 4, there["bias"][1]])
    np.testing.assert_array_equal(here["direction"], [[0] * 4, there["direction"][1]])
    assert here["bias_smebu"]["active"].tolist() == [False, True]
    assert_same_bits(here["bias_smebu"]["own"], there["bias_smebu"])
    assert "in the MoE layers [0], in which no method moves it" in said


@pytest.mark.parametrize(
    ("before", "now", "is_new"),
    [
        (dict(kappa=1.0), dict(kappa=3.0), ()),
        (dict(ema=0.5, layers=(0, 1)), dict(ema=0.9), ()),
        (dict(ema=0.5), {}, ()),
        (dict(layers=(0, 1)), dict(layers=(0, 2)), ()),
        ({}, dict(ema=0.5), ("sum", "weight")),
        ({}, dict(layers=(0, 2), ema=0.5), ("sum", "weight")),
    ],
    ids=str,
)
def test_a_method_under_other_options_goes_on_with_what_it_has_learned(before, now, is_new):
    states = balanced(of(dict(bias_smebu=before)), of(dict(bias_smebu=now)))
    old, own, initial = (flat(state["bias_smebu"]) for state in states[:3])
    assert own.keys() == initial.keys()
    for name in own:
        assert_same_bits(own[name], (initial if name in ("active", *is_new) else old)[name])
    assert ("a state that is in part new" in states[3]) == bool(is_new)


def flat(state):
    """The leaves of an own state, whatever wraps it."""
    if isinstance(state, dict) and "own" in state:
        return {key: value for key, value in state.items() if key != "own"} | flat(state["own"])
    return {"": state}


def test_the_weight_of_a_loss_follows_its_own_schedule_at_the_step_of_the_branch():
    later = dict(warmup_steps=12)  # the step after five has 6 / 12 of the weight
    falling = dict(schedule="linear", freeze_step=20)  # 15 / 20 of it
    now = of(dict(aux_loss=later, z_loss=falling, other=dict(method="z_loss", freeze_step=AT, layers=(0, 1))))
    _, here, _, said = balanced(of(dict(aux_loss=dict(warmup_steps=2))), now)
    factors = [here["aux_loss"], here["z_loss"], here["other"]["own"]]
    assert [np.asarray(own["factor"]).tolist() for own in factors] == [[0.5, 0.5], [0.75, 0.75], [0.0, 0.0]]
    assert said == ""


def test_another_method_under_a_label_does_not_get_its_state():
    loss = dict(aux_loss={}, held=dict(method="target_violation"))
    there, here, _, _ = balanced(of(loss), of(loss | dict(z_loss={})))
    assert_same_bits(here["held"], there["held"])
    _, here, fresh, _ = balanced(of(loss), of(dict(held=dict(method="bias_smebu"))))
    assert_same_bits(here, fresh)


def test_a_table_of_hash_goes_on_under_any_seed_and_a_new_one_fits_the_corpus(trunk, tmp_path):
    config = branched(trunk, seed=1, balance=dict(hash={}))
    run(config, tmp_path / "first", stop_at=AT, quiet=True)  # saves what it begins with
    first = begun(config, tmp_path / "first").state.balance["hash"]["table"]
    best = balanced_table(token_frequencies(open_corpus(), 264, {}), 4, 2, seed=1)
    for layer, table in enumerate(first):
        np.testing.assert_array_equal(table, np.random.default_rng((1, layer)).permutation(4)[best])
    second = branched(tmp_path / "first", seed=2, balance=dict(hash={}, z_loss={}))
    assert_same_bits(begun(second, tmp_path / "second").state.balance["hash"]["table"], first)


# --- what is refused and said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(step=6), r"has no finished checkpoint of step 6; name another \(saved are: 5, 8"),
        (dict(trunk="nowhere"), r"nowhere has no finished checkpoint of step 5; name another \(saved are: none"),
        (dict(model=dict(gate_scale=2.5)), r"has another model .* \(there -> here: model\.gate_scale: 1\.0 -> 2\.5\)"),
        (dict(model=dict(num_layers=4)), r"has another model .*model\.num_layers: 3 -> 4"),
        (dict(model=dict(dispatch="capacity")), r"has another model .*model\.dispatch"),
        (
            dict(optimizer=dict(moment_dtype="bfloat16")),
            r"moment_dtype='bfloat16' must be that of the .*; set 'float32'",
        ),
        (dict(optimizer=dict(method="muon")), r"optimizer\.method='muon', .* must give every parameter the moments"),
        (
            dict(optimizer=dict(groups=dict(router=dict(frozen=True)))),
            r"the frozen parts must give every parameter the moments that it has in .*; set them as there",
        ),
    ],
    ids=str,
)
def test_a_trunk_that_does_not_fit_is_refused_before_the_workdir_is_claimed(trunk, tmp_path, overrides, words):
    config = branched(**(dict(trunk=trunk) | overrides))
    with pytest.raises(ValueError, match=words) as caught:
        run(config, tmp_path / "run", quiet=True)
    assert f"branch_from={config.branch_from!r}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=words):
        begun(config, tmp_path)


def test_a_speed_key_of_the_model_may_differ(trunk, tmp_path):
    assert int(begun(branched(trunk, model=dict(remat="full", unroll_layers=False)), tmp_path).state.step) == AT


def test_a_branch_in_the_workdir_of_its_trunk_is_refused(trunk):
    before = contents(trunk)
    with pytest.raises(ValueError, match=r"names the --workdir=.* of this run, which a branch must leave as it is"):
        run(branched(f"{trunk}/../{trunk.name}"), trunk, quiet=True)
    assert contents(trunk) == before


def test_a_damaged_checkpoint_is_refused_even_with_fallback(trunk, tmp_path):
    there = shutil.copytree(trunk, tmp_path / "trunk")
    rig.flip_bit(rig.data_files(there / "checkpoints" / "00000008")[-1], 7)
    config = branched(there, step=8, num_steps=9, checkpoint=dict(fallback=True))
    with pytest.raises(ValueError, match=r"branch_from=.* sha256 of the manifest. Restore the file, or name another"):
        run(config, tmp_path / "run", quiet=True)
    assert int(begun(branched(there), tmp_path / "run").state.step) == AT


def with_extra(trunk, folder, **extra):
    """A copy of the trunk whose checkpoint says something else of itself."""
    shutil.copytree(trunk, folder)
    there = folder / "checkpoints" / f"{AT:08d}"
    rig.rewrite_manifest(there, extra=read_manifest(there)["extra"] | extra)
    return folder


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (dict(weights_only=True), "holds weights only, without moments; start from them with init_from"),
        (dict(config=dict(new=1)), "has a config that this version cannot read: new is not a configuration key"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_with_the_key(trunk, tmp_path, extra, words):
    with pytest.raises(ValueError, match=r"^branch_from='[^']*' " + words):
        check_branch(branched(with_extra(trunk, tmp_path / "trunk", **extra)), tmp_path / "run")


def test_a_trunk_of_an_earlier_version_has_the_defaults_of_newer_keys(trunk, tmp_path):
    config = {key: value for key, value in as_dict(TRUNK).items() if key not in ("branch_from", "mtp_weights")}
    older = with_extra(trunk, tmp_path / "trunk", config=config)
    assert_same_bits(begun(branched(older), tmp_path).state, begun(branched(trunk), tmp_path).state)


def test_differences_to_the_trunk_are_said_in_one_line(trunk, tmp_path):
    assert not any("unlike" in line for line in begun(branched(trunk), tmp_path).remarks)
    other = branched(
        trunk, seed=3, batch_size=16, optimizer=dict(learning_rate=0.5), balance=dict(aux_loss={}, z_loss={})
    )
    (line,) = [line for line in begun(other, tmp_path).remarks if "unlike its trunk" in line]
    assert line.partition("here): ")[2] == (
        "batch_size: 8 -> 16; optimizer.learning_rate: 0.001 -> 0.5; seed: 0 -> 3; "
        "balance.bias_sign: only there; balance.z_loss: only here"
    )


# --- identity -------------------------------------------------------------------------------------------------


def files_of(workdir):
    """The files of a run, without those that each start makes."""
    return {file: found for file, found in contents(workdir).items() if file.name != ".lock"}


@pytest.fixture(scope="module")
def stopped(trunk, tmp_path_factory):
    """The workdir of a branch with a checkpoint of its own."""
    workdir = tmp_path_factory.mktemp("stopped")
    run(branched(trunk), workdir, stop_at=6, quiet=True)
    return workdir


def test_another_checkpoint_than_a_branch_began_with_is_refused(trunk, stopped, tmp_path):
    checkpoints = shutil.copytree(trunk, tmp_path / "other") / "checkpoints"
    shutil.rmtree(checkpoints / f"{AT:08d}")
    (checkpoints / "00000008").rename(checkpoints / f"{AT:08d}")
    before = files_of(stopped)
    for source in (branched(tmp_path / "other"), branched(trunk, step=4), branched(tmp_path / "gone", step=7)):
        with pytest.raises(ValueError, match=r"is another checkpoint than the run in .* began with"):
            run(source, stopped, quiet=True)
    with pytest.raises(ValueError, match=r"has other weights than the run in .* started from"):
        run(rig.drill_config(**SHORT, init_from=str(trunk)), stopped, quiet=True)
    assert files_of(stopped) == before


def test_a_run_that_began_otherwise_does_not_become_a_branch(trunk, tmp_path):
    run(TRUNK, tmp_path, stop_at=6, quiet=True)
    with pytest.raises(ValueError, match=r"is another checkpoint than the run in .* began with"):
        run(branched(trunk), tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"holds a run that began without branch_from"):
        run(branched(trunk), tmp_path, quiet=True)


def test_a_branch_without_a_checkpoint_of_its_own_does_not_begin_at_random(trunk, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ValueError, match=r"holds a run that began as a branch at step 5"):
        run(TRUNK, workdir, quiet=True)
    assert run(branched(trunk), workdir, quiet=True).step == 8
