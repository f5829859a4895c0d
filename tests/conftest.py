"""Shared by all tests: run-time checks of shapes and dtypes, one compilation cache, tiny configs."""

import gc
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# a private cache shared by the workers and by the commands that tests start
CACHE = Path(tempfile.gettempdir()) / f"moe_jax_test_cache_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# tests check values, not speed: without LLVM's optimisation a step compiles in half the time
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # so that no command restarts itself for it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Under nohup, and in the background of a script, SIGHUP and SIGINT are ignored here and in every command that a test
# starts, and some tests send them. A handler keeps these tests alive, but commands do not inherit it.
if threading.current_thread() is threading.main_thread():
    for ignored in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, lambda *_: None)

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # for the tests of meshes; the others use the first

CHECKED = """
routing balance kernels.grouped kernels.quantize kernels.attention dispatch model training.state training.step
""".split()
install_import_hook([f"moe_jax.{name}" for name in CHECKED], "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from moe_jax.config import Config, default, validate  # noqa: E402

HANG_SECONDS = 900  # the only time limit in the tests: a test that takes longer hangs, even on the slowest machine

TINY_MODEL = dict(
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffw_dim=24,
    num_experts=4,
    top_k=2,
    num_shared_experts=1,
    expert_ffw_dim=8,
    first_dense=1,
)


def tiny_config(**overrides) -> Config:
    """Three layers (one dense, two MoE with 4 experts), 8 x 16 tokens a step; `model` is merged."""
    model = TINY_MODEL | overrides.pop("model", {})
    settings = dict(
        mesh=dict(data=1), num_steps=8, batch_size=8, sequence_length=16, log_every=1, eval_every=0, save_every=0
    )
    return validate(default(**(settings | overrides), model=model))


def mesh_sizes(sizes: tuple[int, ...]) -> dict[str, int]:
    """The mesh of a config from (replica, data, expert, tensor), and sequence if it is cut."""
    return dict(zip(("replica", "data", "expert", "tensor", "sequence")[: max(4, len(sizes))], sizes, strict=True))


def assert_same_bits(a, b) -> None:
    """Structure, shapes, dtypes and every bit of two trees of arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


@contextmanager
def strict_flags() -> Iterator[None]:
    """JAX with the strictest flags that a user may have set for their own program."""
    dtypes, ranks = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.enable_x64(True), dtypes, ranks, jax.debug_nans(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_executables():
    """Free the programs of a module: XLA:CPU maps memory for each, and Linux ends a process with 65,530 maps."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return Path(__file__).parent.parent


@pytest.fixture
def own_dispatchers() -> Iterator[None]:
    """Allow a test to register dispatchers, which are removed after it."""
    from moe_jax.config import DISPATCHERS
    from moe_jax.dispatch import DISPATCH_FUNCTIONS

    tables = DISPATCHERS, DISPATCH_FUNCTIONS
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture
def tpu_devices() -> Iterator[Callable[[str], list]]:
    """topology -> devices to compile for, which need not be present; skipped without the TPU compiler."""
    from moe_jax import plan
    from moe_jax.planning import compile

    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    # programs for devices that are not present cannot be read back from the cache, so none are written
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)

    def devices(text: str) -> list:
        topology = plan.parse_topology(text)
        compile.prepare_environment(topology)
        return list(compile.topology_devices(topology))

    yield devices
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


class Clock:
    """A clock that shows the time to which it is set."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()
