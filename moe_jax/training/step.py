"""The train step, a pure function that `compile` jits.

One step: a forward and a backward pass of every micro-batch, one division, one optimizer update and one bias update, of
which all or none are kept. N micro-batches, B sequences, S tokens a sequence, L MoE layers, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, Key

from moe_jax import balance
from moe_jax.balance import measures
from moe_jax.config import Config
from moe_jax.data.batches import Batch, total_of
from moe_jax.dispatch import Traffic
from moe_jax.mesh import is_sharded, replicated, ways
from moe_jax.model.abstract import Tree, abstract_model
from moe_jax.model.forward import MaxLogits, Pass, PerLayer, inputs_of
from moe_jax.model.prediction import AheadLoss, language_nats
from moe_jax.training import anticipation, ema, guard
from moe_jax.training.guard import Guard
from moe_jax.training.losses import model_summed_nats
from moe_jax.training.micro_batches import Micro, chosen_experts, micro_batches, micro_batches_of_step, report_of
from moe_jax.training.optimizer import learning_rate, make_optimizer, stored, without_frozen_gradients
from moe_jax.training.qk_clip import clipped, largest
from moe_jax.training.state import TrainState, read_bias, state_shardings, step_key, write_bias


class StepSums(NamedTuple):
    """What `accumulate` sums over the micro-batches of a step; the metrics are computed from it.

    nats: the cross-entropy of the next tokens.
    ahead: nats and targets of multi-token prediction, summed over its depths.
    total_loss: the loss that was differentiated.
    statistics, losses, aux_loss, traffic: the sums of the MoE layers' `Report`s, leaves [L, ...]; None for a dense
        model. The balancer moves the bias by the statistics.
    max_logits: the largest logits, of which not the sum but the largest counts; None without `optimizer.qk_clip`.
    """

    nats: Float32[Array, ""]
    ahead: AheadLoss
    total_loss: Float32[Array, ""]
    statistics: balance.Statistics | None = None
    losses: dict[str, Float32[Array, "layers"]] | None = None
    aux_loss: Float32[Array, "layers"] | None = None
    traffic: Traffic | None = None
    max_logits: MaxLogits | None = None

    def plus(self, other: "StepSums") -> "StepSums":
        """The sums over two parts of a step."""
        sums = jax.tree.map(jnp.add, self._replace(max_logits=None), other._replace(max_logits=None))
        return sums._replace(max_logits=jax.tree.map(jnp.maximum, self.max_logits, other.max_logits))


def train_step(
    config: Config,
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    later: Batch | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step, as a pure function.

    Args:
        state: after `state.step` steps.
        batch: `batch_at(state.step)`, leaves [B, ...].
        key: the run's base key; this step uses `fold_in(key, state.step)`.
        later: `batch_at(state.step + anticipation.delay)`, whose experts this step chooses; only with a delay.
        mesh: of state and batch; None for one device.

    Returns:
        the next state (or, if the loss, the gradient or a number of the next state is not finite, this one with step,
        skipped and stuck advanced), and the step's metrics, with `loads` [L, E] and `bias` [L, E] for a model with
        experts.
    """
    run_key = key
    key = jax.random.fold_in(run_key, state.step)
    sums, grads = accumulate(config, state, batch, key, mesh)
    grad_norm = optax.tree.norm(grads)
    rate = learning_rate(config.optimizer, config.num_steps)(state.step)
    move = state, grads, sums.statistics, rate, jax.random.fold_in(key, ROUNDING), sums.max_logits
    moving = functools.partial(advance, config, mesh=mesh)
    with jax.named_scope("optimizer"):
        moved = moving(*move)
        # Computed twice: `checked` is only reduced to whether it is finite, so it needs no memory, while `moved` is
        # written in place of the old state, which `make_train_step` donates. Without the barrier XLA would merge the
        # two, and keep both states at once.
        checked = moving(*jax.lax.optimization_barrier(move))
        finite = jnp.isfinite(sums.total_loss) & jnp.isfinite(grad_norm) & is_finite(checked)
        keep, watched = _guarded(config, state, sums, batch, grad_norm, finite)
        fine = keep if config.guard.rollback else finite
        after = all_or_nothing(fine, keep, moved, state)._replace(guard=watched)
    values = step_metrics(sums, batch, after, grad_norm, rate)
    if config.model.mtp_depth:
        values |= {"mtp/loss": sums.ahead.nats / divisor(sums.ahead.targets)}
    if sums.statistics is not None:
        values |= balance_metrics(config, sums, batch, state, after, mesh)
    if later is not None:
        after, more = _with_later_choices(config, state, after, values["loss"], later, run_key, mesh)
        values |= more
    return after, values


