"""The same numbers on any mesh: how arrays are split, one step from equal state, loads and bias of replayed logits."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import mesh_sizes, tiny_config
from moe_jax import balance
from moe_jax.config import MeshConfig, resolve
from moe_jax.config.axes import BATCH, TABLE
from moe_jax.config.schema import Kept
from moe_jax.config.xla_options import BETWEEN_LAYERS, SPARSE_CORES
from moe_jax.data import Batch, open_corpus, training_batches
from moe_jax.mesh import batch_sharding, gather, make_mesh, parameter_spec, platform, spec, specs
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.model.moe import MoE, RouterBias
from moe_jax.routing import Routing, Tokens
from moe_jax.training.compile import compiler_options, make_eval_step, make_train_step
from moe_jax.training.losses import model_row_nats
from moe_jax.training.state import abstract_state, init_state, state_shardings, step_key
from moe_jax.training.step import accumulate

ONE = (1, 1, 1, 1)
MESHES = [(1, 1, 8, 1), (1, 8, 1, 1), (1, 2, 4, 1), (2, 1, 2, 2), (1, 2, 2, 2)]
MODEL = dict(num_layers=2, first_dense=0, num_experts=8, num_heads=4, num_kv_heads=2)
LATENT = dict(attention="mla", q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6)
BALANCE = dict(bias_sign=dict(rate=1e-2), aux_loss=dict(weight=1e-2), coupling_loss=dict(weight=1e-2))


def config_on(sizes, **overrides):
    """The test's config with a mesh of these sizes, and the mesh."""
    model = MODEL | overrides.pop("model", {})
    settings = dict(balance=BALANCE, model=model, mesh=mesh_sizes(sizes)) | overrides
    config = resolve(tiny_config(**settings), len(jax.devices()), "cpu")
    return config, make_mesh(config.mesh)


def batch_of(config, mesh, step: int = 0):
    batch_at = training_batches(
        open_corpus(""), seed=0, batch_size=config.batch_size, sequence_length=config.sequence_length
    )
    return jax.device_put(batch_at(step), batch_sharding(mesh))


# --- how arrays are split -------------------------------------------------------------------------------------


def test_a_mesh_has_seven_auto_axes_and_minus_one_takes_what_is_left():
    mesh = make_mesh(MeshConfig(replica=1, data=-1, expert=2, tensor=2))
    assert dict(mesh.shape) == dict(replica=1, data=2, data_y=1, data_z=1, expert=2, sequence=1, tensor=2)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert platform(mesh) == "cpu"
    assert make_mesh(MeshConfig(data=2)).size == 2  # a smaller mesh leaves devices unused


