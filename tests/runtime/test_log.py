"""Laws of the logs: strict JSON, every key, every step once, also after kills."""

import errno
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from drills import rig
from etils import epath

from experiments.report.sweep import by_step
from moe_jax.runtime import log
from moe_jax.runtime.display import LONG, Display, summary_line
from moe_jax.runtime.log import RunLog, lines_from_end, newest, parts, plain, read_jsonl, set_aside
from moe_jax.training.loop import run

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


def test_the_config_versions_and_identity_of_the_run_are_written(logged):
    assert json.loads((logged / "config.json").read_text())["num_steps"] == 20
    assert json.loads((logged / "run.json").read_text()).keys() >= {"versions", "git", "machine"}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    run_log = RunLog(tmp_path, 0)
    run_log.write(0, {"loss": jnp.float32(jnp.nan), "norm": np.inf, "n": 3}, {"bias": np.array([[0.5, -np.inf]])})
    run_log.close()
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
def test_plain_values_are_json_values(value, expected):
    assert plain(value) == expected


def test_a_dense_model_has_no_layers_to_log(tmp_path):
    run_log = RunLog(tmp_path, 0)
    run_log.write(0, {"loss": 1.0}, {})
    run_log.close()
    assert (tmp_path / "layers.jsonl").read_text() == ""


