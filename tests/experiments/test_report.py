"""Laws of the report: numbers equal hand-computed ones, nothing is hidden, the page is whole."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drills import rig

from experiments import report
from experiments.figures import shown_layers, smooth
from experiments.statistics import (
    Interval,
    SweepError,
    arm_settings,
    interval,
    layer_arrays,
    noise_floor,
    paired,
    planned_steps,
    read_lines,
    read_sweep,
    summarise,
)

MOE = re.compile("moe/|violation|dead")  # what a dense arm does not log
DOMAINS = ("prose", "code", "mathematics")
CONFIG: dict[str, Any] = {
    "num_steps": 1000,
    "batch_size": 16,
    "sequence_length": 256,
    "learning_rate": 1e-3,
    "model": {"num_layers": 4, "num_experts": 16, "top_k": 2, "embed": 128},
    "balance": {},
}
ARMS_CONFIG = {
    "none": {},
    "aux_loss": {"balance.aux_loss.weight": 0.01},
    "bias_sign": {"balance.bias_sign.rate": 0.001},
    "dense": {"model": {"num_experts": 0, "embed": 128}},
}


# --- synthetic logs -------------------------------------------------------------------------------------


def write_sweep(directory: Path, arms: list[str], seeds: list[int], /, **changes: Any) -> None:
    """sweep.json alone."""
    spec = {
        "name": "balance, small",
        "description": "Which way of balancing keeps the loss and evens the load?",
        "arms": arms,
        "seeds": seeds,
        "baseline": arms[0],
        "command": "python -m experiments.ablate --config=configs/small.py",
        "config": CONFIG,
        "arms_config": {arm: ARMS_CONFIG.get(arm, {}) for arm in arms},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.json").write_text(json.dumps(spec | changes))


def write_run(folder: Path, metrics: list[dict], layers: list[dict], config: dict | None = None) -> None:
    """One run's files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in layers))


def tiny_metrics(bits: float, violation: float, steps: tuple[int, ...] = (0, 250, 500, 999)) -> list[dict]:
    """Four rows whose last quarter is the last row, so every expected number is one that is written here."""
    rows = [
        {
            "step": step,
            "loss": 3.0,
            "moe/max_violation": 10 * violation if step < steps[-1] else 2 * violation,
            "moe/aux_loss": 1.5,
            "tokens_per_second": 1000.0 + step,
            "skipped": 0,
        }
        for step in steps
    ]
    rows[-1] |= {
        "eval/bits_per_byte": bits,
        "eval/bits_per_byte/prose": bits - 0.1,
        "eval/max_violation": violation,
        "eval/max_violation_worst": 1.5 * violation,
        "eval/dead_experts": 1,
    }
    return rows


def tiny_layers(steps: tuple[int, ...] = (0, 250, 500, 999)) -> list[dict]:
    """Two layers of three experts; at the end two of the six experts are dead, before that none."""
    alive, dead = [[1, 1, 1], [1, 1, 1]], [[3, 0, 0], [1, 1, 1]]
    zero = [[0.0] * 3] * 2
    return [{"step": s, "loads": dead if s == steps[-1] else alive, "bias": zero} for s in steps]


def tiny_sweep(directory: Path, bits: dict[str, list[float]], **changes: Any) -> Path:
    """An arm's list holds held-out bits per byte by seed; max violation is 1 for the first arm, 0.5 after."""
    arms = list(bits)
    write_sweep(directory, arms, list(range(max(map(len, bits.values())))), **changes)
    for i, arm in enumerate(arms):
        for seed, value in enumerate(bits[arm]):
            metrics = tiny_metrics(value, 1.0 if i == 0 else 0.5)
            write_run(directory / arm / f"seed{seed}", metrics, tiny_layers())
    return directory


def simulated_sweep(directory: Path, arms: list[str], seeds: list[int], every: int = 10) -> Path:
    """Logs that look like training: a collapsing, a lightly balanced, a bias-balanced and a dense arm."""
    write_sweep(directory, arms, seeds)
    for arm in arms:
        for seed in seeds:
            metrics, layers = simulated_run(arm, seed, every)
            folder = directory / arm / f"seed{seed}"
            write_run(folder, metrics, layers)
            info = {"versions": {"jax": "0.7.0"}, "machine": "one CPU", "git": "abc1234", "seconds": 600.0}
            info["time"] = {"init": 60.0, "step": 540.0}
            (folder / "run.json").write_text(json.dumps(info))
    return directory


