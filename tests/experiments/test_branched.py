"""Laws of branched sweeps: trunks first, branches from their kept checkpoint, resumable, and no failure spreads."""

import json
import signal
from types import SimpleNamespace

import pytest
from drills import rig

from experiments import hyper
from experiments.branched import branches_in, claim_branched, execute_branched, plan_branched, share_of, trunks_in
from experiments.progress import Progress, time_text
from experiments.runs import claim, folder_of, plan, sweep_record
from moe_jax.config import as_dict
from moe_jax.runtime import checkpoint, manifest
from moe_jax.runtime.log import read_jsonl
from moe_jax.training import loop

BASE = as_dict(rig.drill_config(save_every=0))
AT = 12
METHODS = hyper.arms(bias={}, none={"balance": {}})
SOURCE = SimpleNamespace(__file__="configs/ablation/branched.py", __doc__="Trunks and branches.")


def listed(trunk_seeds=2, seeds=2, at=AT, trunks=METHODS, arms=METHODS, **options):
    sweep = hyper.sweep
    return hyper.branches(
        hyper.product(trunks, sweep("seed", range(trunk_seeds))),
        hyper.product(arms, sweep("seed", range(seeds))),
        at=at,
        **options,
    )


def planned(folder, base=BASE, **changes):
    return plan_branched(base, listed(**changes), folder)


# --- the plan -------------------------------------------------------------------------------------------------


def test_every_arm_is_branched_from_every_trunk(tmp_path):
    parts = planned(tmp_path)
    assert [part.name for part in parts] == ["bias, seed 0", "bias, seed 1", "none, seed 0", "none, seed 1"]
    for part in parts:
        origin = f"{tmp_path}/trunks/{part.trunk.arm}/seed{part.trunk.seed}@{AT}"
        assert {run.config.branch_from for run in part.branches} == {origin}
        assert part.trunk.config.num_steps == AT
        assert [run.arm for run in part.branches] == ["bias", "bias", "none", "none"]
        assert {run.config.num_steps for run in part.branches} == {20}
    assert parts[0].branches[2].config.balance == () == parts[2].trunk.config.balance


def test_a_trunk_seed_has_data_seeds_of_its_own_unless_asked_otherwise(tmp_path):
    own = planned(tmp_path, trunks=METHODS[:1])
    assert [[run.seed for run in part.branches] for part in own] == [[0, 1, 0, 1], [1000, 1001, 1000, 1001]]
    assert own[1].branches[0].config.seed == 1000
    shared = planned(tmp_path, trunks=METHODS[:1], own_data=False)
    assert [[run.seed for run in part.branches] for part in shared] == [[0, 1, 0, 1]] * 2