def _guarded(
    config: Config, state: TrainState, sums: StepSums, batch: Batch, grad_norm: Array, finite: Array
) -> tuple[Bool[Array, ""], Guard | None]:
    """Whether a step is kept, and the guard after it."""
    if state.guard is None:
        return finite, None
    loss = mean_nats(sums, batch)
    finite &= ~guard.has_failed(config.guard, state.stuck)
    outlier = finite & guard.is_outlier(config.guard, state.guard, loss, grad_norm)
    return finite & ~outlier, guard.advance(config.guard, state.guard, finite, outlier, loss, grad_norm)


def _with_later_choices(
    config: Config, state: TrainState, after: TrainState, loss: Array, later: Batch, key: Array, mesh: Mesh | None
) -> tuple[TrainState, dict[str, Array]]:
    """The state after a step with the experts of the batch `later`, and whether this step's were chosen before it."""
    assert state.anticipation is not None  # a run with batches ahead has a delay

    def choose() -> Array:
        key_then = jax.random.fold_in(key, state.step + config.anticipation.delay)
        return chosen_experts(config, state, micro_batches(config, later, key_then, mesh), mesh)

    used = anticipation.due(state.anticipation, state.step) != anticipation.NOT_CHOSEN
    moved = anticipation.advance(config.anticipation, state.anticipation, state.step, loss, choose)
    return after._replace(anticipation=moved), {"moe/anticipated": used.any().astype(jnp.float32)}


def accumulate(
    config: Config, state: TrainState, batch: Batch, key: Array, mesh: Mesh | None = None
) -> tuple[StepSums, Tree]:
    """Sum the loss, its gradient and the reports over the micro-batches, by scan.

    Nats are divided once, by the targets of the whole step, each as much as it counts; where none does, loss and
    gradient of the language model are 0. Token-averaged balancing losses are weighted by their micro-batch's share of
    the tokens, which count once each whatever their targets do. So N micro-batches give the gradient of one batch.
    """
    micro = micro_batches_of_step(config, state, batch, key, mesh)
    statistics = None
    if config.micro_batches > 1 and balance.needs_step_statistics(config.balance):
        statistics = step_statistics(config, state, micro, mesh)
    gradient = _micro_batch_gradient(config, state, statistics, batch, mesh)
    first: Micro = jax.tree.map(lambda a: a[0], micro)

    if config.micro_batches == 1:  # without a scan, which would add all gradients to zeros
        sums, grads = gradient(state.params, first, None)
        return sums, _sharded_as_parameters(config, jax.tree.map(lambda g: g.astype(_wide(g.dtype)), grads), mesh)

    def add(totals: tuple[StepSums, Tree], one: Micro) -> tuple[tuple[StepSums, Tree], None]:
        earlier = None
        if balance.needs_running_statistics(config.balance):
            earlier = totals[0].statistics
        sums, grads = gradient(state.params, one, earlier)
        grads = jax.tree.map(jnp.add, totals[1], grads)
        return (totals[0].plus(sums), _sharded_as_parameters(config, grads, mesh)), None

    sums, grads = jax.tree.map(_zeros_to_add_to, jax.eval_shape(gradient, state.params, first, None))
    sums = sums._replace(max_logits=jax.tree.map(lambda a: jnp.full_like(a, -jnp.inf), sums.max_logits))
    return jax.lax.scan(add, (sums, _sharded_as_parameters(config, grads, mesh)), micro)[0]


def _micro_batch_gradient(
    config: Config, state: TrainState, statistics: balance.Statistics | None, step: Batch, mesh: Mesh | None
) -> Callable[[Tree, Micro, balance.Statistics | None], tuple[StepSums, Tree]]:
    """(params, micro-batch, statistics of the earlier ones) -> its part of the step's sums, and its gradient.

    statistics: of the whole step if a loss reads them, else None. step: the batch of the whole step.
    """
    num_targets, num_tokens = divisor(total_of(step.mask)), divisor(step.num_tokens)
    balancer = balance.make(config.balance, config.model)
    dims = abstract_model(config.model).dims

    def objective(params: Tree, micro: Micro, earlier: Any) -> tuple[Array, StepSums]:
        batch, key, chosen = micro
        per_layer = PerLayer(state.balance, statistics, earlier, chosen)
        clips = config.optimizer.qk_clip > 0
        fwd = Pass(inputs_of(batch), balancer, per_layer, key, train=True, mesh=mesh, max_logits=clips)
        params = without_frozen_gradients(config.optimizer, dims, params)
        nats, ahead, report, max_logits = model_summed_nats(config, params, state.bias, fwd, batch)
        total = language_nats(config, state.step, nats, ahead) / num_targets
        share = batch.num_tokens.astype(jnp.float32) / num_tokens
        if report is None:
            return total, StepSums(nats, ahead, total, max_logits=max_logits)
        losses, aux_loss = jax.tree.map(lambda value: share * value, (report.losses, report.aux_loss))
        total = sum((value.sum() for value in losses.values()), total)
        return total, StepSums(nats, ahead, total, report.statistics, losses, aux_loss, report.traffic, max_logits)

    differentiate = jax.jit(jax.grad(objective, has_aux=True))  # jitted, so that it is traced once, not at every call

    def gradient(params: Tree, micro: Micro, earlier: Any) -> tuple[StepSums, Tree]:
        grads, sums = differentiate(params, micro, earlier)
        return sums, grads

    return gradient


