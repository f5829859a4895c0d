"""Flags of jax that users may set change no number: 64 bits, strict promotion, NaNs that are errors."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drills.rig import REPO
from jax.extend.core import subjaxprs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import assert_same_bits, mesh_sizes, strict_flags, tiny_config
from moe_jax import balance
from moe_jax.config import MeshConfig
from moe_jax.config.balance import BALANCE_METHODS
from moe_jax.dispatch import ExpertWeights, apply_experts
from moe_jax.kernels import native
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.model import abstract
from moe_jax.routing import RouterConfig, route
from moe_jax.runtime.log import read_jsonl
from moe_jax.simulator import streams
from moe_jax.text.sampling import Sampling, next_tokens
from moe_jax.training import state
from moe_jax.training.compile import abstract_batch
from moe_jax.training.step import train_step

ENVIRONMENT = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEBUG_NANS": "1",
}


# --- random draws ----------------------------------------------------------------------------------------------


def drawn():
    """A table of experts, tokens, and a stream of the simulation with its domains and bursts."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    rows = jnp.arange(4, dtype=jnp.int32)
    how = Sampling(0.7, top_k=5, top_p=0.9)
    values = [balance.make(dict(hash={})).init(4, 1), next_tokens(logits, how, jax.random.key(1), rows, rows)]
    for offsets in (
        streams.domains(4, 1.0, 3, 2),
        streams.bursty(4, 1.0, 2.0, 2),
        streams.adversarial(4, 1.0, 0.1, 1.0),
    ):
        stream = streams.synthetic(offsets, num_tokens=8, num_experts=4, num_rows=2, noise=1.0, vocab_size=9)
        loads = jnp.asarray([3, 1, 0, 4], jnp.int32)
        values.append(stream.next(stream.init(jax.random.key(2)), jax.random.key(3), jnp.int32(5), loads)[1:])
    return values


def test_no_flag_changes_a_draw():
    plain = jax.jit(drawn)()
    with strict_flags():
        assert_same_bits(plain, jax.jit(drawn)())


# --- dispatch -------------------------------------------------------------------------------------------------

TOKENS, EXPERTS, SLOTS, EMBED, FFW = 32, 8, 2, 8, 6
DISPATCHES = {
    "local, in C++": dict(dispatcher="local", cpu_kernel="native"),
    "local, in XLA": dict(dispatcher="local", cpu_kernel="xla"),
    "in int8": dict(dispatcher="local", quantization="int8"),
    "dense": dict(dispatcher="dense"),
    "capacity": dict(dispatcher="capacity", num_sequences=2),
    "rounds": dict(dispatcher="rounds", sizes=(1, 2, 2, 1)),
    "gathered": dict(dispatcher="gathered", sizes=(1, 2, 2, 1)),
}


def dispatched(dtype, sizes=None, **how):
    """The output, its cost and its gradients."""
    draw = np.random.default_rng(0)
    x, logits = (jnp.asarray(draw.normal(size=(TOKENS, n)), jnp.float32) for n in (EMBED, EXPERTS))
    shapes = [(EXPERTS, EMBED, FFW)] * 2 + [(EXPERTS, FFW, EMBED)]
    weights = ExpertWeights(*(jnp.asarray(draw.normal(size=s), dtype) for s in shapes))
    mesh = None if sizes is None else make_mesh(MeshConfig(**mesh_sizes(sizes)), jax.devices()[: int(np.prod(sizes))])
    args = x.astype(dtype), logits, weights
    if mesh is not None:
        tokens = batch_sharding(mesh)
        args = jax.device_put(args, (tokens, tokens, NamedSharding(mesh, P())))

    def run(x, logits, weights):
        y, traffic = apply_experts(x, route(logits, RouterConfig(top_k=SLOTS)), weights, mesh=mesh, **how)
        return (y.astype(jnp.float32) ** 2).sum(), (y, traffic)

    return jax.device_get(jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*args))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", DISPATCHES.values(), ids=DISPATCHES)
def test_no_flag_changes_a_number_of_a_dispatch(how, dtype):
    if how.get("cpu_kernel") == "native" and (why := native.missing()):
        pytest.skip(why)
    plain = dispatched(dtype, **how)
    with strict_flags():
        assert_same_bits(plain, dispatched(dtype, **how))


