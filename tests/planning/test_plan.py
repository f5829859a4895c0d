"""The plan command: its counts, against the model's own arithmetic, and one sentence for every mistake."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.planning import compile
from moe_jax.planning import report as report_
from moe_jax.planning.baseline import grown, read_baseline
from moe_jax.planning.collectives import Collective
from moe_jax.planning.cost import NOTHING
from moe_jax.planning.topology import Place, Topology, exchange, parse_topology
from moe_jax.runtime.chips import CHIPS

V5E, V5P = CHIPS["v5e"], CHIPS["v5p"]
BASELINE = Path(__file__).parent / "baselines" / "cpu_8.json"
SMALL = ["--config.model.num_layers=2", "--config.sequence_length=32", "--config.batch_size=8"]


def run(repo, *arguments, config="configs/deepseek_v3_mini.py", **environment):
    command = [sys.executable, "-m", "moe_jax.plan", f"--config={config}", *arguments]
    return subprocess.run(command, cwd=repo, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report(repo, tmp_path_factory):
    """A plan for eight local devices, four of them on the expert axis, beside a baseline of half its FLOPs."""
    folder = tmp_path_factory.mktemp("plan")
    half = json.loads(BASELINE.read_text())
    half["flops_per_step"]["compiled"] /= 2
    (folder / "half.json").write_text(json.dumps(half))
    files = [f"--json={folder / 'plan.json'}", f"--baseline={folder / 'half.json'}", "--tolerance=0.5"]
    result = run(repo, "--topology=cpu:8", "--config.mesh.expert=4", *files, *SMALL)
    assert result.returncode == 1, result.stderr
    return json.loads((folder / "plan.json").read_text()) | {"printed": result.stdout, "errors": result.stderr}


# --- counts -----------------------------------------------------------------------------------------------------


def test_the_plan_names_what_it_compiled(report):
    assert report["chips"] == 8
    assert report["mesh"] == {"replica": 1, "data": 2, "expert": 4, "sequence": 1, "tensor": 1}
    assert report["tokens_per_step"] == 8 * 32
    assert report["compile_seconds"] > 0


def test_bytes_of_the_state_follow_from_its_sharding(report):
    memory = report["bytes_per_chip"]
    # two float32 moments for a float32 parameter, sharded like it, and Adam's count
    assert memory["optimizer"] == 2 * memory["parameters"] + 4
    # two MoE layers, one of them of multi-token prediction, of 16 experts: float32, and the sign of its move
    assert memory["bias_and_balance"] == 2 * (4 + 1) * 16
    known = ("parameters", "optimizer", "bias_and_balance", "batch_and_results", "activations", "temporaries", "code")
    assert memory["total"] >= sum(memory[key] for key in known)
    assert all(memory[key] >= 0 for key in known)


def test_compiled_flops_are_near_the_ideal(report):
    f = report["flops_per_step"]
    assert f["ideal"] == 6 * f["active_parameters"] * report["tokens_per_step"]
    # above it: attention over the full square, room in the rounds, a round and the vectors of routing computed twice
    assert 1.0 < f["compiled_over_ideal"] < 2.5
    assert sum(f["compiled_by_phase"].values()) == pytest.approx(f["compiled"])
    assert sum(f["compiled_by_origin"].values()) == pytest.approx(f["compiled"])


def test_tokens_travel_over_the_expert_axis(report):
    exchanges = [row for row in report["collectives"] if row["kind"] == "all-to-all"]
    assert [row["axes"] for row in exchanges] == [["expert"]]
    # loads; then copies and results, to the experts and back, forward and backward
    assert exchanges[0]["count"] >= 1 + 2 + 2
    assert all(row["seconds"] is None and row["sent"] > 0 for row in report["collectives"])


def test_roofs_are_not_known_without_a_chip(report):
    assert report["fits"] is report["seconds"] is report["mfu_bound"] is report["bound_by"] is None
    assert report["schedule"] is report["links"] is None
    assert "roofs: not known" in report["printed"]


def test_assumptions_are_reported(report):
    assert any("balanced" in line for line in report["assumptions"])
    assert report["not_counted"]["untaken_branches"]["flops_per_chip"] > 0  # further rounds
    assert report["not_counted"]["loops_of_unknown_length"] == []


def test_a_plan_that_has_grown_ends_the_command_with_a_sentence(report):
    assert report["errors"].startswith("error: FLOPs grew from ")
    assert report["errors"].count("\n") == 1


def test_the_plan_has_not_grown_since_it_was_last_recorded(report):
    # if a change makes it grow for a reason, write the file anew: --json=tests/planning/baselines/cpu_8.json
    has_not_grown(report, BASELINE, Topology("cpu", (8,)))


def has_not_grown(report, file, topology):
    baseline = read_baseline(file, topology)
    if baseline["versions"] != report["versions"]:
        pytest.skip("recorded with other versions, whose compiler differs")
    assert grown(report, baseline, 0.02) == []


def test_the_plan_says_how_often_to_save(report):
    assert f"save_every_seconds={report['saving']['interval_seconds']:.0f} loses least" in report["printed"]


def test_a_search_tries_the_meshes_that_divide(repo, tmp_path):
    file = tmp_path / "search.json"
    tiny = ["--config.model.num_layers=1", "--config.sequence_length=16", "--config.batch_size=2"]
    result = run(repo, "--topology=cpu:2", "--search", f"--json={file}", *tiny, config="configs/dense.py")
    assert result.returncode == 0, result.stderr
    trials = json.loads(file.read_text())
    tried = [tuple(t["mesh"][axis] for axis in ("data", "expert", "tensor")) for t in trials]
    assert sorted(tried) == [(1, 1, 2), (1, 2, 1), (2, 1, 1)]
    assert {t["remat"] for t in trials} == {"none"}  # it fits, and the others recompute more
    assert "tried, best first" in result.stdout


# --- roofs, by hand ---------------------------------------------------------------------------------------------


def collective(kind, size, group):
    return Collective(kind, size, tuple(group), False, "", "")


def torus(*dims):
    return [Place(0, tuple(int(n) for n in at)) for at in np.ndindex(*dims)]


def test_a_gather_around_a_ring_uses_both_directions():
    # a row of 16 x 16: (n - 1) / n of the bytes over two links
    seconds = exchange(collective("all-gather", 160e6, range(16)), torus(16, 16), Topology("v5e", (16, 16))).seconds
    assert seconds == pytest.approx(150e6 / (2 * V5E.link))


def test_a_gather_along_a_line_has_one_link_at_its_end():
    # 8 does not close to a ring on v5e
    seconds = exchange(collective("all-gather", 80e6, range(8)), torus(8, 8), Topology("v5e", (8, 8))).seconds
    assert seconds == pytest.approx(70e6 / V5E.link)


def test_a_group_that_spans_two_dimensions_uses_the_links_of_both():
    everybody = range(256)
    one = exchange(collective("all-reduce", 256e6, everybody), torus(16, 16), Topology("v5e", (16, 16))).seconds
    assert one == pytest.approx(2 * 255e6 / (4 * V5E.link))


def test_members_that_are_apart_share_their_links_with_those_between():
    # every fourth chip of a ring of 16: each link carries four groups
    group = (0, 4, 8, 12)
    seconds = exchange(collective("all-gather", 40e6, group), torus(1, 16), Topology("v5e", (1, 16))).seconds
    assert seconds == pytest.approx(30e6 / (2 * V5E.link / 4))


def test_an_all_to_all_is_limited_by_its_busiest_link():
    # half of what 8 chips put in leaves for the other half of the ring, by the two links at either end
    seconds = exchange(collective("all-to-all", 16e6, range(16)), torus(16, 16), Topology("v5e", (16, 16))).seconds
    assert seconds == pytest.approx(8 * 16e6 / 2 / 2 / V5E.link)
    # a line has one link in its middle
    line = exchange(collective("all-to-all", 8e6, range(8)), torus(8, 8), Topology("v5e", (8, 8))).seconds
    assert line == pytest.approx(4 * 8e6 / 2 / V5E.link)
    # 4 x 4 x 4 of a v5p: 32 chips send half of theirs over the 2 x 16 links between the halves
    cube = exchange(collective("all-to-all", 64e6, range(64)), torus(4, 4, 4), Topology("v5p", (4, 4, 4))).seconds
    assert cube == pytest.approx(32 * 64e6 / 2 / 32 / V5P.link)


def test_between_slices_the_data_centre_network_counts():
    places = [Place(n // 4, (n % 4,)) for n in range(8)]
    topology = Topology("v5e", (4,), slices=2)
    seconds = exchange(collective("all-reduce", 8e6, (0, 4)), places, topology).seconds
    assert seconds == pytest.approx(2 * 8e6 / 2 / V5E.dcn)


def test_there_is_no_time_without_a_chip_and_none_needed_alone():
    assert exchange(collective("all-gather", 8, (0, 1)), [Place(0, (0,))] * 2, Topology("cpu", (2,))) is None
    assert exchange(collective("all-gather", 8, (0,)), [Place(0, (0,))], Topology("v5e", (1, 1))).seconds == 0.0


def test_axes_are_those_along_which_a_group_differs():
    mesh = SimpleNamespace(devices=np.zeros((1, 2, 4, 2)), axis_names=("replica", "data", "expert", "tensor"))
    assert report_.group_axes((0, 2, 4, 6), mesh) == ("expert",)
    assert report_.group_axes((0, 8), mesh) == ("data",)
    assert report_.group_axes((0, 1, 8, 9), mesh) == ("data", "tensor")


def test_the_roof_of_the_links_is_the_busiest_dimension():
    # 4 x 4 rings: 1 s of exchanges along x twice, 1.5 s along y
    rows, columns = (collective("all-gather", size * 2 * V5P.link / 3 * 4, group) for size, group in GATHERS)
    cost = NOTHING._replace(
        flops=Counter({"": 2 * V5P.flops}), hbm=V5P.hbm_bandwidth, collectives=Counter({rows: 2, columns: 1})
    )
    seconds, links = report_.roofs(cost, torus(4, 4, 1), Topology("v5p", (4, 4, 1)))
    assert seconds == pytest.approx({"compute": 2.0, "hbm": 1.0, "interconnect": 2.0})
    assert links["busy"] == pytest.approx({"x": 2.0, "y": 1.5})
    assert links["one_after_another"] == pytest.approx(3.5)


GATHERS = ((1.0, (0, 4, 8, 12)), (1.5, (0, 1, 2, 3)))


def test_the_network_between_slices_is_a_roof_of_its_own():
    # half of what two slices gather leaves a slice, over the one chip of the group in it
    cost = NOTHING._replace(collectives=Counter([collective("all-gather", 6 * V5P.dcn, (0, 1))]))
    seconds, links = report_.roofs(cost, [Place(0, (0, 0, 0)), Place(1, (0, 0, 0))], Topology("v5p", (1, 1, 1), 2))
    assert seconds == pytest.approx({"compute": 0.0, "hbm": 0.0, "interconnect": 0.0, "across slices": 3.0})
    assert links["busy"] == {}


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "family", "dims", "slices"),
    [
        ("v5p:8x16x16", "v5p", (8, 16, 16), 1),
        ("2xv5e:16x16", "v5e", (16, 16), 2),
        ("cpu:8", "cpu", (8,), 1),
        ("v5litepod:4x4", "v5e", (4, 4), 1),
        ("Trillium:16x16", "v6e", (16, 16), 1),
        ("h100:2x8", "h100", (2, 8), 1),
    ],
)
def test_topologies_are_read(text, family, dims, slices):
    assert parse_topology(text) == Topology(family, dims, slices)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v5p", "is not a topology; write FAMILY:SHAPE"),
        ("v5e:axb", "is not a topology"),
        ("v9:4x4", "names no known family of chips; choose v4, v5e, v5p, v6e, tpu7x, h100, b200, gb200 or cpu"),
        ("h100:16", "must give 2 positive sizes; write h100:HOSTSxGPUS"),
        ("h100:2x16", "has 16 GPUs a host, but a host of this family has at most 8; write h100:HOSTSx8."),
        ("gb200:20x4", "has 20 hosts, but NVLink joins 18 of them to a domain; choose at most 18 hosts or a multiple."),
        ("2xh100:2x8", "gives slices, which GPUs do not have; write h100:HOSTSxGPUS."),
        ("v5p:8x16", "must give 3 positive sizes; write v5p:AxBxC"),
        ("v5e:0x4", "must give 2 positive sizes; write v5e:AxB"),
        ("v5e:4x", "must give 2 positive sizes"),
        ("cpu:2x4", "must give 1 positive size; write cpu:N"),
        ("2xcpu:4", "must give 1 positive size; write cpu:N"),
    ],
)
def test_a_wrong_topology_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=f"^--topology={text} ") as error:
        parse_topology(text)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_topology_ends_the_command_with_status_2(repo):
    result = run(repo, "--topology=v9:4x4")
    assert result.returncode == 2
    assert result.stderr == (
        "error: --topology=v9:4x4 names no known family of chips; "
        "choose v4, v5e, v5p, v6e, tpu7x, h100, b200, gb200 or cpu.\n"
    )


def test_a_mesh_that_does_not_divide_is_one_sentence(repo):
    result = run(repo, "--topology=cpu:8", "--config.mesh.expert=3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_baseline_of_a_search_is_one_sentence(repo):
    result = run(repo, "--topology=cpu:8", "--search", "--baseline=plan.json")
    assert result.returncode == 2
    assert result.stderr == "error: --baseline compares one plan, and --search makes many; give one of the two.\n"


def test_a_missing_tpu_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ValueError, match="needs the TPU compiler, which is not installed; run pip install 'jax"):
        compile.prepare_environment(Topology("v5e", (4, 4)))


def test_too_few_local_devices_are_one_sentence():
    with pytest.raises(ValueError, match=r"needs 4096 local devices, but there are \d+; set XLA_FLAGS"):
        compile.topology_devices(Topology("cpu", (4096,)))


def test_the_environment_is_set_for_fake_devices(monkeypatch):
    environment = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=2"}
    monkeypatch.setattr(os, "environ", environment)
    compile.prepare_environment(Topology("cpu", (8,)))
    assert environment == {
        "XLA_FLAGS": "--a=1  --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
            "HLO temporaries (18.75G) exceeds available HBM (15.75G). HLO module: jit_f.",
            18.75,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5, 15.75),
        ("RESOURCE_EXHAUSTED: something else", 0, 0),
    ],
)
def test_the_compilers_out_of_memory_is_read(message, needed, available):
    assert compile.out_of_memory(message) == (needed * 2**30, available * 2**30)


# --- with the TPU compiler, by hand: python -m pytest -m slow tests/planning/test_plan.py -------------------------

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install 'jax[tpu]'")


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_a_tpu_has_all_its_roofs(repo, tmp_path):
    file = tmp_path / "plan.json"
    result = run(repo, "--topology=v5e:4x4", "--config.mesh.expert=4", "--config.batch_size=16", f"--json={file}")
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text())
    assert report["fits"] is True
    assert set(report["seconds"]) == {"compute", "hbm", "interconnect"}
    assert 0 < report["mfu_bound"] < 1
    assert "FITS" in result.stdout
    schedule = report["schedule"]
    assert 0 < schedule["mfu"] < report["mfu_bound"]
    assert sum(schedule["causes"].values()) == pytest.approx(schedule["seconds"])
    # what the model says of attention is known by formula, so only look-ups are left without FLOPs
    assert not any("splash" in kernel or "gmm" in kernel for kernel in report["not_counted"]["kernels_without_flops"])
    has_not_grown(report, BASELINE.with_name("v5e_4x4.json"), Topology("v5e", (4, 4)))


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "sentence"), [("v5e:3x5", "was refused by the TPU compiler"), ("v5p:3x5x7", "was refused by")]
)
def test_a_shape_that_the_compiler_refuses_is_one_sentence(repo, topology, sentence):
    result = run(repo, f"--topology={topology}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --topology={topology} {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_does_not_fit_says_so(repo):
    large = ["--config.model.vocab_size=524288", "--config.model.embed_dim=8192", "--config.batch_size=64"]
    result = run(repo, "--topology=v5e:2x2", *large, "--config.sequence_length=2048")
    assert result.returncode == 0, result.stderr
    assert "DOES NOT FIT" in result.stdout
