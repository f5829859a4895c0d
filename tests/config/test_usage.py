"""Laws of `--help`: it shows a command's own flags, `--config` first with an example, and none of the libraries'."""

import re
import subprocess
import sys

import pytest
from drills import rig

# some of the flags of each command
COMMANDS = {
    "moe_jax.train": ["config", "workdir", "stop_at", "profile"],
    "moe_jax.evaluate": ["config", "workdir", "data", "specialisation"],
    "moe_jax.generate": ["workdir", "prompt", "top_p", "separator"],
    "moe_jax.harness": ["workdir", "tasks", "num_fewshot"],
    "moe_jax.describe": ["config", "compile", "num_devices"],
    "moe_jax.plan": ["config", "topology", "search"],
    "moe_jax.simulate": ["balance", "experts", "rates"],
    "moe_jax.convert": ["input", "output", "dtype"],
    "moe_jax.data.prepare": ["input", "output", "tokenizer"],
    "experiments.ablate": ["config", "workdir", "shard"],
    "experiments.report": ["output", "baseline", "figures"],
    "experiments.methods": ["folder", "seeds"],
    "experiments.cost": ["config", "methods"],
}
OF_LIBRARIES = ("--verbosity", "--logtostderr", "--pdb", "--helpxml", "--flagfile")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_commands_own_flags_and_no_others(command):
    words = [sys.executable, "-m", command, "--help"]
    done = subprocess.run(words, cwd=rig.REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    flags = re.findall(r"^  (?:-h, )?--(?:\[no\])?(\w+)", done.stdout, re.M)
    assert set(COMMANDS[command]) <= set(flags)
    assert not any(flag in done.stdout for flag in OF_LIBRARIES)
    if "config" in flags:
        assert flags[0] == "config" and "--config.optimizer.learning_rate=1e-3" in done.stdout


def test_help_marks_required_flags_and_shows_defaults():
    words = [sys.executable, "-m", "moe_jax.generate", "--help"]
    text = subprocess.run(words, cwd=rig.REPO, capture_output=True, text=True, check=True).stdout
    assert re.search(r"--workdir=TEXT .*\(required\)", text)
    assert re.search(r"--max_new_tokens=N .*\(default: 64\)", text)
