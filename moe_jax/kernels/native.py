"""SwiGLU experts on a CPU in C++: `native.cc`, compiled once on each machine with the system's compiler.

XLA:CPU multiplies a dynamic number of rows only by loops over small products, and moves every copy through memory in
between. Here a single call of XLA's foreign function interface sorts, multiplies, activates and combines.
T tokens, K slots, N = T K copies, E experts, D embed, F ffw.
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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moe_jax.mesh import around_kernel
from moe_jax.runtime.cache import user_folder

SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
DTYPES = (jnp.float32, jnp.bfloat16)
Targets = dict[tuple[str, str], str]  # (forward or backward, dtype) -> XLA's name, which includes a hash of the source


def experts(x: Array, expert_ids: Array, gates: Array, weights: Sequence[Array]) -> Float32[Array, "tokens embed"]:
    """sum over a token's slots of gate x (silu(x gate_e) * (x up_e)) down_e, accumulated in float32.

    The cost is proportional to the copies, whatever E and the skew of the routing. Call it only if `missing()` is None.

    The C++ code reads raw memory, so dtypes are converted and sizes compared here.

    Args:
        x: [T, D], float32 or bfloat16.
        expert_ids: int32 [T, K]; E is an empty slot. Another integer dtype is cast.
        gates: float32 [T, K]; another floating dtype is cast.
        weights: gate and up [E, D, F], down [E, F, D]; cast to x's dtype.

    Returns:
        float32 [T, D]. An expert without tokens has a gradient of exactly 0.

    Raises:
        ValueError: another dtype, or sizes that do not fit together.
    """
    if x.dtype not in DTYPES or not jnp.issubdtype(expert_ids.dtype, jnp.integer):
        raise ValueError(
            f"experts in C++ take x in float32 or bfloat16 and integer expert_ids, not {x.dtype} and "
            f"{expert_ids.dtype}; cast them."
        )
    shapes = [a.shape for a in (x, expert_ids, gates, *weights)]
    if not _fit(*shapes):
        raise ValueError(
            f"x, expert_ids, gates and the three weights have the shapes {', '.join(map(str, shapes))}, which must be "
            "[T, D], [T, K], [T, K], [E, D, F], [E, D, F] and [E, F, D]; correct them."
        )
    weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
    return _experts(x, expert_ids.astype(jnp.int32), gates.astype(jnp.float32), weights)


def _fit(x: tuple, ids: tuple, gates: tuple, gate: tuple, up: tuple, down: tuple) -> bool:
    """Whether these shapes fit together."""
    if [len(shape) for shape in (x, ids, gate)] != [2, 2, 3]:
        return False
    (tokens, embed), (experts, _, ffw) = x, gate
    wide = (experts, embed, ffw)
    narrow = (experts, ffw, embed)
    return ids[0] == tokens and gates == ids and (gate, up, down) == (wide, wide, narrow)


@jax.custom_vjp
def _experts(x: Array, expert_ids: Array, gates: Array, weights: Sequence[Array]) -> Array:
    return _forward(x, expert_ids, gates, weights)[0]


def missing() -> str | None:
    """Why experts cannot run in C++ on this machine; None if they can. The first call compiles."""
    built = _build()
    return built if isinstance(built, str) else None


def _forward(x: Array, expert_ids: Array, gates: Array, weights: Sequence[Array]) -> tuple[Array, tuple[Any, ...]]:
    (tokens, embed), copies, (num_experts, _, ffw) = x.shape, expert_ids.size, weights[0].shape
    hidden = jax.ShapeDtypeStruct((copies, ffw), x.dtype)
    ints = jax.ShapeDtypeStruct((copies,), jnp.int32)
    results = [
        jax.ShapeDtypeStruct((tokens, embed), jnp.float32),
        *(hidden, hidden, ints, ints, jax.ShapeDtypeStruct((num_experts,), jnp.int32)),
        jax.ShapeDtypeStruct((copies, embed), jnp.float32),
    ]
    y, *residuals, _ = _call("forward", x.dtype, results, x, expert_ids, gates, *weights)
    return y, (x, gates, weights, *residuals)


def _backward(residuals: tuple[Any, ...], dy: Array) -> tuple[Array, None, Array, Any]:
    x, gates, weights, *rest = residuals
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, gates, *weights)]
    room = jax.ShapeDtypeStruct((gates.size, x.shape[1]), jnp.float32)
    dx, d_gates, *d_weights, _ = _call("backward", x.dtype, [*like, room], dy, x, gates, *weights, *rest)
    return dx, None, d_gates, jax.tree.unflatten(jax.tree.structure(weights), d_weights)


_experts.defvjp(_forward, _backward)


def _call(which: str, dtype: jnp.dtype, results: list[jax.ShapeDtypeStruct], *arrays: Array) -> list[Array]:
    targets = _build()
    assert not isinstance(targets, str)  # the caller has checked `missing`
    call = jax.ffi.ffi_call(targets[which, dtype.name], results, vmap_method="sequential")
    with jax.named_scope("experts"):  # dispatch and combine are in the same call
        return around_kernel(call, *arrays)


@functools.cache
def _build() -> Targets | str:
    """Compile the library if it does not exist, and register it with XLA; or return why that is impossible."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler; install one, or name it with CXX=..."
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        inputs = SOURCE.read_text() + version + " ".join(FLAGS) + jax.lib.__version__
        digest = hashlib.sha256(inputs.encode()).hexdigest()[:12]
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
    """Compile so that the library appears whole or not at all; several processes may do so at the same time."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(temporary)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        temporary.replace(library)


def _register(library: ctypes.CDLL, digest: str) -> Targets:
    targets = {}
    for which, dtype in itertools.product(("forward", "backward"), (jnp.dtype(d).name for d in DTYPES)):
        targets[which, dtype] = f"moe_jax_experts_{which}_{dtype}_{digest}"
        handler = jax.ffi.pycapsule(getattr(library, f"moe_experts_{which}_{dtype}"))
        jax.ffi.register_ffi_target(targets[which, dtype], handler, platform="cpu")
    return targets
