"""The coupling loss by hand, its noise, and where its gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.config import ModelConfig
from moe_jax.dispatch import responses
from moe_jax.model.forward import Inputs, Pass, PerLayer, token_info
from moe_jax.model.moe import MoE
from moe_jax.routing import RouterConfig, Tokens, route

EMBED, EXPERTS, FFW = 6, 4, 3
DRAW = np.random.default_rng(0)
ROUTER = DRAW.normal(size=(EMBED, EXPERTS)).astype(np.float32)
FIRST = DRAW.normal(size=(EXPERTS, EMBED, FFW)).astype(np.float32)


def loss_of(router, first, state=None, model=ModelConfig(), mask=(True, True), **options):
    """The loss, for the state before step 0 or another one; `first` are the experts' matrices, or their responses."""
    balancer = balance.make({"coupling_loss": options}, model)
    experts = jnp.asarray(router).shape[1]
    tokens = Tokens(mask=jnp.asarray(mask))
    routing = route(jnp.zeros((len(mask), experts)), RouterConfig(top_k=1), jnp.zeros(experts), tokens=tokens)
    state = balancer.init(experts) if state is None else state
    respond = first if callable(first) else lambda x: responses(x, jnp.asarray(first))
    return balancer.loss(routing, balancer.observe(routing), state, jnp.asarray(router), respond)


def test_the_loss_by_hand():
    # r_1 = (1, 0), r_2 = (0, 1), W_1 = (3, 1), W_2 = (2, 4): M = (3 2; 1 4)
    router, first = np.eye(2, dtype=np.float32), np.float32([[[3], [1]], [[2], [4]]])
    assert float(loss_of(router, first, noise=0.0)) == 0.0  # both are strongest on the diagonal
    # alpha = 1/2: of the four differences M_12 - 3/2, M_21 - 3/2, M_21 - 2 and M_12 - 2 only the first is above 0
    np.testing.assert_allclose(loss_of(router, first, noise=0.0, alpha=0.5), 0.5 / 4, rtol=1e-6)
    # experts exchanged, M = (2 3; 4 1): (3 - 2) + (4 - 2) + (4 - 1) + (3 - 1)
    np.testing.assert_allclose(loss_of(router, first[::-1], noise=0.0, weight=0.5), 0.5 * 8 / 4, rtol=1e-6)


def proxies(state, **options):
    """The vectors to which the experts respond, in the place of the router's columns [E, D]."""
    given = []

    def respond(x):
        given.append(x)
        return jnp.zeros((len(x), len(x)))

    loss_of(ROUTER, respond, state, **options)
    return np.asarray(given[0])


def test_the_noise_keeps_a_column_nearer_to_itself_than_to_any_other():
    balancer = balance.make({"coupling_loss": {}})
    state = balancer.init(EXPERTS, 1)
    moved = np.abs(proxies(state) - ROUTER.T)
    apart = np.linalg.norm(ROUTER.T[:, None] - ROUTER.T[None], axis=-1) + np.diag([np.inf] * EXPERTS)
    bound = apart.min(1) / 2 / np.linalg.norm(ROUTER, axis=0)
    relative = moved / np.abs(ROUTER.T)
    assert (relative <= bound[:, None]).all()
    assert (relative.max(1) > 0.5 * bound).all()
    np.testing.assert_allclose(proxies(state, noise=0.5) - ROUTER.T, (proxies(state) - ROUTER.T) / 2, atol=1e-6)
    np.testing.assert_array_equal(proxies(state, noise=0.0), ROUTER.T)


def test_the_noise_is_another_one_in_every_layer_step_and_run_and_no_other():
    balancer = balance.make({"coupling_loss": {}})
    state = balancer.init(EXPERTS, 1)
    later = balancer.update({"loads": jnp.ones(EXPERTS, jnp.int32)}, state, jnp.int32(0))
    drawn = [proxies(s) for s in (state, later, balancer.init(EXPERTS, 2))] + [proxies(state, seed=1)]
    assert len({array.tobytes() for array in drawn}) == 4
    np.testing.assert_array_equal(proxies(state), drawn[0])
    np.testing.assert_array_equal(proxies(balancer.at_step(state, jnp.int32(1)) | {"bias": state["bias"]}), drawn[1])


