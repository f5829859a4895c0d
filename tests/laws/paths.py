"""The paths of a model: the columns of docs/options.md, and the run that decides each cell.

A cell is "yes" if the path runs with the option and agrees with its reference, "refused" if a sentence that names the
option refuses it, and "-" if the path traces to the same program with the option and without it.
"""

import dataclasses
import functools
import gc
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from drills import folders
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from laws.options import Row

from moe_jax import balance
from moe_jax.config import Config, ModelConfig
from moe_jax.huggingface import shards
from moe_jax.huggingface.config_out import choose, to_hf
from moe_jax.huggingface.folders import to_folder, to_workdir
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.model import attention
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Inputs, Pass, PerLayer, next_inputs, token_info
from moe_jax.model.moe import MoE
from moe_jax.training.state import initial_balance, state_shardings

ROWS, LENGTH, PROMPT = 4, 12, 8
TOKENS = np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH), np.int32)
SEGMENTS = np.tile(np.asarray([1] * 5 + [2] * 5 + [0] * 2, np.int32), (ROWS, 1))  # two documents in a row, and padding
POSITIONS = np.tile(np.asarray([*range(5), *range(5), 0, 0], np.int32), (ROWS, 1))
PACKED = Inputs(TOKENS, POSITIONS, SEGMENTS)
WHOLE = Inputs(TOKENS, np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)), np.ones_like(TOKENS))
ORACLE = dict(dispatch="dense", cpu_kernel="xla")

# --- programs, and what they compute --------------------------------------------------------------------------


class Run(NamedTuple):
    """The program of a path, as it was traced, and a function that runs it."""

    program: Jaxpr
    results: Callable[[], Any]


def traced(function: Callable[..., Any], *args: Any) -> Run:
    trace = jax.jit(function).trace(*args)
    return Run(trace.jaxpr.jaxpr, functools.cache(lambda: jax.tree.map(np.asarray, trace.lower().compile()(*args))))


def equations(program: Jaxpr, kept: Callable[[Any], bool]) -> Iterator[str]:
    """Operation, operands and parameters of every equation that is kept, within loops and calls, too."""
    for equation in program.eqns:
        inner = [p for p in jax.tree.leaves(list(equation.params.values())) if isinstance(p, Jaxpr | ClosedJaxpr)]
        for one in inner:
            yield from equations(one.jaxpr if isinstance(one, ClosedJaxpr) else one, kept)
        if not inner and kept(equation):
            operands = [getattr(v, "val", v.aval) for v in equation.invars]
            yield without_addresses(f"{equation.primitive} {operands} {equation.params}")


def without_addresses(text: str) -> str:
    return re.sub(" at 0x[0-9a-f]+", "", text)


def is_in_cpp(equation: Any) -> bool:
    return equation.primitive.name == "ffi_call"


def is_of_quantized_experts(equation: Any) -> bool:
    """Of routed experts: not of shared ones, which are in C++, nor a sum of gradients, which has an operand's scope."""
    scopes = str(equation.source_info.name_stack)
    elsewhere = is_in_cpp(equation) or equation.primitive.name == "add_any"
    return any(scope in scopes for scope in ("dispatch", "experts", "combine")) and not elsewhere


def drawn(config: Config) -> tuple[Any, Any, Any]:
    """Parameters, selection bias and state of the methods, with no value at which an option has no effect."""
    abstract, draw = abstract_model(config.model), np.random.default_rng(1)

    def leaf(path: Any, a: Any) -> np.ndarray:
        mean = any(word in jax.tree_util.keystr(path) for word in ("norm", "expert_scale"))
        return draw.normal(float(mean), 0.4, a.shape).astype(a.dtype)

    params, bias = jax.tree_util.tree_map_with_path(leaf, (abstract.params, abstract.bias))
    return params, bias, initial_balance(config)


def weighed(outputs: Any) -> jax.Array:
    """A number whose gradient reads every output."""
    waves = (jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape) for a in jax.tree.leaves(outputs))
    return sum((a * wave).sum() for a, wave in zip(jax.tree.leaves(outputs), waves, strict=True))


def dense_attention(
    query: Any, key: Any, value: Any, segment_ids: Any, *, scale: float, window: int, sinks: Any, **_: Any
) -> jax.Array:
    """`attend` with all scores of a token in one softmax."""
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], 2) for a in (key, value))
    before = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (segment_ids[:, None, :, None] == segment_ids[:, None, None]) & (before >= 0) & (before < (window or LENGTH))
    scores = jnp.where(seen, scale * jnp.einsum("bqhk,bshk->bhqs", query, key), -jnp.inf)
    none = jnp.full(query.shape[2], -jnp.inf) if sinks is None else sinks
    last = jnp.broadcast_to(none[None, :, None, None], (*scores.shape[:3], 1))
    return jnp.einsum("bhqs,bshv->bqhv", jax.nn.softmax(jnp.concatenate([scores, last], -1))[..., :-1], value)


