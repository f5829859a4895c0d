"""The train state: everything a run remembers, and how it is initialised.

Parameters, biases and moments are plain nested dicts of arrays; layers of a kind are stacked, L in front.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float32, Int32, Key

from moe_jax import balance
from moe_jax.config import Config, ModelConfig, OptimizerConfig, num_moe_layers
from moe_jax.config.balance import BalanceEntry
from moe_jax.mesh import AnyMesh, platform, replicated, spec
from moe_jax.model.moe import RouterBias
from moe_jax.model.transformer import Transformer
from moe_jax.runtime.defaults import jax_defaults

Tree = Any  # a nested dict of arrays


Entries = tuple[BalanceEntry, ...]


class TrainState(NamedTuple):
    """What `step` optimizer steps have made. The bias has one home, the model; other balancer state is apart.

    step: steps done, skipped ones included. skipped: steps in which the loss, the gradient or anything that the update
    made of them was not finite.
    stuck: how many of them came last in a row. bias: the RouterBias variables. balance: [L, ...] by label.
    """

    step: Int32[Array, ""]
    skipped: Int32[Array, ""]
    stuck: Int32[Array, ""]
    params: Tree
    optimizer: Tree
    bias: Tree
    balance: Tree


class AbstractModel(NamedTuple):
    """The model without values: how to rebuild it, and shape, dtype and logical dimensions of each leaf."""

    graphdef: nnx.GraphDef
    params: Tree
    bias: Tree
    dims: Tree


@functools.lru_cache(maxsize=64)
def abstract_model(config: ModelConfig) -> AbstractModel:
    """The model's structure; no array is made."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)  # type: ignore[misc]
    dims = jax.tree.map(lambda v: Dims(v.get_metadata()["dims"]), params, is_leaf=_is_variable)
    return AbstractModel(graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(bias), nnx.to_pure_dict(dims))


class Dims:
    """A leaf's logical dimensions, wrapped so that trees treat them as one leaf."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"Dims({', '.join(self.names)})"


def init_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """The state before step 0, drawn from `config.seed` under jit, straight into its shards: same values anywhere."""
    key = jax.random.fold_in(jax.random.key(config.seed), INIT)
    return _initializer(config.model, config.balance, config.optimizer, mesh)(key)


def abstract_state(config: Config, mesh: AnyMesh | None = None) -> TrainState:
    """Shapes and dtypes of the state, as `jax.ShapeDtypeStruct` leaves; with a mesh also where each lies."""
    state = _abstract_state(config.model, config.balance, config.optimizer)
    if mesh is None:
        return state
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state, state_shardings(config, mesh)
    )


def state_shardings(config: Config, mesh: AnyMesh) -> TrainState:
    """Where every leaf lies: parameters by the table of `mesh`, their moments with them, the rest whole."""
    return _state_shardings(config.model, config.balance, config.optimizer, mesh)


@functools.lru_cache(maxsize=16)
def _abstract_state(model: ModelConfig, entries: Entries, optimizer: OptimizerConfig) -> TrainState:
    return jax.eval_shape(functools.partial(_make_state, model, entries, optimizer), jax.random.key(0))


@functools.lru_cache(maxsize=16)
def _state_shardings(model: ModelConfig, entries: Entries, optimizer: OptimizerConfig, mesh: AnyMesh) -> TrainState:
    abstract, whole = abstract_model(model), replicated(mesh)
    params = jax.tree.map(
        lambda a, d: NamedSharding(mesh, spec(mesh, d.names, a.shape)), abstract.params, abstract.dims
    )
    state = _abstract_state(model, entries, optimizer)
    moments = optax.tree.map_params(
        make_optimizer(optimizer, abstract.dims),
        lambda _, place: place,
        state.optimizer,
        params,
        transform_non_params=lambda _: whole,
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
    # XLA:CPU spends half a second on every shape of random draw unless told that speed does not matter here
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
    """The state before step 0 with these parameters, and these biases or those that balancing starts from."""
    zero, abstract = jnp.zeros((), jnp.int32), abstract_model(model)
    layers = _init_balance(balance.make(entries, model), model)
    first = layers.pop("bias", None)
    if bias is None:
        bias = abstract.bias if first is None else write_bias(abstract.bias, first)
    return TrainState(zero, zero, zero, params, make_optimizer(optimizer, abstract.dims).init(params), bias, layers)


def state_around(config: Config, params: Tree, bias: Tree | None, mesh: Mesh | None = None) -> TrainState:
    """The state before step 0 with given parameters, donated, and biases; None for those that balancing starts from."""
    make = functools.partial(_around, config.model, config.balance, config.optimizer)
    places = None if mesh is None else state_shardings(config, mesh)
    return jax.jit(make, donate_argnums=0, out_shardings=places)(params, bias)


def _init_balance(balancer: balance.Balancer, model: ModelConfig) -> Tree:
    layers = num_moe_layers(model)
    if not layers:
        return {}
    experts, classes = model.num_experts + model.num_zero_experts, len(model.class_starts) + 1
    state = jax.vmap(functools.partial(balancer.init, experts))(jnp.arange(layers))
    if classes > 1 and state["bias"].ndim == 2:  # no method owns it
        state["bias"] = jnp.zeros((layers, classes, experts), jnp.float32)
    return state


def initial_balance(config: Config) -> Tree:
    """What balancing remembers before step 0, apart from the bias."""
    layers = _init_balance(balance.make(config.balance, config.model), config.model)
    return {label: value for label, value in layers.items() if label != "bias"}


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
    """The parts of the model with biases as they run: the stacks, then multi-token prediction."""
    return [bias[name] for name in sorted(bias, key=_STACKS_FIRST)]


_STACKS_FIRST = ("stacks", "mtp").index


# --- optimizer ------------------------------------------------------------------------------------------------


def make_optimizer(config: OptimizerConfig, dims: Tree) -> optax.GradientTransformation:
    """AdamW without its learning rate, which follows the step number and is applied by the train step.

    It computes in float32: what it returns is stored by `stored`. Weights with two or more logical dimensions decay;
    scales of norms, which have one, do not. The number of array dimensions would not tell them apart, for layers are
    stacked.
    """
    parts = [_clip_by_norm(config.clip_norm)] if config.clip_norm > 0 else []
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    parts.append(_moments_in(adam, config.moment_dtype))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask(dims)))
    chain = optax.chain(*parts)
    return optax.GradientTransformation(jax_defaults()(chain.init), jax_defaults()(chain.update))


def _clip_by_norm(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with one division in all, not one an element, for which XLA:CPU keeps a copy."""

    def clip(updates: Tree, _: Tree) -> Tree:
        share = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda u: (share * u).astype(u.dtype), updates)

    return optax.stateless(clip)


