"""Laws of the compilation cache: on by default, overridden by the user's settings, bounded, and never ending a run."""

import os
import stat
import sys
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
from drills import rig

from moe_jax.runtime import cache

NAMES = (cache.FOLDER, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home folder without any setting; settings are undone afterwards."""
    for name in (*NAMES, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # the jax of these tests keeps its own cache
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_it_is_on_in_the_users_cache_folder_and_keeps_every_program(home, capsys):
    cache.keep_compiled()
    folder = cache.user_folder("xla")
    assert folder.is_relative_to(home / ".cache" / "moe_jax" / "xla")
    assert [os.environ[name] for name in NAMES] == [str(folder), "0.0", "-1"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # whoever can write there can run code as the user
    assert capsys.readouterr().err == ""


def test_a_jax_that_a_config_file_has_imported_is_configured_too(home, monkeypatch):
    updated = {}
    config, alone = SimpleNamespace(update=updated.__setitem__), SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=config, distributed=alone))
    cache.keep_compiled()
    assert updated == dict(zip(map(str.lower, NAMES), [str(cache.user_folder("xla")), 0.0, -1], strict=True))


def test_xdg_cache_home_is_followed(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert cache.user_folder("xla").is_relative_to(home / "elsewhere" / "moe_jax" / "xla")


def test_settings_of_the_user_take_precedence(home, monkeypatch):
    theirs = [str(home / "mine"), "5", "1000"]
    for name, value in zip(NAMES, theirs, strict=True):
        monkeypatch.setenv(name, value)
    cache.keep_compiled()
    assert [os.environ[name] for name in NAMES] == theirs
    assert not (home / ".cache").exists()


@pytest.fixture
def of_two(home, monkeypatch):
    """One of two processes that have joined; returns what JAX would keep programs with."""
    compiler = SimpleNamespace(_cache_write=lambda *_: written.append(state.process_id))
    state, written = SimpleNamespace(process_id=1), []
    internal = SimpleNamespace(compiler=compiler, distributed=SimpleNamespace(global_state=state))
    config = SimpleNamespace(update=lambda *_: None, jax_enable_compilation_cache=True)
    jax = SimpleNamespace(_src=internal, config=config, default_backend=lambda: "cpu", written=written)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr(cache.processes, "count", lambda: 2)
    monkeypatch.setattr(cache.processes, "index", lambda: state.process_id)
    return jax


def test_several_processes_keep_their_programs_in_the_workdir(of_two, home):
    cache.keep_compiled(home / "run")
    assert os.environ[cache.FOLDER] == str(home / "run" / "xla" / cache._machine())
    assert stat.S_IMODE((home / "run" / "xla" / cache._machine()).stat().st_mode) == 0o700
    assert not (home / ".cache").exists()


def test_the_users_folder_takes_precedence_over_the_workdir(of_two, home, monkeypatch, capsys):
    monkeypatch.setenv(cache.FOLDER, str(home / "mine"))
    of_two._src.distributed.global_state.process_id = 0
    cache.keep_compiled(home / "run")
    assert not (home / "run").exists()
    assert capsys.readouterr().out == f"compiled programs are kept in {home / 'mine'}\n"


@pytest.mark.parametrize(("platform", "writer"), [("cpu", 0), ("tpu", 1), ("gpu", 1)])
def test_every_process_writes_on_cpus_and_none_but_the_first_elsewhere(of_two, home, platform, writer):
    of_two.default_backend = lambda: platform
    cache.keep_compiled(home / "run")
    of_two._src.compiler._cache_write()  # JAX returns without writing if it is not process 0
    assert of_two.written == [writer]
    assert of_two._src.distributed.global_state.process_id == 1


def test_a_cache_that_is_switched_off_is_not_announced(of_two, home, capsys):
    of_two.config.jax_enable_compilation_cache = False
    of_two._src.distributed.global_state.process_id = 0
    cache.keep_compiled(home / "run")
    assert capsys.readouterr().out == ""


def test_a_bucket_gets_programs_and_none_of_the_files_that_xla_itself_writes(of_two, monkeypatch):
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", raising=False)
    cache.keep_compiled(PurePosixPath("gs://bucket/run"))  # not a Path, as the paths of buckets
    assert os.environ[cache.FOLDER].startswith("gs:/bucket/run/xla/")
    assert os.environ.pop("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES") == "none"


def test_a_cache_folder_that_cannot_be_written_is_reported_in_one_line_and_not_used(home, monkeypatch, capsys):
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    cache.keep_compiled()
    assert cache.FOLDER not in os.environ
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept: ") and cache.FOLDER in line


def test_machines_of_other_instruction_sets_do_not_share_a_folder(home, monkeypatch):
    ours = cache.user_folder("xla")
    monkeypatch.setattr(cache, "_machine", lambda: "x86_64-00000000")
    assert cache.user_folder("xla") != ours
    assert cache.user_folder("xla").parent == ours.parent


def test_the_least_recently_used_files_are_deleted_until_the_rest_fits(tmp_path):
    # 30 bytes each; used at 1 (written at 1), 5 (written at 2) and 3 (written at 3)
    for name, (used, written) in dict(a=(1, 1), b=(5, 2), c=(3, 3)).items():
        (tmp_path / name).write_bytes(bytes(30))
        os.utime(tmp_path / name, (used, written))
    cache.prune(tmp_path, 90)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b", "c"]
    cache.prune(tmp_path, 89)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b", "c"]
    cache.prune(tmp_path, 30)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b"]


def test_a_second_start_finds_every_program_in_the_cache_and_computes_the_same_bits(home, tmp_path):
    file = rig.write_config(tmp_path / "config.py", rig.drill_config())
    rig.train(file, tmp_path / "first", "--stop_at=2")
    kept = sorted(cache.user_folder("xla").iterdir())
    assert any("train_step" in program.name for program in kept)
    rig.train(file, tmp_path / "second", "--stop_at=2")
    assert sorted(cache.user_folder("xla").iterdir()) == kept
    assert rig.curve(tmp_path / "second") == rig.curve(tmp_path / "first")
