"""Laws of several processes that one process can check: the environment, and which rows a process loads."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from drills import rig

from moe_jax.config import MeshConfig
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.runtime.processes import by_all, by_first, find_cluster, from_rows, gather_json

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[007-009,012],other",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t", "TPU_WORKER_ID": "1"}


def test_a_plain_host_is_not_a_cluster():
    assert (
        find_cluster({"PATH": "/bin", "TPU_WORKER_HOSTNAMES": "localhost", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
        is None
    )


def test_the_three_variables_of_jax_are_taken_as_they_are():
    assert find_cluster(EXPLICIT) == ("the environment", "host0:1234", 2, 1, None)


def test_slurm_is_read_with_a_port_of_the_job_and_one_device_a_task():
    # job 5000, step 2: port 61440 + 5002 % 4096 = 62346; several tasks a node share its devices
    assert find_cluster(SLURM) == ("Slurm", "node007:62346", 4, 3, (1,))


@pytest.mark.parametrize("tasks", ["1", "1(x4)"])
def test_a_slurm_task_alone_on_its_node_has_all_devices(tasks):
    assert find_cluster(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks}).local_devices is None


@pytest.mark.parametrize(("nodes", "first"), [("a", "a"), ("a1,a2", "a1"), ("n[3,5]", "n3"), ("n[01-02]", "n01")])
def test_the_first_slurm_node_coordinates(nodes, first):
    assert find_cluster(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:62346"


def test_a_batch_script_without_srun_is_a_plain_host():
    assert find_cluster({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}) is None


def test_open_mpi_is_read():
    # job 1531576320 / 4096 = 373920; port 61440 + 373920 % 4096 = 62624
    assert find_cluster(OPEN_MPI) == ("Open MPI", "10.96.0.1:62624", 4, 2, (0,))
    six = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp6://[fe80::1,2620::2]:43370"}
    assert find_cluster(six).coordinator == "[fe80::1]:62624"


def test_open_mpi_5_needs_the_coordinator_to_be_named():
    newer = {k: v for k, v in OPEN_MPI.items() if "orte" not in k}
    with pytest.raises(ValueError, match="the host of process 0; add -x JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        find_cluster(newer)
    assert find_cluster(newer | {"JAX_COORDINATOR_ADDRESS": "host0:99"}).coordinator == "host0:99"


def test_open_mpi_inside_a_slurm_job_is_open_mpi():
    assert find_cluster(SLURM | OPEN_MPI).launcher == "Open MPI"


@pytest.mark.parametrize(
    "alone",
    [
        {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        TPU | {"JAX_NUM_PROCESSES": "1"},
    ],
)
def test_a_job_of_one_task_is_a_plain_host(alone):
    assert find_cluster(alone) is None


@pytest.mark.parametrize("environ", [TPU, {"MEGASCALE_NUM_SLICES": "2"}])
def test_jax_itself_finds_the_processes_of_a_tpu_slice(environ):
    assert find_cluster(environ) == ("Cloud TPU", None, None, None, None)
    assert find_cluster({}, on_tpu_vm=True) == ("Cloud TPU", None, None, None, None)


@pytest.mark.parametrize("missing", EXPLICIT)
def test_a_missing_variable_is_named(missing):
    with pytest.raises(ValueError, match=f"needs {missing} too; set all three"):
        find_cluster({k: v for k, v in EXPLICIT.items() if k != missing})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (EXPLICIT | SLURM, "JAX_PROCESS_ID=1 of JAX_NUM_PROCESSES=2 contradicts Slurm, which started process 3 of 4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, "number 2 of 2; processes are counted from 0"),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one' must be a whole number"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host0"}, "JAX_COORDINATOR_ADDRESS=host0 must be HOST:PORT"),
        (SLURM | {"SLURM_PROCID": "4"}, "Slurm sets this process to number 4 of 4"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": ""}, "OMPI_COMM_WORLD_RANK='' must be a whole number"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environ, words):
    with pytest.raises(ValueError, match=words):
        find_cluster(environ)


def test_the_command_reports_a_wrong_environment(tmp_path):
    file = rig.write_config(tmp_path / "config.py", rig.drill_config())
    flags = [f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    command = rig.Command("moe_jax.train", tmp_path / "log", *flags, environ={"JAX_NUM_PROCESSES": "2"})
    assert command.wait() == 2
    assert command.text.startswith("error: JAX_NUM_PROCESSES=2 needs JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID")
    assert not (tmp_path / "run").exists()


# --- one process ----------------------------------------------------------------------------------------------


def test_one_process_agrees_with_itself():
    assert gather_json({"a": 1}) == [{"a": 1}]
    assert by_first(lambda: object) is by_all(lambda: object) is object
    for agree in (by_first, by_all):
        with pytest.raises(OSError, match="no space"):
            agree(lambda: raise_(OSError("no space")))


def raise_(error):
    raise error


class Rows(NamedTuple):
    tokens: np.ndarray
    domain: np.ndarray


@pytest.mark.parametrize(
    "sizes",
    [dict(data=1), dict(data=2, expert=4), dict(data=2, tensor=4), dict(replica=2, data=4), dict(data=2, sequence=4)],
)
def test_a_batch_is_loaded_by_rows_each_once_and_whole_on_the_mesh(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    whole = Rows(np.arange(32).reshape(8, 4), np.arange(8) + 100)
    places = Rows(batch_sharding(mesh, ("batch", "length")), batch_sharding(mesh))
    abstract = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), whole, places)
    asked = []

    def load(rows):
        asked.append(rows)
        return Rows(*(leaf[slice(*rows)] for leaf in whole))

    batch = from_rows(load, abstract)
    blocks = mesh.size // sizes.get("tensor", 1) // sizes.get("sequence", 1)  # tensor and sequence share rows
    assert asked == [(i * 8 // blocks, (i + 1) * 8 // blocks) for i in range(blocks)]
    for leaf, expected, place in zip(batch, whole, places, strict=True):
        assert leaf.sharding == place
        assert np.array_equal(leaf, expected)
    assert isinstance(batch.tokens, jax.Array)