def simulated_run(arm: str, seed: int, every: int, experts: int = 16, layers: int = 4) -> tuple[list, list]:
    """One run: router preferences drift, the arm's method pulls them back, loads are multinomial draws."""
    shared = np.random.default_rng(seed)  # the same for all arms: what pairing by seed cancels
    own = np.random.default_rng([seed, len(arm)])
    offset = 0.01 * shared.normal()
    taste, bias = 0.2 * shared.normal(size=(layers, experts)), np.zeros((layers, experts))
    metrics, rows = [], []
    for step in range(every - 1, CONFIG["num_steps"], every):
        taste += 0.035 * shared.normal(size=taste.shape) + (0.012 * taste if arm == "none" else 0)
        taste *= 0.93 if arm == "aux_loss" else 1.0
        share = np.exp(taste + bias) / np.exp(taste + bias).sum(axis=1, keepdims=True)
        share[share < 0.012] = 0.0
        loads = np.stack([own.multinomial(8192, s / s.sum()) for s in share])
        if arm == "bias_sign":
            bias = bias - 0.03 * np.sign(loads - loads.mean(axis=1, keepdims=True))
        metrics.append(simulated_row(arm, step, loads, offset, own, last=step + every >= CONFIG["num_steps"]))
        rows.append({"step": step, "loads": loads.tolist(), "bias": bias.round(5).tolist()})
    return metrics, [] if arm == "dense" else rows


def simulated_row(
    arm: str, step: int, loads: np.ndarray, offset: float, own: np.random.Generator, last: bool
) -> dict[str, Any]:
    """One line of metrics.jsonl; evaluation every hundred steps."""
    effect = {"none": 0.0, "aux_loss": 0.004, "bias_sign": -0.006, "dense": 0.05}.get(arm, 0.002)
    bits = 1.3 + 2.2 * math.exp(-step / 160) + offset + effect + 0.0015 * own.normal()
    violation = loads.max(axis=1) / loads.mean(axis=1) - 1
    row: dict[str, Any] = {"step": step, "loss": bits * 2.1 + 0.03 * own.normal(), "skipped": 0}
    row["tokens_per_second"] = 21000 + 400 * own.normal()
    moe = {"moe/max_violation": violation.mean(), "moe/aux_loss": 1 + 0.1 * violation.mean()}
    evaluated = {"eval/bits_per_byte": bits, "eval/max_violation": 0.9 * violation.mean()}
    evaluated |= {"eval/max_violation_worst": violation.max(), "eval/dead_experts": int((loads == 0).sum())}
    for i, domain in enumerate(DOMAINS):
        evaluated[f"eval/bits_per_byte/{domain}"] = bits + 0.2 * (i - 1) + 0.002 * own.normal()
    row |= moe | (evaluated if step % 100 == 0 or last else {})
    return {key: value for key, value in row.items() if arm != "dense" or not MOE.search(key)}


# --- intervals and readers ------------------------------------------------------------------------------


def test_interval_is_the_t_interval_of_the_mean() -> None:
    found = interval([1.0, 1.2, 1.4])  # sd 0.2, /sqrt(3), times t(0.975, 2) = 4.30265
    assert (found.mean, found.half, found.n) == (pytest.approx(1.2), pytest.approx(0.496828, abs=1e-5), 3)


def test_interval_of_one_value_has_no_width_and_of_none_no_mean() -> None:
    assert interval([2.0, math.nan]) == Interval(2.0, None, 1)
    assert not interval([2.0]).excludes_zero
    assert interval([]).n == 0


def test_pairs_only_where_both_have_the_seed() -> None:
    found = paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.7, 3: 0.0})  # differences 0.5 and 0.3
    assert (found.mean, found.n) == (pytest.approx(0.4), 2)


def test_equal_arms_are_not_distinguishable() -> None:
    assert not paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).excludes_zero


def test_noise_floor_is_that_of_a_simulated_uniform_router() -> None:
    rng = np.random.default_rng(0)  # T = 4096, E = 16, K = 2, as in CONFIG
    pairs = np.argsort(rng.random((30, 4096, 16), dtype=np.float32), axis=2)[:, :, :2].reshape(30, -1)
    loads = np.stack([np.bincount(pair, minlength=16) for pair in pairs])
    simulated = (loads.max(axis=1) / loads.mean(axis=1) - 1).mean()
    assert noise_floor(CONFIG) == pytest.approx(simulated, rel=0.1)


