"""The long drills: many kills, many kinds of damage. `python -m pytest -m slow tests/drills`."""

import os
import random
import shutil

import pytest
from drills import rig

from moe_jax.runtime import checkpoint
from moe_jax.training.loop import run
from moe_jax.training.state import abstract_state

pytestmark = pytest.mark.slow

CONFIG = rig.drill_config()
KILLS_A_RUN = 5


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The run of an undisturbed command: a folder with `run` and `config.py`."""
    return rig.uninterrupted(tmp_path_factory, CONFIG)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A run stopped at step 10, with checkpoints at 5 and 10."""
    return rig.made_once(tmp_path_factory, "saved", lambda folder: run(CONFIG, folder, stop_at=10, quiet=True))


@pytest.mark.parametrize("seed", range(1, 5))
def test_twenty_kills_at_random_times_change_no_number(uninterrupted, tmp_path, seed):
    rig.kill_until_done(uninterrupted / "config.py", tmp_path / "run", KILLS_A_RUN, random.Random(seed))
    rig.assert_same_numbers(CONFIG, tmp_path / "run", uninterrupted / "run")
    assert rig.folders(tmp_path / "run") == ["00000015", "00000020"]


def flip(file, draw):
    rig.flip_bit(file, draw.randrange(10**9))


def cut(file, draw):
    os.truncate(file, draw.randrange(file.stat().st_size))


def remove(file, draw):
    file.unlink()


def zero(file, draw):
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE = [flip] * 30 + [cut] * 10 + [remove] * 10 + [zero] * 5


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_any_damage_to_any_file_is_detected_named_and_survived(saved, tmp_path, number):
    draw = random.Random(number)
    directory = shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    files = [f for f in rig.data_files(directory / "00000010") if any(f.read_bytes())]
    file = draw.choice(files)
    DAMAGE[number](file, draw)
    with pytest.raises(ValueError, match=f"00000010: .*{file.name}"):
        checkpoint.restore(directory, abstract_state(CONFIG))
    state, _ = checkpoint.restore(directory, abstract_state(CONFIG), fallback=True)
    assert int(state.step) == 5
