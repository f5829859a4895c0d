"""Laws of the benchmarks: rounds are fair, ratios are within a round, unequal work is refused, absent peers named."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from experiments.benchmarks import layer, layer_peers, peers, problem, profile, scaling, start, step, step_peers, timing

ROOT = Path(__file__).parent.parent.parent
TINY = layer.SHAPES["tiny"]  # T 64, d 16, E 8, h 8, k 2
SIZES = dict(num_layers=1, embed_dim=16, num_heads=2, num_experts=4, top_k=2, expert_ffw_dim=8, vocab_size=32)
BATCH = dict(batch_size=2, sequence_length=8)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def without_peers(monkeypatch):
    """As if no other project were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in peers.INSTALL else find(name))


# --- rounds and ratios ------------------------------------------------------------------------------------------


def test_every_contestant_leads_a_round_and_the_circle_is_kept():
    orders = [timing.order("abc", turn) for turn in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    now = [0.0]
    calls = []

    def contestant(name, seconds):
        def run():
            calls.append(name)
            now[0] += next(seconds)

        return run

    several = {"a": contestant("a", iter([9.0, 1.0, 2.0])), "b": contestant("b", iter([9.0, 3.0, 4.0]))}
    times = timing.interleave(several, 2, clock=lambda: now[0])
    assert times == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert calls == ["b", "a", "a", "b", "b", "a"]


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    times = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 10.0, 6.0]}
    # 2, 1 and 6 times as fast; the ratio of the medians would be 6
    assert timing.ratio(times, "ours", "theirs") == (2.0, 1.0, 6.0)


def test_the_limit_is_the_best_rate_of_the_same_round():
    times = {"ours": [2.0, 2.0], "small": [1.0, 4.0], "large": [4.0, 2.0]}
    limit = timing.best_rates(times, {"small": 10.0, "large": 20.0})
    assert limit == [10.0, 10.0]  # 10 / 1 against 20 / 4, 10 / 4 against 20 / 2
    assert timing.ratio_to_limit(times, "ours", 10.0, limit) == (0.5, 0.5, 0.5)


def test_useful_flops_are_nine_matmuls_of_two_flops():
    # 64 x 2 rows, 16 x 8 weights: 9 x 2 x 128 x 128
    assert TINY.flops == 294_912


def test_a_table_has_columns_of_one_width():
    assert timing.table(["", "ms"], [["a", "1.0"], ["long", "20.0"]]) == "        ms\na      1.0\nlong  20.0"


def test_a_file_without_a_folder_is_refused_before_anything_is_measured(tmp_path):
    command = ["experiments.benchmarks.start", f"--json={tmp_path / 'none' / 'x.json'}"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be written; name a file in an existing folder" in done.stderr


def test_a_busy_machine_is_reported():
    facts = timing.about(3)
    idle, busy = ({**facts["machine"], "load": load * facts["machine"]["threads"]} for load in (0.1, 2.0))
    assert "busy" in timing.heading(facts | {"machine": busy})
    assert "busy" not in timing.heading(facts | {"machine": idle})


# --- equal work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skew", ["uniform", "zipf", "collapsed"])
def test_every_tokens_choice_is_clear(skew, dtype):
    drawn = problem.draw(TINY, skew, dtype)
    logits = np.sort(drawn.x @ drawn.router, -1)
    assert (logits[:, -2] - logits[:, -3] >= problem.MARGIN[dtype]).all()


def test_bfloat16_problems_hold_only_bfloat16_values():
    for values in problem.draw(TINY, "zipf", "bfloat16"):
        assert (values == values.astype(ml_dtypes.bfloat16)).all()


def test_skews_match_their_names():
    def loads(skew):
        drawn = problem.draw(TINY, skew, "float32")
        return np.bincount(np.argsort(drawn.x @ drawn.router, -1)[:, -2:].ravel(), minlength=8)

    assert loads("collapsed").tolist() == [64, 64, 0, 0, 0, 0, 0, 0]
    assert loads("uniform").max() < loads("zipf").max() < 64
    assert loads("zipf").argmax() == 0


def outcome(**changes):
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal((50, 4)).astype(np.float32) for name in problem.Outcome._fields}
    return problem.Outcome(**(drawn | changes))


