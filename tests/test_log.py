"""Laws of the logs: strict JSON, every key, every step once, whatever was killed when."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from drills import rig

from moe_jax.log import LONG, Display, RunLog, plain, read_jsonl, summary_line
from moe_jax.train import run

CONFIG = rig.drill_config(eval_every=4)
EVERY_STEP = {
    "step",
    "loss",
    "total_loss",
    "bits_per_byte",
    "tokens_seen",
    "moe/max_violation",
    "moe/max_violation_worst",
    "moe/load_entropy",
    "moe/dead_experts",
    "moe/bias_range",
    "moe/aux_loss",
    "moe/dropped",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "skipped",
}
EVALUATION = {"eval/loss", "eval/bits_per_byte", "eval/max_violation"}
DOMAINS = {f"eval/bits_per_byte/{d}" for d in ("austen", "factbook", "milton", "shakespeare")}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The workdir of a run of 6 steps that was evaluated after the 4th."""
    folder = tmp_path_factory.mktemp("logged")
    run(CONFIG, folder, stop_at=6, quiet=True)
    return folder


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def strict(file):
    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def test_every_step_has_every_metric(logged):
    records = strict(logged / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(6))
    for record in records:
        assert record.keys() >= EVERY_STEP


def test_evaluations_are_logged_with_the_step_they_follow(logged):
    records = strict(logged / "metrics.jsonl")
    assert [r["step"] for r in records if EVALUATION & r.keys()] == [3]
    assert records[3].keys() >= EVALUATION | DOMAINS


def test_tokens_seen_count_the_valid_targets(logged):
    assert [r["tokens_seen"] for r in rig.curve(logged)] == [(n + 1) * 8 * 16 for n in range(6)]


def test_bits_per_byte_is_the_loss_in_bits_over_bytes(logged):
    # bits per byte = loss x tokens / (ln 2 x bytes); a separator is a token of 0 bytes, so it is never less
    for record in rig.curve(logged):
        assert record["bits_per_byte"] >= record["loss"] / np.log(2) * (1 - 1e-6)


def test_layers_have_loads_and_biases_of_every_moe_layer(logged):
    records = strict(logged / "layers.jsonl")
    assert [r["step"] for r in records] == list(range(6))
    for record in records:
        assert np.shape(record["loads"]) == np.shape(record["bias"]) == (2, 4)
        assert np.sum(record["loads"], axis=-1).tolist() == [8 * 16 * 2] * 2  # every token, twice: top_k=2


def test_the_violation_logged_is_that_of_the_loads_logged(logged):
    for record, layer in zip(rig.curve(logged), rig.layers(logged), strict=True):
        loads = np.array(layer["loads"])
        violation = loads.max(-1) / loads.mean(-1) - 1
        assert record["moe/max_violation"] == pytest.approx(violation.mean(), rel=1e-5)
        assert record["moe/max_violation_worst"] == pytest.approx(violation.max(), rel=1e-5)


def test_log_every_logs_the_first_step_and_every_nth(tmp_path):
    run(rig.drill_config(log_every=3), tmp_path, stop_at=7, quiet=True)
    assert [r["step"] for r in rig.curve(tmp_path)] == [0, 2, 5]


def test_the_config_and_what_made_the_run_are_written(logged):
    assert json.loads((logged / "config.json").read_text())["num_steps"] == 20
    assert json.loads((logged / "run.json").read_text()).keys() >= {"versions", "git", "machine"}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(0, {"loss": jnp.float32(jnp.nan), "norm": np.inf, "n": 3}, {"bias": np.array([[0.5, -np.inf]])})
    log.close()
    assert strict(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": None, "norm": None, "n": 3}]
    assert strict(tmp_path / "layers.jsonl") == [{"step": 0, "bias": [[0.5, None]]}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (np.int32(3), 3),
        (jnp.float32(0.5), 0.5),
        (np.nan, None),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.array([]), []),
        (True, True),
    ],
)
def test_plain_values_are_what_json_holds(value, expected):
    assert plain(value) == expected


def test_a_dense_model_has_no_layers_to_log(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(0, {"loss": 1.0}, {})
    log.close()
    assert (tmp_path / "layers.jsonl").read_text() == ""


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "loss": 5.5}\n{"step": 1, "loss": 5.4}\n'
    for end in range(len(whole) // 2 + 1, len(whole)):
        file.write_text(whole[:end])
        assert [r["step"] for r in read_jsonl(file)] == ([0, 1] if end == len(whole) - 1 else [0])


def test_a_log_file_that_is_absent_is_empty(tmp_path):
    assert read_jsonl(tmp_path / "nothing") == []


def test_steps_that_are_done_again_are_in_the_log_once(tmp_path):
    log = RunLog(tmp_path, 0)
    for n in range(5):
        log.write(n, {"loss": float(n)}, {"loads": np.array([[n]])})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing step 5
    log = RunLog(tmp_path, 3)
    log.write(3, {"loss": 30.0}, {"loads": np.array([[30]])})
    log.close()
    assert [(r["step"], r["loss"]) for r in strict(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert [r["loads"] for r in strict(tmp_path / "layers.jsonl")] == [[[0]], [[1]], [[2]], [[30]]]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(0, {"loss": 1.0})
    assert strict(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]
    log.close()


def test_the_display_prints_plain_lines_where_there_is_no_terminal(capsys):
    display = Display("train", 10)
    with display.running(0):
        display.step(1)
        display.report(1, {"loss": 5.5, "moe/max_violation": 0.25})
    assert capsys.readouterr().out == "train step 1/10  loss 5.500  max violation 0.25\n"


def test_a_quiet_display_prints_nothing(capsys):
    display = Display("train", 10, quiet=True)
    with display.running(0):
        display.report(1, {"loss": 5.5})
        display.say("hello")
    assert capsys.readouterr().out == ""


def test_a_number_that_is_missing_is_left_out_of_the_line():
    assert summary_line({"loss": 2.0, "tokens_per_second": None}, LONG) == "loss 2.000"
