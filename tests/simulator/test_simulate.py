"""The simulator: its grammar, its streams, its measures, and the published behaviour of the rules."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import simulate
from moe_jax.config import as_dict, balance_entries
from moe_jax.config.balance import BALANCE_METHODS
from moe_jax.simulator import arms as arms_
from moe_jax.simulator import loop, show, streams
from moe_jax.simulator import settings as settings_
from moe_jax.simulator.loop import Summary, Trace
from moe_jax.simulator.settings import Settings

TINY = Settings(experts=8, top_k=2, tokens=256, steps=200, skew=1.0)
EXPERTS = 8


@functools.cache
def ran(text: str, sign: int = 1, seeds: int = 1, **changes) -> loop.Result:
    """The arm in the tiny simulation; each is compiled only once for all tests."""
    (arm,) = arms_.arms_of([text], signs=[sign])
    return loop.simulate(arm, dataclasses.replace(TINY, **changes), seeds)


def only(result: loop.Result) -> Summary:
    (summary,) = result.summaries
    return summary


# --- the grammar ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("none", {}),
        ("bias_sign", {"bias_sign": {}}),
        ("bias_sign:rate=1e-3,zero_mean=True", {"bias_sign": {"rate": 1e-3, "zero_mean": True}}),
        ("bias_sign+aux_loss:weight=1e-3", {"bias_sign": {}, "aux_loss": {"weight": 1e-3}}),
        ("bias_sign:rate=1e+3+aux_loss", {"bias_sign": {"rate": 1e3}, "aux_loss": {}}),
        ("aux_loss:scope=sequence,layers=(0,1)", {"aux_loss": {"scope": "sequence", "layers": (0, 1)}}),
        ("second:method=aux_loss", {"second": {"method": "aux_loss"}}),
        ("quantile:freeze_step=None", {"quantile": {"freeze_step": None}}),
    ],
)
def test_a_text_is_read_as_its_mapping(text, mapping):
    assert arms_.parse_balance(text) == mapping
    assert arms_.parse_balance(arms_.write_balance(mapping)) == mapping


@pytest.mark.parametrize("name", BALANCE_METHODS)
def test_every_option_of_every_method_can_be_written(name):
    defaults = dataclasses.asdict(BALANCE_METHODS[name]())
    with_loss = {"aux_loss": {}} if name == "target_violation" else {}
    mapping = {name: defaults} | with_loss
    (arm,) = arms_.arms_of([arms_.write_balance(mapping)])
    assert arm.entries == balance_entries(mapping)


def test_rates_and_signs_repeat_a_method():
    arms = arms_.arms_of(["bias_sign+aux_loss"], rates=[0.1, 0.2], signs=[1, -1])
    both = [f"bias_sign:rate={rate}+aux_loss{turned}" for rate in (0.1, 0.2) for turned in ("", ", reversed")]
    assert [arm.name for arm in arms] == both
    assert [arm.sign for arm in arms] == [1, -1, 1, -1]
    assert arms[3].entries == balance_entries({"bias_sign": {"rate": 0.2}, "aux_loss": {}})
    assert [arm.name for arm in arms_.arms_of(["none"], signs=[1, -1])] == ["none"]


# --- streams ----------------------------------------------------------------------------------------------------


def popularity(offsets: streams.Offsets, steps: int = 40, loads=lambda offset: jnp.zeros(EXPERTS, jnp.int32)):
    """The offsets [steps, E] of a stream whose loads are a function of the offsets before."""

    def step(carry, inputs):
        state, last = carry
        state, offset = offsets.move(state, *inputs, loads(last))
        return (state, offset), offset

    keys = jax.random.split(jax.random.key(1), steps)
    start = offsets.init(jax.random.key(0)), jnp.zeros(EXPERTS)
    return np.asarray(jax.lax.scan(step, start, (keys, jnp.arange(steps)))[1])


def test_every_named_stream_is_there_with_its_settings():
    for name, settings in settings_.STREAMS.items():
        offsets = getattr(streams, name)(EXPERTS, *(getattr(TINY, setting) for setting in settings))
        assert popularity(offsets, 3).shape == (3, EXPERTS)


def test_skewed_popularity_stays():
    values = popularity(streams.skewed(EXPERTS, 2.0))
    assert (values == values[0]).all()
    assert 1.0 < values[0].std() < 3.0


def test_drifting_popularity_is_a_random_walk():
    moves = np.diff(popularity(streams.drifting(EXPERTS, 0.0, 0.5)), axis=0)  # 39 x 8 normals: sd within 4 / sqrt(624)
    assert abs(moves.std() / 0.5 - 1.0) < 0.16
    assert abs(np.corrcoef(moves[1:].ravel(), moves[:-1].ravel())[0, 1]) < 0.23


def test_a_burst_lifts_an_expert_for_a_period_at_least():
    values = popularity(streams.bursty(EXPERTS, 0.0, 3.0, 5), 400)
    assert set(np.unique(values)) == {0.0, 3.0}
    edges = np.diff((values > 0).astype(int), axis=0, prepend=0)
    lengths = [
        stop - start
        for e in range(EXPERTS)
        for start, stop in zip(np.flatnonzero(edges[:, e] > 0), np.flatnonzero(edges[:, e] < 0), strict=False)
    ]
    assert lengths
    assert min(lengths) == 5


def test_domains_change_at_the_end_of_a_period_only_and_return():
    values = popularity(streams.domains(EXPERTS, 1.0, 3, 5), 100)
    periods = values.reshape(20, 5, EXPERTS)
    assert (periods == periods[:, :1]).all()
    assert len(np.unique(values, axis=0)) == 3


def test_shift_draws_popularity_again_once():
    values = popularity(streams.shift(EXPERTS, 1.0, 30))
    assert (values[:30] == values[0]).all()
    assert (values[30:] == values[39]).all()
    assert (values[0] != values[39]).all()


def test_adversarial_raises_the_most_loaded_expert_within_its_bound():
    # expert 2 has all the load: up 0.8 x 7/8 a step to its bound 1, the others down 0.8 / 8 to theirs
    loads = jnp.zeros(EXPERTS, jnp.int32).at[2].set(5)
    values = popularity(streams.adversarial(EXPERTS, 0.0, 0.8, 1.0), 12, lambda _: loads)
    np.testing.assert_allclose(values[0], [-0.1] * 2 + [0.7] + [-0.1] * 5, rtol=1e-6)
    np.testing.assert_allclose(values[11], [-1.0] * 2 + [1.0] + [-1.0] * 5, rtol=1e-6)


def test_logits_are_noise_times_a_tokens_own_and_its_experts_popularity():
    offsets = streams.Offsets(lambda key: jnp.arange(4.0), lambda offset, *_: (offset, offset))
    stream = streams.synthetic(offsets, 512, 4, 8, 0.5, 100)
    state = stream.init(jax.random.key(0))
    state, first, tokens = stream.next(state, jax.random.key(1), jnp.int32(0), jnp.zeros(4, jnp.int32))
    _, second, _ = stream.next(state, jax.random.key(2), jnp.int32(1), jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(first.mean(0), 0.5 * np.arange(4.0), atol=4 * 0.5 / math.sqrt(512))
    np.testing.assert_allclose(first.std(0), 0.5, rtol=4 / math.sqrt(2 * 512))
    apart = np.corrcoef(np.ravel(first - first.mean(0)), np.ravel(second - second.mean(0)))[0, 1]
    assert abs(apart) < 4 / math.sqrt(2048)
    np.testing.assert_array_equal(tokens.row, np.arange(512) // 64)
    assert tokens.ids.min() >= 0
    assert tokens.ids.max() < 100


def test_a_stream_without_skew_has_the_violation_of_chance():
    # 4 x 200 steps of standard deviation 0.06: their mean is known to 0.002
    seen = ran("none", seeds=4, skew=0.0)
    mean = np.mean([trace.violation.mean() for trace in seen.traces])
    np.testing.assert_allclose(mean, loop.floor(TINY), rtol=0.04)


# --- recorded streams -------------------------------------------------------------------------------------------


def written(folder, step: int, logits: np.ndarray, mask: np.ndarray) -> None:
    np.savez(folder / f"{step:08d}.npz", logits=logits, mask=mask, ids=np.arange(len(mask), dtype=np.int32))


@pytest.fixture
def scores(tmp_path):
    """Two steps of two layers, four tokens and four experts; the comments have the loads of layer 1."""
    order = np.eye(4, dtype=np.float16) * 2
    logits = np.stack([np.zeros((4, 4), np.float16), order])
    written(tmp_path, 10, logits, np.ones(4, bool))  # a token for each expert: loads 1 1 1 1
    everyone = np.stack([logits[0], np.tile(order[0], (4, 1))])
    written(tmp_path, 9, everyone, np.asarray([True, True, True, False]))  # three valid tokens to expert 0: 3 0 0 0
    return tmp_path


def test_recorded_logits_are_replayed_in_order_and_repeated(scores):
    recording = settings_.read_scores(scores, layer=1)
    s = dataclasses.replace(TINY, experts=4, top_k=1, tokens=4, sequences=1, steps=10, window=2)
    (arm,) = arms_.arms_of(["none"])
    (trace,) = loop.simulate(arm, s, 1, recording, 1).traces
    # step 9 before step 10: max violation 3 / (3/4) - 1 = 3, then 0
    np.testing.assert_array_equal(trace.violation, [3.0, 0.0] * 5)
    np.testing.assert_array_equal(trace.dead, [3.0, 0.0] * 5)


def test_a_bias_moves_by_the_recorded_loads(scores):
    recording = settings_.read_scores(scores, layer=1)
    s = dataclasses.replace(TINY, experts=4, top_k=1, tokens=4, sequences=1, steps=10, window=2)
    (arm,) = arms_.arms_of(["bias_sign:rate=1e-3"])
    (trace,) = loop.simulate(arm, s, 1, recording, 1).traces
    # loads 3 0 0 0 move expert 0 down and the others up, loads 1 1 1 1 nothing: the range grows 2e-3 every second step
    np.testing.assert_allclose(trace.bias_range, 2e-3 * np.repeat([1, 2, 3, 4, 5], 2), rtol=1e-5)
    np.testing.assert_allclose(trace.bias_change, [1e-3, 0.0] * 5, rtol=1e-4)


def test_recorded_scores_of_another_form_are_refused(scores):
    with pytest.raises(ValueError, match=r"--layer=2 must be from 0 to 1"):
        settings_.read_scores(scores, layer=2)
    np.savez(scores / "11.npz", logits=np.zeros((2, 3, 4), np.float16), mask=np.ones(3, bool), ids=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"11.npz has logits of shape \(2, 3, 4\)"):
        settings_.read_scores(scores, layer=0)
    np.savez(scores / "11.npz", logits=np.zeros((2, 3, 4), np.float16), mask=np.ones(4, bool), ids=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"mask bool\[4\]"):
        settings_.read_scores(scores, layer=0)
    np.savez(scores / "11.npz", logits=np.zeros((2, 3, 4), np.float16))
    with pytest.raises(ValueError, match=r"11.npz must hold logits, mask and ids"):
        settings_.read_scores(scores, layer=0)
    with pytest.raises(ValueError, match="record_scores_every"):
        settings_.read_scores(scores / "elsewhere", layer=0)


# --- numbers ----------------------------------------------------------------------------------------------------


def test_settling_is_the_start_of_the_first_window_from_which_on_all_are_low():
    assert loop.settling(np.asarray([9.0, 9, 1, 1, 1, 1]), 1.0, 2) == 2
    assert loop.settling(np.asarray([9.0, 1, 1, 9, 1, 1, 1]), 1.0, 2) == 4  # low before, but not for good
    assert loop.settling(np.asarray([1.0, 1, 1]), 1.0, 2) == 0
    assert loop.settling(np.asarray([1.0, 1, 9]), 1.0, 2) is None
    assert loop.settling(np.asarray([2.0, 0, 2, 0]), 1.0, 2) == 0  # the means are 1


def test_a_summary_is_of_the_last_fifth_and_of_the_shift():
    s = Settings(experts=8, top_k=2, tokens=256, steps=20, window=2, stream="shift")
    violation = np.asarray([5.0] * 4 + [0.0] * 6 + [7.0, 5, 5] + [0.0] * 3 + [0.0, 0.3, 0.0, 0.3])
    ramp = np.arange(20.0)
    summary = loop.summarize(Trace(violation, ramp, ramp, ramp, ramp), s, limit=0.2)
    assert summary.settled == 4
    assert summary.recovered == 3  # steps 13 and on, of which two have a mean of 0.15 at most
    assert summary.peak == 7.0
    assert summary.final == pytest.approx(0.15)
    assert summary.chatter == pytest.approx(0.3)  # every change is 0.3
    assert summary.bias_range == 19.0
    assert summary.dead == summary.flips == 17.5  # the mean of 16 to 19
    assert summary.bias_change == pytest.approx(math.sqrt((16**2 + 17**2 + 18**2 + 19**2) / 4))


def test_the_best_is_the_lowest_of_those_that_settled():
    def result(name: str, settled: int | None, final: float) -> loop.Result:
        summary = Summary(settled, None, None, final, *[0.0] * 5)
        return loop.Result(arms_.Arm(name, ()), [], [summary])

    two = [result("a", 5, 0.3), result("b", 9, 0.2), result("c", None, 0.1)]
    assert loop.best_arm(two, TINY) == "Lowest final level of the 2 of 3 that settled: b, 0.2."
    assert loop.best_arm(two[2:], TINY).startswith("None settled")


def test_a_cell_tells_mean_spread_and_how_many():
    assert show.cell([3, 5], steps=True) == "4 ± 1"  # standard deviation sqrt(2)
    assert show.cell([0.25], steps=False) == "0.25"
    assert show.cell([None, 5], steps=True) == "5 (1 of 2)"
    assert show.cell([None], steps=True) == "never"
    assert show.cell([0.1, 0.2], steps=False, spread=False) == "0.15"


# --- the published behaviour ------------------------------------------------------------------------------------


def test_chatter_of_the_sign_rule_is_proportional_to_its_rate():
    # rates so high that chance (0.05 at 2048 tokens) is little beside them
    low, high = (only(ran(f"bias_sign:rate={rate}", tokens=2048)) for rate in (0.05, 0.1))
    assert high.bias_change / low.bias_change == pytest.approx(2.0, rel=0.05)
    assert 1.7 < high.final / low.final < 2.3
    assert low.flips > 0.7


def test_the_proportional_rule_ends_below_the_sign_rule():
    sign, proportional = only(ran("bias_sign:rate=0.02")), only(ran("bias_proportional:rate=0.02"))
    assert sign.settled is not None
    assert proportional.final < 0.9 * sign.final
    assert proportional.bias_change < 0.5 * sign.bias_change


def test_quantile_balancing_settles_within_a_few_steps():
    quantile, sign = only(ran("quantile")), only(ran("bias_sign:rate=0.005"))
    assert quantile.settled <= 3
    assert sign.settled > 30


def test_the_flipped_sign_collapses():
    free, flipped = only(ran("none")), only(ran("bias_sign:rate=0.02", sign=-1))
    # the three experts that had more than a fair share without balancing come to have it all: 8 / 3 - 1 or more
    assert free.dead == 0.0
    assert flipped.dead == 5.0
    assert flipped.final > max(8 / 3 - 1, 1.3 * free.final)
    assert flipped.settled is None


def test_recovery_is_measured_after_a_shift():
    summary = only(ran("bias_sign:rate=0.02", stream="shift", seed=1))
    before = only(ran("bias_sign:rate=0.02"))
    assert summary.settled is not None
    assert 3 < summary.recovered < 100
    assert summary.peak > 3 * before.final
    assert only(ran("quantile", stream="shift", seed=1)).recovered <= 3


def test_a_loss_moves_the_router_as_fast_as_its_rate():
    balanced, still = only(ran("aux_loss")), only(ran("aux_loss", router_rate=0.0))
    assert balanced.settled is not None
    np.testing.assert_array_equal(ran("aux_loss", router_rate=0.0).traces[0].violation, ran("none").traces[0].violation)
    assert still.bias_range == balanced.bias_range == 0.0


def test_a_selector_with_a_state_is_given_it():
    # its thresholds start unset and are learned: what a token may use changes after step 0
    assert only(ran("expert_threshold")).final < 0.5 * only(ran("none")).final


def test_seeds_draw_other_streams_and_arms_share_them():
    first, second = ran("none", seeds=2).traces
    again = only_trace(ran("none", seed=1))
    np.testing.assert_array_equal(second.violation, again.violation)
    assert (first.violation != second.violation).any()
    # before anything moved
    assert ran("quantile").traces[0].violation[0] == ran("none").traces[0].violation[0]


def only_trace(result: loop.Result) -> Trace:
    (trace,) = result.traces
    return trace


# --- the command ------------------------------------------------------------------------------------------------

BAD = [
    # flags, a part of the sentence
    (["--balance=bias_sgn"], "did you mean 'bias_sign'"),
    (["--balance=bias_sign:rat=1"], "did you mean 'rate'"),
    (["--balance=bias_sign:rate"], "must have option=value after its colon, not 'rate'"),
    (["--balance=bias_sign+bias_sign"], "'bias_sign' occurs twice"),
    (["--balance=bias_sign+bias_rms"], "only one method may own the bias"),
    (["--balance=quantile", "--rates=1"], "--rates sets the rate of one method"),
    (["--balance=bias_sign", "--rates=x"], "--rates=x must have a number"),
    (["--balance=bias_sign", "--sign=2"], "--sign=2 must be 1, or -1"),
    (["--balance=bias_sign", "--experts=4"], "--top_k=8 must be at most --experts=4"),
    (["--balance=bias_sign", "--tokens=100"], "--tokens=100 must be divisible by --sequences=8"),
    (["--balance=bias_sign", "--skew=-1"], "--skew=-1.0 must be at least 0"),
    (["--balance=bias_sign", "--stream=wild"], "--stream=wild must be one of skewed"),
    (["--balance=bias_sign", "--burst=1"], "--burst is not read by --stream=skewed; choose bursty"),
    (["--balance=bias_sign", "--window=90", "--steps=100"], "--window=90 must be at most half"),
    (["--balance=bias_sign", "--seeds=0"], "--seeds=0 must be at least 1"),
    (["--balance=bias_sign", "--layer=1"], "give --scores=FOLDER"),
    (["--balance=bias_sign", "--scores=/nowhere"], "--scores=/nowhere must be a folder"),
    (["--balance=bias_sign", "--scores=/nowhere", "--experts=4"], "--experts is for synthetic streams"),
    (["--balance=bias_sign", "--out=/nowhere/a.png"], "--out=/nowhere/a.png cannot be written"),
    (["--balance=quantile", "--score=sqrt_softplus"], "scores between 0 and 1"),
    ([], "--balance is missing"),
]
# every line of argv in one process, which must not load jax
REFUSALS = """
import json, sys
from moe_jax import simulate
from moe_jax.config.command import parse_flags
from absl import flags
simulate.define_flags()
for arguments in json.loads(sys.argv[1]):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS: flags.FLAGS[name].unparse()
    try:
        parse_flags(["simulate", *arguments])
        simulate.main([])
    except SystemExit as end:
        assert end.code == 2
    assert "jax" not in sys.modules
