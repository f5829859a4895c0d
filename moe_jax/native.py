"""SwiGLU experts on a CPU in C++: `native.cc`, compiled once a machine with the system's compiler.

XLA:CPU multiplies a dynamic number of rows only by loops over small products, and moves every copy through memory
between them. One call of XLA's foreign function interface sorts, multiplies, activates and combines instead.
T tokens, K slots, N = T K copies, E experts, D embed, F ffw.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from moe_jax.cache import user_folder
from moe_jax.mesh import around_kernel

SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
DTYPES = (jnp.float32, jnp.bfloat16)


class _Targets(NamedTuple):
    """The names under which XLA knows the compiled functions: another source has others."""

    forward: str
    backward: str


@jax.custom_vjp
def experts(
    x: Float[Array, "tokens embed"],
    expert_ids: Int32[Array, "tokens slots"],
    gates: Float32[Array, "tokens slots"],
    weights: Sequence[Float[Array, "experts _ _"]],
) -> Float32[Array, "tokens embed"]:
    """sum over a token's slots of gate x (silu(x gate_e) * (x up_e)) down_e, accumulated in float32.

    Cost follows the copies: neither E nor the skew of the routing counts. Call it where `missing()` is None.

    Args:
        x: [T, D], float32 or bfloat16.
        expert_ids: int32 [T, K]; E is an empty slot.
        gates: float32 [T, K].
        weights: gate and up [E, D, F], down [E, F, D], in x's dtype.

    Returns:
        float32 [T, D]. An expert without tokens has a gradient of exactly 0.
    """
    return _forward(x, expert_ids, gates, weights)[0]


def missing() -> str | None:
    """Why experts cannot run in C++ on this machine, in words; None if they can. The first call compiles."""
    built = _build()
    return built if isinstance(built, str) else None


def _forward(x: Array, expert_ids: Array, gates: Array, weights: Sequence[Array]) -> tuple[Array, tuple[Any, ...]]:
    (tokens, embed), copies, (num_experts, _, ffw) = x.shape, expert_ids.size, weights[0].shape
    hidden, ints = jax.ShapeDtypeStruct((copies, ffw), x.dtype), jax.ShapeDtypeStruct((copies,), jnp.int32)
    results = [
        jax.ShapeDtypeStruct((tokens, embed), jnp.float32),
        *(hidden, hidden, ints, ints, jax.ShapeDtypeStruct((num_experts,), jnp.int32)),
        jax.ShapeDtypeStruct((copies, embed), jnp.float32),
    ]
    y, *kept, _ = _call("forward", results, x, expert_ids, gates, *weights)
    return y, (x, gates, weights, *kept)


def _backward(kept: tuple[Any, ...], dy: Array) -> tuple[Array, None, Array, Any]:
    x, gates, weights, *rest = kept
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, gates, *weights)]
    room = jax.ShapeDtypeStruct((gates.size, x.shape[1]), jnp.float32)
    dx, d_gates, *d_weights, _ = _call("backward", [*like, room], dy, x, gates, *weights, *rest)
    return dx, None, d_gates, jax.tree.unflatten(jax.tree.structure(weights), d_weights)


experts.defvjp(_forward, _backward)


def _call(which: str, results: list[jax.ShapeDtypeStruct], *arrays: Array) -> list[Array]:
    targets = _build()
    assert isinstance(targets, _Targets)  # the caller has asked `missing`
    call = jax.ffi.ffi_call(getattr(targets, which), results, vmap_method="sequential")
    with jax.named_scope("experts"):  # dispatch and combine are in the same call
        return around_kernel(call, *arrays)


@functools.cache
def _build() -> _Targets | str:
    """Compile, unless it is compiled, and make known to XLA; or why that cannot be."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler; install one, or name it by CXX=..."
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        told = SOURCE.read_text() + version + " ".join(FLAGS) + jax.lib.__version__
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        library = user_folder("native") / f"experts-{digest}.so"
        if not library.exists():
            _compile(compiler, library)
        return _register(ctypes.CDLL(str(library)), digest)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "no message").strip().splitlines()
        return f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}"
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        return str(error)


def _compile(compiler: str, library: Path) -> None:
    """Whole or not there, whoever else is compiling the same."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        made.replace(library)


def _register(library: ctypes.CDLL, digest: str) -> _Targets:
    targets = _Targets(*(f"moe_jax_experts_{which}_{digest}" for which in _Targets._fields))
    for which, name in zip(_Targets._fields, targets, strict=True):
        handler = jax.ffi.pycapsule(getattr(library, f"moe_experts_{which}"))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return targets
