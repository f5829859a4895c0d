"""An installed wheel has every command and every config; an installed clone provides no module except moe_jax."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="builds the package: pip install 'moe_jax[dev]'")

SWEEP = """
from moe_jax.config import default

def get_config(arg=""):
    small = dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, ffw_dim=16)
    experts = dict(num_experts=4, top_k=2, expert_ffw_dim=8)
    run = dict(num_steps=2, batch_size=8, sequence_length=16, eval_every=0, save_every=0)
    return default(**run, data=dict(eval_sequences=2), model=small | experts)

def get_hyper(h):
    return h.product(h.arms(alone={}), h.sweep("seed", range(2)))
"""


def build(repo, folder, kind):
    """A wheel of this tree, "standard" or "editable"."""
    call = f"from hatchling.build import *; build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", call.replace("standard", "wheel")], cwd=repo, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(repo, tmp_path_factory):
    return build(repo, tmp_path_factory.mktemp("wheel"), "standard")


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel and with the dependencies of this interpreter.

    The environment is inside the repository of another project, as environments usually are.
    """
    project = tmp_path_factory.mktemp("project")
    somebody = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "--quiet"], [*somebody, "commit", "--quiet", "--allow-empty", "--message=theirs"]):
        subprocess.run(["git", *command], cwd=project, check=True)
    folder = project / ".venv"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)  # what pip does with a wheel of Python files
    theirs = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(theirs))
    return folder / "bin" / "python"


def names(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_config_and_every_module_of_sweeps(wheel, repo):
    there = names(wheel)
    wanted = [*repo.glob("configs/**/*.py"), *repo.glob("experiments/*.py")]
    wanted += [*repo.glob("experiments/report/*.*"), *repo.glob("experiments/corpus/*.py")]
    wanted += [*repo.glob("experiments/statistics/*.py"), *repo.glob("experiments/study/*.py")]
    assert len(wanted) > 20
    assert {f"moe_jax/{file.relative_to(repo)}" for file in wanted} <= there
    assert {name.split("/")[0] for name in there} == {"moe_jax"}


def test_an_installed_clone_gives_its_environment_moe_jax_only(repo, tmp_path):
    pytest.importorskip("editables", reason="how a clone is installed: pip install 'moe_jax[dev]'")
    there = zipfile.ZipFile(build(repo, tmp_path, "editable"))
    text = "".join(there.read(name).decode() for name in there.namelist() if "dist-info" not in name)
    assert f"F.map_module('moe_jax', '{repo / 'moe_jax' / '__init__.py'}')" in text
    assert text.count("map_module") == 1
    assert not any(line == str(repo) for line in text.splitlines())


def test_every_command_of_an_installed_wheel_works_from_an_empty_folder(python, repo, tmp_path):
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    (tmp_path / "sweep.py").write_text(SWEEP)

    def command(name, *flags, status=0):
        done = subprocess.run(
            [python, "-m", name, *flags], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "1 of 20 steps done in run" in command("moe_jax.train", "--config=tiny", "--workdir=run", "--stop_at=1")
    assert "moe_jax/configs/from_checkpoint.py" in command("moe_jax.describe", "--config=from_checkpoint", status=2)
    # this config imports another one
    assert "16 experts, 4 a token" in command("moe_jax.describe", "--config=ablation/trade_off")
    done = command("moe_jax.experiments.ablate", "--config=sweep.py", "--workdir=sweep")
    assert "report: sweep/report.html" in done
    assert "python -m moe_jax.experiments.ablate --config=sweep.py" in (tmp_path / "sweep/sweep.json").read_text()
    assert "Wrote again.html" in command("moe_jax.experiments.report", "sweep", "--output=again.html")
    assert '"git": null' in (tmp_path / "run/run.json").read_text()