def test_the_trunks_of_two_methods_have_the_same_data_seeds(tmp_path):
    seeds = {(part.trunk.arm, part.trunk.seed): [run.seed for run in part.branches] for part in planned(tmp_path)}
    assert seeds["bias", 1] == seeds["none", 1] == [1000, 1001, 1000, 1001]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(at=0), "branches at=0, which must be a whole number of steps, at least 1"),
        (dict(at=2.5), r"branches at=2\.5, which must be a whole number"),
        (dict(at=True), "branches at=True"),
        (dict(trunk_seeds=0), "lists no trunks; give h.branches at least one"),
        (dict(seeds=0), "lists no arms"),
        (dict(trunks=hyper.arms(long={"num_steps": 20})), "num_steps=20 of the trunk 'long', which must be at=12"),
        (dict(seeds=1001), "seed=1000 of the arm 'bias' must be from 0 to 999"),
        (dict(arms=hyper.arms(bad={"model.top_k": 9})), r"model\.top_k=9 must be at most"),
        (dict(arms=[{"seed": 0}]), "without an 'arm'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_any_run_starts(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        planned(tmp_path, **changes)


def test_a_branch_that_ends_before_it_begins_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_steps=20"):
        planned(tmp_path, at=20)


# --- the folder -----------------------------------------------------------------------------------------------


def claimed(folder, **changes):
    parts = planned(folder, **changes)
    return claim_branched(folder, parts, BASE, AT, SOURCE, "the command")


def test_the_folder_says_what_is_in_it_and_its_parts_are_plain_sweeps(tmp_path):
    assert claimed(tmp_path) == []
    spec = json.loads((tmp_path / "sweep.json").read_text())
    assert (spec["at"], spec["trunks"], spec["trunk_seeds"]) == (AT, ["bias", "none"], [0, 1])
    assert (spec["arms"], spec["seeds"], spec["baseline"]) == (["bias", "none"], [0, 1, 1000, 1001], "bias")
    assert spec["parts"] == [["bias", 0], ["bias", 1], ["none", 0], ["none", 1]]
    assert spec["config"] == BASE
    assert spec["trunks_config"]["bias"] == {"num_steps": AT}
    assert spec["arms_config"]["bias"] == {}
    assert all(key.startswith("balance") for key in spec["arms_config"]["none"])
    trunks = json.loads((tmp_path / "trunks" / "sweep.json").read_text())
    assert (trunks["arms"], trunks["seeds"]) == (["bias", "none"], [0, 1])
    part = json.loads((tmp_path / "branches" / "none" / "seed1" / "sweep.json").read_text())
    assert (part["arms"], part["seeds"], part["arms_config"]["bias"]) == (["bias", "none"], [1000, 1001], {})


def test_a_branched_sweep_grows_and_names_what_it_has_lost(tmp_path):
    claimed(tmp_path)
    assert claimed(tmp_path, trunk_seeds=3, seeds=3) == []
    lines = claimed(tmp_path, arms=METHODS[:1])
    assert len(lines) == 1 + 4  # the sweep, and the part of each trunk
    assert all("arm none is in" in line and "no longer in the sweep" in line for line in lines)


def test_a_folder_holds_one_kind_of_sweep(tmp_path):
    claimed(tmp_path / "branched")
    runs = plan(BASE, METHODS)
    record = sweep_record(runs, BASE, SOURCE, "")
    with pytest.raises(ValueError, match="holds a branched sweep, and get_hyper lists a plain sweep; use another"):
        claim(tmp_path / "branched", record, runs)
    claim(tmp_path / "plain", record, runs)
    with pytest.raises(ValueError, match="holds a plain sweep, and get_hyper lists a branched sweep; use another"):
        claimed(tmp_path / "plain")


def test_where_a_part_is_refused_nothing_is_written(tmp_path):
    part = branches_in(tmp_path, "none", 1)
    part.mkdir(parents=True)
    (part / "sweep.json").write_text(json.dumps({"arms": ["other"]}))
    with pytest.raises(ValueError, match="holds another sweep, with the arms other"):
        claimed(tmp_path)
    assert not (tmp_path / "sweep.json").exists() and not (tmp_path / "trunks").exists()


# --- training -------------------------------------------------------------------------------------------------


def finish(config, folder):
    """What a finished run leaves: a log that ends with an evaluation, and its last checkpoint."""
    saved = folder / "checkpoints" / f"{config.num_steps:08d}"
    saved.mkdir(parents=True, exist_ok=True)
    (saved / manifest.MANIFEST).write_text("{}")
    line = {"step": config.num_steps - 1, "eval/loss": 5.0, "eval/bits_per_byte": 7.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture
def training(monkeypatch, tmp_path):
    """`loop.run` replaced by one that leaves a finished run: (what it trained, in order; folder -> error)."""
    done, errors = [], {}

    def fake(config, folder, hooks, name):
        place = str(folder.relative_to(tmp_path))
        done.append(place)
        if place in errors:
            if isinstance(errors[place], signal.Signals):
                return loop.Outcome(3, errors[place], {})
            raise errors[place]
        finish(config, folder)
        return loop.Outcome(config.num_steps, None, {})

    monkeypatch.setattr(loop, "run", fake)
    return done, errors


def execute(folder, shard=(0, 1), discard=False, **changes):
    return execute_branched(planned(folder, **changes), folder, AT, shard, discard)


def every(folder, **changes):
    """The folders of all trunks and of all branches, in the order in which one machine trains them."""
    parts = planned(folder, **changes)
    trunks = [folder_of(trunks_in(folder), part.trunk) for part in parts]
    arms = list(dict.fromkeys(run.arm for run in parts[0].branches))
    branches = [
        folder_of(branches_in(folder, part.trunk.arm, part.trunk.seed), run)
        for arm in arms
        for part in parts
        for run in part.branches
        if run.arm == arm
    ]
    return [str(place.relative_to(folder)) for place in trunks], [str(p.relative_to(folder)) for p in branches]


def test_trunks_are_trained_first_and_the_sweep_resumes(training, tmp_path):
    done, errors = training
    trunks, branches = every(tmp_path)
    errors[branches[6]] = signal.SIGTERM
    assert execute(tmp_path) == (signal.SIGTERM, [])
    before = len(done)
    assert done == [*trunks, *branches][:before] and before == 4 + 7
    errors.clear()
    assert execute(tmp_path) == (None, [])
    assert done[before:] == branches[6:]
    assert execute(tmp_path) == (None, [])
    assert len(done) == 4 + 16 + 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 30])
