"""The identity of a run: its numbers, its data and its initial weights, each by content."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from drills import rig

from experiments import runs
from moe_jax import evaluate
from moe_jax.analysis.observer import observers
from moe_jax.analysis.specialisation import stored_steps
from moe_jax.config import as_dict, changed_numbers, keys_that_change, validate
from moe_jax.data.prepare import main as prepare
from moe_jax.runtime.log import read_jsonl
from moe_jax.runtime.workdir import config_of_run
from moe_jax.training.loop import run

SHORT = dict(num_steps=4, save_every=2)
WORDS = ["a cat sat on a mat", "the dog ran to the sea", "rain fell on the town", "he saw ten ships", "no one knew why"]


def texts(folder, seed=0, domains=("one", "two")):
    """A prepared corpus of two domains, whose text depends on the seed."""
    draw = np.random.default_rng(seed)
    for domain in domains:
        (folder / "text" / domain).mkdir(parents=True)
        for number in range(8):
            lines = draw.choice(WORDS, 40)
            (folder / "text" / domain / f"{number}.txt").write_text("\n".join(lines))
    output = folder / "prepared"
    prepare([f"--input={folder / 'text'}", f"--output={output}"])
    return output


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora with different text."""
    folder = tmp_path_factory.mktemp("corpora")
    return [texts(folder / str(seed), seed) for seed in range(2)]


def config(path="", **overrides):
    return rig.drill_config(**(SHORT | dict(data=dict(path=str(path), eval_sequences=4)) | overrides))


# --- the config -----------------------------------------------------------------------------------------------

OTHER = {
    "batch_size": 16,
    "seed": 1,
    "num_steps": 5,
    "sequence_length": 32,
    "log_every": 3,
    "save_every": 1,
    "micro_batches": 2,
    "mesh.data": 4,
    "data.path": "elsewhere",
    "data.eval_sequences": 9,
    "data.verify": "full",
    "init_from": "elsewhere",
    "branch_from": "elsewhere@3",
    "model.remat": "full",
    "model.cpu_kernel": "xla",
    "model.dispatch": "local",
    "model.top_k": 3,
    "model.compute_dtype": "bfloat16",
    "optimizer.learning_rate": 0.5,
    "checkpoint.keep": 5,
    "compiler_options": {"xla_cpu_enable_fast_math": "true"},
    "data.weights": {"austen": 1.0},
    "data.packing": "best_fit",
    "balance": {},
}


def with_key(config, key, value):
    return validate(runs.override(as_dict(config), {key: value}))


@pytest.mark.parametrize("key", OTHER)
def test_only_keys_that_change_numbers_are_fixed_for_a_run(key):
    before = config(balance=dict(bias_sign={}))
    after = with_key(before, key, OTHER[key])
    assert before != after
    free = key in keys_that_change("speed", "nothing")
    assert bool(changed_numbers(before, after)) != free


@pytest.mark.parametrize(
    ("overrides", "binds"),
    [
        (dict(balance=dict(bias_sign={})), False),
        (dict(balance=dict(aux_loss=dict(scope="sequence"))), False),
        (dict(balance=dict(aux_loss=dict(scope="global"))), False),
        (dict(balance=dict(aux_loss=dict(scope="microbatch"))), True),
        (dict(balance=dict(aux_loss=dict(scope="global_running"))), True),
        (dict(balance=dict(sinkhorn={})), True),
        (dict(balance=dict(random={})), True),
        (dict(balance={}, model=dict(router_jitter=0.1)), True),
        (dict(balance={}, model=dict(random_second=True)), True),
        (dict(balance={}, model=dict(dispatch="capacity")), False),
    ],
)
def test_micro_batches_are_fixed_for_a_run_if_results_depend_on_them(overrides, binds):
    one, two = (config(micro_batches=n, **overrides) for n in (1, 2))
    assert bool(changed_numbers(one, two)) == binds


