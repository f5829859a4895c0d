"""Laws of dispatch: dropless equals dense, value and gradient, under any routing; capacity is GShard's."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_jax.config import DISPATCHERS
from moe_jax.dispatch import DISPATCH_FUNCTIONS, ExpertWeights, apply_experts, register
from moe_jax.dispatch.capacity import capacity_of, seats_of
from moe_jax.kernels import native
from moe_jax.kernels.activation import Activation
from moe_jax.routing import RouterConfig, Routing, count, route

TOKENS, EXPERTS, EMBED, FFW = 6, 4, 3, 5
EMPTY = EXPERTS  # the id of an empty slot
DROPLESS = [name for name, facts in DISPATCHERS.items() if facts.dropless and not facts.is_oracle]


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = ExpertWeights(array(1, EXPERTS, EMBED, FFW), array(2, EXPERTS, EMBED, FFW), array(3, EXPERTS, FFW, EMBED))


def routing_of(ids, gates) -> Routing:
    """A routing with these ids and gates; empty slots get a gate of 0, as in `route`."""
    gates = jnp.where(ids < EXPERTS, gates, 0.0)
    routing = route(jnp.zeros((ids.shape[0], EXPERTS)), RouterConfig(top_k=1))
    return routing._replace(expert_ids=ids, gates=gates, loads=count(ids, EXPERTS))


@pytest.fixture(params=["xla", "native"], autouse=True)
def _by_each_cpu_kernel(request, monkeypatch):
    if request.param == "native" and (why := native.missing()):
        pytest.skip(why)
    monkeypatch.setattr(sys.modules[__name__], "cpu_kernel", request.param)


cpu_kernel = "auto"


@functools.cache
def compiled(dispatcher: str, cpu_kernel: str, num_sequences: int = 1, capacity_factor: float = 1.25, **how):
    """(x, gates, weights, ids) -> (y, dropped), and the gradients of a function of y in the first three."""

    def run(x, gates, weights, ids):
        options = {"dispatcher": dispatcher, "num_sequences": num_sequences, "capacity_factor": capacity_factor}
        options |= {"cpu_kernel": cpu_kernel} | how
        y, traffic = apply_experts(x, routing_of(ids, gates), weights, **options)
        return (y * jnp.arange(1.0, y.size + 1.0).reshape(y.shape) ** 0.5).sum(), (y, traffic.dropped)

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))


def applied(dispatcher: str, ids, x=None, gates=None, weights=WEIGHTS, **options):
    """y, dropped copies, gradients in (x, gates, weights)."""
    ids = np.asarray(ids, np.int32)
    x = array(4, len(ids), EMBED) if x is None else x
    gates = np.abs(array(5, *ids.shape)) if gates is None else gates
    (_, (y, dropped)), gradients = compiled(dispatcher, cpu_kernel, **options)(x, gates, weights, ids)
    return np.asarray(y), int(dropped), jax.tree.map(np.asarray, gradients)


def assert_equals_dense(dispatcher: str, ids, weights=WEIGHTS, **options) -> None:
    y, dropped, gradients = applied(dispatcher, ids, weights=weights, **options)
    exact, _, its_gradients = applied("dense", ids, weights=weights, **options)
    assert dropped == 0
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(its_gradients), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# --- dropless -----------------------------------------------------------------------------------------------


def test_dense_equals_the_definition_token_by_token():
    # y_t = sum of gate x (silu(x gate_e) * (x up_e)) down_e over the filled slots
    ids, x, gates = (
        np.asarray([[0, 3], [2, EMPTY], [1, 0], [EMPTY, EMPTY], [3, 2], [0, 1]]),
        array(4, 6, 3),
        array(5, 6, 2),
    )
    expected = np.zeros((TOKENS, EMBED))
    for t, slot in np.ndindex(*ids.shape):
        if ids[t, slot] < EXPERTS:
            gate, up, down = (w[ids[t, slot]].astype(np.float64) for w in WEIGHTS[:3])
            hidden = x[t] @ gate
            expected[t] += gates[t, slot] * ((hidden / (1 + np.exp(-hidden)) * (x[t] @ up)) @ down)
    np.testing.assert_allclose(applied("dense", ids, x, gates)[0], expected, rtol=1e-4, atol=1e-5)


BIASES = dict(gate_bias=array(6, EXPERTS, FFW), up_bias=array(7, EXPERTS, FFW), down_bias=array(8, EXPERTS, EMBED))
KINDS = {  # experts, and how they are used
    "matrices only": (WEIGHTS, {}),
    "biases": (WEIGHTS._replace(**BIASES), {}),
    "no gate, a bias of down": (
        WEIGHTS._replace(gate=None, down_bias=BIASES["down_bias"]),
        dict(activation=Activation(gated=0.0)),
    ),
}


@settings(deadline=None, max_examples=150)
@given(arrays(np.int32, (TOKENS, 2), elements=st.integers(0, EXPERTS)), st.sampled_from(list(KINDS)))
def test_local_equals_dense_under_any_routing_with_empty_slots_and_nothing_is_dropped(ids, kind):
    weights, options = KINDS[kind]
    assert_equals_dense("local", ids, weights, **options)


SHAPES = {
    "all to one expert": [[2, EMPTY]] * TOKENS,
    "all to the same two": [[3, 1]] * TOKENS,
    "empty experts": [[0, 3], [3, 0], [0, 3], [0, 3], [3, 0], [3, 0]],
    "padded tokens": [[0, 1], [EMPTY, EMPTY], [2, 3], [EMPTY, EMPTY], [1, 3], [EMPTY, EMPTY]],
    "only padding": [[EMPTY, EMPTY]] * TOKENS,
    "top-1": [[0], [1], [1], [3], [0], [1]],
    "every expert": [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]] * 2,
    "a single token": [[2, 0]],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_local_equals_dense_value_and_gradient(shape):
    assert_equals_dense("local", SHAPES[shape])


@pytest.mark.parametrize("dispatcher", DROPLESS)
def test_every_dropless_dispatcher_equals_dense_on_one_device(dispatcher):
    assert_equals_dense(dispatcher, SHAPES["padded tokens"])


def test_every_dispatcher_has_a_row_of_facts_and_a_function():
    assert set(DISPATCH_FUNCTIONS) == set(DISPATCHERS)
    with pytest.raises(ValueError, match=r"'teleport' has no row in moe_jax\.config\.DISPATCHERS"):
        register("teleport")
    with pytest.raises(ValueError, match=r"model\.dispatch='teleport' is not registered, but .*rounds"):
        applied("teleport", SHAPES["top-1"])


def test_auto_and_every_exchange_are_local_on_one_device():
    exchanges = ("auto", "rounds", "ragged", "gathered")
    local, *others = (applied(dispatcher, SHAPES["padded tokens"]) for dispatcher in ("local", *exchanges))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, local, other)


@pytest.mark.parametrize("dispatcher", ["local", "dense"])
def test_a_batch_of_no_tokens_has_an_empty_output(dispatcher):
    y, dropped, (dx, _, dw) = applied(dispatcher, np.zeros((0, 2)))
    assert (y.shape, dx.shape, dropped) == ((0, EMBED), (0, EMBED), 0)
    assert not any(w.any() for w in jax.tree.leaves(dw))


def test_experts_without_tokens_have_gradients_of_exactly_zero():
    # experts 1 and 2 are not chosen (Megatron-LM #1877, tokamax #1016)
    _, _, (_, _, dw) = applied("local", SHAPES["empty experts"])
    for gradient in jax.tree.leaves(dw):
        np.testing.assert_array_equal(gradient[[1, 2]], 0.0)
        assert gradient[[0, 3]].any()


def test_the_weights_of_an_expert_without_tokens_are_not_read():
    # garbage in the weights of experts 1 and 2 reaches nothing
    garbage = jax.tree.map(np.copy, WEIGHTS)
    for w in jax.tree.leaves(garbage):
        w[[1, 2]] = np.nan
    y, _, (dx, dgates, dw) = applied("local", SHAPES["empty experts"], weights=garbage)
    for value in jax.tree.leaves((y, dx, dgates, dw)):
        assert np.isfinite(value).all()


def test_padding_is_not_read_and_gets_no_gradient():
    # tokens 1, 3 and 5 are padding with arbitrary values
    ids, x = SHAPES["padded tokens"], array(4, TOKENS, EMBED)
    clean = applied("local", ids, x)
    x[[1, 3, 5]] = 1e30
    y, _, (dx, _, dw) = applied("local", ids, x)
    np.testing.assert_array_equal(y[[1, 3, 5]], 0.0)
    np.testing.assert_array_equal(dx[[1, 3, 5]], 0.0)
    np.testing.assert_array_equal(y[[0, 2, 4]], clean[0][[0, 2, 4]])
    jax.tree.map(np.testing.assert_array_equal, dw, clean[2][2])


@pytest.mark.parametrize("dispatcher", ["local", "dense", "capacity"])
def test_permuting_experts_changes_no_output(dispatcher):
    # expert e becomes expert place[e], weights and ids alike
    order = np.asarray([2, 0, 3, 1])
    place = np.append(np.argsort(order), EMPTY)
    ids = np.asarray(SHAPES["padded tokens"])
    permuted = jax.tree.map(lambda w: w[order], WEIGHTS)
    y, dropped, _ = applied(dispatcher, ids)
    its_y, its_dropped, _ = applied(dispatcher, place[ids], weights=permuted)
    np.testing.assert_allclose(its_y, y, rtol=1e-5, atol=1e-6)
    assert dropped == its_dropped


@pytest.mark.parametrize("dispatcher", ["local", "dense", "capacity"])
def test_output_has_the_dtype_of_the_input_and_the_gates_stay_float32(dispatcher):
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), WEIGHTS)
    x = jnp.asarray(array(4, TOKENS, EMBED), jnp.bfloat16)
    y, _, (dx, dgates, _) = applied(dispatcher, SHAPES["top-1"], x, weights=narrow)
    assert (y.dtype, dx.dtype, dgates.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


# --- capacity -----------------------------------------------------------------------------------------------

# first choices 0 1 0 3, second choices 1 0 2 2; a factor of 1/2 gives ceil(0.5 x 4 tokens x 2 / 4) = 1 seat
CHOICES = np.asarray([[0, 1], [1, 0], [0, 2], [3, 2]], np.int32)
TIGHT = {"capacity_factor": 0.5}


def test_capacity_is_the_factor_times_the_balanced_load_rounded_up_and_at_least_one():
    assert capacity_of(4, 2, 4, 0.5) == 1
    assert capacity_of(4, 2, 4, 1.0) == 2
    assert capacity_of(4, 2, 4, 1.25) == 3  # 2.5
    assert capacity_of(4, 1, 64, 1.0) == 1  # 1 / 16


def test_first_choices_are_seated_before_second_ones():
    # expert 0: tokens 0, 2 by first choice, then 1; expert 1: token 1, then 0; expert 2: 2, 3; expert 3: 3
    seats = jax.jit(seats_of, static_argnums=1)(CHOICES, EXPERTS)
    np.testing.assert_array_equal(seats, [[0, 1], [0, 2], [1, 0], [0, 1]])


def test_copies_without_a_seat_are_dropped_and_counted():
    # with one seat each: token 0 keeps its first, 1 its first, 2 its second, 3 its first; 4 are dropped
    kept = np.asarray([[1, 0], [1, 0], [0, 1], [1, 0]], bool)
    gates = np.abs(array(6, 4, 2))
    y, dropped, _ = applied("capacity", CHOICES, gates=gates, **TIGHT)
    expected = applied("dense", np.where(kept, CHOICES, EMPTY), gates=gates)[0]
    assert dropped == 4
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_a_dropped_copy_sends_no_gradient():
    _, _, (_, dgates, dw) = applied("capacity", CHOICES, **TIGHT)
    np.testing.assert_array_equal(dgates != 0, [[True, False], [True, False], [False, True], [True, False]])
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(dw))


def test_loads_are_counted_before_dropping():
    # f_i of a loss sees what the router wanted (Megatron-LM #1513): 3 + 2 + 2 + 1 copies, 4 dropped
    logits = np.full((4, EXPERTS), -9.0, np.float32)
    np.put_along_axis(logits, CHOICES, np.asarray([[2.0, 1.0]] * 4, np.float32), axis=1)
    routing = jax.jit(functools.partial(route, router=RouterConfig(top_k=2)))(logits)
    np.testing.assert_array_equal(routing.expert_ids, CHOICES)
    _, dropped, _ = applied("capacity", routing.expert_ids, **TIGHT)
    np.testing.assert_array_equal(routing.loads, [3, 2, 2, 1])
    assert dropped == 4


def test_generous_capacity_equals_dense():
    # factor E: ceil(4 x 4 x 2 / 4) = 8 seats, one for every copy
    assert_equals_dense("capacity", CHOICES, capacity_factor=4.0)


def test_empty_slots_take_no_seat_and_are_not_counted_as_dropped():
    # token 0 is padding: token 1 has the one seat of expert 0; token 2 finds it taken
    ids = [[EMPTY, EMPTY], [0, EMPTY], [0, EMPTY], [3, EMPTY]]
    y, dropped, _ = applied("capacity", ids, **TIGHT)
    assert dropped == 1
    np.testing.assert_array_equal(y.any(1), [False, True, False, True])


def test_capacity_of_a_sequence_does_not_depend_on_another_sequence():
    # capacity is per sequence: the second row collapses onto expert 0, which does not affect the first
    one, other = np.concatenate([CHOICES, CHOICES]), np.concatenate([CHOICES, [[0, 1]] * 4])
    calm, _, _ = applied("capacity", one, num_sequences=2, **TIGHT)
    crowded, dropped, _ = applied("capacity", other, num_sequences=2, **TIGHT)
    np.testing.assert_array_equal(calm[:4], crowded[:4])
    assert dropped == 4 + 6
    x, gates = array(4, 8, EMBED)[:4], np.abs(array(5, 8, 2))[:4]
    np.testing.assert_allclose(calm[:4], applied("capacity", CHOICES, x, gates, **TIGHT)[0], rtol=1e-6)


def test_capacity_is_causal_for_top_1():
    # whatever token 3 chooses, seats go in token order and the tokens before it keep theirs
    outputs = [applied("capacity", [[0], [0], [1], [last]], **TIGHT)[0] for last in range(EXPERTS)]
    for y in outputs[1:]:
        np.testing.assert_array_equal(y[:3], outputs[0][:3])


def test_capacity_is_not_causal_for_top_2():
    # token 0 wants expert 1 second; when token 3's first choice becomes 1, it takes the only seat
    before, _, _ = applied("capacity", [[0, 1], [3, 3], [3, 3], [2, 3]], **TIGHT)
    after, _, _ = applied("capacity", [[0, 1], [3, 3], [3, 3], [1, 3]], **TIGHT)
    assert np.abs(before[0] - after[0]).max() > 1e-3


@settings(deadline=None, max_examples=50)
@given(arrays(np.int32, (4, 2), elements=st.integers(0, EXPERTS)))
def test_copies_are_kept_or_dropped_and_no_expert_exceeds_its_capacity(ids):
    # one seat each: an expert keeps min(1, its load)
    _, dropped, _ = applied("capacity", ids, **TIGHT)
    loads = np.bincount(ids.ravel(), minlength=EXPERTS + 1)[:EXPERTS]
    assert dropped == loads.sum() - np.minimum(loads, 1).sum()
