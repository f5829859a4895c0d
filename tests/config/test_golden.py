"""The meaning of every config file of the repository: a change shows as a difference in a golden file."""

import json
import os
from pathlib import Path

import pytest
from drills.rig import REPO

from experiments import branched, hyper, runs
from moe_jax.config import as_dict, differences, validate
from moe_jax.config.command import load

ALL = sorted((REPO / "configs").rglob("*.py"))
FILES = [file for file in ALL if file.stem != "from_checkpoint"]  # its meaning depends on a workdir
GOLDEN = REPO / "tests" / "golden"
UPDATE = "UPDATE_GOLDEN=1 python -m pytest tests/config/test_golden.py"


def name_of(file):
    return "_".join(file.relative_to(REPO / "configs").with_suffix("").parts)


def changes_of(planned, base):
    """What each run changes of the base, as lines."""
    return [{"arm": r.arm, "seed": r.seed, "changes": differences(base, as_dict(r.config))} for r in planned]


def text_of(file):
    """The config of a file as JSON, with the changes of its arms if it has any."""
    namespace = load(file)
    config = as_dict(validate(namespace.get_config()))
    golden = {"config": config}
    if hasattr(namespace, "get_hyper"):
        listed = namespace.get_hyper(hyper)
        if isinstance(listed, hyper.Branches):
            parts = branched.plan_branched(config, listed, Path("sweep"))
            golden["trunks"] = changes_of([part.trunk for part in parts], config)
            golden["branches of the first trunk"] = changes_of(parts[0].branches, parts[0].base)
        else:
            golden["runs"] = changes_of(runs.plan(config, listed), config)
    return json.dumps(golden, indent=1) + "\n"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_config_file_means_what_its_golden_file_says(file):
    golden = GOLDEN / f"{name_of(file)}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text_of(file))
    assert golden.is_file(), f"{golden.name} is missing; run {UPDATE}"
    assert golden.read_text() == text_of(file), f"{file.name} means something else now; if so, run {UPDATE}"


def test_there_is_no_golden_file_without_a_config():
    assert {f.stem for f in GOLDEN.glob("*.json")} == {name_of(file) for file in FILES}


@pytest.mark.parametrize("file", ALL, ids=name_of)
def test_the_header_of_a_config_file_has_its_source_and_its_command(file):
    header = (load(file).__doc__ or "").strip()
    assert "Source:" in header
    assert "Command:" in header
    assert f"--config=configs/{file.relative_to(REPO / 'configs')}" in header
