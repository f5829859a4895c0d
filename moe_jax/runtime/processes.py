"""The processes of a run: they start together, read separate rows, agree, and end together.

The environment shows whether there are several processes; on a plain host nothing here has any effect. What must be
decided once is decided by process 0 and sent to all (`by_first`). What fails in one process is raised in every process
(`by_all`), because a process that ends alone leaves the others waiting.

The first part is pure functions of the environment. Functions import jax themselves, because on a plain host mistakes
are reported before jax is loaded.
"""

import ctypes
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

TEMPORARY = 75  # exit status (EX_TEMPFAIL): not the run's fault, and the same command resumes it
MOST_CHARACTERS = 400  # the longest quotation of a library's error in ours
BLOCK_BYTES = 2**16  # messages between processes are padded to blocks; a config fits, so that all have one shape
ENDING_SECONDS = 60.0  # time for the thread that ends the process, before another thread does
COORDINATOR_LINGERS_SECONDS = 2.0  # process 0 exits this much later, because the others need it as coordinator
NETWORK = re.compile("gloo|nccl|unavailable|connection|socket|deadline|heartbeat|barrier", re.IGNORECASE)
FIRST_PORT = 61440  # of Slurm and Open MPI jobs ...
NUM_PORTS = 4096  # ... whose number selects one of these

T = TypeVar("T")


# --- the environment ------------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """The processes of a run: the arguments of `jax.distributed.initialize`.

    launcher: its name in messages. coordinator: "host:port" of process 0. It and the two numbers are None where JAX
    finds them in the TPU's own environment. local_devices: the accelerators of this process if its host runs several
    processes, None for all.
    """

    launcher: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_cluster(environ: Mapping[str, str], on_tpu_vm: bool = False) -> Cluster | None:
    """The cluster that an environment describes; None on a plain host.

    Looks for, in this order: JAX_NUM_PROCESSES with its two companions, Open MPI, Slurm, Cloud TPU. A job of one task
    is a plain host, and so is a batch script that starts python without `srun`.

    Raises:
        ValueError: the variables contradict each other, or some are missing.
    """
    launched = _open_mpi(environ) or _slurm(environ)
    if "JAX_NUM_PROCESSES" in environ or "JAX_PROCESS_ID" in environ:
        return _explicit(environ, launched)
    if launched is not None:
        return None if launched.num_processes == 1 else _with_coordinator(launched, environ)
    if environ.get("JAX_COORDINATOR_ADDRESS"):
        return _explicit(environ, None)
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or _integer(environ, "MEGASCALE_NUM_SLICES", 1) > 1 or on_tpu_vm:
        return Cluster("Cloud TPU")
    return None


def _explicit(environ: Mapping[str, str], launched: Cluster | None) -> Cluster | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if environ.get("JAX_NUM_PROCESSES") == "1":
        return None
    missing = [name for name in names if not environ.get(name)]
    if missing:
        there = [f"{name}={environ[name]}" for name in names if environ.get(name)]
        raise ValueError(
            f"{' and '.join(there)} needs {' and '.join(missing)} too; set all three in every process, "
            "or JAX_NUM_PROCESSES=1 for a run of one process."
        )
    count = _integer(environ, "JAX_NUM_PROCESSES")
    number = _integer(environ, "JAX_PROCESS_ID")
    if launched is not None and launched[2:4] != (count, number):
        raise ValueError(
            f"JAX_PROCESS_ID={number} of JAX_NUM_PROCESSES={count} contradicts {launched.launcher}, which started "
            f"process {launched.process_id} of {launched.num_processes}; unset the JAX_ variables."
        )
    local = None if launched is None else launched.local_devices
    return _checked(Cluster("the environment", environ[names[0]], count, number, local))


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    size, rank, local, local_size = (
        _integer(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    )
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    launcher = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", uri)
    address = None
    if launcher:
        host = f"[{launcher[2]}]" if ":" in launcher[2] else launcher[2]
        address = f"{host}:{FIRST_PORT + int(launcher[1]) // NUM_PORTS % NUM_PORTS}"
    return _checked(Cluster("Open MPI", address, size, rank, (local,) if local_size > 1 else None))


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environ for name in needed):
        return None  # not started by srun
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environ["SLURM_STEP_NODELIST"])  # node[001-004,007],other
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']!r} names no node; start with srun.")
    port = FIRST_PORT + (_integer(environ, "SLURM_JOB_ID") + _integer(environ, "SLURM_STEP_ID", 0)) % NUM_PORTS
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return _checked(
        Cluster(
            "Slurm",
            f"{first[1]}{first[2] or ''}:{port}",
            _integer(environ, tasks),
            _integer(environ, "SLURM_PROCID"),
            None if alone else (_integer(environ, "SLURM_LOCALID"),),
        )
    )


def _with_coordinator(cluster: Cluster, environ: Mapping[str, str]) -> Cluster:
    cluster = cluster._replace(coordinator=environ.get("JAX_COORDINATOR_ADDRESS") or cluster.coordinator)
    if cluster.coordinator is None:
        raise ValueError(
            f"{cluster.launcher} started {cluster.num_processes} processes and does not give the host of process 0; "
            "add -x JAX_COORDINATOR_ADDRESS=HOST:PORT with the host of process 0 and a free port."
        )
    return cluster


def _checked(cluster: Cluster) -> Cluster:
    count, number, address = cluster.num_processes, cluster.process_id, cluster.coordinator
    if count is None or number is None or not 0 <= number < count:
        raise ValueError(
            f"{cluster.launcher} sets this process to number {number} of {count}; processes are counted from 0."
        )
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT; add a free port of process 0's host.")
    return cluster


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} must be a whole number; start the command with the launcher, which sets it.")
    return int(text)


def on_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU machine, whose metadata show whether it is one of several."""
    wanted = "tpu" in environ.get("JAX_PLATFORMS", "tpu") and "TPU_SKIP_MDS_QUERY" not in environ
    chips = any(Path("/dev").glob("accel[0-9]*")) or Path("/dev/vfio/0").exists()
    return wanted and chips and importlib.util.find_spec("libtpu") is not None