def test_noise_floor_needs_its_keys_and_a_choice() -> None:
    # m(2) = sqrt(2) / sqrt(pi) = 0.7979; T = 4096, K = 1: 0.7979 * sqrt(0.5 * 2 / 4096) = 0.012467
    two = CONFIG | {"model": {"num_experts": 2, "top_k": 1}}
    assert noise_floor(two) == pytest.approx(0.012467, abs=1e-5)
    assert noise_floor(CONFIG | {"model": {"num_experts": 2, "top_k": 2}}) is None
    assert noise_floor({}) is None


def test_lines_keep_the_last_of_a_step_and_leave_out_a_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5}\n{"step": 0, "loss": 9}\n{"step": 1, "loss": null}\n{"step": 2,')
    assert read_lines(path) == ([{"step": 0, "loss": 9}, {"step": 1, "loss": None}], 1)


def test_missing_layers_are_no_arrays(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0]}))
    run = sweep.runs["none"][0]
    assert layer_arrays(run)[1].shape == (4, 2, 3)
    (run.directory / "layers.jsonl").unlink()
    assert layer_arrays(run) is None


def test_arm_settings_are_the_differences_only(tmp_path: Path) -> None:
    write_sweep(tmp_path, list(ARMS_CONFIG), [0])
    sweep = read_sweep(tmp_path)
    assert arm_settings(sweep, "none") == {}
    assert arm_settings(sweep, "aux_loss") == {"balance.aux_loss.weight": 0.01}
    assert arm_settings(sweep, "dense") == {"model.num_experts": 0}  # embed is as in the base config


def test_more_layers_than_fit_are_spread_with_both_ends() -> None:
    assert shown_layers(3) == [0, 1, 2]
    assert shown_layers(15) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_smoothing_keeps_a_constant_and_skips_nan() -> None:
    assert smooth(np.array([2.0, np.nan, 2.0, 2.0]), 3).tolist() == [2.0] * 4
    assert smooth(np.array([0.0, 3.0, 6.0]), 3).tolist() == [1.5, 3.0, 4.5]  # ends average two


# --- a sweep in numbers ---------------------------------------------------------------------------------


def test_table_equals_numbers_computed_by_hand(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0, 1.2, 1.4], "aux_loss": [0.9, 1.0, 1.1]}))
    _, rows = report.main_table(sweep, summarise(sweep))
    # differences -0.1, -0.2, -0.3: mean -0.2, half 0.1 / sqrt(3) * 4.30265 = 0.2484, so 0 is inside
    # dead at the end: the last quarter of 4 rows is the last row, with 2 of 6 experts at zero
    even = ["1.000 ± 0.000", "2.000 ± 0.000", "1.500 ± 0.000", "2.0 ± 0.0", "1.0 ± 0.0", "1.500 ± 0.000"]
    half = ["0.500 ± 0.000", "1.000 ± 0.000", "0.750 ± 0.000", *even[3:]]
    assert rows[0] == ["none", "3", "1.2000 ± 0.4968", "-", *even, "1,375"]
    assert rows[1] == ["aux_loss", "3", "1.0000 ± 0.2484", "-0.2000 ± 0.2484", *half, "1,375"]


