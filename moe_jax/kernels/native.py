"""The C++ kernels of CPUs, `cpp/NAME.cc`, each compiled once on a machine with the system's compiler.

They are called through XLA's foreign function interface, and share XLA's threads.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from moe_jax.mesh import around_kernel, platform
from moe_jax.runtime.cache import user_folder

FOLDER = Path(__file__).parent / "cpp"
# kernel -> the functions that it exports
KERNELS = {"attention": ("forward", "backward"), "experts": ("forward", "backward"), "head": ("gradient",)}
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
DTYPES = (jnp.float32, jnp.bfloat16)
Targets = dict[
    tuple[str, str, str], str
]  # (kernel, function, dtype) -> XLA's name, which includes a hash of the source


def chosen(cpu_kernel: str, mesh: Mesh | None, dtype: jnp.dtype) -> bool:
    """Whether CPUs compute in C++: with "auto" those that can, with "native" every CPU, with "xla" none.

    Raises:
        ValueError: `cpu_kernel="native"` on a CPU without a compiler, or with another dtype.
    """
    here = jax.default_backend() if mesh is None else platform(mesh)
    if here != "cpu" or cpu_kernel == "xla":
        return False
    why = missing() if dtype in DTYPES else f"it computes in float32 and bfloat16, not {dtype}"
    if why and cpu_kernel == "native":
        raise ValueError(f'model.cpu_kernel="native" cannot run: {why}; or set it to "auto" or "xla".')
    return why is None


def missing() -> str | None:
    """Why C++ cannot run on this machine; None if it can. The first call compiles."""
    built = _build()
    return built if isinstance(built, str) else None


def call(
    kernel: str,
    which: str,
    dtype: jnp.dtype,
    results: Sequence[jax.ShapeDtypeStruct],
    *arrays: Array,
    **attributes: Any,
) -> list[Array]:
    """The results of one function of a kernel, for arrays of one of DTYPES.

    The C++ code reads raw memory: callers convert dtypes, and both sides compare sizes. Call it only if `missing()` is
    None.
    """
    targets = _build()
    assert not isinstance(targets, str)  # the caller has checked `missing`
    run = jax.ffi.ffi_call(targets[kernel, which, dtype.name], results, vmap_method="sequential")
    return around_kernel(functools.partial(run, **attributes), *arrays)


@functools.cache
def _build() -> Targets | str:
    """Compile the libraries that do not exist, and register them with XLA; or return why that is impossible."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler; install one, or name it with CXX=..."
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        sources = "".join(path.read_text() for path in sorted(FOLDER.iterdir()))
        inputs = sources + version + " ".join(_flags()) + jax.lib.__version__
        digest = hashlib.sha256(inputs.encode()).hexdigest()[:12]
        libraries = [user_folder("native") / f"{kernel}-{digest}.so" for kernel in KERNELS]
        with ThreadPoolExecutor() as pool:
            list(pool.map(functools.partial(_compile, compiler), KERNELS, libraries))
        registered: Targets = {}
        for kernel, library in zip(KERNELS, libraries, strict=True):
            registered |= _register(kernel, ctypes.CDLL(str(library)), digest)
        return registered
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "no message").strip().splitlines()
        return f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}"
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        return str(error)


def _flags() -> tuple[str, ...]:
    """The compiler's flags; the environment's come last, so that CXXFLAGS=-mno-avx512bf16 works."""
    return *FLAGS, *os.environ.get("CXXFLAGS", "").split()


def _compile(compiler: str, kernel: str, library: Path) -> None:
    """Compile so that the library appears whole or not at all; several processes may do so at the same time."""
    if library.exists():
        return
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder) / library.name
        source = str(FOLDER / f"{kernel}.cc")
        command = [compiler, *_flags(), f"-I{jax.ffi.include_dir()}", source, "-o", str(temporary)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        temporary.replace(library)


def _register(kernel: str, library: ctypes.CDLL, digest: str) -> Targets:
    targets = {}
    for which, dtype in itertools.product(KERNELS[kernel], (jnp.dtype(d).name for d in DTYPES)):
        targets[kernel, which, dtype] = f"moe_jax_{kernel}_{which}_{dtype}_{digest}"
        handler = jax.ffi.pycapsule(getattr(library, f"moe_{kernel}_{which}_{dtype}"))
        jax.ffi.register_ffi_target(targets[kernel, which, dtype], handler, platform="cpu")
    return targets
