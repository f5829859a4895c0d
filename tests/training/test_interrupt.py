"""Ctrl-C ends every command with one line and status 130, from its first import on."""

import os
import subprocess
import sys

import pytest
from drills import rig

from conftest import HANG_SECONDS

# Python runs this before anything else: Ctrl-C is pressed when the command first imports one of two libraries
CUSTOM = """
import signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("absl", "numpy"):
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""
COMMANDS = [f"moe_jax.{name}" for name in "train evaluate generate harness describe plan simulate convert".split()]
COMMANDS += ["moe_jax.data.prepare", "moe_jax.data.embedded.build"]
COMMANDS += [f"experiments.{name}" for name in "ablate report methods cost corpus".split()]


def interrupted(tmp_path, *command):
    (tmp_path / "sitecustomize.py").write_text(CUSTOM)
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{rig.REPO}"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=rig.REPO,
        env=environ,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_a_command_is_imported_prints_one_line(tmp_path, name):
    ended = interrupted(tmp_path, "-m", name)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_a_program_that_imports_the_package_keeps_its_own_handling(tmp_path):
    ended = interrupted(tmp_path, "-c", "import moe_jax, numpy")
    assert "KeyboardInterrupt" in ended.stderr and "interrupted" not in ended.stderr