class Device:
    """A device of another machine, with the attributes that a mesh reads."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number: int, slices: int = 1, processes: int = 1) -> None:
        self.id = number
        self.slice_index = number * slices // 8
        self.process_index = number * processes // 8


def test_replicas_are_placed_across_slices_and_everything_else_inside_one():
    devices = [Device(n, slices=2) for n in range(8)]
    mesh = make_mesh(MeshConfig(replica=2, data=2, expert=2, tensor=1), devices)
    for replica in range(2):
        assert {d.slice_index for d in mesh.devices[replica].flat} == {replica}
    with pytest.raises(ValueError, match=r"mesh.replica=1 must be a multiple of the 2 slices.*set mesh.replica=2\."):
        make_mesh(MeshConfig(replica=1, data=8), devices)


def test_any_axis_may_cross_the_slices_of_gpus_and_the_last_ones_stay_within():
    class Gpu(Device):
        platform = "gpu"

    mesh = make_mesh(MeshConfig(data=2, expert=4), [Gpu(n, slices=2) for n in range(8)])
    assert [[d.id for d in row.flat] for row in mesh.devices[0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_several_processes_use_all_their_devices_or_none():
    with pytest.raises(ValueError, match=r"must use all 8"):
        make_mesh(MeshConfig(data=4), [Device(n, processes=2) for n in range(8)])


SPECS = [  # dims, shape, as it is kept, as a layer multiplies by it, on (replica 1, data 2, expert 2, tensor 2)
    (("experts", "embed", "ffw"), (3, 8, 16, 8), P(None, "expert", "data", "tensor"), None),
    (("experts", "ffw", "embed"), (3, 8, 8, 16), P(None, "expert", "tensor", "data"), None),
    (("embed", "experts"), (3, 16, 8), P(None, "data", "expert"), P(None, None, None)),
    (("embed", "ffw"), (16, 24), P("data", ("tensor", "expert")), P(None, "tensor")),
    (("embed", "heads", "head_dim"), (16, 4, 8), P("data", ("tensor", "expert"), None), P(None, "tensor", None)),
    (("embed", "kv_heads", "head_dim"), (16, 2, 8), P("data", "tensor", "expert"), P(None, "tensor", None)),
    (("heads", "head_dim", "embed"), (4, 8, 16), P(("tensor", "expert"), None, "data"), P("tensor", None, None)),
    (("vocab", "embed"), (264, 16), P(("tensor", "expert"), "data"), P("tensor", None)),
    (("vocab", "embed"), (258, 16), P("tensor", "data"), P("tensor", None)),  # 258 does not divide by 4
    (("embed",), (3, 16), P(), P()),
    (("head_dim",), (3, 8), P(), P()),
]


CUT = [  # the same on (data 2, sequence 2, tensor 2)
    (("experts", "embed", "ffw"), (8, 16, 8), P(None, ("data", "sequence"), "tensor"), None),
    (("latent", "heads", "head_dim"), (8, 4, 8), P(("data", "sequence"), "tensor", None), P(None, "tensor", None)),
    (("heads", "head_dim", "embed"), (4, 8, 16), P("tensor", None, ("data", "sequence")), P("tensor", None, None)),
    (("vocab", "embed"), (264, 18), P("tensor", "data"), P("tensor", None)),  # 18 does not divide by 4
]
ON = [(dict(data=2, expert=2, tensor=2), *row) for row in SPECS]
ON += [(dict(data=2, sequence=2, tensor=2), *row) for row in CUT]


@pytest.mark.parametrize(("sizes", "dims", "shape", "kept", "used"), ON)
def test_the_table_splits_every_kind_of_parameter(sizes, dims, shape, kept, used):
    mesh = make_mesh(MeshConfig(**sizes))
    assert parameter_spec(mesh, dims, shape) == kept
    if used is not None:  # gathered inside a scan: without the stacked layers in front
        w = jax.device_put(np.zeros(shape[-len(dims) :], np.float32), NamedSharding(mesh, P()))
        gathered = jax.jit(lambda w: gather(w, mesh, dims))(w)
        assert gathered.sharding.is_equivalent_to(NamedSharding(mesh, P(*used[-len(dims) :])), w.ndim)


def test_every_dimension_of_every_parameter_is_in_the_table():
    models = dict(qk_norm="head"), LATENT | dict(mtp_depth=1), dict(num_shared_experts=1, shared_gate=True)
    dims = [d for m in models for d in jax.tree.leaves(abstract_model(tiny_config(model=m).model).dims)]
    activations = {"batch", "length", "pieces", "tokens", "shards", "layers", "micro_batches"}
    activations |= {"all_heads", "own_heads", "whole"}
    assert {name for d in dims for name in d.names} == set(TABLE) - activations


def test_axes_that_the_batch_takes_are_left_to_no_later_dimension_of_an_activation():
    batch = ("replica", "data", "data_y", "data_z", "expert")
    assert spec("batch", "length") == P(batch, "sequence")
    assert spec("pieces", "length", "all_heads", "head_dim") == P((*batch, "sequence"), None, "tensor", None)
    assert spec("batch", "whole", "own_heads", "head_dim") == P(batch, None, ("tensor", "sequence"), None)
    assert spec("layers", "batch") == P(None, batch)
    assert spec("experts", "embed", "ffw") == P("expert", ("data", "data_y", "data_z", "sequence"), "tensor")
    assert spec("experts", "ffw", "embed") == P("expert", "tensor", ("data_y", "data", "data_z", "sequence"))
    assert spec() == P()


@pytest.mark.parametrize("record", [Batch, Routing])
def test_a_record_names_the_dims_of_every_field(record):
    dims = record.dims()
    assert all(type(own) is tuple for own in dims)
    assert specs(dims, "layers") == record(*(spec("layers", *own) for own in dims))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_state_is_split_over_all_of_data_expert_and_tensor_and_moments_follow(sizes):
    config, mesh = config_on(sizes)
    places = state_shardings(config, mesh)
    state = abstract_state(config, mesh)
    split = sizes[1] * sizes[2] * sizes[3]
    dims = jax.tree.leaves(abstract_model(config.model).dims)
    for leaf, d in zip(jax.tree.leaves(state.params), dims, strict=True):
        parts = 1 if len(d.names) == 1 else split
        if d.names == ("embed", "experts"):  # the router has no width that `tensor` could split
            parts = sizes[1] * sizes[2]
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size // parts, d
    moments = jax.tree.leaves(places.optimizer)
    params = jax.tree.leaves(places.params)
    assert [m.spec for m in moments if m.spec != P()] == [p.spec for p in params if p.spec != P()] * 2
    assert {place.spec for place in jax.tree.leaves((places.bias, places.balance, places.step))} == {P()}


@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), (2, 1, 2, 2)], ids=str)
def test_the_initial_state_is_the_same_on_any_mesh_and_is_sharded(sizes):
    config, mesh = config_on(sizes)
    here, there = init_state(config), init_state(config, mesh)
    assert jax.tree.map(lambda a: a.sharding, there) == state_shardings(config, mesh)
    jax.tree.map(np.testing.assert_array_equal, here, there)


# --- one step from equal state --------------------------------------------------------------------------------


@functools.cache
def one_step(sizes):
    """loss, gradients, and per layer the chosen experts and biased scores of every token, as numpy."""
    config, mesh = config_on(sizes)
    plain = balance.make(config.balance)

    def own_statistics(routing, inputs):
        return plain.own_statistics(routing, inputs) | {
            "ids": routing.expert_ids,
            "scores": routing.scores + routing.bias,
        }

    def loss(params, bias, state, batch, key):
        balancer = plain._replace(own_statistics=own_statistics)
        fwd = Pass(inputs_of(batch), balancer, PerLayer(state), key, train=True, mesh=mesh)
        nats, report = model_row_nats(config, params, bias, fwd, batch)
        losses = sum(loss.sum() for loss in report.losses.values())
        return nats.sum() / batch.mask.sum() + losses, (report.statistics, report.traffic)

    state, batch = init_state(config, mesh), batch_of(config, mesh)
    args = state.params, state.bias, state.balance, batch, step_key(config)
    (value, (statistics, traffic)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args)
    return jax.tree.map(np.asarray, (value, grads, statistics, traffic))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_one_step_from_equal_state_is_the_step_of_one_device(sizes):
    loss, grads, statistics, traffic = one_step(sizes)
    exact, its_grads, its, _ = one_step(ONE)
    best = np.sort(its["scores"], -1)[..., ::-1]
    clear = best[..., 1] - best[..., 2] > 1e-5  # top_k = 2
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.sort(statistics["ids"])[clear], np.sort(its["ids"])[clear])
    np.testing.assert_allclose(loss, exact, atol=1e-5)
    assert (traffic.dropped == 0).all()
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(its_grads), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.fixture
def torus_of_devices(monkeypatch):
    """Eight devices that are placed like the chips of a torus: 2 x 2 x 1 groups of 2 that share experts."""

    def placed(devices, experts):
        return np.array(devices, object).reshape(2, 2, 1, experts) if len(devices) == 8 else None

    monkeypatch.setattr("moe_jax.torus.placed", placed)
    one_step.cache_clear()
    yield
    one_step.cache_clear()


def test_on_two_axes_of_data_a_step_is_that_of_one_device(torus_of_devices):
    config, mesh = config_on((1, 4, 2, 1))
    assert (mesh.shape["data"], mesh.shape["data_y"]) == (2, 2)
    up, down = (parameter_spec(mesh, dims, (8, 16, 16)) for dims in (("embed", "ffw"), ("ffw", "embed")))
    assert (up, down) == (P(None, ("data", "data_y"), "expert"), P(None, "expert", ("data_y", "data")))
    test_one_step_from_equal_state_is_the_step_of_one_device((1, 4, 2, 1))
    state, values = make_train_step(config, mesh)(init_state(config, mesh), batch_of(config, mesh), step_key(config))
    alone, one = config_on(ONE)
    its, exact = make_train_step(alone, one)(init_state(alone, one), batch_of(alone, one), step_key(alone))
    np.testing.assert_allclose(values["loss"], exact["loss"], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.bias), jax.tree.leaves(its.bias), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_latent_attention_and_multi_token_prediction_give_the_step_of_one_device():
    model = LATENT | dict(mtp_depth=1, init_std=0.1)
    by_names = dict(remat="names", remat_keep=get_args(Kept), remat_offload=("rows",))
    results = []
    for sizes, remat in ((ONE, dict(remat="full")), ((1, 2, 2, 2), by_names)):
        config, mesh = config_on(sizes, model=model | remat)
        args = init_state(config, mesh), batch_of(config, mesh), step_key(config)
        results.append(jax.device_get(jax.jit(functools.partial(accumulate, config, mesh=mesh))(*args)))
    (exact, its_grads), (sums, grads) = results
    np.testing.assert_array_equal(sums.statistics["loads"], exact.statistics["loads"])
    np.testing.assert_allclose(sums.total_loss, exact.total_loss, atol=1e-5)
    np.testing.assert_allclose(sums.ahead.nats, exact.ahead.nats, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(its_grads), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


def test_a_batch_of_weighted_targets_gives_the_step_of_one_device():
    results = []
    for sizes in (ONE, (1, 2, 2, 2)):
        config, mesh = config_on(sizes, micro_batches=2)
        batch = batch_of(config, mesh)
        draws = np.random.default_rng(0).uniform(0.0, 3.0, batch.mask.shape)
        weights = np.where(np.asarray(batch.mask) & (draws > 0.5), draws, 0.0).astype(np.float32)
        batch = batch._replace(mask=jax.device_put(weights, batch.mask.sharding))
        args = init_state(config, mesh), batch, step_key(config)
        results.append(jax.device_get(jax.jit(functools.partial(accumulate, config, mesh=mesh))(*args)))
    (exact, its_grads), (sums, grads) = results
    np.testing.assert_array_equal(sums.statistics["loads"], exact.statistics["loads"])
    np.testing.assert_allclose(sums.total_loss, exact.total_loss, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(its_grads), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


def test_a_train_step_keeps_every_sharding_and_compiles_once_without_warnings(capfd):
    config, mesh = config_on((1, 2, 2, 2), micro_batches=2, model=dict(remat="full"))
    step = make_train_step(config, mesh)
    state = init_state(config, mesh)
    for n in range(3):
        state, values = step(state, batch_of(config, mesh, n), step_key(config))
        assert jax.tree.map(lambda a: a.sharding, state) == state_shardings(config, mesh)
    assert step._cache_size() == 1
    assert all(v.is_fully_replicated for v in jax.tree.leaves(values))
    assert int(values["skipped"]) == 0
    evaluation = make_eval_step(config, mesh)(state, batch_of(config, mesh))
    assert evaluation.loads.sum() == 2 * 2 * evaluation.tokens.sum()  # 2 layers, top-2
    assert "rematerialization" not in capfd.readouterr().err  # XLA would gather a split array


# --- replayed logits ------------------------------------------------------------------------------------------


@functools.cache
def replayed(sizes, steps: int = 50):
    """Loads [steps, E] and biases [steps, E] of recorded logits: the layer's input is the logits, its router 1."""
    config, mesh = config_on(sizes, model=dict(embed_dim=8, num_groups=4, top_groups=2))
    graphdef, params, _ = nnx.split(MoE(config.model, nnx.Rngs(0)), nnx.Param, RouterBias)
    params["router"][...] = jnp.eye(8)
    balancer = balance.make(config.balance)
    drift = np.random.default_rng(0).normal(size=(1, 1, 8))
    logits = drift + np.random.default_rng(1).normal(size=(steps, 96, 8))
    logits = jax.device_put(logits.astype(np.float32), NamedSharding(mesh, P(None, BATCH)))
    mask = jax.device_put(np.arange(96) % 5 > 0, batch_sharding(mesh))

    def run(logits, mask):
        def step(state, now):
            number, x = now
            layer = nnx.merge(graphdef, params, {"bias": state["bias"]})
            fwd = Pass(None, balancer, PerLayer({}), jax.random.key(0), train=True, mesh=mesh)
            routing = layer.routing(x, Tokens(mask=mask), fwd)
            state = balancer.update(balancer.observe(routing), state, number)
            return state, (routing.loads, state["bias"])

        return jax.lax.scan(step, balancer.init(8), (jnp.arange(steps), logits))[1]

    return jax.tree.map(np.asarray, jax.jit(run)(logits, mask))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_replayed_logits_give_bit_equal_loads_and_bias_for_50_steps(sizes):
    loads, bias = replayed(sizes)
    its_loads, its_bias = replayed(ONE)
    assert (its_loads.sum(1) == 2 * 76).all()  # top-2 of the 76 tokens that are not padding
    assert np.ptp(its_bias[-1]) > 0.1  # it moved
    np.testing.assert_array_equal(loads, its_loads)
    np.testing.assert_array_equal(bias, its_bias)


