"""The jitted train and evaluation steps, shared by all configs that compile to the same step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32

from moe_jax import balance
from moe_jax.balance import measures
from moe_jax.config import DISPATCHERS, Config, MeshConfig, at_defaults
from moe_jax.config.xla_options import BETWEEN_LAYERS, SPARSE_CORES
from moe_jax.data.batches import Batch
from moe_jax.mesh import HOST_MEMORY, batch_sharding, platform, replicated, ways
from moe_jax.model.forward import Details, Pass, PerLayer, inputs_of
from moe_jax.training.losses import model_row_nats
from moe_jax.training.state import TrainState, abstract_state, read_bias, state_shardings
from moe_jax.training.step import train_step

TrainStep = Any  # a jitted (TrainState, Batch, key[, Batch]) -> (TrainState, metrics)


def make_train_step(config: Config, mesh: Mesh | None = None) -> TrainStep:
    """A jitted (state, batch, key) -> (state, metrics) that donates the state; with `anticipation.delay` its last
    argument is the batch of that many steps later.

    Configs that differ only in what no step reads, such as the seeds of an experiment, share one function and so one
    compilation. Metrics are arrays on the devices, whole on each; the caller decides when to fetch them. With a mesh
    the state is sharded by `state_shardings`, the batch by `batch_sharding`.
    """
    return _train_step(compiled_by(config), mesh)


def abstract_arguments(config: Config, mesh: Mesh | None = None) -> tuple[Any, ...]:
    """Shapes and dtypes of the arguments of the train step, to lower it; with a mesh also their shardings."""
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    if mesh is not None:
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=replicated(mesh))
    batch = abstract_batch(config, mesh)
    later = (batch,) if config.anticipation.delay else ()
    return abstract_state(config, mesh), batch, key, *later


def make_eval_step(
    config: Config, mesh: Mesh | None = None, balancer: balance.Balancer | None = None
) -> Callable[[TrainState, Batch], "Evaluation"]:
    """A jitted (state, batch) -> sums over the batch, whole on every device; the state is not changed.

    Experts are selected by the config's balancer, or by another `balancer` with the same state.
    """
    return _eval_step(compiled_by(config), mesh, balancer)


def abstract_batch(config: Config, mesh: Mesh | None = None, weighted: bool = False) -> Batch:
    """Shapes and dtypes of a step's batch, of a corpus with weights or not; with a mesh also its sharding."""
    dtypes = {"mask": jnp.float32, "num_bytes": jnp.float32} if weighted else {"mask": jnp.bool_}
    sizes = {"batch": config.batch_size, "length": config.sequence_length}

    def leaf(name: str, dims: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        shape = tuple(sizes[dim] for dim in dims)
        sharding = None if mesh is None else batch_sharding(mesh, dims)
        return jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=sharding)

    return Batch(**{name: leaf(name, dims) for name, dims in Batch.dims()._asdict().items()})


def compiled_by(config: Config) -> Config:
    """The config with every key that no step reads at its default: runs with the same result share a compilation."""
    # the mesh is a separate argument of a step
    return dataclasses.replace(at_defaults(config, "data", "nothing"), mesh=MeshConfig())


