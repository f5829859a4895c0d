"""The train state: everything that a run remembers, and how it is initialised.

Parameters, biases and moments are plain nested dicts of arrays; layers of a kind are stacked, with L the first axis.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float32, Int32, Key

from moe_jax import balance
from moe_jax.config import BalanceEntry, Config, ModelConfig, OptimizerConfig, num_choices, num_moe_layers
from moe_jax.mesh import AnyMesh, parameter_spec, platform, replicated
from moe_jax.model.abstract import Tree, abstract_model
from moe_jax.model.transformer import Transformer
from moe_jax.training import anticipation, ema, guard
from moe_jax.training.anticipation import Anticipation
from moe_jax.training.ema import Ema
from moe_jax.training.guard import Guard
from moe_jax.training.muon import is_masked
from moe_jax.training.optimizer import make_optimizer

Entries = tuple[BalanceEntry, ...]


class TrainState(NamedTuple):
    """The state after `step` optimizer steps. The bias is kept once, in `bias`; other balancer state is in `balance`.

    step: steps done, skipped ones included. skipped: steps in which the loss, the gradient or a result of the update
    was not finite, and outliers. stuck: the number of steps since the last finite one, or with `guard.rollback` since
    the last one that was kept. bias: the RouterBias variables.
    balance: [L, ...] by label. anticipation: the experts that were chosen for later steps; None without.
    ema: the moving average of the weights; None without. guard: what it compares a step with; None without.
    """

    step: Int32[Array, ""]
    skipped: Int32[Array, ""]
    stuck: Int32[Array, ""]
    params: Tree
    optimizer: Tree
    bias: Tree
    balance: Tree
    anticipation: Anticipation | None = None
    ema: Ema | None = None
    guard: Guard | None = None


def init_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """The state before step 0, drawn from `config.seed` under jit into its shards; the same values on any mesh."""
    key = jax.random.fold_in(jax.random.key(config.seed), INIT)
    state = _initializer(config.model, config.balance, config.optimizer, mesh)(key)
    return with_options(config, state, mesh)


def with_options(config: Config, state: TrainState, mesh: Mesh | None = None) -> TrainState:
    """The state with what some runs remember besides, as before their first step; placed on the mesh."""
    places = None if mesh is None else state_shardings(config, mesh).ema
    return state._replace(
        anticipation=anticipation.initial(config, mesh),
        ema=ema.initial(config.ema, Ema(state.params, state.bias), places),
        guard=guard.initial(config.guard, mesh),
    )


def with_other_batches(config: Config, state: TrainState, mesh: Mesh) -> TrainState:
    """The state before steps that have other batches than they would have had; on the mesh.

    Experts that were chosen for the batches that they would have had are forgotten, and steps that were not kept do not
    count any more as in a row with them.
    """
    if state.guard is None:
        return state

    def zeroed(*counts: Array) -> tuple[Array, ...]:
        return tuple(map(jnp.zeros_like, counts))

    stuck, in_a_row = jax.jit(zeroed, out_shardings=replicated(mesh))(state.stuck, state.guard.in_a_row)
    chosen = anticipation.initial(config, mesh)
    if chosen is not None and state.anticipation is not None:
        chosen = state.anticipation._replace(ids=chosen.ids)
    return state._replace(stuck=stuck, guard=state.guard._replace(in_a_row=in_a_row), anticipation=chosen)


def abstract_state(config: Config, mesh: AnyMesh | None = None) -> TrainState:
    """Shapes and dtypes of the state, as `jax.ShapeDtypeStruct` leaves; with a mesh also their shardings."""
    state = _abstract_state(config.model, config.balance, config.optimizer)
    state = jax.eval_shape(functools.partial(with_options, config), state)
    if mesh is None:
        return state
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state, state_shardings(config, mesh)
    )


def state_shardings(config: Config, mesh: AnyMesh) -> TrainState:
    """The sharding of every leaf: parameters by the table in `mesh`, moments like parameters, the rest replicated."""
    state = _state_shardings(config.model, config.balance, config.optimizer, mesh)
    return state._replace(
        anticipation=anticipation.shardings(config, mesh),
        ema=Ema(state.params, state.bias) if config.ema.decay else None,
        guard=guard.shardings(config.guard, mesh),
    )


@functools.lru_cache(maxsize=16)
def _abstract_state(model: ModelConfig, entries: Entries, optimizer: OptimizerConfig) -> TrainState:
    return jax.eval_shape(functools.partial(_make_state, model, entries, optimizer), jax.random.key(0))


@functools.lru_cache(maxsize=16)
def _state_shardings(model: ModelConfig, entries: Entries, optimizer: OptimizerConfig, mesh: AnyMesh) -> TrainState:
    abstract = abstract_model(model)
    whole = replicated(mesh)
    params = jax.tree.map(
        lambda a, d: NamedSharding(mesh, parameter_spec(mesh, d.names, a.shape)), abstract.params, abstract.dims
    )
    state = _abstract_state(model, entries, optimizer)
    moments = optax.tree.map_params(
        make_optimizer(optimizer, abstract.dims),
        lambda moment, place: moment if is_masked(moment) else place,
        state.optimizer,
        params,
        transform_non_params=lambda _: whole,
        is_leaf=is_masked,
    )
    rest = jax.tree.map(lambda _: whole, state)
    return rest._replace(params=params, optimizer=moments)


FAST_COMPILE: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}

INIT, STEP = 0, 1  # streams of randomness, folded into the seed's key


def step_key(config: Config) -> Key[Array, ""]:
    """The base key of the run's steps; step n uses `fold_in(key, n)`, so no key is stored."""
    return jax.random.fold_in(jax.random.key(config.seed), STEP)


