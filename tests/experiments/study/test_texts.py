"""Laws of committed texts: numbers keep what they say, and no machine is named."""

import getpass
import json
import platform
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.sweep import SweepError
from experiments.study import texts
from experiments.study.texts import Private, as_lines, short


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_is_the_same_float32_in_fewer_digits(value):
    shorter = short("loss", value)
    assert np.float32(shorter) == np.float32(value)
    assert len(repr(shorter)) <= len(repr(value))


@pytest.mark.parametrize("value", [2.864666415472698, 1e300, 5, True, None, "text"])
def test_what_is_no_float32_is_unchanged(value):
    assert short("eval/bits_per_byte", value) is value


def test_clocks_have_four_digits():
    line = {"step": 999999, "tokens_per_second": 23501.206752706577, "time/step": 87.8212, "eval/loss": 1.9855825646}
    (again,) = map(json.loads, as_lines([line]).splitlines())
    assert again == {"step": 999999, "tokens_per_second": 23500.0, "time/step": 87.82, "eval/loss": 1.9855825646}


def test_arrays_are_shortened_number_by_number():
    bias = [[float(np.float32(0.1)), 0.0]]
    assert short("bias", bias) == [[0.1, 0.0]]
    assert short("loads", [[1, 2]]) == [[1, 2]]


@pytest.fixture
def private(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(platform, "node", lambda: "tower.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    return Private(tmp_path / "runs" / "study")


@pytest.mark.parametrize(
    ("text", "relative"),
    [
        ("{work}/arms/trunks/bias/seed0@1000", "arms/trunks/bias/seed0@1000"),
        ("{here}/corpus/bytes", "corpus/bytes"),
        ("{work}", "."),
        ("/data/lab/bytes", "bytes"),
        ("/home/ada/my runs/bytes", "my runs/bytes"),  # a space ends a path, and what is left is no path
        ("python -m x --config={here}/a.py:64 --workdir=~/runs '--at=/tmp/q' -o /x/y/", "python -m x --config=a.py:64"),
        ("bits/byte and 3 / 4, 8 hours/2", "bits/byte and 3 / 4, 8 hours/2"),
        ("corpus/bytes", "corpus/bytes"),
        ("{here}_other/bytes", "bytes"),
    ],
)
def test_paths_are_relative_or_their_last_name(private, tmp_path, text, relative):
    value = {"a": [text.format(work=tmp_path / "runs/study", here=tmp_path)]}
    (found,) = private.without_paths(value)["a"]
    assert found.startswith(relative)
    assert "/tmp" not in found and "~" not in found and "ada" not in found
    private.check("here", found)


def test_a_path_relative_to_a_folder_above_the_home_would_name_the_user(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    private = Private(tmp_path / "ada" / "runs")
    assert private.without_paths([f"{tmp_path}/ada/corpus", f"{tmp_path}/ada/runs/arms"]) == ["corpus", "arms"]


def test_a_command_keeps_what_is_no_path(private):
    text = "python -m x --workdir=~/runs/a '--at=/tmp/q' --out /x/y/ --rate=1e-3"
    assert private.without_paths(text) == "python -m x --workdir=a '--at=q' --out y --rate=1e-3"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x/home/ada", "the user's name, ada"),
        ("in:/home/ada/x", "the folder /home/ada"),
        ("/home/adamant", ""),
        ("run on tower", "the host's name, tower"),
        ("tower.example.org", "the host's name, tower"),
        ("towers, watch-tower", ""),
        ("ada@elsewhere", "the user's name, ada"),
        ("[{work}]", "the folder {work}"),
        (3.0, ""),
    ],
)
def test_a_text_that_names_the_machine_is_refused(private, tmp_path, text, what):
    fill = dict(work=tmp_path / "runs/study")
    value = {"tower": [{"machine": text.format(**fill) if isinstance(text, str) else text}]}
    if not what:
        private.check("run.json", value)
        return
    with pytest.raises(SweepError) as error:
        private.check("run.json", value)
    assert str(error.value).startswith(f"run.json has {what.format(**fill)}, in ")


def test_a_home_that_is_the_root_folder_or_a_host_without_a_name_forbids_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(platform, "node", lambda: "")
    monkeypatch.setattr(texts, "_user", lambda: "nobody")
    Private(tmp_path).check("x", ["/", "a / b", ""])
    assert Path.home() == Path("/")