def test_shards_train_every_run_once(training, tmp_path, count):
    done, _ = training
    failed = [line for i in range(count) for line in execute(tmp_path, (i, count))[1]]
    trunks, branches = every(tmp_path)
    assert failed == []  # earlier shards have trained the trunks
    assert sorted(done) == sorted(trunks + branches)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_with_as_many_trunks_as_shards_none_depends_on_another(tmp_path, count):
    parts = planned(tmp_path)
    for index in range(count):
        assert {part.name for part in share_of(parts, index, count)} == {part.name for part in parts[index::count]}


def test_a_shard_reports_branches_whose_trunk_is_not_finished_and_trains_them_when_repeated(training, tmp_path):
    done, _ = training
    stopped, failed = execute(tmp_path, (5, 8))  # 4 trunks, so this shard has none, and half the branches of the second
    assert (stopped, done) == (None, [])
    (sentence,) = failed
    assert sentence.startswith("every unfinished branch of bias, seed 1: its trunk is not finished yet")
    assert "repeat the command when it is" in sentence
    execute(tmp_path, (1, 8))
    assert execute(tmp_path, (5, 8)) == (None, [])
    assert len(done) == 1 + 2 + 2


@pytest.mark.parametrize("error", [ValueError("bad data"), FloatingPointError("step 2"), MemoryError("too large")])
def test_a_failed_trunk_fails_its_branches_by_a_sentence_and_the_others_go_on(training, tmp_path, error, capsys):
    done, errors = training
    errors["trunks/bias/seed1"] = error
    _, failed = execute(tmp_path)
    assert failed == [
        f"trunk bias, seed 1 ({tmp_path}/trunks/bias/seed1): {error}",
        f"every unfinished branch of bias, seed 1: its trunk failed ({tmp_path}/trunks/bias/seed1).",
    ]
    assert not any(place.startswith("branches/bias/seed1") for place in done)
    assert len(done) == 4 + 12
    assert capsys.readouterr().out.count("! ") == 2


def test_a_trunk_that_diverged_earlier_fails_its_branches(training, tmp_path):
    done, _ = training
    folder = tmp_path / "trunks" / "none" / "seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"diverged": "step 3: not finite."}))
    _, failed = execute(tmp_path)
    assert len(failed) == 2 and "diverged: step 3" in failed[0] and "its trunk failed" in failed[1]
    assert len(done) == 3 + 12


def test_a_failed_branch_fails_alone(training, tmp_path):
    done, errors = training
    errors["branches/none/seed0/bias/seed1"] = ValueError("no")
    _, failed = execute(tmp_path)
    place = tmp_path / "branches/none/seed0/bias/seed1"
    assert failed == [f"trunk none, seed 0, arm bias, seed 1 ({place}): no"]
    assert len(done) == 20


def test_a_trunk_whose_checkpoint_is_gone_is_named(training, tmp_path):
    done, _ = training
    (trunk, *_), _ = every(tmp_path)
    finish(planned(tmp_path)[0].trunk.config, tmp_path / trunk)
    (tmp_path / trunk / "checkpoints" / f"{AT:08d}" / manifest.MANIFEST).unlink()
    _, failed = execute(tmp_path)
    (sentence,) = failed
    assert "its trunk is finished, but its checkpoint of step 12 is gone; delete" in sentence
    assert len(done) == 3 + 12


