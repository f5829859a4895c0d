"""A run whose workdir is in a bucket, served from memory; needs the `gcs` extra."""

import importlib.util
import json

import pytest
from drills import bucket, rig

from moe_jax.config.paths import workdir_of

CONFIG = rig.drill_config()


def test_a_bucket_without_gcsfs_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs gcsfs, which is not installed; pip install 'moe_jax\[gcs\]'"):
        workdir_of("gs://bucket/run")


@pytest.mark.slow
def test_a_run_in_a_bucket_stops_resumes_and_is_evaluated_like_one_in_a_folder(tmp_path_factory, tmp_path):
    pytest.importorskip("gcsfs")
    reference = rig.uninterrupted(tmp_path_factory, CONFIG)
    train = [f"--config={reference / 'config.py'}", "--workdir=gs://bucket/runs/one"]
    with bucket.serve() as (environ, objects):
        for number, (name, *flags) in enumerate(
            [("train", *train, "--stop_at=7"), ("train", *train), ("evaluate", train[1], "--eval_sequences=4")]
        ):
            command = rig.Command(f"moe_jax.{name}", tmp_path / f"{number}.log", *flags, environ=environ)
            assert command.wait() == 0, command.text
    lines = objects["runs/one/metrics.jsonl"][1].decode().splitlines()
    curve = [rig.untimed(json.loads(line)) for line in lines]
    assert curve == rig.curve(reference / "run")
    saved = sorted(name.split("/")[3] for name in objects if name.endswith("/manifest.json"))
    assert saved == ["00000015", "00000020"]
    evaluation = json.loads(objects["runs/one/evaluation.json"][1])
    assert evaluation["eval/loss"] == curve[-1]["eval/loss"]