# --- the step -------------------------------------------------------------------------------------------------

BIASED = dict(bias_sign={}, aux_loss=dict(scope="sequence"))
MODELS = {
    "multi-token prediction": dict(mtp_depth=1),
    "latent attention, biases of experts and router, in bfloat16": dict(
        attention="mla", q_lora_rank=4, compute_dtype="bfloat16", param_dtype="bfloat16", expert_bias=True
    )
    | dict(router_bias=True, router_norm="scaled", expert_scale=True),
    "norms of heads, zero experts": dict(qk_norm="head", num_zero_experts=2, latent_dim=8),
    "groups, jitter, a random second": dict(num_groups=2, router_jitter=0.1, random_second=True),
    "raw gates": dict(score="sqrt_softplus", normalize_gates=False, dispatch="capacity", gate_on="input"),
    "classes": dict(class_starts=(5,), activation="geglu", activation_limit=7.0),
    "no gate": dict(activation="relu2", select_by="logits"),
}
STEPS = {name: dict(balance={name: {}}, model=dict(BALANCE_METHODS[name].requires)) for name in balance.names()}
STEPS["target_violation"]["balance"]["aux_loss"] = {}
STEPS |= {name: dict(model=model, balance=BIASED) for name, model in MODELS.items()}
STEPS["device_capacity"] = dict(balance=dict(device_capacity=dict(num_devices=2)))
STEPS["classes"]["balance"] = dict(bias_sign=dict(num_classes=2))
STEPS["micro-batches"] = dict(micro_batches=2, balance=dict(aux_loss=dict(scope="global_running"), bias_sign={}))
STEPS["multistep"] = dict(optimizer=dict(schedule="multistep", weight_decay=0.1), balance={})
STEPS["stochastic rounding"] = dict(optimizer=dict(rounding="stochastic", moment_dtype="bfloat16"), balance={})


def traced(config):
    """The program of a train step, and the shapes and dtypes of its results."""
    for cached in (state._abstract_state, abstract.abstract_model):
        cached.cache_clear()  # or they would return what was traced under other flags
    arguments = state.abstract_state(config), abstract_batch(config), state.step_key(config)
    return jax.make_jaxpr(functools.partial(train_step, config), return_shape=True)(*arguments)


def dtypes_in(jaxpr) -> set[str]:
    """The dtypes of everything that a program computes, including the programs inside it."""
    found = {str(v.aval.dtype) for equation in jaxpr.eqns for v in equation.outvars}
    return found.union(*map(dtypes_in, subjaxprs(jaxpr)))


@pytest.mark.parametrize("what", STEPS)
def test_under_64_bits_and_strict_promotion_a_step_computes_and_returns_nothing_in_64_bits(what):
    with strict_flags():
        program, results = traced(tiny_config(**STEPS[what]))
    assert "float64" not in dtypes_in(program.jaxpr)  # int64 is the dtype of some indices
    assert {str(a.dtype) for a in jax.tree.leaves(results)} <= {"float32", "bfloat16", "int32", "int8", "bool"}


# --- a run, as its user starts it -----------------------------------------------------------------------------


def log_of(workdir, environment) -> list[dict]:
    """What a run of two steps logs, its measures and its evaluation included, without times."""
    overrides = "num_steps=2 measure_every=2 record_scores_every=2 model.num_layers=2 data.eval_sequences=4".split()
    call = [sys.executable, "-m", "moe_jax.train", "--config=configs/tiny.py", f"--workdir={workdir}"]
    call += [f"--config.{key}" for key in overrides]
    out = subprocess.run(call, env=os.environ | environment, cwd=REPO, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    times = "second", "time", "wait", "mfu", "goodput"
    rows = read_jsonl(workdir / "metrics.jsonl")
    return [{name: v for name, v in row.items() if not any(t in name for t in times)} for row in rows]


def test_no_flag_changes_a_run(tmp_path):
    plain = log_of(tmp_path / "plain", {})
    assert log_of(tmp_path / "strict", ENVIRONMENT) == plain
