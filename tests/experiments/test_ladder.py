"""Laws of the ladder: its sizes are what they are called, and the fit finds what made-up runs were made of."""

import json
import math

import numpy as np
import pytest
from sweeps import write_run, write_sweep

from configs import ladder as rules
from experiments import ladder
from experiments.report import read_sweep
from moe_jax.config import as_dict, validate
from moe_jax.model.cost import parts, train_flops

SIZES = ("0.05m", "0.1m", "0.2m", "0.4m")
SPEED = {"moe": 1000.0, "dense": 4000.0}  # tokens per second


@pytest.mark.parametrize("size", rules.SIZES)
def test_a_size_has_the_active_parameters_of_its_name_and_the_flops_of_its_dense_model(size):
    sparse, dense = (validate(rules.get_config(size + ending)) for ending in ("", ",dense"))
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    active = sum(part.active for part in parts(dense) if part.name not in ("embedding", "head"))
    assert active == pytest.approx(named, rel=0.15)
    assert dense.num_steps * dense.batch_size * dense.sequence_length == pytest.approx(20 * active, rel=0.05)
    assert 1 <= train_flops(sparse) / train_flops(dense) < 1.1  # the routers
    assert sparse.num_steps == dense.num_steps


def test_an_unknown_size_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"ladder.py:5m must end in one of 0\.05m, "):
        rules.get_config("5m")
    with pytest.raises(ValueError, match="with ,dense or without it"):
        rules.get_config("3m,sparse")


def made(folder, bits, sizes=SIZES, kinds=("moe", "dense"), seeds=(0, 1, 2)):
    """A sweep whose runs have `bits(kind, FLOPs, seed)` bits per byte."""
    arms = [f"{kind}_{size}" for size in sizes for kind in kinds]
    write_sweep(folder, arms, list(seeds))
    for arm in arms:
        kind, size = arm.split("_")
        config = validate(rules.get_config(size if kind == "moe" else f"{size},dense"))
        tokens = config.num_steps * config.batch_size * config.sequence_length
        for seed in seeds:
            last = {"step": config.num_steps, "tokens_per_second": SPEED[kind]}
            last["eval/bits_per_byte"] = bits(kind, train_flops(config) * tokens, seed)
            write_run(folder / arm / f"seed{seed}", [last], [], as_dict(config))
    return folder


def law(kind, flops, seed):
    """A power law, with seeds apart by 1 %."""
    return (9.0 if kind == "moe" else 10.0) * flops**-0.04 * (1 + 0.01 * (seed - 1))


def test_the_fit_finds_the_exponent_and_the_largest_size_is_inside(tmp_path):
    found = ladder.rungs(read_sweep(made(tmp_path / "ladder", law)))
    assert len(found) == 24
    for one in ladder.predictions(found):
        assert one.arm == ("moe_0.4m" if one.kind == "experts" else "dense_0.4m")
        assert one.line.slope == pytest.approx(-0.04, abs=1e-4)
        assert one.predicted == pytest.approx(one.measured.mean, rel=1e-3)
        assert one.low < one.measured.mean < one.high
        # nine runs whose residuals have a deviation of 1 % x sqrt(6 / 7); the interval is for a tenth run, farther out
        assert one.high / one.predicted > 1 + 2.36 * 0.009
        assert one.line.half > 0


def test_a_floor_that_no_line_has_leaves_the_largest_size_outside(tmp_path):
    found = ladder.rungs(read_sweep(made(tmp_path, lambda kind, flops, seed: 2 + 1e6 * flops**-0.5 + 1e-4 * seed)))
    assert all(one.measured.mean > one.high for one in ladder.predictions(found))


def test_experts_are_compared_with_dense_models_at_equal_flops_and_at_equal_time(tmp_path):
    found = ladder.rungs(read_sweep(made(tmp_path, law)))
    pairs = ladder.comparisons(found)
    assert [pair.arm for pair in pairs] == [f"moe_{size}" for size in SIZES]
    one = pairs[1]
    own = {(r.arm, r.seed): r for r in found}
    apart = [own["moe_0.1m", s].bits - own["dense_0.1m", s].bits for s in range(3)]
    assert one.equal_flops.mean == pytest.approx(np.mean(apart)) and one.equal_flops.n == 3
    # in four times the seconds the dense line is further down, so experts gain less
    assert one.equal_flops.mean < one.equal_time.mean
    seconds = [r.seconds for r in found if r.kind == "dense"]
    bits = [r.bits for r in found if r.kind == "dense"]
    slope, start = np.polyfit(np.log(seconds), np.log(bits), 1)
    expected = own["moe_0.1m", 1].bits - math.exp(start + slope * math.log(own["moe_0.1m", 1].seconds))
    assert one.equal_time.mean == pytest.approx(expected, rel=1e-6)


def test_the_command_prints_and_writes_the_numbers(tmp_path, capsys):
    folder = made(tmp_path / "ladder", law)
    ladder.main([str(folder), f"--json={tmp_path / 'ladder.json'}"])
    printed = capsys.readouterr().out
    assert "inside" in printed and "at equal time" in printed
    written = json.loads((tmp_path / "ladder.json").read_text())
    assert [one["size"] for one in written["predictions"]] == ["dense_0.4m", "moe_0.4m"]
    assert len(written["comparisons"]) == 4


def test_dense_models_alone_are_fitted_without_a_comparison(tmp_path):
    found = ladder.rungs(read_sweep(made(tmp_path, law, kinds=("dense",))))
    assert len(ladder.predictions(found)) == 1 and ladder.comparisons(found) == []


def test_too_few_sizes_are_refused(tmp_path, capsys):
    folder = made(tmp_path, law, sizes=SIZES[:2])
    with pytest.raises(SystemExit) as end:
        ladder.main([str(folder)])
    assert end.value.code == 2
    assert "DIR has finished dense models of 2 sizes, and a fit and a prediction need three" in capsys.readouterr().err


def test_a_sweep_without_a_finished_run_is_refused(tmp_path, capsys):
    write_sweep(tmp_path, ["moe_0.1m"], [0])
    with pytest.raises(SystemExit):
        ladder.main([str(tmp_path)])
    assert f"DIR={tmp_path} has no finished run; train the sweep first." in capsys.readouterr().err
