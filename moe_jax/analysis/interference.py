"""Measure what balancing does in a step: its gradient against the language model's, and what the bias decides.

The first micro-batch of a step is measured before the step, by a separate program: the train step is the same program
whether or not anything is measured. L MoE layers, T tokens, S slots, E experts, D embed.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_jax import balance
from moe_jax.analysis import gradients as gradients_
from moe_jax.balance import measures
from moe_jax.config import Config
from moe_jax.data.batches import Batch, total_of
from moe_jax.mesh import constrain, replicated, spec
from moe_jax.model.abstract import Tree
from moe_jax.model.forward import Details, Pass, PerLayer, inputs_of
from moe_jax.model.prediction import language_nats
from moe_jax.training.compile import compiled_by
from moe_jax.training.hooks import Context, Now
from moe_jax.training.losses import model_summed_nats
from moe_jax.training.micro_batches import Micro, micro_batches_of_step
from moe_jax.training.state import TrainState, step_key
from moe_jax.training.step import divisor

Measure = Any  # a jitted (TrainState, Batch, key) -> result, such as {name: [L]}


def measure_next_step(context: Context, now: Now) -> dict[str, Array]:
    """The result of `measure` for the step that is due."""
    return make_measure_step(context.config, context.mesh)(now.state, now.batch, step_key(context.config))


def make_measure_step(config: Config, mesh: Mesh | None = None) -> Measure:
    """A jitted (state, batch, key) -> result of `measure`, whole on every device; the state is not donated."""
    run = jitted_on(measure, compiled_by(config), mesh)

    def measured(state: TrainState, batch: Batch, key: Array) -> dict[str, Array]:
        with jax.debug_nans(False):  # NaN is a valid result here: a gradient of 0 has no angle to another
            return run(state, batch, key)

    return measured


@functools.lru_cache(maxsize=16)
def jitted_on(function: Any, config: Config, mesh: Mesh | None) -> Measure:
    """The jitted (state, batch, key) -> function(config, state, batch, key, mesh=mesh), its result whole everywhere."""
    places = None if mesh is None else replicated(mesh)
    return jax.jit(functools.partial(function, config, mesh=mesh), out_shardings=places)


def measure(
    config: Config, state: TrainState, batch: Batch, key: Array, mesh: Mesh | None = None
) -> dict[str, Float[Array, "*layers"]]:
    """Measure interference and the effect of the bias: float32 [L], one number a MoE layer; violations float32 [].

    Args:
        state, batch, key: the arguments of the train step that follows.

    Returns:
        interference/router_ratio: the norm of the balancing losses' gradient over that of the language model's, at the
            router weight; 0 for methods without a loss. interference/router_cosine: the cosine of the angle between
            the two, NaN where one is 0. interference/input_ratio, input_cosine: the same at the layer's input.
            interference/z_...: the same for losses that do not balance, which are not included above: z-losses, and
            that of coupling. Losses of scope global read the counts of this micro-batch alone.
        moe/microbatch_max_violation, moe/sequence_max_violation: MaxVio of the micro-batch's loads, and the mean of
            the MaxVio of each of its sequences; min_, mean_, _worst and _violation_floor as in the metrics of a step.
            moe/bias_changed: the share of choices that the bias changes, where there is a bias. moe/churn: the share
            that the update from this micro-batch alone would change, where only the bias selects. Neither is measured
            where experts are chosen some steps before.

    Source: LongCat-Flash (arXiv 2509.01322) monitors the ratio of the gradients; here both are pulled back through
    one linearisation.
    """
    gradients, details = _gradients(config, state, first_micro_batch(config, state, batch, key, mesh), mesh)
    values = {}
    for name, gradient in {"": gradients.balance, "z_": gradients.z}.items():
        for place in Places._fields:
            ours = getattr(gradient, place)
            theirs = getattr(gradients.language, place)
            values[f"interference/{name}{place}_ratio"] = jax.vmap(gradients_.norm_ratio)(ours, theirs)
            values[f"interference/{name}{place}_cosine"] = jax.vmap(gradients_.cosine)(ours, theirs)
    return values | _choices(config, details)


class Places(NamedTuple):
    """The gradients of one loss in every layer: at the router weight [L, D, E] and at the input [L, B S, D]."""

    router: Array
    input: Array


class Gradients(NamedTuple):
    """The gradients of the cross-entropy, of the losses that balance, and of the others, such as z-losses."""

    language: Places
    balance: Places
    z: Places


def _gradients(config: Config, state: TrainState, micro: Micro, mesh: Mesh | None) -> tuple[Gradients, Details]:
    """Linearise one forward pass, and pull back each of the three losses through it."""
    batch, key, chosen = micro
    balancer = balance.make(config.balance, config.model)
    z_labels = {e.label for e in config.balance if not getattr(e.options, "balances", True)}
    num_targets = divisor(total_of(batch.mask))
    router = jnp.concatenate([leaf for _, leaf in routers(state.params)])

    def losses(router: Array, offset: Array) -> tuple[tuple[Array, Array, Array], Details]:
        params = with_routers(state.params, router)
        steps = jnp.full(router.shape[0], state.step)
        per_layer = PerLayer(state.balance, chosen=chosen, offset=offset, step=steps)
        fwd = Pass(inputs_of(batch), balancer, per_layer, key, train=True, mesh=mesh)
        nats, ahead, report, _ = model_summed_nats(config, params, state.bias, fwd, batch)
        assert report is not None  # only models with experts are measured
        sums = {True: jnp.float32(0.0), False: jnp.float32(0.0)}  # whether it is such a loss -> their sum
        for label, value in report.losses.items():
            sums[label in z_labels] += value.sum()
        language = language_nats(config, state.step, nats, ahead) / num_targets
        return (language, sums[False], sums[True]), report.details

    shape = (router.shape[0], batch.tokens.size, config.model.embed_dim)
    offset = constrain(jnp.zeros(shape, config.model.compute_dtype), mesh, spec("layers", "tokens"))
    _, pull, details = jax.vjp(losses, router, offset, has_aux=True)
    return Gradients(*(Places(*pull(tuple(map(jnp.float32, unit)))) for unit in jnp.eye(3, dtype=jnp.float32))), details


def _choices(config: Config, details: Details) -> dict[str, Array]:
    """Violations of the micro-batch's loads, and the shares of choices that the bias and its next update change."""
    routing = details.routing
    real = config.model.num_experts  # without zero-computation experts
    loads = routing.loads[:, :real]
    row_loads = details.row_loads[..., :real]
    num_choices = routing.loads.shape[-1]
    mask = routing.tokens.mask
    changed = jax.vmap(functools.partial(measures.decisions_changed, num_experts=num_choices))
    assert mask is not None
    tokens = divisor(mask.sum(-1, dtype=jnp.int32))
    copies = loads.sum(-1, dtype=jnp.int32).astype(jnp.float32) / tokens
    floors = {
        "microbatch": measures.violation_floor(tokens, copies, real),
        "sequence": measures.sequence_floor(row_loads, copies[:, None]),
    }
    scopes = {"microbatch": measures.violations(loads), "sequence": measures.sequence_violations(row_loads)}
    values = {}
    chosen_here = config.anticipation.delay == 0  # or the choices of other parameters would be compared with these
    if chosen_here and any(e.options.moves_bias for e in config.balance):
        values["moe/bias_changed"] = changed(routing.expert_ids, details.unbiased_ids, mask=mask)
    for scope, measured in scopes.items():
        values |= {f"moe/{scope}_{name}": value for name, value in measures.over_layers(measured).items()}
        values[f"moe/{scope}_violation_floor"] = floors[scope].mean()
    if chosen_here and balance.make(config.balance, config.model).select is None:
        values["moe/churn"] = changed(routing.expert_ids, details.next_ids, mask=mask)
    return values


def first_micro_batch(config: Config, state: TrainState, batch: Batch, key: Array, mesh: Mesh | None) -> Micro:
    """The first micro-batch of the step that follows the state, as its forward pass has it; `key` is the run's."""
    key = jax.random.fold_in(key, state.step)
    return jax.tree.map(lambda a: a[0], micro_batches_of_step(config, state, batch, key, mesh))


def routers(params: Tree) -> list[tuple[Any, Array]]:
    """(path, weight [layers, D, E]) of every stack of routers in execution order: multi-token prediction's last."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [(path, leaf) for path, leaf in leaves if path[-1] == jax.tree_util.DictKey("router")]
    return sorted(found, key=lambda pair: pair[0][0] == jax.tree_util.DictKey("mtp"))


def with_routers(params: Tree, router: Float[Array, "layers embed experts"]) -> Tree:
    """The parameters with the routers replaced by those of `router`, all layers in one array."""
    ends = itertools.accumulate(len(leaf) for _, leaf in routers(params))
    parts = zip(routers(params), jnp.split(router, list(ends)[:-1]), strict=True)
    new = {path: part for (path, _), part in parts}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(path, leaf), params)