@functools.lru_cache(maxsize=16)
def _initializer(
    model: ModelConfig, entries: Entries, optimizer: OptimizerConfig, mesh: Mesh | None
) -> Callable[[Array], TrainState]:
    places = None if mesh is None else _state_shardings(model, entries, optimizer, mesh)
    make = jax.jit(functools.partial(_make_state, model, entries, optimizer), out_shardings=places)
    if (jax.default_backend() if mesh is None else platform(mesh)) != "cpu":
        return make
    # XLA:CPU spends half a second on optimising every shape of random draw, whose speed does not matter here
    return make.lower(jax.random.key(0)).compile(FAST_COMPILE)


def _make_state(
    model: ModelConfig,
    entries: Entries,
    optimizer: OptimizerConfig,
    key: Array,
) -> TrainState:
    values = nnx.state(Transformer(model, nnx.Rngs(params=key)), nnx.Param)
    return _around(model, entries, optimizer, nnx.to_pure_dict(values), None)


def _around(
    model: ModelConfig, entries: Entries, optimizer: OptimizerConfig, params: Tree, bias: Tree | None
) -> TrainState:
    """The state before step 0 with these parameters and biases; None for the balancer's initial biases."""
    zero = jnp.zeros((), jnp.int32)
    abstract = abstract_model(model)
    layers = _init_balance(balance.make(entries, model), model)
    initial = layers.pop("bias", None)
    if bias is None:
        bias = abstract.bias if initial is None else write_bias(abstract.bias, initial)
    return TrainState(zero, zero, zero, params, make_optimizer(optimizer, abstract.dims).init(params), bias, layers)


def state_around(config: Config, params: Tree, bias: Tree | None, mesh: Mesh | None = None) -> TrainState:
    """The state before step 0 with given parameters, donated, and biases; None for the balancer's initial biases."""
    entries = config.model, config.balance, config.optimizer
    places = None if mesh is None else _state_shardings(*entries, mesh)
    state = jax.jit(functools.partial(_around, *entries), donate_argnums=0, out_shardings=places)(params, bias)
    return with_options(config, state, mesh)


def _init_balance(balancer: balance.Balancer, model: ModelConfig) -> Tree:
    layers = num_moe_layers(model)
    if not layers:
        return {}
    experts = num_choices(model)
    classes = len(model.class_starts) + 1
    state = jax.vmap(functools.partial(balancer.init, experts))(jnp.arange(layers))
    if classes > 1 and state["bias"].ndim == 2:  # no method moves the bias, so it lacks the axis of classes
        state["bias"] = jnp.zeros((layers, classes, experts), jnp.float32)
    return state


def initial_layers(config: Config) -> Tree:
    """The balancer state of all MoE layers before step 0, with "bias" as `read_bias` has it; {} for a dense model."""
    return _init_balance(balance.make(config.balance, config.model), config.model)


def initial_balance(config: Config) -> Tree:
    """The balancer state before step 0, without the bias."""
    return {label: value for label, value in initial_layers(config).items() if label != "bias"}


def read_bias(bias: Tree) -> Float32[Array, "layers *classes experts"]:
    """The biases of all MoE layers in execution order, [L, E], or [L, C, E] with classes of tokens."""
    return jnp.concatenate(jax.tree.leaves(_in_order(bias)))


def write_bias(bias: Tree, value: Float32[Array, "layers *classes experts"]) -> Tree:
    """The bias variables holding `value`: the inverse of `read_bias`."""
    ordered = _in_order(bias)
    leaves, structure = jax.tree.flatten(ordered)
    ends = itertools.accumulate(leaf.shape[0] for leaf in leaves[:-1])
    filled = jax.tree.unflatten(structure, jnp.split(value, list(ends)))
    return dict(zip(sorted(bias, key=_STACKS_FIRST), filled, strict=True))


def _in_order(bias: Tree) -> list[Tree]:
    """The parts of the model with biases in execution order: the stacks, then multi-token prediction."""
    return [bias[name] for name in sorted(bias, key=_STACKS_FIRST)]


_STACKS_FIRST = ("stacks", "mtp").index