def test_a_different_outcome_is_refused_by_name():
    wrong = outcome().up.copy()
    wrong[7] = wrong[8]  # one row of fifty
    with pytest.raises(ValueError, match=r"peer and moe_jax differ in the gradient of up by .*, more than 1e-05"):
        problem.check("peer", outcome(up=wrong), outcome(), "float32")


def test_nan_is_a_different_outcome():
    with pytest.raises(ValueError, match="differ in y by nan"):
        problem.check("peer", outcome(y=np.full((50, 4), np.nan, np.float32)), outcome(), "float32")


def test_rounding_is_not_a_different_outcome():
    expected = outcome()
    rounded = problem.Outcome(*(a * np.float32(1 + 2e-7) for a in expected))
    assert 0 < problem.check("peer", rounded, expected, "float32") < 1e-6


def test_our_contestant_is_the_layer_by_hand():
    drawn = problem.draw(TINY, "zipf", "float32")
    entry = layer.ours(TINY, drawn, "float32", "softmax")
    found = entry.read(entry.run())
    assert [a.shape for a in found] == [a.shape for a in (drawn.x, drawn.x, *drawn[2:])]
    logits = drawn.x @ drawn.router
    expected = np.zeros_like(drawn.x)
    for t, row in enumerate(drawn.x):
        chosen = np.argsort(logits[t])[-2:]
        gates = np.exp(logits[t, chosen] - logits[t, chosen].max())
        for gate, e in zip(gates / gates.sum(), chosen, strict=True):
            before = row @ drawn.gate[e]
            expected[t] += gate * (before / (1 + np.exp(-before)) * (row @ drawn.up[e])) @ drawn.down[e]
    np.testing.assert_allclose(found.y, expected, atol=1e-5)


# --- the layer --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_peers")
def test_peers_that_are_not_installed_are_named_with_their_command():
    result = layer.measure(TINY, dtype="float32", skew="uniform", rounds=2)
    assert set(result["absent"]) == {"transformers_deepseek_v3", "transformers_qwen3_moe", "torchtitan", "maxtext"}
    assert "torch is not installed; pip install torch==" in result["absent"]["torchtitan"]
    text = layer.as_text("tiny", result)
    assert "torchtitan is absent: torch is not installed" in text
    assert [line.split()[0] for line in text.splitlines()[2:3]] == ["moe_jax"]


@pytest.mark.usefixtures("without_peers")
def test_a_layers_figures_follow_from_its_times():
    result = layer.measure(TINY, dtype="float32", skew="uniform", rounds=2)
    assert list(result["seconds"]) == ["moe_jax", "matmul_layer_jax", "matmul_square_jax"]
    rates = zip(*([work / s for s in result["seconds"][f"matmul_{kind}_jax"]] for kind, work in
                  (("layer", 2.0 * 64 * 16 * 32), ("square", 2.0 * 2048**3))), strict=True)  # fmt: skip
    of_round = [294_912 / s / max(both) for s, both in zip(result["seconds"]["moe_jax"], rates, strict=True)]
    assert result["ratio_to_limit"] == pytest.approx(sum(of_round) / 2)
    assert result["memory_bytes"]["moe_jax"] > sum(a.nbytes for a in problem.draw(TINY, "uniform", "float32"))