def test_dispatch_and_its_capacity_are_fixed_for_a_run_that_drops_tokens():
    dropless = config(model=dict(dispatch="rounds"))
    dropping = config(model=dict(dispatch="capacity"))
    roomier = config(model=dict(dispatch="capacity", capacity_factor=2.0))
    assert changed_numbers(dropless, config(model=dict(dispatch="local", capacity_factor=2.0))) == []
    assert changed_numbers(dropless, dropping) == ["model.dispatch: 'rounds' -> 'capacity'"]
    assert changed_numbers(dropping, roomier) == ["model.capacity_factor: 1.25 -> 2.0"]


def test_a_run_resumes_with_another_number_of_micro_batches_up_to_rounding(tmp_path):
    balance = dict(bias_sign=dict(rate=1e-2))
    run(config(balance=balance), tmp_path / "one", quiet=True)
    run(config(balance=balance), tmp_path / "two", stop_at=2, quiet=True)
    run(config(balance=balance, micro_batches=4), tmp_path / "two", quiet=True)
    rig.assert_close_curves(tmp_path / "two", tmp_path / "one")


# --- the data -------------------------------------------------------------------------------------------------


def test_other_data_at_the_same_path_are_refused_and_the_run_is_unchanged(corpora, tmp_path):
    shutil.copytree(corpora[0], tmp_path / "data")
    run(config(tmp_path / "data"), tmp_path / "run", stop_at=2, quiet=True)
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(corpora[1], tmp_path / "data")
    before = rig.folders(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"has other data \(fingerprint \w+\) than the run in .* reads"):
        run(config(tmp_path / "data"), tmp_path / "run", quiet=True)
    assert (rig.folders(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()) == before


def test_a_checkpoint_identifies_its_data_if_run_json_is_gone(corpora, tmp_path):
    run(config(corpora[0]), tmp_path, stop_at=2, quiet=True)
    for name in ("run.json", "config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"than the checkpoint in .* reads"):
        run(config(corpora[1]), tmp_path, quiet=True)


def test_a_run_resumes_when_its_data_were_moved(corpora, tmp_path):
    shutil.copytree(corpora[0], tmp_path / "here")
    run(config(tmp_path / "here"), tmp_path / "run", stop_at=2, quiet=True)
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(config(tmp_path / "there"), tmp_path / "run", quiet=True).step == 4
    assert config_of_run(tmp_path / "run").data.path == str(tmp_path / "there")


def test_processes_that_read_different_data_are_refused_before_the_first_step(corpora, tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "data").symlink_to(corpora[number])
    file = rig.write_config(tmp_path / "config.py", config("data", mesh=dict(data=2)))
    folders = [tmp_path / "0", tmp_path / "1"]
    with rig.Processes(file, tmp_path / "run", devices=(1, 1), folders=folders) as processes:
        statuses = processes.wait()
    assert statuses == [2, 2], processes.text
    assert "holds other data in process 1" in processes.text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- the weights it started from ------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """A run of two steps that started from the weights in tmp_path/source."""
    run(config(), tmp_path / "source", stop_at=2, quiet=True)
    there = config(init_from=str(tmp_path / "source"))
    run(there, tmp_path / "run", stop_at=2, quiet=True)
    return there


def test_a_run_resumes_without_the_weights_it_started_from(started, tmp_path, capsys):
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert run(started, tmp_path / "run").step == 4
    assert "no longer has the weights that this run started from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "elsewhere"])
def test_init_from_may_be_empty_or_gone_when_a_run_is_resumed(started, tmp_path, name):
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    moved = dataclasses.replace(started, init_from=name and str(tmp_path / name))
    assert run(moved, tmp_path / "run", quiet=True).step == 4


def test_other_weights_than_a_run_started_from_are_refused(started, tmp_path):
    run(config(seed=7), tmp_path / "other", stop_at=2, quiet=True)
    other = dataclasses.replace(started, init_from=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"has other weights than the run in .* started from"):
        run(other, tmp_path / "run", quiet=True)
    drawn = config(seed=7, init_from=str(tmp_path / "source"))
    with pytest.raises(ValueError, match=r"has other weights than the run in .* started from"):
        run(drawn, tmp_path / "other", quiet=True)


def test_a_run_resumes_while_the_run_that_it_started_from_continues(started, tmp_path):
    trained = config(checkpoint=dict(keep=1))
    assert run(trained, tmp_path / "source", quiet=True).step == 4
    assert run(started, tmp_path / "run", quiet=True).step == 4


def test_the_fine_tuning_command_resumes_without_the_weights(repo, tmp_path):
    run(config(), tmp_path / "source", stop_at=2, quiet=True)
    flags = ("--config.num_steps=4", "--config.optimizer.warmup_steps=1", "--config.data.eval_sequences=2")
    command = (repo / "configs" / "from_checkpoint.py", tmp_path / "run", *flags)
    rig.train(Path(f"{command[0]}:{tmp_path / 'source'}"), *command[1:], "--stop_at=2")
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert (
        "is gone; the config is that of the run"
        in rig.train(Path(f"{command[0]}:{tmp_path / 'source'}"), *command[1:]).text
    )
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) >= 1
    assert rig.folders(tmp_path / "run")[-1] == "00000004"


# --- workdirs of earlier versions -----------------------------------------------------------------------------


@pytest.fixture
def legacy(repo, tmp_path):
    """A run of 2 of 4 steps and a sweep with one of its two runs, made before runs had identities."""
    with tarfile.open(repo / "tests" / "legacy" / "before_identities.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_of_an_earlier_version_resumes(repo, legacy):
    file = repo / "tests" / "legacy" / "config.py"
    rig.train(file, legacy / "run")
    assert [record["step"] for record in read_jsonl(legacy / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert json.loads((legacy / "run" / "run.json").read_text())["identity"]["corpus"]


def test_a_run_of_an_earlier_version_is_identified_by_the_path_of_its_data(corpora, legacy):
    there = config_of_run(legacy / "run")
    moved = dataclasses.replace(there, data=dataclasses.replace(there.data, path=str(corpora[0])))
    with pytest.raises(ValueError, match=r"than the run in .* reads, which has ''"):
        run(moved, legacy / "run", quiet=True)


def test_a_sweep_of_an_earlier_version_resumes(repo, legacy):
    finished = (legacy / "sweep" / "none" / "seed0" / "metrics.jsonl").read_bytes()
    file = repo / "tests" / "legacy" / "config.py"
    command = rig.Command("experiments.ablate", legacy / "log", f"--config={file}", f"--workdir={legacy / 'sweep'}")
    assert command.wait() == 0, command.text
    assert (legacy / "sweep" / "none" / "seed0" / "metrics.jsonl").read_bytes() == finished
    assert len(read_jsonl(legacy / "sweep" / "bias" / "seed0" / "metrics.jsonl")) == 4


# --- evaluation -----------------------------------------------------------------------------------------------


def test_an_evaluation_on_other_data_than_the_run_was_trained_on_reports_it(corpora, tmp_path, capsys):
    run(config(corpora[0]), tmp_path, stop_at=2, quiet=True)
    evaluate.run(config(corpora[0]), tmp_path)
    assert "the text is other data" not in capsys.readouterr().out
    evaluate.run(config(corpora[1]), tmp_path)
    assert "the text is other data" in capsys.readouterr().out


def test_the_number_of_held_out_sequences_may_change_and_stored_routing_stays_comparable(corpora, tmp_path):
    measured = dict(measure_every=1, eval_every=2)
    first = config(corpora[0], **measured)
    run(first, tmp_path, hooks=observers(first), stop_at=2, quiet=True)
    more = dict(path=str(corpora[0]), eval_sequences=8)
    run(config(**measured, data=more), tmp_path, hooks=observers(first), quiet=True)
    assert stored_steps(tmp_path) == [4]
    assert [file.name for file in (tmp_path / "routing").glob("*/*.npy")] == ["2.npy"]
