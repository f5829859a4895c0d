"""AdamW or Muon behind gradient clipping, by part of the model, and the learning rate over the steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from moe_jax.config import Config, OptimizerConfig
from moe_jax.mesh import is_vector
from moe_jax.model.abstract import Dims, Tree, abstract_model
from moe_jax.runtime.defaults import jax_defaults
from moe_jax.training.muon import orthogonalized

# --- optimizer ------------------------------------------------------------------------------------------------


def make_optimizer(config: OptimizerConfig, dims: Tree, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """The optimizer without its learning rate, which follows the step number and is applied by the train step.

    It computes in float32; `stored` converts its results. Matrices decay; vectors, which are scales and biases, do
    not. The number of array dimensions does not distinguish them, because layers are stacked.

    Adam divides by sqrt(v) + eps; another epsilon for a parameter is the same one after its gradient was divided by the
    ratio of the two, by which its moments are divided, too.

    Args:
        dims: dims, part and multipliers of every parameter.
        mesh: of the parameters, on which Muon places its matrices; None is one device.
    """
    chain = [_clip_by_norm(config.clip_norm)] if config.clip_norm > 0 else []
    chain += _scaled(jax.tree.map(lambda d: 1 / d.multipliers.epsilon, dims))
    chain.append(_direction(config, dims, mesh))
    decay = jax.tree.map(lambda d: weight_decay(config, d), dims)
    chain += [optax.add_decayed_weights(value, mask) for value, mask in _by_value(decay) if value > 0]
    chain += _scaled(jax.tree.map(lambda d: rate_factor(config, d), dims))
    whole = optax.chain(*chain)
    return optax.GradientTransformation(jax_defaults()(whole.init), jax_defaults()(whole.update))


def _direction(config: OptimizerConfig, dims: Tree, mesh: Mesh | None) -> optax.GradientTransformation:
    """The transform of each parameter's gradient by the method that moves it."""
    methods = jax.tree.map(lambda d: method_of(config, d), dims)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    muon = optax.chain(optax.trace(config.muon.momentum, nesterov=True), orthogonalized(config.muon, dims, mesh))
    transforms = {
        "adamw": _moments_in(adam, config.moment_dtype),
        "muon": _moments_in(muon, config.moment_dtype),
        "frozen": optax.set_to_zero(),
    }
    used = set(jax.tree.leaves(methods))
    if used <= {"adamw"}:
        return transforms["adamw"]
    return optax.partition({name: transforms[name] for name in used}, methods)


def method_of(config: OptimizerConfig, dims: Dims) -> str:
    """What moves a parameter: "adamw", "muon" or nothing, "frozen"."""
    if getattr(config.groups, dims.part).frozen:
        return "frozen"
    by_muon = config.method == "muon" and dims.part in config.muon.parts and not is_vector(dims.names)
    return "muon" if by_muon else "adamw"


def moved_by(config: Config) -> list[str]:
    """`method_of` every parameter, which says what moments it has."""
    return [method_of(config.optimizer, d) for d in jax.tree.leaves(abstract_model(config.model).dims)]


def rate_factor(config: OptimizerConfig, dims: Dims) -> float:
    """The factor of a parameter's learning rate: of its group, times that of its sizes."""
    return getattr(config.groups, dims.part).learning_rate * _rate_by_size(config, dims)


def weight_decay(config: OptimizerConfig, dims: Dims) -> float:
    """The weight decay of a parameter; 0 for vectors and what is frozen.

    What the sizes multiply the learning rate by divides it, so that a step shrinks weights as in the base.
    """
    group = getattr(config.groups, dims.part)
    if is_vector(dims.names) or group.frozen:
        return 0.0
    return config.weight_decay * group.weight_decay / _rate_by_size(config, dims)


def _rate_by_size(config: OptimizerConfig, dims: Dims) -> float:
    return dims.multipliers.muon if method_of(config, dims) == "muon" else dims.multipliers.adamw


def without_frozen_gradients(config: OptimizerConfig, dims: Tree, params: Tree) -> Tree:
    """The parameters, those of frozen parts as constants, whose gradients are zeros and are never computed."""

    def one(d: Dims, value: Array) -> Array:
        return jax.lax.stop_gradient(value) if method_of(config, d) == "frozen" else value

    return jax.tree.map(one, dims, params)


def _scaled(factors: Tree) -> list[optax.GradientTransformation]:
    """Each update times its factor."""
    return [optax.masked(optax.scale(value), mask) for value, mask in _by_value(factors) if value != 1]


def _by_value(values: Tree) -> list[tuple[float, Tree]]:
    """Each of the different leaves, ascending, and the mask of where it stands."""
    return [(value, jax.tree.map(value.__eq__, values)) for value in sorted(set(jax.tree.leaves(values)))]


def _clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with a single division: for one an element XLA:CPU keeps a copy of the gradient."""

    def clip(updates: Tree, _: Tree) -> Tree:
        share = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda u: (share * u).astype(u.dtype), updates)

    return optax.stateless(clip)


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """step -> learning rate: a linear warm-up that ends at the peak, then the schedule of that name.

    constant; cosine to `end_ratio` of the peak at the last step; wsd (warm-up, stable, decay): linear to the same value
    over the last `decay_fraction` of the steps; multistep: times `milestone_ratio` at every milestone. A decay starts
    from a step at the peak, so a decay over the whole run is a step shorter.
    """
    peak = config.learning_rate
    warmup = config.warmup_steps
    longest = num_steps - max(1, warmup)  # the largest number of steps of the decay
    decay = 0
    fall = optax.constant_schedule(peak)
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
    """`inner`, computing in float32 from moments whose initial dtype is `dtype`, whatever the parameters' dtype."""

    def cast(tree: Tree, to: str) -> Tree:
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def init(params: Tree) -> Tree:
        return cast(inner.init(params), dtype)

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        return inner.update(cast(updates, "float32"), cast(state, "float32"), params)

    return optax.GradientTransformation(init, update)


def stored(new: Tree, old: Tree, rounding: str, key: Key[Array, ""]) -> Tree:
    """The new values in the dtypes of `old`, rounded to the nearest; to bfloat16 also stochastically.

    Rounding to the nearest loses every update of less than about 2^-8 of a bfloat16 number, step after step. Stochastic
    rounding rounds up or down with the probabilities that keep the mean. The draws from `key` are the same on any mesh.

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
    """One line about small updates that are lost to numbers kept in bfloat16; None if none are lost."""
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
        f"{' and '.join(kept)}='bfloat16' loses every change of a number by less than about 2^-8 of it, as with small "
        "learning rates; set 'float32', or optimizer.rounding='stochastic'"
    )