def test_finished_branches_need_no_trunk(training, tmp_path):
    done, _ = training
    execute(tmp_path)
    for folder in (tmp_path / "trunks").glob("*/*/checkpoints/*"):
        (folder / manifest.MANIFEST).unlink()
    before = len(done)
    assert execute(tmp_path) == (None, [])
    assert len(done) == before


def test_weights_are_kept_unless_a_flag_says_so_and_those_of_trunks_always(training, tmp_path):
    _, errors = training
    trunks, branches = every(tmp_path)

    def with_weights(places):
        return [place for place in places if list((tmp_path / place / "checkpoints").glob("*"))]

    execute(tmp_path)
    assert with_weights(trunks + branches) == trunks + branches
    unfinished = branches[3]
    (tmp_path / unfinished / "metrics.jsonl").unlink()
    errors[unfinished] = ValueError("not now")
    execute(tmp_path, discard=True)
    assert with_weights(trunks) == trunks
    assert with_weights(branches) == [unfinished]
    assert all((tmp_path / place / "metrics.jsonl").is_file() for place in branches if place != unfinished)
    errors.clear()
    assert execute(tmp_path, discard=True) == (None, [])
    assert with_weights(branches) == []


# --- progress -------------------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_the_steps_left_at_the_rate_so_far(capsys):
    now = [100.0]
    progress = Progress([10, 0, 20, 30], clock=lambda: now[0])
    now[0] += 60
    assert progress.next() == "1 of 4 runs done, about 5 min left"  # 50 steps at 6 s
    assert progress.next() == ""  # it was done already
    now[0] += 60
    assert progress.next() == "3 of 4 runs done, about 2 min left"  # 30 steps at 4 s
    assert progress.next() == ""
    assert capsys.readouterr().out.count("runs done") == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (3569, "59 min"), (3600, "1 h 00 min"), (11100, "3 h 05 min")],
)
def test_a_time_as_text(seconds, text):
    assert time_text(seconds) == text


def test_the_command_says_how_long_the_others_will_take(training, tmp_path, capsys):
    execute(tmp_path)
    out = capsys.readouterr().out
    assert "1 of 20 runs done, about 0 s left" in out and "19 of 20 runs done" in out


# --- the command ----------------------------------------------------------------------------------------------

FILE = """'''Trunks and branches in small.'''
from moe_jax.config import default


def get_config(arg=""):
    return default(**{base!r})


def get_hyper(h):
    methods = h.arms(often={{"log_every": 1}}, seldom={{"log_every": 2}})
    return {returned}
"""


def ablate(tmp_path, returned, *flags):
    file = tmp_path / "small.py"
    file.write_text(FILE.format(base=BASE, returned=returned))
    command = rig.Command("experiments.ablate", tmp_path / "log", f"--config={file}", *flags)
    return command.wait(), command


def test_a_plain_sweep_refuses_to_discard_weights(tmp_path):
    status, command = ablate(tmp_path, "methods", f"--workdir={tmp_path / 'sweep'}", "--discard_weights")
    text = command.text
    assert status == 2
    assert "--discard_weights is for branched sweeps, and get_hyper lists a plain one" in text
    assert not (tmp_path / "sweep").exists()


def test_the_command_trains_trunks_then_branches_and_reports(tmp_path):
    folder = tmp_path / "sweep"
    returned = "h.branches(methods[:1], methods, at=12)"
    status, command = ablate(tmp_path, returned, f"--workdir={folder}", "--discard_weights")
    text = command.text
    assert status == 0, text
    assert checkpoint.committed(folder / "trunks/often/seed0/checkpoints") == [AT]
    assert set(command.compilations) == {1}
    for arm in ("often", "seldom"):
        branch = branches_in(folder, "often", 0) / arm / "seed0"
        steps = [line["step"] for line in read_jsonl(branch / "metrics.jsonl")]
        assert (steps[0], steps[-1]) == (AT, 19)
        assert not (branch / "checkpoints").exists()
    assert "trunk's favour" in text and f"report: {folder}/report.html" in text
    assert "1 of 3 runs done, about" in text