def keep_account(folder: Path, gflops: float, mfu: float | None = None, **seconds: float) -> None:
    """A run's ledger in run.json, and its rates in every line but the first."""
    (folder / "run.json").write_text(json.dumps({"time": seconds}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line |= {"gflops_per_second": gflops} | ({} if mfu is None else {"mfu": mfu})
    lines[0]["gflops_per_second"] = None  # it compiled
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_time_of_an_arms_runs_is_added_up_and_shared_out(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, {"none": [1.0, 1.2], "aux_loss": [0.9, 1.0], "old": [1.0, 1.0]})
    keep_account(
        sweep / "none" / "seed0", 10.0, init=6, compile=12, data=3, step=33, evaluation=3, checkpoint=2, lost=1
    )
    keep_account(sweep / "none" / "seed1", 30.0, init=6, compile=0, data=3, step=51, lost=0)
    keep_account(sweep / "aux_loss" / "seed0", 2048.0, mfu=0.4, step=30)
    headers, rows = report.time_table(summarise(read_sweep(sweep)))
    kinds = ["init", "compile", "data", "step", "evaluation", "checkpoint", "lost"]
    assert headers == ["arm", "minutes", *kinds, "data wait", "GFLOP/s", "MFU"]
    # 120 s: 12 init, 12 compile, 6 data, 84 step, 3 evaluation, 2 checkpoint, 1 lost; data 6 of 90
    shares = ["10.0%", "10.0%", "5.0%", "70.0%", "2.5%", "1.7%", "0.8%"]
    assert rows[0] == ["none", "2.0", *shares, "6.67%", "20.0", "-"]
    assert rows[1] == ["aux_loss", "0.5", *["0.0%"] * 3, "100.0%", *["0.0%"] * 3, "0.00%", "2,048.0", "40.0%"]
    assert len(rows) == 2  # the third arm's runs are older than the account


def test_the_page_shows_where_the_time_went_if_any_run_says_so(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.2]})
    assert "Where the time went" not in report.write(tmp_path).read_text()
    keep_account(tmp_path / "none" / "seed0", 10.0, init=1, step=3)
    assert "<td>75.0%</td>" in report.write(tmp_path).read_text().partition("Where the time went")[2]


def test_domains_are_paired_too(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0, 1.2], "aux_loss": [0.9, 1.1]}))
    headers, rows = report.domain_table(sweep, summarise(sweep))
    assert headers == ["arm", "prose"]
    assert rows[1] == ["aux_loss", "0.9000 ± 1.2706\n-0.1000 ± 0.0000 *"]


def test_answer_says_what_the_intervals_say(tmp_path: Path) -> None:
    bits = {"none": [1.0, 1.2, 1.4], "aux_loss": [0.9, 1.0, 1.1], "worse": [1.1, 1.3, 1.5]}
    sweep = read_sweep(tiny_sweep(tmp_path, bits))
    balance, quality, certainty = report.answer(sweep, summarise(sweep))
    assert "lower than none: aux_loss (0.500, difference -0.500 ± 0.000) and worse" in balance
    assert "not distinguishable from none: aux_loss (1.0000, difference -0.2000 ± 0.2484)" in quality
    assert "higher than none: worse (1.3000, difference +0.1000 ± 0.0000)" in quality
    assert quality.endswith("No arm is shown to be better than none.")
    assert "over 3 seeds" in certainty and "95 % t-interval" in certainty


def test_one_seed_has_no_interval_and_no_claim(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0], "aux_loss": [0.5]}))
    summaries = summarise(sweep)
    _, quality, certainty = report.answer(sweep, summaries)
    assert "one seed, so no interval, for aux_loss" in quality
    assert "lower than" not in quality and "One seed has no interval (n/a)" in certainty
    assert report.main_table(sweep, summaries)[1][1][2:4] == ["0.5000 ± n/a", "-0.5000 ± n/a"]


def test_baseline_can_be_another_arm(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.1], "aux_loss": [0.9, 1.0]})
    summaries = summarise(read_sweep(tmp_path, baseline="aux_loss"))
    assert summaries[0].difference.mean == pytest.approx(0.1)
    assert summaries[1].difference.n == 0


def test_missing_seed_is_named_and_its_pair_left_out(tmp_path: Path) -> None:
    sweep = read_sweep(tiny_sweep(tmp_path, {"none": [1.0, 1.2, 1.4], "aux_loss": [0.9, 1.0]}))
    assert report.remarks(sweep) == ["aux_loss, seed 2: not started (no metrics)."]
    none, aux = summarise(sweep)
    assert (none.bits_per_byte.n, aux.bits_per_byte.n, aux.difference.n) == (3, 2, 2)


def test_unfinished_diverged_and_stray_runs_are_named(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.0, 1.0], "aux_loss": [0.9]})
    write_run(tmp_path / "aux_loss/seed1", tiny_metrics(1.0, 1.0, (0, 100, 200)), [])
    diverged = tiny_metrics(1.0, 1.0)
    diverged[-1]["eval/bits_per_byte"] = None
    write_run(tmp_path / "aux_loss/seed2", diverged, [])
    write_run(tmp_path / "other/seed0", tiny_metrics(1.0, 1.0), [])
    sweep = read_sweep(tmp_path)
    assert list(sweep.runs["aux_loss"]) == [0]
    assert report.remarks(sweep) == [
        "aux_loss, seed 1: unfinished (step 200 of 1000).",
        "aux_loss, seed 2: diverged (the evaluation at step 999 is not finite); left out of every mean.",
        "other/seed0 is not named in sweep.json and was not read.",
    ]