"""


def test_bad_input_is_one_sentence_before_jax_is_loaded(repo):
    arguments = json.dumps([flags for flags, _ in BAD])
    command = [sys.executable, "-c", REFUSALS, arguments]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == len(BAD), result.stderr
    for line, (_, part) in zip(lines, BAD, strict=True):
        assert line.startswith("error: ")
        assert part in line


def test_the_command_prints_draws_and_writes(repo, tmp_path):
    command = [sys.executable, "-m", "moe_jax.simulate", "--balance=bias_sign", "--rates=0.01,0.1", "--experts=8"]
    command += ["--top_k=2", "--tokens=256", "--steps=100", "--drift=0.001", "--seeds=2"]
    files = [f"--json={tmp_path / 'a.json'}", f"--out={tmp_path / 'a.png'}"]
    result = subprocess.run(command + files, cwd=repo, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "stream drifting (skew=0.5, drift=0.001, noise=1); 2 seeds" in result.stdout
    assert "that settled: bias_sign:rate=" in result.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["balance"] for row in found["methods"]] == ["bias_sign:rate=0.01", "bias_sign:rate=0.1"]
    assert [len(row["seeds"]) for row in found["methods"]] == [2, 2]
    assert found["settings"]["stream"] == "drifting"
    assert found["threshold"] == pytest.approx(found["floor"] + 0.1)


def test_scores_of_a_run_that_selects_by_logits_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(as_dict(tiny_config(model=dict(select_by="logits")))))
    with pytest.raises(ValueError, match=r"--scores=.*scores is of a run that selects by logits"):
        simulate._of_the_run(tmp_path / "scores", set())
