"""Huge pages: a command restarts itself once to get them, and only where they have to be requested."""

import os
import subprocess
import sys

import pytest

from moe_jax.runtime import memory

COMMAND = """
import os, sys
from pathlib import Path
from moe_jax.runtime import memory
memory.HUGE_PAGES = Path(sys.argv[1])
print(os.environ.get("GLIBC_TUNABLES", "none"), sys.argv[2:], "jax" in sys.modules)
memory.use_huge_pages()
print("done", sys.stdin.read())
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(kernel's setting, environment) -> the lines of a command, which restarts where it asks for huge pages."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def run(kernel, **environment):
        (tmp_path / "enabled").write_text(kernel)
        command = [sys.executable, "-c", COMMAND, str(tmp_path / "enabled"), "--a=b c"]
        done = subprocess.run(
            command, env=os.environ | environment, input="in", capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    return run


def test_a_command_restarts_once_with_its_arguments_and_its_input(run, monkeypatch):
    first, again, last = run("always [madvise] never\n", JAX_PLATFORMS="cpu")
    assert first == "none ['--a=b c'] False"
    assert again == "glibc.malloc.hugetlb=1 ['--a=b c'] False"
    assert last == "done in"


def test_settings_of_the_user_stay(run):
    assert run("[madvise]", JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.check=0")[1].startswith(
        "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    )
    assert len(run("[madvise]", JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")) == 2


def test_a_process_of_another_program_is_not_restarted(monkeypatch):
    # a notebook that runs a command sets sys.argv; a program that calls one has threads of its own
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ipykernel_launcher", "-f", "kernel.json"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=tiny"])
    assert not memory._is_own_process()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "moe_jax.train", "--config=tiny"])
    monkeypatch.setattr(memory.threading, "active_count", lambda: 1)
    assert memory._is_own_process()
    monkeypatch.setattr(memory.threading, "active_count", lambda: 2)
    assert not memory._is_own_process()


@pytest.mark.parametrize("kernel", ["[always] madvise never", "always madvise [never]"])
def test_a_kernel_that_gives_huge_pages_unasked_or_never_is_not_asked(run, kernel):
    assert len(run(kernel, JAX_PLATFORMS="cpu")) == 2


def test_a_host_of_accelerators_is_left_alone(run, tmp_path, monkeypatch):
    assert len(run("[madvise]", JAX_PLATFORMS="tpu")) == 2
    monkeypatch.setattr(memory, "ACCELERATORS", ("null",))  # a file that every /dev has
    assert not memory._computes()