def test_runs_of_unequal_lengths_are_finished_at_their_own_ends_and_are_compared(tmp_path: Path) -> None:
    write_sweep(tmp_path, ["wide", "narrow"], [0, 1])
    for arm, num_steps in {"wide": 4, "narrow": 8}.items():
        for seed in (0, 1):
            metrics = tiny_metrics(1.0 if arm == "wide" else 0.9, 1.0, (0, num_steps - 1))
            write_run(tmp_path / arm / f"seed{seed}", metrics, [], CONFIG | {"num_steps": num_steps})
    sweep = read_sweep(tmp_path)
    assert report.remarks(sweep) == [
        "The arms plan different numbers of steps (wide 4, narrow 8); each is compared at its own end."
    ]
    _, narrow = summarise(sweep)
    assert (narrow.difference.n, round(narrow.difference.mean, 6)) == (2, -0.1)


def test_a_run_whose_last_line_is_an_earlier_evaluation_is_unfinished(tmp_path: Path) -> None:
    # 900 + the 300 between two lines is beyond 1000, but the last evaluation is that of step 899
    write_sweep(tmp_path, ["none"], [0])
    write_run(tmp_path / "none/seed0", tiny_metrics(1.0, 1.0, (0, 299, 599, 899)), [])
    assert report.remarks(read_sweep(tmp_path)) == ["none, seed 0: unfinished (step 899 of 1000)."]


def test_a_run_that_noted_its_divergence_is_called_diverged(tmp_path: Path) -> None:
    write_sweep(tmp_path, ["none"], [0])
    write_run(tmp_path / "none/seed0", tiny_metrics(1.0, 1.0, (0, 8)), [])
    (tmp_path / "none/seed0/run.json").write_text('{"diverged": "step 8: the loss was not finite; lower something."}')
    expected = ["none, seed 0: diverged (step 8: the loss was not finite); left out of every mean."]
    assert report.remarks(read_sweep(tmp_path)) == expected