def decay_mask(dims: Tree) -> Tree:
    """True for every leaf that weight decay shrinks."""
    return jax.tree.map(lambda d: len(d.names) > 1, dims)


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """step -> learning rate: a linear warm-up that ends at the peak, then the schedule by name.

    constant; cosine to `end_ratio` of the peak at the last step; wsd (warm-up, stable, decay): linear to the same
    over the last `decay_fraction`; multistep: times `milestone_ratio` at every milestone. A decay starts from a step
    at the peak, so one that would fill the run is a step shorter.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    longest = num_steps - max(1, warmup)  # of the decay
    decay, fall = 0, optax.constant_schedule(peak)
    if config.schedule == "cosine" and longest:
        decay = max(1, num_steps - 1 - warmup)
        fall = optax.cosine_decay_schedule(peak, decay, config.end_ratio)
    elif config.schedule == "wsd" and config.decay_fraction and longest:
        decay = min(longest, max(1, round(config.decay_fraction * num_steps)))
        fall = optax.linear_schedule(peak, config.end_ratio * peak, decay)
    milestones = config.milestones if config.schedule == "multistep" else ()
    last_at_peak = num_steps - 1 - decay

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step, jnp.int32)
        ramp = jnp.minimum(1.0, (step + 1).astype(jnp.float32) / max(1, warmup))
        rate = ramp * fall(jnp.maximum(step - last_at_peak, 0).astype(jnp.float32))
        drops = sum((step >= round(m * num_steps)).astype(jnp.float32) for m in milestones)
        return rate * config.milestone_ratio**drops if milestones else rate

    return schedule


def _moments_in(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner` computing in float32 from moments that begin in `dtype`, whatever the parameters' dtype."""

    def cast(tree: Tree, to: str) -> Tree:
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def init(params: Tree) -> Tree:
        return cast(inner.init(params), dtype)

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        return inner.update(cast(updates, "float32"), cast(state, "float32"), params)

    return optax.GradientTransformation(init, update)


def stored(new: Tree, old: Tree, rounding: str, key: Key[Array, ""]) -> Tree:
    """What was computed, in the dtypes of `old`: rounded to the nearest, or by chance where that is to bfloat16.

    To the nearest, what changes a bfloat16 number by less than 2^-8 of it is lost, step after step. By chance, a number
    goes up or down with the probabilities that keep its mean. The draws are those of `key`, the same on any mesh.

    Source: stochastic rounding for training, Gupta et al. (arXiv 1502.02551); in bfloat16, Zamirai et al. (2010.06192).
    """

    def one(number: int, new: Array, old: Array) -> Array:
        if rounding == "nearest" or (new.dtype, old.dtype) != (jnp.float32, jnp.bfloat16):
            return new.astype(old.dtype)
        noise = jax.random.bits(jax.random.fold_in(key, number), new.shape, jnp.uint16).astype(jnp.uint32)
        bits = (jax.lax.bitcast_convert_type(new, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
        return jnp.where(jnp.isfinite(new), jax.lax.bitcast_convert_type(bits, jnp.float32), new).astype(old.dtype)

    leaves, structure = jax.tree.flatten(new)
    pairs = zip(leaves, jax.tree.leaves(old), strict=True)
    return jax.tree.unflatten(structure, [one(number, *pair) for number, pair in enumerate(pairs)])


def cost_of_rounding(config: Config) -> str | None:
    """One line on what is lost of small updates to numbers that are kept in bfloat16; None where nothing is."""
    model, optimizer = config.model, config.optimizer
    if optimizer.rounding == "stochastic":
        return None
    kept = []
    if model.param_dtype == "bfloat16":
        kept.append("model.param_dtype")
    if optimizer.moment_dtype == "bfloat16" and max(optimizer.b1, optimizer.b2) > 1 - 2**-8:
        kept.append("optimizer.moment_dtype")
    if not kept:
        return None
    return (
        f"{' and '.join(kept)}='bfloat16' loses every change of a number by less than about 2^-8 of it, as small "
        "learning rates make them; set 'float32', or optimizer.rounding='stochastic'"
    )


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)