def test_the_gradient_reaches_router_and_experts_as_in_loops():
    def loops(router, first):
        total = 0.0
        m = [[jnp.sqrt(((router[:, i] @ first[j]) ** 2).sum()) for j in range(EXPERTS)] for i in range(EXPERTS)]
        for i, j in np.ndindex(EXPERTS, EXPERTS):
            if i != j:
                total += jnp.maximum(m[i][j] - 0.9 * m[i][i], 0) + jnp.maximum(m[j][i] - 0.9 * m[i][i], 0)
        return total / EXPERTS**2

    def ours(router, first):
        return loss_of(router, first, noise=0.0, alpha=0.9)

    for found, expected in zip(*(jax.grad(f, (0, 1))(ROUTER, FIRST) for f in (ours, loops)), strict=True):
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_noise_has_no_gradient():
    # the gradient of the loss is that with the noise as a constant factor on each column
    balancer = balance.make({"coupling_loss": {}})
    factor = proxies(balancer.init(EXPERTS)) / ROUTER.T

    def fixed(router):
        return loss_of(router * factor.T, FIRST, noise=0.0)

    np.testing.assert_allclose(
        jax.grad(lambda r: loss_of(r, FIRST))(ROUTER), jax.grad(fixed)(ROUTER), rtol=1e-4, atol=1e-6
    )


def test_zero_computation_experts_are_left_out_and_a_single_expert_has_none_to_differ_from():
    model = ModelConfig(num_experts=EXPERTS, num_zero_experts=2)
    wide = np.concatenate([ROUTER, np.ones((EMBED, 2), np.float32)], 1)
    np.testing.assert_array_equal(loss_of(wide, FIRST, model=model), loss_of(ROUTER, FIRST))
    assert float(loss_of(ROUTER[:, :1], FIRST[:1])) == 0.0


def test_without_a_token_it_costs_nothing():
    assert float(loss_of(ROUTER, FIRST, mask=(False, False))) == 0.0 < float(loss_of(ROUTER, FIRST, mask=(True, False)))


def test_equal_columns_and_columns_of_zeros_have_a_finite_gradient():
    router = ROUTER.copy()
    router[:, 1], router[:, 2] = router[:, 0], 0.0
    for gradient in jax.grad(loss_of, (0, 1))(router, FIRST):
        assert np.isfinite(gradient).all()


def test_a_call_without_the_responses_is_refused_in_a_sentence():
    balancer = balance.make({"coupling_loss": {}})
    routing = route(jnp.zeros((2, 4)), RouterConfig(top_k=1), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"coupling_loss reads the weights of the experts, .*; give losses\("):
        balancer.loss(routing, balancer.observe(routing), balancer.init(4), jnp.asarray(ROUTER))


@pytest.mark.parametrize("keys", [{}, dict(activation="relu2"), dict(latent_dim=6)], ids=str)
def test_a_layer_asks_the_first_matrices_of_its_experts_and_what_narrows_their_input(keys):
    config = tiny_config(model=keys, balance={"coupling_loss": {}}).model
    balancer = balance.make({"coupling_loss": {}}, config)
    layer = MoE(config, nnx.Rngs(0))
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    inputs = Inputs(ids, ids, jnp.ones_like(ids))
    fwd = Pass(inputs, balancer, PerLayer(balancer.init(config.num_experts)), jax.random.key(0), train=True)
    x = jnp.ones((1, 8, config.embed_dim))
    found = jax.jit(lambda x: layer(x, token_info(inputs), fwd)[1].losses["coupling_loss"])(x)
    first = layer.up[...] if layer.gate is None else layer.gate[...]
    if layer.latent_down is not None:
        first = jnp.einsum("dl,elf->edf", layer.latent_down[...], first)
    np.testing.assert_allclose(found, loss_of(layer.router[...], first), rtol=1e-5)
    assert found > 0
