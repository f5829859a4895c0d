"""The recipes of docs/experiments.md for engines, each in a faked environment: every run is started exactly once."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import yaml

from experiments import ablate, hyper
from experiments.planned import plan_sweep
from moe_jax.config import as_dict, validate
from moe_jax.config.command import load
from moe_jax.runtime.processes import find_cluster

# an array's task, and a pod of a Job: neither is one process of many
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture(scope="module")
def recipes(repo):
    """heading -> its block: `list` is the command that writes runs.txt."""
    text = (repo / "docs" / "experiments.md").read_text()
    section = text.partition("## On many machines\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^(A file of commands|\*\*(?:\w+)\*\*).*?^```\w+\n(.*?)^```$", section, re.DOTALL | re.M)
    return {heading.strip("*"): block for heading, block in blocks}


@pytest.fixture
def commands(repo, recipes, tmp_path, monkeypatch):
    """runs.txt of the demo in the working directory, which is on PATH with a `python` that records its arguments."""
    words = shlex.split(recipes["A file of commands"].partition(">")[0])
    monkeypatch.setattr(sys, "argv", words[2:])
    source = load(repo / "configs" / "ablation" / "demo.py")
    sweep = plan_sweep(source, as_dict(validate(source.get_config())), source.get_hyper(hyper), tmp_path / "sweep")
    lines = ablate._commands(sweep, tmp_path / "sweep")
    (tmp_path / "runs.txt").write_text("\n".join(lines) + "\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "python $*" >> "{tmp_path / "started"}"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert words[-1] == "--list" and len(lines) == 9
    return lines


def started(folder) -> list[str]:
    return (folder / "started").read_text().splitlines()


def run(command: Sequence[str], environ: dict[str, str]) -> None:
    assert find_cluster(environ) is None
    subprocess.run(command, env=os.environ | environ, check=True)


def test_every_engine_has_a_recipe(recipes):
    assert list(recipes) == ["A file of commands", "Slurm", "Kubernetes", "JobSet", "Ray"]


def test_the_tasks_of_a_slurm_array_start_every_run_once(recipes, commands, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(recipes["Slurm"])
    for task in range(1, len(commands) + 1):
        run(["bash", str(script)], SLURM | {"SLURM_ARRAY_TASK_ID": str(task)})
    assert started(tmp_path) == commands


def test_the_indices_of_a_kubernetes_job_start_every_run_once(recipes, commands, tmp_path):
    spec = yaml.safe_load(recipes["Kubernetes"])["spec"]
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", len(commands))
    (container,) = spec["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    assert [volume["name"] for volume in spec["template"]["spec"]["volumes"]] == [mount["name"]]
    command = [word.replace(mount["mountPath"], str(tmp_path)) for word in container["command"]]
    for index in range(spec["completions"]):
        run(command, POD | {"JOB_COMPLETION_INDEX": str(index)})
    assert started(tmp_path) == commands


def test_the_pods_of_a_jobset_claim_runs(recipes, commands, tmp_path):
    (job,) = yaml.safe_load(recipes["JobSet"])["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    for index in range(spec["completions"]):
        run(container["command"], POD | {"JOB_COMPLETION_INDEX": str(index)})
    assert len(started(tmp_path)) == 8
    (command,) = set(started(tmp_path))
    assert shlex.split(command)[-1] == "--claim"
    assert shlex.split(command)[:3] == shlex.split(commands[0])[:3]


def test_the_tasks_of_ray_start_every_run_once(recipes, commands, tmp_path, monkeypatch):
    def remote(**_):
        return lambda function: SimpleNamespace(remote=function)

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=remote, get=list))
    (tmp_path / "with_ray.py").write_text(recipes["Ray"])
    runpy.run_path(str(tmp_path / "with_ray.py"))
    assert started(tmp_path) == commands


def test_the_image_has_what_it_installs(repo):
    lines = [line.split() for line in (repo / "Dockerfile").read_text().splitlines()]
    copied = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    assert all((repo / name).exists() for name in copied)
    ignored = (repo / ".dockerignore").read_text().splitlines()
    assert [line[1:] for line in ignored if line.startswith("!")] == copied
    extras = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\n", (repo / "pyproject.toml").read_text(), re.S)
    named = re.findall(r"EXTRAS=(\S+)", (repo / "Dockerfile").read_text())
    assert len(named) == 3
    for name in {extra for text in named for extra in text.split(",")}:
        assert re.search(rf"^{name} = \[", extras[1], re.M)