@functools.lru_cache(maxsize=16)
def _train_step(config: Config, mesh: Mesh | None) -> TrainStep:
    step = functools.partial(train_step, config, mesh=mesh)
    _check_offload(config, jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = state_shardings(config, mesh), replicated(mesh)
    options = compiler_options(config, platform(mesh), ways(mesh, "experts"))
    if options:
        _check_options(options, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def compiler_options(config: Config, platform: str, ways: int = 1) -> dict[str, str]:
    """The options of `config.compiler_options` for XLA on a platform with experts split over `ways` devices.

    One named xla_tpu_... is for "tpu" only, and so are all of `config.xla_options`; those BETWEEN_LAYERS are for meshes
    where every device has all experts.
    """
    others = tuple(f"xla_{name}_" for name in ("cpu", "gpu", "tpu") if name != platform)
    elsewhere = SPARSE_CORES | BETWEEN_LAYERS if platform != "tpu" else BETWEEN_LAYERS if ways > 1 else {}
    options = config.compiler_options.items()
    return {name: value for name, value in options if not name.startswith(others) and name not in elsewhere}


def _check_offload(config: Config, device: jax.Device) -> None:
    """Raise a ValueError where tensors are to wait in a host memory that the device does not have."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.model.remat_offload and HOST_MEMORY not in kinds:
        raise ValueError(
            f"model.remat_offload={config.model.remat_offload} needs devices with {HOST_MEMORY} memory, but those of "
            f"{device.platform} have {', '.join(kinds)}; set model.remat_offload=()."
        )


def _check_options(options: dict[str, str], mesh: Mesh) -> None:
    """Compile a trivial program with the options, before minutes are spent on the step.

    Raises:
        ValueError: XLA does not know an option or its value.
    """
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(scalar).compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"compiler_options={options} was refused by XLA: {reason}; correct or remove it.") from None


class Evaluation(NamedTuple):
    """Sums over one held-out batch, by row and over all rows; None without experts, or without a bias.

    nats, targets, domain, num_bytes: of a row, counting only the targets that count. tokens: of a row, all that are
    computed. row_loads: of a row's sequence.
    kept: the number of decisions that are the same without the bias. chosen: the number of decisions. dropped: the
    number of copies that no expert saw; None where none can be dropped.
    """

    nats: Float32[Array, "batch"]
    targets: Int32[Array, "batch"]
    tokens: Int32[Array, "batch"]
    domain: Int32[Array, "batch"]
    num_bytes: Int32[Array, "batch"]
    row_loads: Int32[Array, "batch layers experts"] | None
    kept: Int32[Array, "layers"] | None = None
    chosen: Int32[Array, "layers"] | None = None
    dropped: Int32[Array, "layers"] | None = None

    @property
    def loads(self) -> Int32[Array, "layers experts"] | None:
        """The loads of the whole batch."""
        return None if self.row_loads is None else self.row_loads.sum(0, dtype=jnp.int32)


@functools.lru_cache(maxsize=16)
def _eval_step(
    config: Config, mesh: Mesh | None, balancer: balance.Balancer | None
) -> Callable[[TrainState, Batch], Evaluation]:
    balancer = balance.make(config.balance, config.model) if balancer is None else balancer
    has_bias = any(entry.options.moves_bias for entry in config.balance)
    can_drop = not DISPATCHERS[config.model.dispatch].dropless or balancer.drop is not None

    def evaluate(state: TrainState, batch: Batch) -> Evaluation:
        # only the method `random` draws in evaluation: other experts for every batch, the same for the same batch
        key = jax.random.fold_in(jax.random.key(0), batch.tokens.sum(dtype=jnp.int32))
        fwd = Pass(inputs_of(batch), balancer, PerLayer(state.balance), key, mesh=mesh)
        nats, report = model_row_nats(config, state.params, state.bias, fwd, batch)
        row_loads = None if report is None else report.details.row_loads.swapaxes(0, 1)
        rows = jnp.asarray(batch.domain), jnp.asarray(batch.num_bytes)
        targets, tokens = (flags.sum(-1, dtype=jnp.int32) for flags in (batch.mask, batch.segment_ids > 0))
        result = Evaluation(nats, targets, tokens, *rows, row_loads)
        if report is not None and can_drop:
            result = result._replace(dropped=report.traffic.dropped)
        if report is None or not has_bias:
            return result
        kept, chosen = _kept_without_bias(state, report.details)
        return result._replace(kept=kept, chosen=chosen)

    return jax.jit(evaluate, out_shardings=None if mesh is None else replicated(mesh))


def _kept_without_bias(state: TrainState, details: Details) -> tuple[Int32[Array, "layers"], Int32[Array, "layers"]]:
    """(number of decisions that the scores alone would make too, number of decisions) of each layer."""
    routing = details.routing
    bias = read_bias(state.bias)
    kept, chosen = measures.decisions_kept(routing.expert_ids, details.unbiased_ids, routing.loads.shape[-1])
    # without a bias the experts were selected by another rule, as in hash layers
    biased = (measures.bias_range(bias) > 0).reshape(len(bias), -1).any(-1)
    chosen = chosen.astype(jnp.int32)
    return jnp.where(biased, kept.astype(jnp.int32), chosen), chosen