def _sharded_as_parameters(config: Config, tree: Tree, mesh: Mesh | None) -> Tree:
    """Shard gradients like their parameters, so that no device ever holds all of them."""
    if not is_sharded(mesh):
        return tree
    return jax.lax.with_sharding_constraint(tree, state_shardings(config, mesh).params)


def step_statistics(config: Config, state: TrainState, micro: Micro, mesh: Mesh | None) -> balance.Statistics:
    """The statistics [L, ...] of the whole step, by a forward-only pass before the pass with gradients."""

    def observe(one: Micro) -> balance.Statistics:
        return report_of(config, state, one, mesh).statistics

    def body(totals: Tree, one: Micro) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, totals, observe(one)), None

    first = jax.tree.map(lambda a: a[0], micro)
    zeros = jax.tree.map(_zeros_to_add_to, jax.eval_shape(observe, first))
    return jax.lax.scan(body, zeros, micro)[0]


ROUNDING = 2**31  # the stream of randomness of stochastic rounding, after those of micro-batches


def advance(
    config: Config,
    state: TrainState,
    grads: Tree,
    statistics: balance.Statistics | None,
    rate: Array,
    key: Key[Array, ""],
    max_logits: MaxLogits | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Update the parameters by the optimizer and the bias by the balancer, each once per step, and average them."""
    optimizer = make_optimizer(config.optimizer, abstract_model(config.model).dims, mesh)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p.astype(jnp.float32) + -rate * u, state.params, updates)
    if max_logits is not None:
        params = clipped(config, params, state.bias, max_logits)
    old = state.params, state.optimizer
    params, moments = stored((params, moments), old, config.optimizer.rounding, key)
    state = state._replace(params=params, optimizer=moments)
    if statistics is not None:
        state = balance_update(config, state, statistics)
    return state._replace(ema=ema.advance(config.ema, state.ema, state.params, state.bias, state.step))


def balance_update(config: Config, state: TrainState, statistics: balance.Statistics) -> TrainState:
    """Apply `balancer.update` in every MoE layer, with the statistics [L, ...] of this step."""
    balancer = balance.make(config.balance, config.model)
    joined = state.balance | {"bias": read_bias(state.bias)}
    moved = jax.vmap(balancer.update, in_axes=(0, 0, None))(statistics, joined, state.step)
    bias = write_bias(state.bias, moved.pop("bias"))
    return state._replace(bias=bias, balance=moved)


def is_finite(state: TrainState) -> Bool[Array, ""]:
    """Whether every number of the state is finite; reads a parameter and its moments in one pass over memory."""
    structure: Any = jax.tree.structure(state.params)

    def is_by_parameter(tree: Tree) -> bool:
        return jax.tree.structure(tree) == structure

    # the parameters, and every tree of moments, stay whole; all else is split into leaves
    parts = jax.tree.leaves((state.params, state.optimizer, state.bias, state.balance), is_leaf=is_by_parameter)
    by_parameter = zip(*(jax.tree.leaves(part) for part in parts if is_by_parameter(part)), strict=True)
    others = ((part,) for part in parts if not is_by_parameter(part))
    checks = (functools.reduce(jnp.logical_and, map(jnp.isfinite, group)).all() for group in (*by_parameter, *others))
    return functools.reduce(jnp.logical_and, checks)


def all_or_nothing(fine: Bool[Array, ""], keep: Bool[Array, ""], moved: TrainState, state: TrainState) -> TrainState:
    """The moved state if it is to be kept, else the old one bit by bit; `step` advances in both cases.

    A `fine` step ends a row of stuck ones. The values are selected, not multiplied by zero, because 0 x NaN is NaN.
    """
    kept = jax.tree.map(lambda new, old: jnp.where(keep, new, old), moved, state)
    return kept._replace(
        step=state.step + 1,
        skipped=state.skipped + (~keep).astype(jnp.int32),
        stuck=jnp.where(fine, 0, state.stuck + 1),
    )


def step_metrics(sums: StepSums, batch: Batch, state: TrainState, grad_norm: Array, rate: Array) -> dict[str, Array]:
    """The metrics that are logged for every step; `state` is the state after it."""
    some = {} if state.guard is None else {"outliers": state.guard.outliers}
    if sums.max_logits is not None:
        some["max_logit"] = largest(sums.max_logits)
    return some | {
        "loss": mean_nats(sums, batch),
        "total_loss": sums.total_loss,
        "tokens": batch.num_tokens,
        "bits_per_byte": sums.nats / (jnp.log(jnp.float32(2.0)) * divisor(total_of(batch.num_bytes))),
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "skipped": state.skipped,
        "stuck": state.stuck,
    }


def mean_nats(sums: StepSums, batch: Batch) -> Float32[Array, ""]:
    """The loss of a step: nats per target, each as much as it counts; 0 where none does."""
    return sums.nats / divisor(total_of(batch.mask))


def divisor(total: Int32[Array, "*shape"] | Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """A number or a sum of weights, float32, to divide by: 1 where it is 0."""
    return jnp.where(total > 0, total, 1).astype(jnp.float32)


def balance_metrics(
    config: Config,
    sums: StepSums,
    batch: Batch,
    before: TrainState,
    after: TrainState,
    mesh: Mesh | None = None,
) -> dict[str, Array]:
    """The metrics of a step's routing, the same for every method, and `loads` and `bias` by layer.

    Losses are logged once, as in the total loss, summed over layers. `moe/dropped` counts copies, and `moe/drop_rate`
    is their share.
    """
    m, bias, tokens = config.model, read_bias(after.bias), batch.num_tokens
    statistics, losses, aux_loss, traffic = sums.statistics, sums.losses, sums.aux_loss, sums.traffic
    assert statistics is not None and losses is not None and aux_loss is not None and traffic is not None
    loads = statistics["loads"]
    dropped, rounds, rows, visits = (a.astype(jnp.float32) for a in traffic)
    copies = jnp.maximum(loads[:, : m.num_experts].sum(-1, dtype=jnp.float32), 1.0)
    values = {f"moe/{name}": v for name, v in measures.of_loads(loads, m.num_experts, tokens).items()}
    values |= {f"moe/loss/{label}": value.sum() for label, value in losses.items()}
    if "direction" in before.balance:
        directions = (state.balance["direction"].ravel() for state in (before, after))
        values |= {"moe/bias_flips": measures.flip_rate(*directions)}
    if (devices := ways(mesh, "experts")) > 1:
        on_devices = measures.device_violation(loads[:, : m.num_experts], devices)
        values |= {"moe/device_violation": on_devices.mean(), "moe/device_violation_worst": on_devices.max()}
    if m.num_zero_experts:
        to_zero = loads[:, m.num_experts :].sum(-1, dtype=jnp.int32).astype(jnp.float32)
        values |= {"moe/zero_share": (to_zero / divisor(loads.sum(-1, dtype=jnp.int32))).mean()}
    return values | {
        "moe/bias_range": measures.bias_range(bias).max(),
        "moe/aux_loss": aux_loss.mean(),
        "moe/dropped": traffic.dropped.sum(dtype=jnp.int32),
        "moe/drop_rate": (dropped / copies).mean(),
        "moe/rounds": rounds.mean() / config.micro_batches,
        "moe/padding": (rows / copies).mean(),
        "moe/devices_per_token": (visits / divisor(tokens)).mean(),
        "loads": loads,
        "bias": bias,
    }


def _zeros_to_add_to(leaf: jax.ShapeDtypeStruct) -> Array:
    """Zeros of the leaf's shape, in float32 for narrower floats, whose gradients are summed in float32."""
    return jnp.zeros(leaf.shape, _wide(leaf.dtype))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


PARTS = (
    *("loss", "gradient of", "norm of the gradient"),
    *("moved parameter", "moved moment", "moved bias of", "moved balancer state"),
)


def first_non_finite(config: Config, state: TrainState, batch: Batch, mesh: Mesh | None = None) -> str:
    """The first tensor of a step that is not finite, in the order of PARTS: the part and the tensor's path.

    "nothing any more" if all are finite.
    """

    def parts(state: TrainState, batch: Batch, key: Array) -> tuple[Tree, ...]:
        sums, grads = accumulate(config, state, batch, key, mesh)
        rate = learning_rate(config.optimizer, config.num_steps)(state.step)
        key = jax.random.fold_in(key, ROUNDING)
        moved = advance(config, state, grads, sums.statistics, rate, key, sums.max_logits, mesh)
        after = moved.params, moved.optimizer, moved.bias, moved.balance
        found = sums.total_loss, grads, optax.tree.norm(grads), *after
        return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), found)

    key = jax.random.fold_in(step_key(config), state.step)
    flags = jax.jit(parts, out_shardings=None if mesh is None else replicated(mesh))(state, batch, key)
    for name, tree in zip(PARTS, flags, strict=True):
        for path, is_finite in jax.tree_util.tree_leaves_with_path(tree):
            if not is_finite:
                return f"{name} {jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip()
    return "nothing any more"
