"""Trackers beside the files of a run, with the real libraries, offline."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import tiny_config
from moe_jax.runtime import sinks
from moe_jax.runtime.log import RunLog
from moe_jax.runtime.pictures import heat_map
from moe_jax.training.loop import run

ABOUT = {"git": "abc1234", "versions": {"jax": "0.0"}}
VALUES = [{"loss": 1.5, "eval/loss/wiki (en)": 2.0, "none": None, "text": "x"}, {"loss": np.float32(1.25)}]
PIXELS = np.zeros((4, 6, 3), np.uint8)


def config_of(**tracking):
    return tiny_config(tracking=tracking)


# --- Weights & Biases -----------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    for key, value in dict(WANDB_MODE="offline", WANDB__DISABLE_STATS="true", WANDB_DISABLE_GIT="true").items():
        monkeypatch.setenv(key, value)


def records(file: Path) -> Iterator:
    """The records of a .wandb file: a log in LevelDB's format, in blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole in this piece, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def logged(workdir: Path) -> list[list[dict]]:
    """The lines of each session, oldest first."""
    sessions = []
    for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        history = [r.history for r in records(file) if r.WhichOneof("record_type") == "history"]
        lines = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in history]
        sessions.append([{k: v for k, v in line.items() if not k.startswith("_")} for line in lines])
    return sessions


def test_wandb_has_the_numbers_under_their_names_and_a_resumed_run_the_same_id(tmp_path, offline):
    config = config_of(wandb="balance", name="first")
    for step, values in enumerate(VALUES):
        (sink,) = sinks.open_trackers(config, tmp_path, ABOUT)
        sink.write(step, values)
        sink.picture(step, "moe/load", PIXELS)
        sink.close()
    (first, picture), (second, _) = logged(tmp_path)
    assert first == {"step": 0, "loss": 1.5, "eval/loss/wiki (en)": 2.0}
    assert second == {"step": 1, "loss": 1.25}
    assert picture["step"] == 0
    found = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in found}) == 1 < len(found)  # the id is in the name
    (run_record,) = [r.run for r in records(found[0]) if r.WhichOneof("record_type") == "run"]
    settings = {item.key: json.loads(item.value_json) for item in run_record.config.update}
    assert (run_record.project, run_record.display_name) == ("balance", "first")
    assert settings["made_by"]["git"] == "abc1234"
    assert settings["model"]["num_experts"] == 4


# --- MLflow ---------------------------------------------------------------------------------------------------


@pytest.fixture
def client(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())


def test_mlflow_has_the_numbers_and_a_resumed_run_is_the_same_run(tmp_path, client):
    config = config_of(mlflow="balance")
    workdir = tmp_path / "run"
    workdir.mkdir()
    for step, values in enumerate(VALUES):
        (sink,) = sinks.open_trackers(config, workdir, ABOUT)
        sink.write(step, values)
        sink.picture(step, "moe/load", PIXELS)
        sink.close()
    (found,) = client.search_runs([client.get_experiment_by_name("balance").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.5), (1, 1.25)]
    assert found.data.metrics["eval/loss/wiki _en_"] == 2.0  # it has no brackets in names
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["model.num_experts"] == "4"
    assert found.data.tags["git"] == "abc1234"
    assert [a.path for a in client.list_artifacts(found.info.run_id, "moe/load")] == [
        "moe/load/00000000.png",
        "moe/load/00000001.png",
    ]
    (other,) = sinks.open_trackers(config_of(mlflow="another"), workdir, ABOUT)
    other.close()
    assert client.get_experiment_by_name("another") is not None
    assert len(client.search_runs([client.get_experiment_by_name("balance").experiment_id])) == 1


# --- whatever the tracker -------------------------------------------------------------------------------------


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def write(self, step, values):
        self.calls += 1
        raise OSError("no\nnetwork")

    def picture(self, step, name, pixels):
        self.calls += 1

    def close(self):
        self.calls += 1


def test_a_tracker_that_fails_is_reported_once_and_the_log_continues(tmp_path, capsys):
    broken = Broken()
    log = RunLog(tmp_path, 0, [sinks.Careful("tracking.x", lambda: broken)])
    for step in range(3):
        log.write(step, {"loss": 1.0})
    log.picture(2, "moe/load", lambda: PIXELS)
    log.close()
    assert broken.calls == 1
    assert capsys.readouterr().out == "tracking.x is no longer used: OSError: no network\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_cannot_begin_is_reported_too(capsys):
    def refuse():
        raise RuntimeError("no key")

    sinks.Careful("tracking.x", refuse).write(0, {"loss": 1.0})
    assert capsys.readouterr().out == "tracking.x is no longer used: RuntimeError: no key\n"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_sentence_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"tracking\.{name}='p' needs the package {name}, .* 'moe_jax\[{name}\]'"):
        run(config_of(**{name: "p"}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_that_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    assert sinks.open_trackers(config_of(), tmp_path, ABOUT) == []
    assert not (tmp_path / sinks.IDS).exists()


# --- the picture of loads -------------------------------------------------------------------------------------


def test_loads_over_their_mean_are_red_above_white_at_and_blue_below_one():
    pixels = heat_map(np.array([[0, 4, 4, 8], [4, 4, 4, 4]])).astype(int)
    assert pixels.shape[2] == 3
    red, blue = pixels[..., 0], pixels[..., 2]
    strong = np.abs(red - blue) > 60
    assert (strong & (red > blue)).sum() > 100
    assert (strong & (red < blue)).sum() > 100


def test_a_layer_without_any_token_is_drawn():
    assert heat_map(np.zeros((1, 2))).dtype == np.uint8
