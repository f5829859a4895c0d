"""Laws of sequences in pieces: the numbers are those of one device, and attention exchanges no more than it needs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from conftest import tiny_config
from moe_jax.config import resolve
from moe_jax.data import Batch, open_corpus, training_batches
from moe_jax.mesh import batch_sharding, make_mesh, spec
from moe_jax.model.attention import make_attention
from moe_jax.model.forward import inputs_of, token_info
from moe_jax.model.pieces import (
    HEAD_DIMS,
    PIECE_DIMS,
    cut,
    for_own_heads,
    for_own_pieces,
    put_together,
    shared_for_own_heads,
)
from moe_jax.planning import cost
from moe_jax.training.compile import abstract_batch, make_eval_step
from moe_jax.training.optimizer import learning_rate
from moe_jax.training.state import abstract_state, init_state, read_bias, state_shardings, step_key
from moe_jax.training.step import accumulate, advance

ONE = dict(data=1)
ROWS, LENGTH = 8, 16


def mesh_with(**sizes):
    return make_mesh(resolve(tiny_config(mesh=ONE | sizes, model=MODEL), 8, "cpu").mesh)


def placed(a, mesh, *dims):
    return jax.device_put(a, NamedSharding(mesh, spec(*dims)))


# --- the exchanges --------------------------------------------------------------------------------------------

MODEL = dict(num_layers=2, first_dense=0, num_experts=8, num_heads=8, num_kv_heads=2, init_std=0.1)


@pytest.mark.parametrize("rows", [2, 6])  # one sequence a device, and three, which are 12 pieces on 4 devices
def test_a_batch_is_cut_in_the_order_of_its_tokens(rows):
    mesh = mesh_with(data=2, sequence=4)
    ids = np.arange(rows * LENGTH, dtype=np.int32).reshape(rows, LENGTH)
    pieces = jax.jit(lambda a: cut(a, mesh))(placed(ids, mesh, "batch", "length"))
    np.testing.assert_array_equal(pieces, ids.reshape(rows * 4, 4))
    assert pieces.sharding.is_equivalent_to(NamedSharding(mesh, spec("pieces")), 2)
    np.testing.assert_array_equal(jax.jit(lambda a: put_together(a, mesh))(pieces), ids)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "repeated"),
    [
        (8, 4, 1, 4),  # 2 heads of keys a device: exchanged
        (8, 2, 2, 4),  # one of 2 for both devices of a sequence: gathered, and each takes it
        (12, 3, 1, 6),  # 6 query heads a device read heads 0 0 0 0 1 1 and 1 1 2 2 2 2: two at a time share one
    ],
)
def test_each_device_gets_whole_sequences_of_its_heads_and_of_the_keys_that_they_read(
    heads, kv_heads, tensor, repeated
):
    mesh = mesh_with(sequence=2, tensor=tensor, data=2)
    draw = np.random.default_rng(0).normal
    query, key = (draw(size=(6, 2, 8, n, 3)).astype(np.float32) for n in (heads, kv_heads))  # 6 sequences in 2 pieces

    def exchange(query, key):
        own = for_own_heads(query, mesh)
        return own, shared_for_own_heads(key, heads, mesh), for_own_pieces(own, mesh)

    in_pieces = (placed(a.reshape(12, 8, -1, 3), mesh, *PIECE_DIMS) for a in (query, key))
    own, shared, back = jax.jit(exchange)(*in_pieces)
    whole = (a.reshape(6, 16, -1, 3) for a in (query, key))
    np.testing.assert_array_equal(own, next(whole))
    assert own.sharding.is_equivalent_to(NamedSharding(mesh, spec(*HEAD_DIMS)), 4)
    np.testing.assert_array_equal(back, query.reshape(12, 8, heads, 3))
    assert shared.shape[2] == repeated
    read = np.arange(heads) // (heads // repeated), np.arange(heads) // (heads // kv_heads)
    np.testing.assert_array_equal(np.asarray(shared)[:, :, read[0]], next(whole)[:, :, read[1]])


def test_a_token_of_a_piece_knows_its_sequence():
    rows = jnp.zeros((6, 4), jnp.int32)  # 2 sequences in 3 pieces
    info = token_info(inputs_of(Batch(rows, rows, rows, rows, rows > 0, rows[:, 0], rows[:, 0])), pieces=3)
    assert info.rows.count == 2
    np.testing.assert_array_equal(info.row, np.repeat([0, 1], 12))


# --- attention alone ------------------------------------------------------------------------------------------

LATENT = dict(attention="mla", q_lora_rank=8, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6)
LOCAL = dict(window=5, attention_sinks=True, attention_gate="head", out_bias=True)
LAYERS = {  # model; of a token: numbers in the widest array that is gathered, and in all that are exchanged
    "mla": (LATENT, 6, 8 * (8 + 6)),
    "keys gathered": (dict(num_kv_heads=2, qk_norm="projection"), 2 * 8, 8 * (8 + 8)),
    "keys exchanged": (dict(num_kv_heads=4, qk_norm="head") | LOCAL, 0, 8 * (8 + 8) + 4 * (8 + 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attention_in_pieces_has_the_values_and_gradients_of_one_device_and_exchanges_no_more_than_it_needs(name):
    model, narrow, wide = LAYERS[name]
    rows, pieces = 2, 4
    mesh, config = mesh_with(data=2, sequence=pieces), tiny_config(model=MODEL | model | dict(init_std=0.3)).model
    graph, weights = nnx.split(make_attention(config, nnx.Rngs(0)))
    x, up = np.random.default_rng(0).normal(size=(2, rows, LENGTH, config.embed_dim)).astype(np.float32)
    batch = packed_batch(pieces)
    inputs = x, batch.positions[4 : 4 + rows], batch.segment_ids[4 : 4 + rows], up

    def attended(weights, x, positions, segments, mesh):
        return nnx.merge(graph, weights)(x, positions, segments, mesh, config.window > 0)

    def gradients(mesh, *inputs):
        def total(weights, x, positions, segments, up):
            y = attended(weights, x, positions, segments, mesh)
            return (y * up).sum(), y

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(weights, *inputs)

    there = [placed(a.reshape(rows * pieces, -1, *a.shape[2:]), mesh, "pieces") for a in inputs]
    for a, b in zip(*map(jax.tree.leaves, (gradients(mesh, *there), gradients(None, *inputs))), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-4, atol=1e-5)

    program = jax.jit(functools.partial(attended, mesh=mesh)).lower(weights, *there[:3]).compile()
    exchanges = cost.analyze(program.as_text()).collectives
    tokens = rows // 2 * LENGTH  # of a group of devices that share sequences
    assert sum(c.bytes * n for c, n in exchanges.items() if c.kind == "all-to-all") == 4 * wide * tokens // pieces
    gathered = [np.prod(dims) for c in exchanges if c.kind == "all-gather" for dims in dims_of(c)]
    assert max(gathered) == max(narrow, 1) * tokens  # the other gather is that of the tokens' documents
    assert {c.kind for c in exchanges} == {"all-to-all", "all-gather"}


def dims_of(collective):
    """The dimensions of every array that an exchange results in."""
    return [[int(d) for d in dims.split(",") if d] for dims in re.findall(r"\[([\d,]*)\]", collective.shape)]


# --- training -------------------------------------------------------------------------------------------------

YARN = dict(factor=4.0, original_length=4, mscale=0.7, mscale_all_dim=0.5)
BALANCE = dict(
    bias_sign=dict(rate=1e-2),
    row=dict(method="aux_loss", weight=1e-2, scope="sequence", counts="unbiased"),
    batch=dict(method="aux_loss", weight=1e-2, scope="microbatch"),
    z_loss=dict(weight=1e-2),
)
STEP = dict(
    row=dict(method="aux_loss", weight=1e-2, scope="sequence", level="device", num_devices=4),
    step=dict(method="aux_loss", weight=1e-2, scope="global"),
    device_capacity=dict(num_devices=4, capacity_factor=1.0),
    bias_sign=dict(rate=1e-2),
)
KINDS = dict(window=5, window_pattern="LG", local_rope=dict(theta=100.0), attention_sinks=True, attention_gate="head")
CONFIGS = {
    "mla": dict(model=LATENT | dict(mtp_depth=1, yarn=YARN), balance=BALANCE),
    # for the long product
    "mla, ahead twice": dict(model=LATENT | dict(mtp_depth=2, remat="full"), balance=STEP, micro_batches=2),
    "mla, no latent of queries": dict(model=LATENT | dict(q_lora_rank=0), balance=BALANCE),
    "gqa": dict(model=dict(qk_norm="head", qkv_bias=True, partial_rotary_factor=0.5) | KINDS, balance=BALANCE),
    "gqa, norm of all heads, ahead": dict(
        model=dict(qk_norm="projection", norm_after=True, shared_gate=True, mtp_depth=1), balance=BALANCE
    ),
    "gqa, yarn, ahead twice": dict(model=dict(yarn=YARN, mtp_depth=2, remat="dots"), balance=STEP, micro_batches=2),
    "gqa, LayerNorm, gates in turn, ahead": dict(
        model=dict(norm="layer", head_bias=True, sparsemixer=0.2, normalize_gates=False, mtp_depth=1), balance=BALANCE
    ),
    "draws": dict(model=dict(router_jitter=0.1, random_second=True), balance=BALANCE),
    "choice": dict(model={}, balance=dict(expert_choice=dict(scope="sequence"))),
    "running": dict(model={}, balance=dict(aux_loss=dict(weight=1e-2, scope="global_running")), micro_batches=2),
}


def config_of(name, mesh):
    settings = dict(CONFIGS[name])
    # a large eps, because Adam would amplify the rounding of gradients that are nearly 0
    settings |= dict(model=MODEL | settings["model"], mesh=mesh, optimizer=dict(eps=1e-3))
    return resolve(tiny_config(batch_size=ROWS, sequence_length=LENGTH, **settings), 8, "cpu")


def text_batch(number):
    batch_at = training_batches(open_corpus(""), seed=0, batch_size=ROWS, sequence_length=LENGTH)
    return batch_at(number)


def packed_batch(pieces):
    """Documents that end just before, at and just after the end of a piece, and pieces of padding only."""
    piece = LENGTH // pieces
    ends = [(piece - 1,), (piece,), (piece + 1,), (piece - 1, piece + 1), (1, piece, LENGTH), (LENGTH,), (2,), ()]
    tokens = np.random.default_rng(5).integers(0, 256, (ROWS, LENGTH + 1)).astype(np.int32)
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row, stops in enumerate(ends):
        for number, (start, stop) in enumerate(zip((0, *stops), stops, strict=False), 1):
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
    mask = segments > 0
    rows = np.arange(ROWS, dtype=np.int32)
    return Batch(tokens[:, :-1] * mask, tokens[:, 1:] * mask, segments, positions, mask, rows, mask.sum(1))


@functools.cache
def compiled(name, **mesh):
    """The config, its mesh, and (state, batch) -> sums, gradients and the next state."""
    config = config_of(name, mesh)
    devices = make_mesh(config.mesh)

    def step(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        sums, grads = accumulate(config, state, batch, key, devices)
        after = advance(config, state, grads, sums.statistics, learning_rate(config.optimizer, 8)(state.step), key)
        return sums, grads, after._replace(step=state.step + 1)

    return config, devices, jax.jit(step, out_shardings=(None, None, state_shardings(config, devices)))


def on_mesh(batch, mesh):
    shardings = (batch_sharding(mesh, dims) for dims in Batch.dims())
    return Batch(*(jax.device_put(a, place) for a, place in zip(batch, shardings, strict=True)))


@functools.cache
def steps(name, batches, **mesh):
    """Sums, gradients and the state of the last of some steps; batches: a number of them, or a number of pieces."""
    config, devices, step = compiled(name, **mesh)
    kind, count = batches
    state = init_state(config, devices)
    for batch in map(text_batch, range(count)) if kind == "text" else [packed_batch(count)]:
        sums, grads, state = step(state, on_mesh(batch, devices), step_key(config))
    return jax.device_get((sums, grads, state))


def assert_same_step(ours, theirs):
    """Loads and bias exactly, losses and every gradient and moment to rounding."""
    (sums, grads, state), (its, its_grads, its_state) = ours, theirs
    if its.statistics is not None:
        np.testing.assert_array_equal(sums.statistics["loads"], its.statistics["loads"])
    np.testing.assert_array_equal(read_bias(state.bias), read_bias(its_state.bias))
    np.testing.assert_allclose(sums.total_loss, its.total_loss, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sums.nats, its.nats, rtol=1e-5)
    np.testing.assert_allclose(sums.ahead.nats, its.ahead.nats, rtol=1e-5)
    assert sums.ahead.targets == its.ahead.targets
    assert (sums.traffic.dropped == its.traffic.dropped).all()
    for label, value in its.losses.items():
        np.testing.assert_allclose(sums.losses[label], value, rtol=1e-5, atol=1e-8, err_msg=label)
    trees = (grads, its_grads), (state.params, its_state.params), (state.optimizer, its_state.optimizer)
    for tree, its_tree in trees:
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(its_tree), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


EVERY_DAY = dict(data=2, sequence=2, tensor=2)  # without `expert`, whose rounds take long to compile


def test_three_steps_with_cut_sequences_are_those_of_one_device():
    ours, theirs = (steps("mla", ("text", 3), **ONE | mesh) for mesh in (EVERY_DAY, {}))
    assert_same_step(ours, theirs)
    assert all(value.sum() > 0 for value in theirs[0].losses.values())
    assert 0 < theirs[0].ahead.targets < ROWS * LENGTH


def test_documents_that_end_at_or_near_the_end_of_a_piece_are_those_of_one_device():
    assert_same_step(*(steps("mla", ("packed", 2), **ONE | mesh) for mesh in (EVERY_DAY, {})))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(data=1, sequence=2), dict(sequence=4, tensor=2), dict(data=2, expert=2, sequence=2)], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_attention_and_loss_is_that_of_one_device_on_every_kind_of_mesh(name, mesh):
    for batches in (("text", 3), ("packed", mesh["sequence"])):
        assert_same_step(steps(name, batches, **ONE | mesh), steps(name, batches, **ONE))


# --- evaluation -----------------------------------------------------------------------------------------------


@functools.cache
def held_out(**mesh):
    """The sums of a held-out batch, as numpy, and the exchanges of the program."""
    config = config_of("gqa", mesh)
    devices = make_mesh(config.mesh)
    program = make_eval_step(config, devices).lower(abstract_state(config, devices), abstract_batch(config, devices))
    step = program.compile()
    result = step(init_state(config, devices), on_mesh(packed_batch(2), devices))
    return jax.device_get(result), cost.analyze(step.as_text()).collectives


def test_held_out_loads_and_losses_of_every_sequence_are_those_of_one_device():
    (ours, exchanges), (theirs, _) = held_out(data=2, sequence=4), held_out(**ONE)
    np.testing.assert_array_equal(ours.row_loads, theirs.row_loads)  # sequence_max_violation is of these
    assert ours.row_loads.shape[0] == ROWS
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-5, atol=1e-6)
    # no token's scores are gathered, over pieces (64), sequences (32) or all; no weight has a dimension of these
    floats = [c for c in exchanges if c.kind == "all-gather" and "f32" in c.shape and "attention" not in c.op_name]
    assert not [c for c in floats if {32, 64, 128} & {d for dims in dims_of(c) for d in dims}]