@functools.cache
def training(config: Config) -> Run:
    """(logits, what the head of multi-token prediction reads) in training, and the gradient of every parameter."""
    balancer, graphdef = balance.make(config.balance, config.model), abstract_model(config.model).graphdef
    arrays, inputs, mesh = drawn(config), PACKED, make_mesh(config.mesh)
    if mesh.size > 1:
        places = state_shardings(config, mesh)
        arrays = jax.device_put(arrays, (places.params, places.bias, places.balance))
        inputs = jax.device_put(inputs, batch_sharding(mesh))

    def total(params: Any, bias: Any, state: Any, inputs: Inputs) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, bias)
        fwd = Pass(inputs, balancer, PerLayer(state), jax.random.key(2), train=True, mesh=mesh)
        x, ahead, *_ = model.before_head(fwd)
        outputs = model.logits(x, mesh), ahead
        return weighed(outputs), outputs

    def run(*args: Any) -> tuple[Any, Any]:
        (_, outputs), gradient = jax.value_and_grad(total, has_aux=True)(*args)
        return outputs, gradient

    return traced(run, *arrays, inputs)


@functools.cache
def oracle(config: Config) -> Any:
    """The results of `training` with every expert on every token, and all scores of attention at once."""
    with mock.patch.object(attention, "attend", dense_attention):
        return training(config).results()


@functools.cache
def experts(config: Config) -> Run:
    """The output of an MoE layer, and its gradients."""
    layer = nnx.eval_shape(lambda: MoE(config.model, nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    draw = np.random.default_rng(3)
    arrays = jax.tree.map(lambda a: draw.normal(0, 0.4, a.shape).astype(a.dtype), (params, rest))
    x = draw.normal(size=(ROWS, LENGTH, config.model.embed_dim)).astype(np.float32)
    balancer = balance.make(config.balance, config.model)
    state = jax.tree.map(lambda a: a[0], initial_balance(config))

    def total(params: Any, x: Any, rest: Any, inputs: Inputs) -> tuple[jax.Array, Any]:
        fwd = Pass(inputs, balancer, PerLayer(state), jax.random.key(2), train=True)
        y, _ = nnx.merge(graphdef, params, rest)(x, token_info(inputs, config.model.class_starts), fwd)
        return weighed(y), y

    def run(params: Any, rest: Any, x: Any, inputs: Inputs) -> Any:
        (_, y), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(params, x, rest, inputs)
        return y, gradients

    return traced(run, *arrays, x, PACKED)


@functools.cache
def decoding(config: Config) -> Run:
    """A step of decoding; the results are the logits of all steps, and those of the whole sequences."""
    balancer, graphdef = balance.make(config.balance, config.model), abstract_model(config.model).graphdef
    arrays = drawn(config)

    def passing(arrays: Any, inputs: Inputs) -> tuple[nnx.Module, Pass]:
        params, bias, state = arrays
        return nnx.merge(graphdef, params, bias), Pass(inputs, balancer, PerLayer(state), jax.random.key(2))

    @jax.jit
    def extend(arrays: Any, tokens: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
        model, fwd = passing(arrays, next_inputs(tokens, positions))
        logits, _, cache = model.extend(fwd, cache)
        return logits, cache

    @jax.jit
    def forward(arrays: Any, inputs: Inputs) -> Any:
        model, fwd = passing(arrays, inputs)
        return model(fwd)[0]

    def part(first: int, last: int) -> tuple[Any, Any]:
        return TOKENS[:, first:last], WHOLE.positions[:, first:last]

    empty = passing(arrays, WHOLE)[0].init_cache(ROWS, LENGTH)

    def all_steps() -> tuple[Any, Any]:
        logits, cache = [], empty
        for ends in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))]:
            new, cache = extend(arrays, *part(*ends), cache)
            logits.append(new)
        return jnp.concatenate(logits, 1), forward(arrays, WHOLE)

    return Run(extend.trace(arrays, *part(0, 1), empty).jaxpr.jaxpr, all_steps)


