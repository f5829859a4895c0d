"""Laws of the compilation cache: on by default, overridden by the user's settings, bounded, and never ending a run."""

import os
import stat
import sys
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
    told = {}
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=SimpleNamespace(update=told.__setitem__)))
    cache.keep_compiled()
    assert told == dict(zip(map(str.lower, NAMES), [str(cache.user_folder("xla")), 0.0, -1], strict=True))


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