def test_unfinished_is_seen_without_a_step_count(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_steps"}
    assert planned_steps(CONFIG) == 1000 and planned_steps(config) is None
    write_sweep(tmp_path, ["none", "aux_loss"], [0], config=config)
    write_run(tmp_path / "none/seed0", tiny_metrics(1.0, 1.0), [], config)
    write_run(tmp_path / "aux_loss/seed0", tiny_metrics(1.0, 1.0, (0, 250)), [], config)
    expected = ["aux_loss, seed 0: unfinished (step 250 of 1000)."]
    assert report.remarks(read_sweep(tmp_path)) == expected


def test_skipped_steps_and_partial_lines_are_said(tmp_path: Path) -> None:
    tiny_sweep(tmp_path, {"none": [1.0]})
    path = tmp_path / "none/seed0/metrics.jsonl"
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 2') + '{"step": 751, "lo')
    assert report.remarks(read_sweep(tmp_path)) == [
        "none, seed 0: 1 unreadable line was left out.",
        "none, seed 0: 2 steps skipped, loss or gradient not finite.",
    ]


# --- the page and the command ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A report with every picture, two seeds and an arm without experts."""
    directory = simulated_sweep(tmp_path_factory.mktemp("sweep"), ["none", "bias_sign", "dense"], [0, 1], every=50)
    report.main([str(directory), "--figures"])
    return directory, (directory / "report.html").read_text(encoding="utf-8")


def test_page_refers_to_nothing_outside_itself(page: tuple[Path, str]) -> None:
    _, html = page
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]{1,40})""", html)
    assert len(links) == 6 and all(link.startswith("data:image/") for link in links)
    assert len(html) < 4_000_000
    assert "http://" not in html and "https://" not in html


def test_page_names_every_arm_seed_and_picture(page: tuple[Path, str]) -> None:
    directory, html = page
    for text in ("none", "bias_sign", "dense", "balance.bias_sign.rate = 0.001", "jax = 0.7.0"):
        assert text in html
    for heading in ("The answer", "Numbers", "Pictures", "What this does not show", "Appendix"):
        assert f"<h2>{heading}</h2>" in html
    alts = re.findall(r'<img alt="([^"]+)"', html)
    assert len(alts) == html.count("<figcaption>") == len(list((directory / "figures").glob("*.png"))) == 6


def test_page_is_well_formed(page: tuple[Path, str]) -> None:
    _, html = page
    for tag in ("table", "tr", "td", "figure", "p", "div", "ul", "li", "details", "pre"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_dense_arm_shows_dashes(page: tuple[Path, str]) -> None:
    directory, _ = page
    sweep = read_sweep(directory)
    row = report.main_table(sweep, summarise(sweep))[1][2]
    assert row[0] == "dense" and row[4:10] == ["-"] * 6
    assert "no value for dense" in report.answer(sweep, summarise(sweep))[0]


def test_names_are_escaped_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "_<script>alert('$x$ & y')[bold]"
    tiny_sweep(tmp_path, {bad: [1.0, 1.1], "aux_loss": [1.0, 1.2]}, description="<img src=x>", name="<b>&")
    report.main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<img src" not in html and "<b>&<" not in html
    assert "_&lt;script&gt;alert(&#x27;$x$ &amp; y&#x27;)[bold]" in html
    assert "[bold]" in capsys.readouterr().out


def test_a_folder_whose_name_is_no_text_is_named_on_the_page_and_the_terminal(tmp_path: Path) -> None:
    directory = tiny_sweep(tmp_path / os.fsdecode(b"caf\xe9"), {"none": [1.0, 1.1]})
    write_run(directory / os.fsdecode(b"stray\xe9") / "seed0", tiny_metrics(1.0, 1.0), [])
    command = [sys.executable, "-m", "experiments.report", str(directory)]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=strict, cwd=rig.REPO)
    assert run.returncode == 0, run.stderr
    assert r"stray\udce9/seed0 is not named in sweep.json" in (directory / "report.html").read_text()
    assert run.stdout.splitlines()[-1] == rf"Wrote {tmp_path}/caf\udce9/report.html"


def test_terminal_table_shows_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_sweep(tmp_path, {"none": [1.0, 1.2], "aux_loss": [0.9]})
    report.print_table(tmp_path)  # takes the folder, as the ablate command gives it
    out = capsys.readouterr().out
    assert "1.1000 ± 1.2706" in out and "! aux_loss, seed 1: not started (no metrics)." in out


def test_nothing_finished_is_a_sentence_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, ["none"], [0])
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    assert "must hold at least one finished run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    report.print_table(tmp_path)
    assert "! none, seed 0: not started (no metrics)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "baseline", "words"),
    [
        ({"arms": []}, None, "arms=[] must be a list with at least one entry"),
        ({"seeds": 3}, None, "seeds=3 must be a list"),
        ({}, "nothing", "baseline='nothing' must be one of the sweep's arms; try one of: none."),
    ],
)
def test_sweep_errors_are_sentences(tmp_path: Path, changes: dict, baseline: str | None, words: str) -> None:
    write_sweep(tmp_path, ["none"], [0], **changes)
    with pytest.raises(SweepError, match=re.escape(words)):
        read_sweep(tmp_path, baseline)


def test_missing_folder_and_missing_sweep_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="does not exist"):
        read_sweep(tmp_path / "nowhere")
    with pytest.raises(SweepError, match=r"must hold sweep\.json"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match="not valid JSON"):
        read_sweep(tmp_path)


def test_runs_that_read_different_data_are_named_and_the_page_shows_which_data(tmp_path: Path) -> None:
    folder = tiny_sweep(tmp_path, {"none": [2.0, 2.1], "bias": [1.9, 2.0]})
    for arm, seed, corpus in (("none", 0, "aaaa"), ("bias", 0, "bbbb"), ("none", 1, "aaaa"), ("bias", 1, "aaaa")):
        (folder / arm / f"seed{seed}" / "run.json").write_text(json.dumps({"identity": {"corpus": corpus}}))
    sweep = read_sweep(folder)
    assert sweep.problems == ["bias, seed 0: read other data than none; their difference is not of the arms."]
    assert "aaaa / bbbb" in report.render(sweep, summarise(sweep), [])