# --- beginning and ending together ----------------------------------------------------------------------------


@contextmanager
def joined(heartbeat_seconds: int, doing: Callable[[], str] = str) -> Iterator[None]:
    """Join the processes of the cluster, if there is one, while the block runs.

    An error ends this process at once, and thereby the others within the heartbeat. Otherwise JAX would wait minutes
    for them at its shutdown barrier, while they wait for this process in a collective.

    Args:
        heartbeat_seconds: a process that has sent no heartbeat for this long counts as dead, and the run ends.
        doing: returns what the run is doing, for the message about a lost process.

    Raises:
        ValueError: the environment contradicts itself, or the processes did not find each other.
    """
    cluster = find_cluster(os.environ, on_tpu_vm(os.environ))
    if cluster is None:
        yield
        return
    _initialize(cluster, heartbeat_seconds)
    import jax

    if jax.process_count() == 1:  # a single TPU host
        yield
        return
    _on_abort(lambda: end(_lost(doing())))
    try:
        yield
    except SystemExit as stop:
        # below 128 the error is this process's; from 128 on every process ends because of the same signal
        if isinstance(stop.code, int) and 0 < stop.code < 128:
            _leave(stop.code)
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except BaseException as error:
        text = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and NETWORK.search(text):
            end(f"{_lost(doing())}\nwhat this process saw: {text[:MOST_CHARACTERS]}")
        traceback.print_exc()
        _leave(1)


def _initialize(cluster: Cluster, heartbeat_seconds: int) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", True)  # so that SIGTERM in one process stops all of them
    arguments: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds}
    if cluster.coordinator is not None:  # otherwise JAX gives every process of Slurm a single device
        arguments |= cluster._asdict() | {"cluster_detection_method": "deactivate"}
        arguments["coordinator_address"] = arguments.pop("coordinator")
        arguments["local_device_ids"] = arguments.pop("local_devices")
        del arguments["launcher"]
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"the processes of {cluster.launcher} did not find each other ({text[:MOST_CHARACTERS]}); "
            "start the command on every host at the same time, or set JAX_NUM_PROCESSES=1 for a run of one process."
        ) from None


