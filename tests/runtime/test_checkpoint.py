"""Laws of checkpoints: a finished save is restored bit by bit; a damaged or foreign one is never trained on."""

import json
import os
import random
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drills import rig
from state_hash import state_hash

from moe_jax.config import as_dict, validate
from moe_jax.data import open_corpus, training_batches
from moe_jax.runtime import checkpoint, slices
from moe_jax.runtime import leaves as leaves_
from moe_jax.runtime import manifest as manifest_
from moe_jax.runtime.checkpoint import Checkpointer, committed, restore
from moe_jax.runtime.manifest import MANIFEST, check
from moe_jax.training import compile
from moe_jax.training.compile import make_train_step
from moe_jax.training.loop import run
from moe_jax.training.state import abstract_state, init_state, step_key

CONFIG = rig.drill_config(checkpoint=dict(keep=10))
CORRUPTIONS = 10


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run stopped at step 10, with checkpoints at 5 and 10."""
    return rig.made_once(tmp_path_factory, "saved", lambda folder: run(CONFIG, folder, stop_at=10, quiet=True))


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of that run, to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def small_state(step=0):
    """Any pytree of arrays will do."""
    return {"step": jnp.int32(step), "weights": jnp.arange(6.0).reshape(2, 3) + step}


def save_small(directory, *steps, keep=10):
    checkpoints = Checkpointer(directory, keep)
    for n in steps:
        checkpoints.save(n, small_state(n), {})
    checkpoints.close()


# --- a save is restored ---------------------------------------------------------------------------------------


def test_a_state_comes_back_bit_by_bit(tmp_path):
    state = init_state(CONFIG)
    # a different value in each field, so that a restore that mixes fields up is noticed
    state = state._replace(step=jnp.int32(7), skipped=jnp.int32(2), stuck=jnp.int32(1))
    checkpoints = Checkpointer(tmp_path, 1)
    checkpoints.save(7, state, {"tokens_seen": 3})
    checkpoints.close()
    back, extra = restore(tmp_path, abstract_state(CONFIG))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert (int(back.step), int(back.skipped), int(back.stuck)) == (7, 2, 1)
    assert state_hash(back) == state_hash(state)
    assert extra == {"tokens_seen": 3}


def test_restored_leaves_have_the_targets_paths_shapes_and_dtypes(saved):
    state, _ = restore(saved / "checkpoints", abstract_state(CONFIG))
    assert leaves_.describe_leaves(state) == leaves_.describe_leaves(abstract_state(CONFIG))


def test_the_moments_and_the_bias_are_in_the_checkpoint(saved):
    leaves = json.loads((saved / "checkpoints" / "00000010" / MANIFEST).read_text())["leaves"]
    for field in ("params", "optimizer", "bias", "step", "skipped", "stuck"):
        assert any(name.split("/")[0] == field for name in leaves), field
    state, _ = restore(saved / "checkpoints", abstract_state(CONFIG))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(state.bias))


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path / "nothing", abstract_state(CONFIG)) is None


def test_the_checkpoint_holds_config_and_versions(saved):
    _, extra = restore(saved / "checkpoints", abstract_state(CONFIG))
    assert extra["config"] == as_dict(CONFIG)
    assert extra["tokens_seen"] == 10 * 8 * 16
    assert {"jax", "orbax-checkpoint"} <= extra["versions"].keys()


def test_the_state_hash_sees_one_bit_of_any_leaf():
    state = init_state(CONFIG)
    before = state_hash(state)
    leaves, structure = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        array = jax.device_get(leaf).copy()
        array.reshape(-1).view("uint32")[0] ^= 1
        changed = jax.tree.unflatten(structure, [*leaves[:i], array, *leaves[i + 1 :]])
        assert state_hash(changed) != before


@pytest.mark.parametrize("name", ["lr=[1e-3]", "a[b", "**", "50%20", "#1", "a?b", "ü 模型", "a:b", "tests"])
def test_checkpoints_can_be_written_and_read_in_a_folder_of_any_name(tmp_path, name):
    # Orbax interprets the folder as a pattern, tensorstore the path as a quoted URL
    save_small(tmp_path / name, 3)
    state, target = small_state(3), jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), small_state())
    back, _ = restore(tmp_path / name, target)
    assert state_hash(back) == state_hash(state)
    _, arrays = slices.open_newest(tmp_path / name, target)
    assert (arrays["weights"].read(()) == state["weights"]).all()


def test_a_checkpoint_whose_leaves_cannot_be_opened_is_not_committed(tmp_path):
    # to tensorstore a\\b is a/b, so it writes outside the checkpoint
    with pytest.raises(ValueError, match=r"00000001 cannot be read"):
        save_small(tmp_path / "a\\b", 1)
    assert committed(tmp_path / "a\\b") == []


def half(name):
    """Weights with a slice that was never written, or does not match its record."""
    return {"params": {"experts": jax.ShapeDtypeStruct((2, 3) if name == "slice" else (2, 4), jnp.float32)}, "bias": {}}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("slice", "of params/experts 1 of 2 chunks are stored"),
        ("shape", r"float32\[2, 3\] and should be float32\[2, 4\]"),
    ],
)
def test_a_checkpoint_that_does_not_match_its_record_is_not_committed(tmp_path, what, words):
    path = tmp_path / "00000000"
    arrays = slices.create(path, half("slice"), lambda leaf: 1)
    arrays["params/experts"].write((0,), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=words):
        slices.commit(path, half(what), {})
    assert committed(tmp_path) == []


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_state_that_is_not_finite_is_not_saved_and_the_one_before_stays(tmp_path, value):
    save_small(tmp_path, 1)
    bad = small_state(2)
    checkpoints = Checkpointer(tmp_path, 1)
    with pytest.raises(
        FloatingPointError, match=r"^weights is not finite after 2 steps: .*00000002 was not written\.$"
    ):
        checkpoints.save(2, bad | {"weights": bad["weights"].at[1, 1].set(value)}, {})
    checkpoints.close()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["00000001"]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    arrays = slices.create(tmp_path / "00000000", half("slice"), lambda leaf: 1)
    with pytest.raises(ValueError, match="params/experts is not finite"):
        arrays["params/experts"].write((0,), np.array([0, np.nan, 0], np.float32))


def test_no_run_resumes_from_a_checkpoint_that_is_not_finite(tmp_path, monkeypatch, capsys):
    save_small(tmp_path, 1)
    with monkeypatch.context() as before:  # as an older version saved them
        before.setattr(checkpoint, "first_non_finite", lambda _: None)
        checkpoints = Checkpointer(tmp_path, 10)
        checkpoints.save(2, small_state(2) | {"weights": jnp.full((2, 3), jnp.nan)}, {})
        checkpoints.close()
    with pytest.raises(ValueError, match=r"weights is not finite.*Set checkpoint\.fallback=True to resume from step 1"):
        restore(tmp_path, small_state())
    assert int(restore(tmp_path, small_state(), fallback=True)[0]["step"]) == 1
    assert "weights is not finite" in capsys.readouterr().out


def test_keep_leaves_the_newest(tmp_path):
    save_small(tmp_path, 1, 2, 3, 4, keep=2)
    assert committed(tmp_path) == [3, 4]


def test_keep_one_never_leaves_less_than_one(tmp_path, monkeypatch):
    seen = []
    original = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        seen.append(committed(tmp_path))
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save_small(tmp_path, 1, 2, 3, keep=1)
    assert len(seen) == 2
    assert all(seen)


def test_every_save_holds_the_state_of_its_step_while_the_next_steps_reuse_its_buffers(tmp_path, monkeypatch):
    hashes = {}
    real = compile.make_train_step

    def make(config, mesh=None):
        def train_step(state, batch, key):
            state, values = real(config, mesh)(state, batch, key)
            hashes[int(state.step)] = state_hash(jax.tree.map(jnp.copy, state))
            return state, values

        return train_step

    monkeypatch.setattr(compile, "make_train_step", make)
    config = rig.drill_config(save_every=1, checkpoint=dict(keep=20))
    run(config, tmp_path, stop_at=10, quiet=True)
    directory = tmp_path / "checkpoints"
    assert committed(directory) == list(range(1, 11))
    for n in committed(directory):
        only = tmp_path / f"only{n}"
        only.mkdir()
        shutil.copytree(directory / f"{n:08d}", only / f"{n:08d}")
        assert state_hash(restore(only, abstract_state(config))[0]) == hashes[n]


# --- saves that were killed -----------------------------------------------------------------------------------


LEFTOVERS = {
    "00000015.orbax-checkpoint-tmp": ["_METADATA", "ocdbt.process_0/d/half"],  # killed while writing arrays
    "00000015.orbax-checkpoint-tmp-1732237000": [],  # right after mkdir, as other Orbax versions name it
    "00000015": ["_METADATA", "d/array"],  # after the rename, before the manifest
    "00000020": ["_METADATA", "manifest.json.tmp"],  # before the manifest's rename
}


def leave_behind(directory):
    for folder, files in LEFTOVERS.items():
        (directory / folder).mkdir()
        for name in files:
            (directory / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / folder / name).write_text("half")


def test_a_killed_save_is_never_restored(workdir):
    directory = workdir / "checkpoints"
    leave_behind(directory)
    assert committed(directory) == [5, 10]
    assert int(restore(directory, abstract_state(CONFIG))[0].step) == 10


def test_the_next_run_removes_what_killed_saves_left(workdir):
    directory = workdir / "checkpoints"
    leave_behind(directory)
    Checkpointer(directory, 10).close()
    assert rig.folders(workdir) == ["00000005", "00000010"]


def test_a_step_whose_save_was_killed_is_saved_again(workdir):
    leave_behind(workdir / "checkpoints")
    run(CONFIG, workdir, quiet=True)
    assert committed(workdir / "checkpoints") == [5, 10, 15, 20]
    for n in (15, 20):
        check(workdir / "checkpoints" / f"{n:08d}", "full")


def test_only_what_a_save_made_is_deleted(workdir):
    directory = workdir / "checkpoints"
    for name in ("notes", "00000007.backup", "best", "000000070", "7"):
        (directory / name).mkdir()
    (directory / "00000099").write_text("a file, not a folder")
    elsewhere = workdir / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    before = rig.folders(workdir)
    Checkpointer(directory, 10).close()
    assert rig.folders(workdir) == before
    assert (elsewhere / "precious").is_file()


def test_a_link_in_the_folder_is_neither_followed_nor_deleted(workdir):
    elsewhere = workdir / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (workdir / "checkpoints" / "00000012").symlink_to(elsewhere)
    Checkpointer(workdir / "checkpoints", 10).close()
    assert (elsewhere / "precious").read_text() == "mine"
    assert (workdir / "checkpoints" / "00000012").is_symlink()


def test_a_removal_that_was_killed_leaves_no_checkpoint_that_looks_finished(tmp_path, monkeypatch):
    # keep=1: the save of step 2 removes step 1, and dies after the first file it deletes
    removed, real = [], os.unlink

    def unlink(path, *args, **kwargs):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        real(path, *args, **kwargs)

    save_small(tmp_path, 1)
    checkpoints = Checkpointer(tmp_path, 1)
    checkpoints.save(2, small_state(2), {})
    checkpoints._orbax.wait_until_finished()
    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.close()
    monkeypatch.undo()
    for n in committed(tmp_path):
        check(tmp_path / f"{n:08d}", "full")


# --- background failures --------------------------------------------------------------------------------------


def no_space(path, *_):
    raise OSError(28, "No space left on device", str(path))


def test_a_failed_background_save_surfaces_at_the_next_save(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "write_manifest", no_space)
    checkpoints.save(1, small_state(1), {})
    with pytest.raises(OSError, match=r"No space left on device.*00000001"):
        checkpoints.save(2, small_state(2), {})
    checkpoints.close()


def test_a_failed_background_save_surfaces_at_close(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "write_manifest", no_space)
    checkpoints.save(1, small_state(1), {})
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.close()


def test_a_failure_while_arrays_are_written_surfaces(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path, 2)

    def fail():
        if threading.current_thread().name.startswith("checkpoint"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", fail)
    checkpoints.save(1, small_state(1), {})
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
    assert committed(tmp_path) == []


def test_after_a_failed_save_the_one_before_restores(workdir, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_manifest", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        run(CONFIG, workdir, quiet=True)
    monkeypatch.undo()
    assert int(rig.restored(CONFIG, workdir).step) == 10
    run(CONFIG, workdir, quiet=True)
    assert committed(workdir / "checkpoints") == [5, 10, 15, 20]


def test_no_step_is_trained_more_than_one_save_after_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_manifest", no_space)
    with pytest.raises(OSError, match="No space"):
        run(CONFIG, tmp_path, quiet=True)  # the save at 5 fails, which the save at 10 reports
    assert rig.steps_logged(tmp_path) <= 10


# --- another state --------------------------------------------------------------------------------------------


MUTATIONS = {
    "fewer layers": dict(model=dict(num_layers=2)),
    "more layers": dict(model=dict(num_layers=5)),
    "twice the experts": dict(model=dict(num_experts=8)),
    "a shared expert more": dict(model=dict(num_shared_experts=2)),
    "another width": dict(model=dict(embed_dim=32)),
    "tied embeddings": dict(model=dict(tied_embeddings=True)),
    "normalised queries": dict(model=dict(qk_norm="head")),
    "no dense layer": dict(model=dict(first_dense=0)),
    "moments of another dtype": dict(optimizer=dict(moment_dtype="bfloat16")),
    "parameters of another dtype": dict(model=dict(param_dtype="bfloat16")),
    "an optimizer without clipping": dict(optimizer=dict(clip_norm=0.0)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_checkpoint_of_another_state_is_refused(saved, name):
    other = rig.drill_config(**MUTATIONS[name])
    with pytest.raises(ValueError, match=r"leaves? differ") as caught:
        restore(saved / "checkpoints", abstract_state(other))
    path, *lines = str(caught.value).splitlines()
    assert "00000010" in path
    wanted = leaves_.describe_leaves(abstract_state(other))
    there = leaves_.describe_leaves(abstract_state(CONFIG))
    for line in lines[:8]:
        leaf, _, rest = line.strip().partition(": saved ")
        assert leaf in wanted or leaf in there
        assert leaves_.leaf_text(there.get(leaf)) == rest.partition(", wanted ")[0]
        assert leaves_.leaf_text(wanted.get(leaf)) == rest.partition(", wanted ")[2]


def test_a_checkpoint_of_another_balancer_state_is_refused(saved):
    target = abstract_state(CONFIG)
    target = target._replace(balance={"average": {"loads": jax.ShapeDtypeStruct((2, 4), jnp.float32)}})
    with pytest.raises(ValueError, match="balance/average/loads: saved nothing, wanted float32"):
        restore(saved / "checkpoints", target)


def test_a_checkpoint_without_bias_is_refused(saved):
    target = abstract_state(CONFIG)._replace(bias={})
    with pytest.raises(ValueError, match=r"bias/.*: saved float32\[2, 4\], wanted nothing"):
        restore(saved / "checkpoints", target)


def test_another_state_is_refused_before_the_first_step(workdir, monkeypatch):
    (workdir / "config.json").unlink()
    monkeypatch.setattr(compile, "make_train_step", lambda *_: pytest.fail("a step was made"))
    before = sorted(workdir.rglob("*"))
    with pytest.raises(ValueError, match="another state"):
        run(rig.drill_config(model=dict(num_experts=8)), workdir, quiet=True)
    assert set(before) <= set(workdir.rglob("*"))


# --- corruption -----------------------------------------------------------------------------------------------


def newest(workdir):
    return workdir / "checkpoints" / "00000010"


@pytest.mark.parametrize("seed", range(CORRUPTIONS))
def test_one_flipped_bit_is_detected_and_its_file_named(workdir, seed):
    draw = random.Random(seed)
    file = draw.choice([f for f in rig.data_files(newest(workdir)) if f.stat().st_size])
    rig.flip_bit(file, draw.randrange(10**9))
    with pytest.raises(ValueError, match=f"00000010: .*{file.name}"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, zero, empty, os.remove])
def test_damage_to_any_file_is_detected_and_named(workdir, damage):
    for file in rig.data_files(newest(workdir)):
        original = file.read_bytes()
        if not original:
            continue
        damage(file)
        with pytest.raises(ValueError, match=f"00000010: .*{file.name}"):
            check(newest(workdir))
        file.write_bytes(original)
    check(newest(workdir))


def test_an_extra_file_is_detected_and_named(workdir):
    (newest(workdir) / "d" / "guest").write_text("hello")
    assert manifest_.other_files(newest(workdir), check(newest(workdir))) == ["d/guest"]


STRAYS = [
    ".DS_Store",
    "d/.DS_Store",
    "ocdbt.process_0/.nfs000000012",
    "Thumbs.db",
    "d/._0",
    "x.txt",
]


@pytest.mark.parametrize("name", STRAYS)
def test_a_foreign_file_in_a_checkpoint_is_ignored_and_named(workdir, name, capsys):
    (newest(workdir) / name).write_text("hello")
    assert run(CONFIG, workdir, stop_at=12, quiet=True).step == 12
    assert f"ignoring files that are not in the manifest of {newest(workdir)}: {name}\n" in capsys.readouterr().out
    assert (newest(workdir) / name).read_text() == "hello"


def test_files_of_a_file_browser_are_not_part_of_the_checkpoint_being_written(tmp_path, monkeypatch):
    real = manifest_.hash_files

    def hash_files(path, process):
        (path / ".nfs000000012").write_text("gone a moment later")
        return real(path, process)

    monkeypatch.setattr(manifest_, "hash_files", hash_files)
    save_small(tmp_path, 1)
    (tmp_path / "00000001" / ".nfs000000012").unlink()
    check(tmp_path / "00000001", "full")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"sha256": 3}'])
def test_a_broken_manifest_is_detected(workdir, text):
    (newest(workdir) / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"00000010: manifest\.json is damaged"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


def test_an_altered_manifest_is_detected(workdir):
    file = newest(workdir) / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["extra"]["tokens_seen"] += 1
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


def test_sizes_alone_see_truncation_and_not_a_flipped_bit(workdir):
    file = max(rig.data_files(newest(workdir)), key=lambda f: f.stat().st_size)
    rig.flip_bit(file, 1000)
    check(newest(workdir), "sizes")
    cut(file)
    with pytest.raises(ValueError, match=f"{file.name} has"):
        check(newest(workdir), "sizes")


def test_damage_is_reported_before_the_first_step_with_a_remedy(workdir, monkeypatch):
    rig.flip_bit(rig.data_files(newest(workdir))[-1], 99)
    monkeypatch.setattr(compile, "make_train_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=r"Set checkpoint\.fallback=True to resume from step 5"):
        run(CONFIG, workdir, quiet=True)


def test_damage_to_the_only_checkpoint_is_reported_as_such(workdir):
    shutil.rmtree(workdir / "checkpoints" / "00000005")
    rig.flip_bit(rig.data_files(newest(workdir))[-1], 99)
    for fallback, words in (
        (False, "There is no older checkpoint: restore the file, or"),
        (True, "no sound checkpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            restore(workdir / "checkpoints", abstract_state(CONFIG), fallback=fallback)


def test_fallback_resumes_from_the_checkpoint_before_and_reports_it(workdir, capsys):
    file = rig.data_files(newest(workdir))[-1]
    rig.flip_bit(file, 99)
    state, extra = restore(workdir / "checkpoints", abstract_state(CONFIG), fallback=True)
    assert int(state.step) == 5
    assert extra["tokens_seen"] == 5 * 8 * 16
    warning = capsys.readouterr().out
    assert "warning" in warning
    assert file.name in warning
    assert "from step 5" in warning


def test_the_advice_to_set_fallback_can_be_followed(workdir, capsys):
    # the same command with --config.checkpoint.fallback=True, in the same workdir
    rig.flip_bit(rig.data_files(newest(workdir))[-1], 99)
    config = rig.drill_config(checkpoint=dict(keep=10, fallback=True))
    run(config, workdir, quiet=True)
    assert "resuming from step 5" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_renamed_unchanged_when_a_run_falls_back(workdir, capsys):
    # only reading all bytes detects the damage, and a save compares sizes
    config = rig.drill_config(checkpoint=dict(keep=10, fallback=True, verify="full"))
    file = rig.data_files(newest(workdir))[-1]
    rig.flip_bit(file, 99)
    damaged = {f.relative_to(newest(workdir)): f.read_bytes() for f in rig.data_files(newest(workdir))}
    run(config, workdir, stop_at=12, quiet=True)
    assert "because it is damaged" in capsys.readouterr().out
    assert rig.folders(workdir) == ["00000005", "00000010", "00000010.damaged", "00000012"]
    aside = workdir / "checkpoints" / "00000010.damaged"
    assert {f.relative_to(aside): f.read_bytes() for f in rig.data_files(aside)} == damaged
    check(newest(workdir), "full")


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path):
    config = rig.drill_config(checkpoint=dict(keep=10, fallback=True))
    run(config, tmp_path, stop_at=10, quiet=True)
    rig.flip_bit(rig.data_files(newest(tmp_path))[-1], 99)
    run(config, tmp_path, stop_at=12, quiet=True)
    assert committed(tmp_path / "checkpoints") == [5, 10, 12]
    for n in (5, 10, 12):
        check(tmp_path / "checkpoints" / f"{n:08d}", "full")


def test_a_run_that_fell_back_ends_with_a_sound_checkpoint_of_its_last_step(tmp_path):
    config = rig.drill_config(checkpoint=dict(keep=10, fallback=True))
    run(config, tmp_path, quiet=True)
    last = tmp_path / "checkpoints" / "00000020"
    rig.flip_bit(rig.data_files(last)[-1], 99)
    run(config, tmp_path, quiet=True)
    check(last, "full")
    assert [r["step"] for r in rig.curve(tmp_path)] == list(range(20))


# --- hostile checkpoints --------------------------------------------------------------------------------------


def test_a_link_inside_a_checkpoint_is_refused(workdir):
    file = rig.data_files(newest(workdir))[-1]
    outside = workdir / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{file.name} is a symbolic link"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


def test_a_linked_folder_inside_a_checkpoint_is_refused(workdir):
    (newest(workdir) / "d").rename(workdir / "outside")
    (newest(workdir) / "d").symlink_to(workdir / "outside")
    with pytest.raises(ValueError, match="d is a symbolic link"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


@pytest.mark.parametrize("name", ["../../config.json", "/etc/passwd"])
def test_a_manifest_cannot_name_files_outside_its_folder(workdir, name):
    manifest = json.loads((newest(workdir) / MANIFEST).read_text())
    rig.rewrite_manifest(newest(workdir), files=manifest["files"] | {name: [1, "0"]})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


def test_a_huge_shape_in_the_manifest_is_refused_without_allocating_it(workdir):
    leaves = json.loads((newest(workdir) / MANIFEST).read_text())["leaves"]
    leaves["params/embedding"] = [[2**40, 2**20], "float32"]
    rig.rewrite_manifest(newest(workdir), leaves=leaves)
    with pytest.raises(ValueError, match=r"params/embedding: saved float32\[1099511627776, 1048576\]"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


@pytest.mark.parametrize("key", ["files", "leaves", "extra"])
def test_a_manifest_of_the_wrong_form_is_refused(workdir, key):
    rig.rewrite_manifest(newest(workdir), **{key: "hello"})
    with pytest.raises(ValueError, match=r"00000010"):
        restore(workdir / "checkpoints", abstract_state(CONFIG))


def test_a_python_pickle_in_a_checkpoint_is_ignored(workdir, capsys):
    (newest(workdir) / "state.pkl").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    assert int(rig.restored(CONFIG, workdir).step) == 10
    assert "state.pkl" in capsys.readouterr().out


# --- a run under way ------------------------------------------------------------------------------------------


def overtaken(monkeypatch, directory, name, times):
    """The run saves another step, and thereby removes the checkpoint that `checkpoint.<name>` is about to read."""
    real, left = getattr(checkpoint, name), list(range(times))

    def read(path, *args, **kwargs):
        if left:
            left.pop()
            save_small(directory, int(path.name) + 1, keep=1)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, name, read)


@pytest.mark.parametrize("name", ["_read", "check"])
def test_when_the_run_removes_the_checkpoint_being_read_a_newer_one_is_read(tmp_path, monkeypatch, name):
    save_small(tmp_path, 1)
    overtaken(monkeypatch, tmp_path, name, 3)
    assert int(restore(tmp_path, small_state())[0]["step"]) == 4


def test_a_run_that_removes_checkpoints_faster_than_they_can_be_read_is_reported(tmp_path, monkeypatch):
    save_small(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "MOST_REMOVED", 2)
    overtaken(monkeypatch, tmp_path, "_read", 9)
    with pytest.raises(ValueError, match=r"faster than they can be read; raise its checkpoint\.keep"):
        restore(tmp_path, small_state())


def test_slices_of_a_checkpoint_that_its_run_removes_raise_a_clear_error(tmp_path):
    state = {"weights": jnp.arange(1e6)}  # too large to be stored in the index
    checkpoints = Checkpointer(tmp_path, 1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    _, arrays = slices.open_newest(tmp_path, state)
    checkpoints.save(2, state, {})
    checkpoints.close()
    with pytest.raises(ValueError, match=r"00000001 was removed by its run while it was read"):
        arrays["weights"].read(())


# --- moved checkpoints ----------------------------------------------------------------------------------------


PLACES = ["copied", "with spaces and ünïcödé 模型", "deep/er/still"]


@pytest.mark.parametrize("place", PLACES)
def test_a_copied_checkpoint_restores(saved, tmp_path, place):
    there = shutil.copytree(saved, tmp_path / place)
    assert rig.final_hash(CONFIG, there) == rig.final_hash(CONFIG, saved)


def test_a_run_resumes_from_a_relative_path_with_a_trailing_slash(workdir, monkeypatch):
    monkeypatch.chdir(workdir.parent)
    outcome = run(CONFIG, type(workdir)("./run/"), stop_at=12, quiet=True)
    assert outcome.step == 12
    assert committed(workdir / "checkpoints") == [5, 10, 12]


def test_a_run_resumes_through_a_link_to_its_workdir(workdir):
    link = workdir.parent / "link"
    link.symlink_to(workdir)
    assert run(CONFIG, link, stop_at=12, quiet=True).step == 12
    assert committed(workdir / "checkpoints") == [5, 10, 12]


def test_a_read_only_checkpoint_restores(workdir):
    for path in [*newest(workdir).rglob("*"), newest(workdir)]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert int(rig.restored(CONFIG, workdir).step) == 10
    finally:
        newest(workdir).chmod(0o755)
        for path in newest(workdir).rglob("*"):
            path.chmod(0o755)


# --- a restored state trains ----------------------------------------------------------------------------------


def test_the_restored_buffers_are_donated_to_the_next_step(saved):
    state, _ = restore(saved / "checkpoints", abstract_state(CONFIG))
    corpus = open_corpus()
    batch = training_batches(corpus, seed=0, batch_size=8, sequence_length=16)(10)
    leaves = jax.tree.leaves(state)
    make_train_step(CONFIG)(state, batch, step_key(CONFIG))
    assert all(leaf.is_deleted() for leaf in leaves)


def test_the_config_in_a_checkpoint_is_a_config(saved):
    _, extra = restore(saved / "checkpoints", abstract_state(CONFIG))
    assert validate(extra["config"]) == CONFIG