def test_a_line_truncated_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "loss": 5.5}\n{"step": 1, "loss": 5.4}\n'
    for end in range(len(whole) // 2 + 1, len(whole)):
        file.write_text(whole[:end])
        assert [r["step"] for r in read_jsonl(file)] == ([0, 1] if end == len(whole) - 1 else [0])


def test_a_log_file_that_is_absent_is_empty(tmp_path):
    assert read_jsonl(tmp_path / "nothing") == []


def test_repeated_steps_are_in_the_log_once(tmp_path):
    run_log = RunLog(tmp_path, 0)
    for n in range(5):
        run_log.write(n, {"loss": float(n)}, {"loads": np.array([[n]])})
    run_log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing step 5
    run_log = RunLog(tmp_path, 3)
    run_log.write(3, {"loss": 30.0}, {"loads": np.array([[30]])})
    run_log.close()
    assert [(r["step"], r["loss"]) for r in strict(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert [r["loads"] for r in strict(tmp_path / "layers.jsonl")] == [[[0]], [[1]], [[2]], [[30]]]


@pytest.mark.parametrize("block", [1, 3, 7, 10**6])
@pytest.mark.parametrize("text", ["", "a", "a\n", "\n", "a\nbc\n", "abcd\n\nefg\nhi"])
def test_lines_are_found_from_the_end_whatever_the_size_of_a_block(tmp_path, monkeypatch, block, text):
    monkeypatch.setattr(log, "BLOCK_BYTES", block)
    (tmp_path / "file").write_text(text)
    with open(tmp_path / "file", "rb") as file:
        found = [text[start:end] for start, end in lines_from_end(file)]
    assert found == [line for line in reversed(text.splitlines(keepends=True)) if line.endswith("\n")]


def test_a_log_is_reopened_without_reading_or_rewriting_it(tmp_path):
    line = '{{"step": {}, "loads": "{}"}}\n'
    with open(tmp_path / "layers.jsonl", "w") as file:
        file.writelines(line.format(n, "x" * 100_000) for n in range(200))
    node = (tmp_path / "layers.jsonl").stat().st_ino
    tracemalloc.start()
    RunLog(tmp_path, 150).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # of 20 MB
    assert (tmp_path / "layers.jsonl").stat().st_ino == node  # truncated, not copied
    assert [r["step"] for r in read_jsonl(tmp_path / "layers.jsonl")] == list(range(150))


def test_the_newest_line_is_the_last_complete_one(tmp_path):
    assert newest(tmp_path / "metrics.jsonl") == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 2.0}\n[1]\nno json\n{"step": 2, "lo')
    assert newest(tmp_path / "metrics.jsonl") == {"step": 1, "loss": 2.0}


def test_values_that_are_known_later_are_added_to_the_newest_line(tmp_path):
    run_log = RunLog(tmp_path, 0)
    run_log.write(0, {"loss": 2.0, "time": 10.25})
    run_log.write(1, {"loss": 1.0, "time": 11.75})
    run_log.amend(1, {"eval/loss": 1.5, "time": 13})
    run_log.write(2, {"loss": 0.5})
    run_log.close()
    run_log = RunLog(tmp_path, 2)
    run_log.amend(1, {"note": 7})  # the newest line of a reopened log
    run_log.amend(5, {"eval/loss": 0.25})  # of a step that is not in the log
    run_log.close()
    assert strict(tmp_path / "metrics.jsonl") == [
        {"step": 0, "loss": 2.0, "time": 10.25},
        {"step": 1, "loss": 1.0, "time": 13, "eval/loss": 1.5, "note": 7},
        {"step": 5, "eval/loss": 0.25},
    ]


# --- in a bucket ----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is accessed like a bucket, by etils' paths; a part holds about four lines."""
    monkeypatch.setattr(log, "PART_BYTES", 1000)
    return epath.Path(str(tmp_path / "bucket"))


def logged_in(bucket, first, last, flush=True):
    """Log these steps, in lines of about 250 bytes."""
    run_log = RunLog(bucket, first)
    for n in range(first, last):
        run_log.write(n, {"loss": 1.0 * n}, {"loads": np.full((2, 50), n)})
        if flush:
            run_log.flush()
    return run_log


def test_a_bucket_gets_the_log_in_parts_and_only_changed_parts_are_copied(bucket, monkeypatch):
    sent = []
    real = log._copy
    monkeypatch.setattr(
        log, "_copy", lambda one, other: (sent.append((one.name, one.stat().st_size)), real(one, other))
    )
    run_log = logged_in(bucket, 0, 40)
    sizes = [size for name, size in sent if name.startswith("layers")]
    assert len(sizes) >= 40 and max(sizes) < 1500  # never the whole log, which has 10 kB
    sent.clear()
    run_log.flush()
    assert sent == []
    run_log.close()
    names = [p.name for p in parts(bucket / "layers.jsonl")]
    assert names[:2] == ["layers.jsonl", "layers.00000004.jsonl"] and len(names) > 5
    assert [r["step"] for r in read_jsonl(bucket / "layers.jsonl")] == list(range(40))
    assert [r["loss"] for r in read_jsonl(bucket / "metrics.jsonl")] == [1.0 * n for n in range(40)]
    rows, unreadable = by_step(Path(bucket) / "layers.jsonl")  # as the report reads a copy of it
    assert ([row["step"] for row in rows], unreadable) == (list(range(40)), 0)


@pytest.mark.parametrize("first", [0, 1, 3, 4, 5, 17, 39, 40])
def test_a_log_in_parts_is_truncated_at_the_step_where_the_run_resumes(bucket, first):
    logged_in(bucket, 0, 40).close()
    logged_in(bucket, first, 42).close()
    for name in ("metrics.jsonl", "layers.jsonl"):
        assert [r["step"] for r in read_jsonl(bucket / name)] == list(range(42))


def test_after_a_kill_a_bucket_has_the_flushed_lines(bucket):
    killed = logged_in(bucket, 0, 10)
    killed.write(10, {"loss": 10.0}, {"loads": np.ones((2, 50))})
    assert [r["step"] for r in read_jsonl(bucket / "layers.jsonl")] == list(range(10))
    logged_in(bucket, 8, 12).close()
    assert [r["step"] for r in read_jsonl(bucket / "layers.jsonl")] == list(range(12))
    for file in [*killed._files.values(), *killed._sinks]:
        file.close()


def test_a_single_log_file_of_an_earlier_version_is_continued_in_parts(bucket):
    Path(bucket).mkdir()
    logged_in(Path(bucket), 0, 20).close()
    assert [p.name for p in parts(bucket / "layers.jsonl")] == ["layers.jsonl"]
    logged_in(bucket, 20, 22).close()
    assert [p.name for p in parts(bucket / "layers.jsonl")] == ["layers.jsonl", "layers.00000020.jsonl"]
    logged_in(bucket, 15, 17).close()
    assert [r["step"] for r in read_jsonl(bucket / "layers.jsonl")] == list(range(17))


def test_the_newest_line_in_a_bucket_can_be_added_to_wherever_it_is(bucket):
    logged_in(bucket, 0, 20).close()
    run_log = RunLog(bucket, 20)
    assert run_log.newest()["step"] == 19
    run_log.amend(19, {"eval/loss": 2.5})
    run_log.close()
    assert [r.get("eval/loss") for r in read_jsonl(bucket / "metrics.jsonl")] == [None] * 19 + [2.5]


def test_all_parts_of_a_log_are_renamed_together(bucket):
    logged_in(bucket, 0, 20).close()
    kept = [p.name for p in parts(bucket / "layers.jsonl")]
    before = {name: (bucket / name).read_bytes() for name in kept}
    assert set_aside(bucket, 6).name == "metrics.jsonl.1"
    logged_in(bucket, 6, 8).close()
    assert {name: (bucket / f"{name}.1").read_bytes() for name in kept} == before
    assert [r["step"] for r in read_jsonl(bucket / "layers.jsonl")] == list(range(8))


# --- the files and the display --------------------------------------------------------------------------------


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    run_log = RunLog(tmp_path, 0)
    run_log.write(0, {"loss": 1.0})
    assert strict(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]
    run_log.close()


def test_the_display_prints_plain_lines_where_there_is_no_terminal(capsys):
    display = Display("train", 10)
    with display.running(0):
        display.step(1)
        display.report(1, {"loss": 5.5, "moe/max_violation": 0.25})
    assert capsys.readouterr().out == "train step 1/10  loss 5.500  max violation 0.25\n"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])  # a pipe without a reader, a terminal that was closed
def test_a_lost_reader_does_not_end_the_run(monkeypatch, tmp_path, number):
    with open(tmp_path / "out", "w") as out:

        class Left:
            def __getattr__(self, name):
                return getattr(out, name)

            def write(self, text):
                raise OSError(number, "nobody reads this")

        monkeypatch.setattr(sys, "stdout", Left())
        display = Display("train", 10)
        with display.running(0):
            display.report(1, {"loss": 5.5})
            display.say("hello")


def test_other_errors_of_the_output_are_raised(monkeypatch):
    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: False))
    with pytest.raises(OSError, match="No space left"):
        Display("train", 10).say("hello")


def test_a_quiet_display_prints_nothing(capsys):
    display = Display("train", 10, quiet=True)
    with display.running(0):
        display.report(1, {"loss": 5.5})
        display.say("hello")
    assert capsys.readouterr().out == ""


def test_missing_numbers_are_left_out_of_the_line():
    assert summary_line({"loss": 2.0, "tokens_per_second": None}, LONG) == "loss 2.000"