def _lost(doing: str) -> str:
    return (
        f"process {index()} of {count()}, at {doing}: another process of the run has died or cannot be reached; "
        "its own log or the lines around this one show which and why. The same command on all hosts resumes from the "
        "newest checkpoint."
    )


_ending = threading.Lock()


def end(message: str) -> NoReturn:
    """End this process at once with a message and status 75; only the first thread that calls it prints one."""
    if not _ending.acquire(blocking=False):
        time.sleep(ENDING_SECONDS)  # another thread is ending the process
    os.write(2, f"error: {message}\n".encode())
    os._exit(TEMPORARY)


def _leave(status: int) -> NoReturn:
    """Exit without JAX's shutdown barrier; process 0 last, because it is the coordinator of the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if index() == 0:
        time.sleep(COORDINATOR_LINGERS_SECONDS)
    os._exit(status)


def _on_abort(handle: Callable[[], NoReturn]) -> None:
    """Call a function when JAX would abort the process because another process was lost.

    JAX's coordination service aborts from its own thread, where Python's `signal` module runs no handler, so the
    handler must be a C function. The handler from ctypes takes the GIL, which is free while the main thread waits.
    """
    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: handle())
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))


_handler: Any = None  # keeps the handler alive, because C has only its address


# --- agreeing -------------------------------------------------------------------------------------------------


def index() -> int:
    """The number of this process; process 0 writes the logs and decides."""
    return sys.modules["jax"].process_index() if _initialized() else 0


def count() -> int:
    """The number of processes of the run."""
    return sys.modules["jax"].process_count() if _initialized() else 1


def _initialized() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()  # a plain host need not load jax


def gather_json(value: Any) -> list[Any]:
    """All-gather a JSON value over processes; to be called on the main thread, in the same order in every process."""
    if count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size], np.int32)).reshape(-1)
    padded = np.zeros(-(-int(sizes.max()) // BLOCK_BYTES) * BLOCK_BYTES, np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def gather_floats(values: Sequence[float]) -> list[list[float]]:
    """All-gather a few numbers over processes, as float32; to be called like `gather_json`."""
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(values, np.float32)).reshape(count(), -1).tolist()


def by_first(function: Callable[[], T]) -> T:
    """Call a function in process 0 only, and return its result, a JSON value, in every process.

    Raises:
        ValueError, OSError: the error of `function` in process 0; in the others a ValueError with the same text.
    """
    if count() == 1:
        return function()
    result, error = _caught(function) if index() == 0 else (None, None)
    return gather_json(_agreed(result, error))[0]


def by_all(function: Callable[[], T]) -> T:
    """Call a function in every process; an error in one of them is raised in all."""
    if count() == 1:
        return function()
    return _agreed(*_caught(function))


def _caught(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, error


def _agreed(result: Any, error: Exception | None) -> Any:
    """The result, if no process has an error; else an error in every process."""
    problems = gather_json(None if error is None else str(error))
    if error is not None:
        raise error
    for number, problem in enumerate(problems):
        if problem is not None:
            raise ValueError(f"process {number}: {problem}")
    return result


def from_rows(load: Callable[[tuple[int, int]], T], whole: Any) -> T:
    """Build a batch on the mesh; this process loads only the rows of which its own devices hold a part.

    Each block of rows is loaded once, whatever the order of the devices and the number that share it; a device keeps
    the columns that it holds.

    Args:
        load: (start, stop) -> a NamedTuple of arrays with these rows of the whole batch.
        whole: the batch as `jax.ShapeDtypeStruct`s, whose shardings split all rows alike.

    Returns:
        the same NamedTuple with jax arrays.
    """
    import jax

    num_rows = whole[0].shape[0]

    def block(slices: Any) -> tuple[int, int]:
        return slices[0].indices(num_rows)[:2]

    places = whole[0].sharding.addressable_devices_indices_map(whole[0].shape)
    loaded: dict[tuple[int, int], Any] = {rows: load(rows) for rows in sorted(set(map(block, places.values())))}

    def place(field: int, leaf: Any) -> jax.Array:
        def part(slices: Any) -> Any:
            return loaded[block(slices)][field][:, *slices[1:]]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return type(whole)(*(place(field, leaf) for field, leaf in enumerate(whole)))