def test_a_peers_ratio_is_our_speed_over_its():
    times = {"moe_jax": [1.0, 2.0], "peer": [3.0, 6.0], "matmul": [1.0, 1.0]}
    result = layer.summary(TINY, times, {"matmul": 1e9}, ["peer"])
    assert result["ratio_to_peer"] == 3.0
    assert result["ours_over"]["peer"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert result["to_limit"]["peer"]["median"] == pytest.approx(result["ratio_to_limit"] / 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skew", ["uniform", "collapsed"])
def test_transformers_layers_compute_what_ours_computes(skew, dtype):
    pytest.importorskip("transformers")
    result = layer.measure(TINY, dtype=dtype, skew=skew, rounds=1, names=[*layer_peers.PEERS, layer_peers.EAGER])
    assert {"transformers_deepseek_v3", "transformers_qwen3_moe", "transformers_deepseek_v3_eager"} <= set(
        result["differences"]
    )


# --- the step ---------------------------------------------------------------------------------------------------


def test_latent_attention_has_as_many_parameters_as_ours():
    m = step.config_like(step.DEEPSEEK, step.SIZES, step.BATCH).model
    sizes = step_peers.latent_sizes(m)
    # keys and values: ours 2 x 256 x 4 x 32 = 65,536; theirs 256 (96 + 16) + 96 x 8 (16 + 32) = 65,536
    assert (m.embed_dim, m.num_kv_heads, m.head_dim) == (256, 4, 32)
    assert sizes == {
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "kv_lora_rank": 96,
        "q_lora_rank": None,
    }


@pytest.mark.usefixtures("without_peers")
def test_a_step_without_peers_reports_its_speed(monkeypatch):
    monkeypatch.setattr(
        step, "in_own_process", lambda settings: contextlib.nullcontext(step.Trainer(lambda: 3.0, 100, {}))
    )
    result = step.measure(SIZES, BATCH, rounds=2)
    assert set(result["absent"]) == {step.QWEN, step.DEEPSEEK}
    assert set(result["seconds"]) == set(step.OURS.values())
    seconds = result["seconds"][step.OURS[step.QWEN]]
    assert result["tokens_per_second"][step.OURS[step.QWEN]]["high"] == pytest.approx(16 / min(seconds))
    assert f"{step.QWEN} is absent" in step.as_text(result)


@pytest.mark.parametrize(("dtype", "suffixes"), [("float32", [""]), ("bfloat16", ["_bfloat16", "_autocast"])])
def test_the_same_model_trains_alike_in_both_frameworks(dtype, suffixes):
    pytest.importorskip("transformers")
    result = step.measure(SIZES, BATCH, rounds=1, dtype=dtype)
    assert set(result["compared"]) == {peer + suffix for peer in step.OURS for suffix in suffixes}
    for suffix in suffixes:
        losses = result["compared"][step.QWEN + suffix]["losses"]
        assert losses[0][0] != pytest.approx(losses[2][0], rel=1e-3)  # it does train


def test_a_commit_is_timed_against_this_tree_with_the_same_settings():
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this is no clone")
    result = step.against("HEAD", SIZES, BATCH, rounds=2)
    assert [len(losses) for losses in result["losses"].values()] == [3, 3]  # one more is not timed
    assert set(result["seconds"]) == {step.HERE, "HEAD"}
    assert "here over there" in step.commits_as_text(result)


def test_what_is_no_commit_is_refused():
    with pytest.raises(ValueError, match="--against=nowhere is no commit of the clone"):
        step.against("nowhere", SIZES, BATCH, rounds=1)


def test_different_losses_are_refused():
    ours = step.Trainer(lambda: 3.0, 100, None)
    theirs = step_peers.Peer(lambda: 3.1, 100)
    with pytest.raises(ValueError, match="not the same training"):
        step.compare(step.QWEN, ours, theirs, 32)


def test_a_different_size_is_refused():
    ours = step.Trainer(lambda: 3.0, 100, None)
    theirs = step_peers.Peer(lambda: 3.0, 102)
    with pytest.raises(ValueError, match="102 parameters and moe_jax 100"):
        step.compare(step.QWEN, ours, theirs, 32)


def test_the_parts_of_a_step_add_up_to_it():
    result = step.attribute(SIZES, BATCH, rounds=2)
    whole, *parts = result["seconds"].values()
    assert sum(parts) == pytest.approx(whole)
    for part in ("attention", "experts", "router", "head", "optimizer"):
        assert result["seconds"][part] > 0, part
    assert "largest operations" in step.parts_as_text(result)


def test_a_moment_is_shared_by_the_operations_that_run_then():
    # 0 to 1 a; 1 to 2 a and b; 2 to 3 a twice and b; 4 to 5 c
    events = [profile.Event("a", 0, 3), profile.Event("b", 1, 3), profile.Event("a", 2, 3), profile.Event("c", 4, 5)]
    assert profile.shares(events) == pytest.approx({"a": 1 + 1 / 2 + 2 / 3, "b": 1 / 2 + 1 / 3, "c": 1})


def test_an_operation_belongs_to_the_scope_of_its_code():
    program = """
  %dot.1 = f32[2] dot(%a, %b), metadata={op_name="jit(step)/transpose(jvp(while))/body/attention/dot_general"}
  ROOT %ffi_call.2 = f32[2] custom-call(%a), metadata={op_name="jit(step)/head/ffi_call"}
  %copy.3 = f32[2] copy(%a)
"""
    assert profile.parts_of(program) == {"dot.1": "attention", "ffi_call.2": "head", "copy.3": "rest"}


# --- scaling and start ------------------------------------------------------------------------------------------


def test_costs_are_relative_to_the_first():
    result = scaling.relative({"one": lambda: None, "two": lambda: None}, 2)
    assert result["over_one"]["one"]["median"] == 1.0
    expected = [b / a for a, b in zip(result["seconds"]["one"], result["seconds"]["two"], strict=True)]
    assert result["over_one"]["two"]["median"] == pytest.approx(sum(expected) / 2)
    assert scaling.as_text("x", result).splitlines()[1].split() == ["ms", "over", "one"]


def test_a_layer_with_more_experts_is_measured():
    result = scaling.experts(TINY, [4, 8], 1)
    assert list(result["over_E=4"]) == ["E=4", "E=8"]


def test_compile_times_are_without_the_cache_which_comes_back(monkeypatch):
    import jax

    seen = []
    monkeypatch.setattr(scaling, "_compile", lambda config: seen.append(jax.config.jax_enable_compilation_cache))
    before = jax.config.jax_enable_compilation_cache
    assert list(scaling.depth([1, 2], 1)["seconds"]) == ["L=1", "L=2"]
    assert seen == [False] * 4
    assert jax.config.jax_enable_compilation_cache == before


def test_devices_send_to_each_other(monkeypatch):
    monkeypatch.setattr(scaling, "MODEL", SIZES)
    result = scaling.devices_here([2], 1)
    assert result["bytes_sent_per_device"]["2 devices"] > 0
    assert "MiB sent per device" in scaling.as_text("devices", result)


def test_a_warm_start_finds_the_programs_of_the_cold_start_of_its_round(monkeypatch):
    seen = []

    def fake(cache, sizes, batch):
        seen.append((cache, len(os.listdir(cache))))
        Path(cache, "compiled").touch()
        return dict.fromkeys(start.PARTS, 4.0 if seen[-1][1] == 0 else 1.0)

    monkeypatch.setattr(start, "start", fake)
    result = start.measure(SIZES, BATCH, 2)
    assert [entries for _, entries in seen] == [0, 1, 0, 1]
    assert seen[0][0] == seen[1][0] != seen[2][0]
    assert result["ratio_warm_to_cold"] == 0.25


def test_a_start_reports_the_seconds_of_its_parts(capsys):
    start.run(SIZES, BATCH)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"import", "init", "first_step", "second_step", "done"}


# --- the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flag", "sentence"),
    [
        ("layer", "--shapes=a,q", "--shapes=q must be a list from a, b, c"),
        ("layer", "--peers=none", "--peers=none must be a list from transformers_deepseek_v3"),
        ("step", "--num_heads=3", "--num_heads=3 must be even"),
        ("step", "--size=7b", "flag --size=7b"),
        ("scaling", "--devices=3", "--devices=3 must divide a batch of 8"),
        ("start", "--rounds=0", "flag --rounds=0"),
    ],
)
def test_a_wrong_flag_is_one_sentence(script, flag, sentence):
    command = [sys.executable, "-m", f"experiments.benchmarks.{script}", flag]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and sentence in done.stderr and done.stderr.count("\n") == 1


def test_the_benchmarks_load_neither_jax_nor_torch_before_their_flags_are_read():
    names = ", ".join(f"experiments.benchmarks.{name}" for name in ("layer", "step", "scaling", "start"))
    code = f"import sys, {names}; print({{'jax', 'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
