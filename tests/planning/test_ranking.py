"""The time of a step predicted from its config, against real compilations, and the order that a search follows from it.

A file of `compiled/`, which `record.py` makes, has what one compilation exchanged: seconds by kind, the sum of every
exchange alone on its links, and the seconds of its schedule.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from chips import chips

from moe_jax.config import MeshConfig, resolve, validate
from moe_jax.config.command import load
from moe_jax.mesh import make_mesh
from moe_jax.planning import ranking, search
from moe_jax.planning.ranking import predict
from moe_jax.planning.topology import parse_topology

FILES = sorted((Path(__file__).parent / "compiled").glob("*.json"))
GRADIENTS = {"reduce-scatter", "all-reduce"}  # XLA chooses between the two, and sums small gradients together


def recorded(file):
    """A compilation: its config, mesh, topology and figures."""
    known = json.loads(file.read_text())
    topology = parse_topology(known["topology"])
    config = validate(load(Path(__file__).parents[2] / known["config"]).get_config())
    model = dataclasses.replace(config.model, remat=known["remat"], remat_keep=tuple(known["remat_keep"]))
    config = dataclasses.replace(config, mesh=MeshConfig(expert=known["expert"]), model=model)
    devices = chips(known["topology"])
    return resolve(config, len(devices), "tpu"), make_mesh(config.mesh, devices), topology, known


def by_kind(seconds):
    """Seconds of rows, of weights, and of their gradients."""
    gradients = sum(s for kind, s in seconds.items() if kind in GRADIENTS)
    return {kind: s for kind, s in seconds.items() if kind not in GRADIENTS} | {"gradients": gradients}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_exchanges_are_predicted_to_five_percent_a_kind(file):
    config, mesh, topology, known = recorded(file)
    found = by_kind(known["seconds"])
    large = {kind: s for kind, s in found.items() if s > 0.01 * sum(found.values())}
    predicted = by_kind(predict(config, mesh, topology).exchanges)
    assert predicted == pytest.approx(large, rel=0.05)


def test_rows_that_are_kept_are_not_exchanged_again():
    config, mesh, topology, _ = recorded(next(file for file in FILES if "deepseek_v3" in file.stem))

    def with_names(*names):
        model = dataclasses.replace(config.model, remat="names", remat_keep=names)
        return predict(dataclasses.replace(config, model=model), mesh, topology)

    other, rows = with_names("residual"), with_names("rows")
    model = dataclasses.replace(config.model, remat="full")
    full = predict(dataclasses.replace(config, model=model), mesh, topology)
    assert full.exchanges == other.exchanges
    assert rows.exchanges["all-to-all"] == pytest.approx(0.8 * full.exchanges["all-to-all"])
    assert with_names("attention").compute < full.compute == rows.compute
    assert with_names("hidden").compute < full.compute


@pytest.mark.parametrize(("remat", "gathers"), [("none", 2), ("names", 2), ("full", 3)])
def test_gathered_tokens_are_predicted_by_the_group(remat, gathers):
    config, mesh, *_ = recorded(next(file for file in FILES if file.stem == "qwen3_expert_8"))
    kept = ("rows", "attention", "residual")
    model = dataclasses.replace(config.model, dispatch="gathered", remat=remat, remat_keep=kept)
    # a device has 1/256 of the batch's tokens, and its group of 8 all of theirs, of 2048 numbers of two bytes
    group = 8 * config.batch_size * config.sequence_length // config.micro_batches // 256 * 2048 * 2
    by_kind = {
        c.kind: (c.bytes, n // config.micro_batches)
        for c, n in ranking.expected(dataclasses.replace(config, model=model), mesh).items()
        if c.bytes == group
    }
    assert by_kind == {"all-gather": (group, gathers * 48), "reduce-scatter": (group, 2 * 48)}


@pytest.mark.parametrize(("remat", "more"), [("none", 1), ("names", 1), ("full", 6 / 5)])
def test_rows_of_a_latent_take_as_much_less_time_as_they_are_narrower(remat, more):
    # a backward pass that keeps nothing repeats both exchanges of the forward pass, and without a latent one
    config, mesh, topology, _ = recorded(next(file for file in FILES if "deepseek_v3" in file.stem))

    def rows(latent):
        model = dataclasses.replace(config.model, remat=remat, latent_dim=latent)
        return predict(dataclasses.replace(config, model=model), mesh, topology).exchanges["all-to-all"]

    assert rows(7168 // 4) == pytest.approx(rows(0) / 4 * more)


def test_there_are_compilations_of_several_meshes():
    assert len({(known["topology"], known["expert"]) for known in (json.loads(f.read_text()) for f in FILES)}) >= 3


def test_the_order_of_predictions_is_that_of_the_compiled_schedules():
    same = [one for one in map(recorded, FILES) if one[3]["config"] == "configs/qwen3_30b_a3b.py"]
    assert len(same) > 1
    predicted = sorted(same, key=lambda one: predict(*one[:3]).seconds)
    assert predicted == sorted(same, key=lambda one: one[3]["scheduled"])


@pytest.fixture
def searched(monkeypatch):
    """The trials of a search over three meshes, of which none is compiled: [(expert, verdict)], and their devices."""
    config, _, topology, _ = recorded(next(file for file in FILES if "qwen" in file.stem))
    sizes = {1: 3.0, 2: 1.0, 4: 2.0, 8: 4.0}  # by `expert`, the seconds that are predicted

    def on(expert):
        return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert=expert, tensor=1))

    def run(best, fits=lambda expert: True):
        monkeypatch.setattr(search, "topology_devices", lambda topology: [])
        monkeypatch.setattr(search, "meshes", lambda config, devices: [on(expert) for expert in sizes])
        monkeypatch.setattr(
            "moe_jax.mesh.make_mesh", lambda mesh, devices: SimpleNamespace(shape={"expert": mesh.expert})
        )
        monkeypatch.setattr(search, "state_bytes", lambda config, mesh: (0, 0, 0))
        monkeypatch.setattr(
            search, "predict", lambda config, mesh, topology: ranking.Prediction(sizes[config.mesh.expert], {}, {})
        )
        monkeypatch.setattr(search, "plan_on", lambda config, topology, mesh: {"fits": fits(mesh.shape["expert"])})
        return list(search.search(config, topology, 1.0, best))

    return run


def test_a_search_compiles_only_as_many_meshes_as_it_is_asked_for_the_fastest_first(searched):
    trials = searched(best=2)
    assert [(t.mesh["expert"], t.verdict) for t in trials] == [
        (2, "fits"),
        (4, "fits"),
        (1, "not compiled"),
        (8, "not compiled"),
    ]
    assert [t.predicted for t in trials] == [1.0, 2.0, 3.0, 4.0]


def test_a_mesh_that_does_not_fit_is_no_answer(searched):
    trials = searched(best=1, fits=lambda expert: expert == 1)
    tried = {t.mesh["expert"] for t in trials if t.verdict != "not compiled"}
    assert tried == {2, 4, 1}