def assert_close(ours: Any, theirs: Any) -> None:
    """Every leaf is the other but for the rounding of float32; the tolerance is that of tests/model/test_moe.py."""
    for (path, one), (_, other) in zip(*map(jax.tree_util.tree_leaves_with_path, (ours, theirs)), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


def forget() -> None:
    """Free what has been traced and compiled: each program maps memory, and Linux ends a process with 65,530 maps."""
    for cached in (training, oracle, experts, decoding):
        cached.cache_clear()
    jax.clear_caches()
    gc.collect()


# --- columns --------------------------------------------------------------------------------------------------


def touches(path: Callable[[Config], Run], row: Row, kept: Callable[[Any], bool] | None = None, **keys: Any) -> bool:
    """Whether the program of a path, or the equations of it that are kept, are others with the option."""

    def text(program: Jaxpr) -> Any:
        return without_addresses(str(program)) if kept is None else sorted(equations(program, kept))

    one, other = (text(path(row.config(chosen, **keys)).program) for chosen in (True, False))
    return one != other


def forward(row: Row) -> bool:
    assert_close(training(row.config()).results()[0], oracle(row.config(**ORACLE))[0])
    return touches(training, row)


def backward(row: Row) -> bool:
    assert_close(training(row.config()).results()[1], oracle(row.config(**ORACLE))[1])
    return touches(training, row)


def in_cpp(row: Row) -> bool:
    config = row.config(cpu_kernel="native")
    used = {re.search("moe_jax_([a-z]+_[a-z]+)", e)[1] for e in equations(training(config).program, is_in_cpp)}
    assert used == {f"{kernel}_{which}" for kernel in ("attention", "experts") for which in ("forward", "backward")}
    assert_close(training(config).results(), oracle(row.config(**ORACLE)))
    return touches(training, row, is_in_cpp, cpu_kernel="native")


def in_xla(row: Row) -> bool:
    config = row.config(cpu_kernel="xla")
    assert not list(equations(training(config).program, is_in_cpp))
    assert_close(training(config).results(), oracle(row.config(**ORACLE)))
    return touches(training, row, cpu_kernel="xla")


def quantized(row: Row) -> bool:
    if not touches(experts, row, is_of_quantized_experts, quantization="int8"):
        return False
    results = (experts(row.config(**keys)).results() for keys in (dict(quantization="int8"), dict(cpu_kernel="xla")))
    pairs = list(zip(*map(jax.tree_util.tree_leaves_with_path, results), strict=True))
    off = {jax.tree_util.keystr(p): np.linalg.norm(a - b) / np.linalg.norm(b) for (p, a), (_, b) in pairs}
    assert 0 < max(off.values()) <= 0.05, off  # as in tests/kernels/test_quantize.py
    return True


def sharded(row: Row) -> bool:
    assert_close(training(row.config(mesh=(1, 2, 2, 2))).results(), training(row.config(cpu_kernel="xla")).results())
    return touches(training, row, mesh=(1, 2, 2, 2))


def decoded(row: Row) -> bool:
    np.testing.assert_allclose(*decoding(row.config()).results(), atol=1e-4)
    return touches(decoding, row)


def exported(row: Row) -> bool:
    """Whether weights of a family with the option come back bit for bit; False if it is no option of weights.

    Raises:
        ValueError: no family has it.
    """
    models = {kind: folders.model_of(folders.config_of(case, **keys)) for kind, (case, keys) in folders.KINDS.items()}
    fitting = {kind: model for kind, model in models.items() if has(model[1], row.beside)}
    for kind, (_, config) in fitting.items():
        if has(config, row.keys):
            assert comes_back(kind)
            return True
    values = {key: getattr(row.config().model, key) for key in row.keys}
    for family, config in fitting.values():
        ours = dataclasses.replace(config, **values)
        choose(ours, family.architecture)
        assert to_hf(family, ours, "float32", {}) == to_hf(family, config, "float32", {}), "a folder with it is missing"
    return False


def has(config: Any, keys: Mapping[str, Any]) -> bool:
    """Whether a config has the same words, and numbers other than the default."""

    def alike(value: Any, wanted: Any, default: Any) -> bool:
        if isinstance(wanted, Mapping):
            return all(alike(getattr(value, k), v, getattr(default, k)) for k, v in wanted.items())
        return value == wanted if isinstance(wanted, str | bool) else value != default

    return all(alike(getattr(config, key), value, getattr(ModelConfig(), key)) for key, value in keys.items())


@functools.cache
def comes_back(kind: str) -> bool:
    """Whether every bit of a folder comes back through a workdir."""
    case, keys = folders.KINDS[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders.make(folder / "hf", case, "bfloat16", **keys)
        to_workdir(folder / "hf", folder / "run")
        to_folder(folder / "run", folder / "back")
        return stored(folder / "hf") == stored(folder / "back")


def stored(folder: Path) -> dict[str, Any]:
    return {name: (e.dtype, shards.read(e).tobytes()) for name, e in shards.open_folder(folder).items()}


COLUMNS: dict[str, Callable[[Row], bool]] = {
    "forward": forward,
    "backward": backward,
    "C++": in_cpp,
    "XLA": in_xla,
    "int8": quantized,
    "sharded": sharded,
    "decoding": decoded,
    "export": exported,
}


def cell(row: Row, column: str) -> str:
    """What the table has to say.

    Raises:
        AssertionError: the path disagrees with its reference.
        ValueError: the path refuses the option without naming it.
    """
    row.config(chosen=False)  # is not refused
    try:
        return "yes" if COLUMNS[column](row) else "-"
    except ValueError as error:
        if any(f"{key}=" in str(error) for key in row.keys):
            return "refused"
        raise