# --- groups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_groups", "top_groups", "most"), [(4, 2, 4), (2, 1, 4), (8, 2, 2), (16, 4, 4)])
def test_group_limited_copies_travel_to_few_blocks_of_consecutive_devices(num_groups, top_groups, most):
    # 16 experts on 8 devices: 4 groups are blocks of 2 devices, 2 groups blocks of 4, 8 groups one device each,
    # and of 16 groups two share one. `most` devices = top_groups x 8 / num_groups, or top_groups
    model = dict(num_experts=16, top_k=4, num_groups=num_groups, top_groups=top_groups, group_top=1)
    config, mesh = config_on((1, 1, 8, 1), model=model)
    layer = MoE(config.model, nnx.Rngs(0))
    x = jax.device_put(np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32), batch_sharding(mesh))
    fwd = Pass(None, balance.make({}), PerLayer({}), jax.random.key(0), mesh=mesh)  # a layer alone reads no inputs
    route = jax.jit(lambda x: layer.routing(x, Tokens(), fwd))
    ids = np.asarray(route(x).expert_ids)
    assert max(len(set(row)) for row in ids // (16 // num_groups)) <= top_groups
    assert max(len(set(row)) for row in ids // 2) == most


# --- options of the compiler ----------------------------------------------------------------------------------


def test_compiler_options_of_another_platform_are_not_read_and_unknown_ones_are_refused():
    config, mesh = config_on(ONE, compiler_options={"xla_tpu_enable_async_all_to_all": "true", "xla_embed_ir": "true"})
    assert compiler_options(config, "cpu") == {"xla_embed_ir": "true"}
    assert compiler_options(config, "tpu") == {"xla_tpu_enable_async_all_to_all": "true", "xla_embed_ir": "true"}
    config, mesh = config_on(ONE, compiler_options=SPARSE_CORES | BETWEEN_LAYERS)
    assert compiler_options(config, "tpu") == SPARSE_CORES | BETWEEN_LAYERS
    assert compiler_options(config, "tpu", 2) == SPARSE_CORES
    assert compiler_options(config, "cpu") == compiler_options(config, "gpu") == {}
    config, mesh = config_on(ONE, compiler_options={"xla_no_such_thing": "1"})
    with pytest.raises(
        ValueError, match=r"compiler_options=\{'xla_no_such_thing': '1'\} was refused by XLA.*remove it\."
    ):
        make_train_step(config, mesh)
