"""Auxiliary losses: published arithmetic computed by hand, scopes, ignored inputs, and balance held at a target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import balance
from moe_jax.balance.losses import squared_variation
from moe_jax.balance.measures import max_violation
from moe_jax.config import ModelConfig
from moe_jax.routing import RouterConfig, Rows, Tokens, route

NO_ROUTER = np.zeros((1, 4), np.float32)
PLAIN = ModelConfig()
# affinities of two tokens to experts 0, 1 on device 0 and 2, 3 on device 1; the best two are 0, 1 and then 0, 2
TWO_TOKENS = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2]]
DEVICES = {"level": "device", "num_devices": 2}
VISITS = {"level": "communication", "num_devices": 2}
LEVELS = {"expert": {}, "device": DEVICES, "communication": VISITS}


@functools.cache
def compiled(method: str, model: ModelConfig, how: tuple, options: tuple):
    """(logits, bias, tokens, statistics | None, router) -> ((loss, statistics), gradients in logits and router)."""
    balancer = balance.make({method: dict(options)}, model)

    def run(logits, router, bias, tokens, statistics):
        routing = route(logits, RouterConfig(**dict(how)), bias, tokens=tokens)
        own = balancer.observe(routing)
        state = balancer.init(logits.shape[1])
        return balancer.loss(routing, own if statistics is None else statistics, state, router), own

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))


def run(method, logits, *, model=PLAIN, top_k=2, bias=None, mask=None, row=None, statistics=None, router=None, **rest):
    """(loss, statistics, (gradient in the logits, in the router)), by default with weight 1 and softmax."""
    how = {"top_k": top_k, "score": rest.pop("score", "softmax")}
    how |= {name: rest.pop(name) for name in ("normalize_gates", "gate_scale") if name in rest}
    if model.num_groups > 1:
        how |= {"num_groups": model.num_groups, "top_groups": model.top_groups, "group_top": model.group_top}
    logits = np.asarray(logits, np.float32)
    bias = np.zeros(logits.shape[1], np.float32) if bias is None else np.asarray(bias, np.float32)
    mask = np.ones(len(logits), bool) if mask is None else np.asarray(mask)
    tokens = Tokens(mask=mask, row=None if row is None else np.asarray(row, np.int32))
    function = compiled(method, model, tuple(how.items()), tuple(({"weight": 1.0} | rest).items()))
    router = NO_ROUTER if router is None else np.asarray(router, np.float32)
    (loss, own), gradients = function(logits, router, bias, tokens, statistics)
    return float(loss), jax.tree.map(np.asarray, own), jax.tree.map(np.asarray, gradients)


def value(method, logits, **options) -> float:
    return run(method, logits, **options)[0]


def log(scores) -> np.ndarray:
    """Logits whose softmax is these scores."""
    return np.log(np.asarray(scores))


def random_logits(seed: int, tokens: int = 8, experts: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, experts)).astype(np.float32)


# --- the levels of the auxiliary loss, by hand --------------------------------------------------------------


def test_expert_level_by_hand():
    # copies (2, 1, 1, 0) of 4: f = (2, 1, 1, 0); P = (0.4, 0.2, 0.25, 0.15); 0.8 + 0.2 + 0.25
    np.testing.assert_allclose(value("aux_loss", log(TWO_TOKENS)), 1.25, rtol=1e-6)


def test_device_level_by_hand():
    # DeepSeek-V2 eq. 26-28: f' = ((2 + 1) / 2, (1 + 0) / 2) and P' = (0.4 + 0.2, 0.25 + 0.15); 1.5 x 0.6 + 0.5 x 0.4
    np.testing.assert_allclose(value("aux_loss", log(TWO_TOKENS), **DEVICES), 1.1, rtol=1e-6)


def test_communication_level_by_hand():
    # eq. 29-31: token 0 is sent to device 0, token 1 to both; M = min(2 slots, 2 devices), so that
    # f'' = 2 / (2 x 2) x (2, 1) = (1, 0.5); 1 x 0.6 + 0.5 x 0.4
    np.testing.assert_allclose(value("aux_loss", log(TWO_TOKENS), **VISITS), 0.8, rtol=1e-6)


def test_communication_level_of_a_model_with_a_group_limit_is_relative_to_that_limit():
    # both tokens may use one group, the one with 0.4: M = 1 and f'' = 2 / (1 x 2) x (2, 0); 2 x 0.6
    limited = ModelConfig(num_experts=4, num_groups=2, top_groups=1, group_top=1)
    loss = value("aux_loss", log(TWO_TOKENS), model=limited, level="communication")
    np.testing.assert_allclose(loss, 1.2, rtol=1e-6)


def test_logical_devices_other_than_the_groups_know_no_group_limit():
    # with one group of two allowed, tokens use experts 0, 1 on two of four devices: M = min(2 slots, 4 devices) and
    # f'' = 4 / (2 x 2) x (2, 2, 0, 0) = (2, 2, 0, 0); 2 x (0.4 + 0.2)
    limited = ModelConfig(num_experts=4, num_groups=2, top_groups=1, group_top=1)
    loss = value("aux_loss", log(TWO_TOKENS), model=limited, level="communication", num_devices=4)
    np.testing.assert_allclose(loss, 1.2, rtol=1e-6)


def test_devices_are_by_default_the_groups_of_the_model():
    grouped = ModelConfig(num_experts=4, num_groups=2, top_groups=2)
    for level in ("device", "communication"):
        by_default = value("aux_loss", random_logits(0), model=grouped, level=level)
        assert by_default == value("aux_loss", random_logits(0), level=level, num_devices=2)


APART = [[0.4, 0.3, 0.2, 0.1], [0.2, 0.1, 0.4, 0.3]]  # each token on one device, with equal use of both devices
ACROSS = [[0.4, 0.1, 0.3, 0.2], [0.1, 0.4, 0.2, 0.3]]  # each token on both devices
CONSTANTS = {
    "expert": ({}, APART, 1.0),
    "device": (DEVICES, APART, 1.0),
    "communication, one device a token": (VISITS, APART, 0.5),  # m / M = 1 / 2
    "communication, two devices a token": (VISITS, ACROSS, 1.0),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_perfect_balance_has_the_documented_constant(case):
    options, scores, constant = CONSTANTS[case]
    for scope in ("sequence", "microbatch", "global"):
        loss = value("aux_loss", log(scores), weight=0.5, scope=scope, **options)
        np.testing.assert_allclose(loss, 0.5 * constant, rtol=1e-6)


@pytest.mark.parametrize("case", CONSTANTS)
def test_perfect_balance_of_raw_scores_has_the_constant_times_the_sum_of_mean_scores(case):
    options, scores, constant = CONSTANTS[case]
    logits = log(scores)
    sums = (1.0 / (1.0 + np.exp(-logits))).sum(1).mean()
    loss = value("aux_loss", logits, score="sigmoid", normalize=False, **options)
    np.testing.assert_allclose(loss, constant * sums, rtol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_frequencies_have_no_gradient_at_any_level(level):
    # L = sum_j a_j P_j with a constant a, so d L / d z_ti = p_ti (a_i - sum_j a_j p_tj) / T; see the values above
    a = {"expert": [2, 1, 1, 0], "device": [1.5, 1.5, 0.5, 0.5], "communication": [1, 1, 0.5, 0.5]}[level]
    p = np.asarray(TWO_TOKENS)
    gradient = run("aux_loss", log(TWO_TOKENS), **LEVELS[level])[2][0]
    np.testing.assert_allclose(gradient, p * (a - (p @ a)[:, None]) / 2, atol=1e-6)


# --- scopes -------------------------------------------------------------------------------------------------

ROW = np.repeat(np.arange(4), 2)  # four sequences of two tokens
HALVES = (slice(0, 4), slice(4, 8))
UNEVEN = np.asarray([1, 1, 1, 1, 1, 0, 1, 0], bool)  # 4 and 2 valid tokens in the halves
TILT = [0.4, 0.0, -0.1, -0.3]


def in_halves(logits, statistics, **options) -> tuple[float, np.ndarray]:
    """The losses of two micro-batches, weighted by their shares of the valid tokens, and the gradient of their sum."""
    total = 0.0
    gradients = []
    for half, seen in zip(HALVES, statistics, strict=True):
        share = UNEVEN[half].sum() / UNEVEN.sum()
        row = ROW[half] - ROW[half][0]
        part = run("aux_loss", logits[half], bias=TILT, mask=UNEVEN[half], row=row, statistics=seen, **options)
        total += share * part[0]
        gradients.append(share * part[2][0])
    return total, np.concatenate(gradients)


def of_halves(logits, **options) -> list:
    """The statistics of each of the two micro-batches."""
    return [run("aux_loss", logits[h], bias=TILT, mask=UNEVEN[h], **options)[1] for h in HALVES]


@pytest.mark.parametrize("counts", ["biased", "unbiased"])
@pytest.mark.parametrize("scope", ["sequence", "global"])
@pytest.mark.parametrize("level", ["device", "communication"])
def test_losses_of_micro_batches_weighed_by_their_tokens_are_the_loss_of_the_batch_at_every_level(level, scope, counts):
    logits = random_logits(1)
    options = LEVELS[level] | {"scope": scope, "counts": counts}
    loss, statistics, (gradient, _) = run("aux_loss", logits, bias=TILT, mask=UNEVEN, row=ROW, **options)
    added = jax.tree.map(np.add, *of_halves(logits, **options))
    jax.tree.map(np.testing.assert_array_equal, added, statistics)
    total, its_gradient = in_halves(logits, (added, added), **options)
    np.testing.assert_allclose(total, loss, rtol=1e-5)
    np.testing.assert_allclose(its_gradient, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("level", LEVELS)
def test_running_frequencies_are_of_the_micro_batch_first_and_of_the_step_last(level):
    logits = random_logits(1)
    running = LEVELS[level] | {"scope": "global_running"}
    first, second = of_halves(logits, **running)
    total, _ = in_halves(logits, (first, jax.tree.map(np.add, first, second)), **running)
    by_scope = {
        scope: [
            run("aux_loss", logits[h], bias=TILT, mask=UNEVEN[h], statistics=s, **LEVELS[level], scope=scope)[0]
            for h, s in zip(HALVES, statistics, strict=True)
        ]
        for scope, statistics in {
            "microbatch": (None, None),
            "global": (jax.tree.map(np.add, first, second),) * 2,
        }.items()
    }
    # 4 of the 6 valid tokens are in the first half
    np.testing.assert_allclose(total, (4 * by_scope["microbatch"][0] + 2 * by_scope["global"][1]) / 6, rtol=1e-6)
    assert abs(by_scope["microbatch"][0] - by_scope["global"][0]) > 1e-3  # otherwise the two would be indistinguishable


def test_statistics_beyond_loads_are_observed_by_hand():
    # visits of device 0 and 1, and the number of tokens; the third token is padding and not counted
    logits = log([*TWO_TOKENS, [0.1, 0.2, 0.3, 0.4]])
    mask = [True, True, False]
    visits = run("aux_loss", logits, mask=mask, **VISITS, scope="global")[1]
    np.testing.assert_array_equal(visits["aux_loss"], [2, 1, 2])
    # a bias sends all to experts 2 and 3, but unbiased counts are those of experts (0, 1) and (0, 2)
    options = {"bias": [0, 0, 9, 9], "mask": mask, "scope": "global_running", "counts": "unbiased"}
    unbiased = run("aux_loss", logits, **options)[1]
    np.testing.assert_array_equal(unbiased["aux_loss"], [2, 1, 1, 0])
    np.testing.assert_array_equal(unbiased["loads"], [0, 0, 2, 2])
    np.testing.assert_array_equal(run("aux_loss", logits, **options, **DEVICES)[1]["aux_loss"], [3, 1])
    # loads are enough for the others
    for local in ({"scope": "sequence"}, {"scope": "microbatch"}, {"scope": "global", **DEVICES}):
        assert set(run("aux_loss", logits, **local)[1]) == {"loads"}


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
@pytest.mark.parametrize("level", ["device", "communication"])
def test_unbiased_counts_ignore_the_bias_at_every_level(level, scope):
    # the bias sends every token to experts 2 and 3
    options = {"row": ROW, "scope": scope} | LEVELS[level]
    free, biased, seeing = (
        value("aux_loss", random_logits(2), bias=bias, counts=counts, **options)
        for bias, counts in (([0, 0, 0, 0], "unbiased"), ([0, 0, 9, 9], "unbiased"), ([0, 0, 9, 9], "biased"))
    )
    assert free == biased
    assert abs(free - seeing) > 1e-3


@pytest.mark.parametrize("level", LEVELS)
def test_a_sequence_loss_is_the_same_at_every_level_where_the_number_of_rows_is_known(level):
    loss = balance.make({"aux_loss": {"scope": "sequence", "weight": 1.0, **LEVELS[level]}})

    @jax.jit
    def of(logits, tokens):
        routing = route(logits, RouterConfig(top_k=2), tokens=tokens)
        return loss.loss(routing, loss.observe(routing), loss.init(4), jnp.asarray(NO_ROUTER))

    row = jnp.asarray(ROW, jnp.int32)
    by_row, known = (of(random_logits(3), Tokens(mask=jnp.asarray(UNEVEN), row=row, rows=r)) for r in (None, Rows(4)))
    np.testing.assert_allclose(by_row, known, rtol=1e-6)


# --- zero-computation experts -------------------------------------------------------------------------------

ZERO = ModelConfig(num_experts=2, num_zero_experts=1)
# two experts and a zero-computation expert; one slot each: expert 0, the zero expert, expert 0
WITH_ZERO = [[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.5, 0.25, 0.25]]


@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
@pytest.mark.parametrize("counts", ["biased", "unbiased"])
def test_auxiliary_loss_is_about_the_experts_that_compute(scope, counts):
    # f = 2 x (2, 0) / 2; scores without the zero expert's (2/3, 1/3), (2/5, 3/5), (2/3, 1/3): P_0 = 26/45
    loss = value("aux_loss", log(WITH_ZERO), model=ZERO, top_k=1, scope=scope, counts=counts)
    np.testing.assert_allclose(loss, 2 * 26 / 45, rtol=1e-6)


def test_importance_is_about_the_experts_that_compute():
    # summed gates (2, 0), not (2, 0, 1): mean 1, variance 1
    np.testing.assert_allclose(value("importance_loss", log(WITH_ZERO), model=ZERO, top_k=1), 1.0, rtol=1e-6)


def test_load_is_about_the_experts_that_compute():
    # tokens prefer 0, the zero expert, 0: loads (2, 0) for noise near 0
    loss = value("load_loss", log(WITH_ZERO), model=ZERO, top_k=1, noise_std=1e-3)
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)


# --- importance and load ------------------------------------------------------------------------------------

# values of Phi from a table
PHI = {-2: 0.0227501, -1: 0.1586553, 1: 0.8413447, 2: 0.9772499}


def cv_squared(sums) -> float:
    return float(np.var(sums) / np.mean(sums) ** 2)


def test_importance_equals_shazeer_eq_6_and_7_by_hand():
    # gates 0.4, 0.3 of experts 0, 1 and 0.4, 0.3 of experts 0, 2: sums (0.8, 0.3, 0.3, 0), mean 0.35 and
    # variance (0.2025 + 2 x 0.0025 + 0.1225) / 4 = 0.0825; 0.0825 / 0.1225 = 0.673469
    loss = value("importance_loss", log(TWO_TOKENS), normalize_gates=False, weight=0.5)
    np.testing.assert_allclose(loss, 0.5 * 0.673469, rtol=1e-5)


def test_importance_does_not_see_a_factor_on_all_gates():
    plain, scaled = (value("importance_loss", random_logits(4), gate_scale=g) for g in (1.0, 2.5))
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)


def test_importance_is_zero_where_all_weigh_the_same_and_experts_minus_one_where_one_has_everything():
    assert value("importance_loss", 50 * np.eye(4), top_k=1) == 0.0
    np.testing.assert_allclose(value("importance_loss", np.tile([9.0, 0, 0, 0], (3, 1)), top_k=1), 3.0, rtol=1e-6)


def test_importance_of_micro_batches_is_not_that_of_the_batch():
    # one token on expert 0, one on expert 1: each alone has CV^2 = 1, together they have 0
    logits = np.asarray([[9.0, 0.0], [0.0, 9.0]])
    assert [value("importance_loss", logits[i : i + 1], top_k=1) for i in (0, 1)] == [1.0, 1.0]
    assert value("importance_loss", logits, top_k=1) == 0.0


def test_load_equals_shazeer_eq_8_to_11_by_hand():
    # k = 1, logits (2, 1, 0), noise 1: the best of the others is 1, 2, 2, so Phi(1), Phi(-1), Phi(-2)
    loss = value("load_loss", [[2.0, 1.0, 0.0]], top_k=1, noise_std=1.0, weight=0.5)
    np.testing.assert_allclose(loss, 0.5 * cv_squared([PHI[1], PHI[-1], PHI[-2]]), rtol=1e-5)
    # k = 2: the second best of the others is 0, 0, 1, so Phi(2), Phi(1), Phi(-1); the other token is the reverse
    loss = value("load_loss", [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], noise_std=1.0)
    both = [PHI[2] + PHI[-1], 2 * PHI[1], PHI[-1] + PHI[2]]
    np.testing.assert_allclose(loss, cv_squared(both), rtol=1e-4)


def test_load_becomes_that_of_top_k_routing_without_noise():
    logits = random_logits(5)
    loads = run("load_loss", logits)[1]["loads"]
    np.testing.assert_allclose(value("load_loss", logits, noise_std=1e-6), cv_squared(loads), rtol=1e-5)


def test_the_default_noise_is_one_over_the_number_of_experts():
    assert value("load_loss", random_logits(5)) == value("load_loss", random_logits(5), noise_std=0.25)
    assert value("load_loss", random_logits(5)) != value("load_loss", random_logits(5), noise_std=0.5)


def test_load_counts_a_tie_for_the_last_slot_as_half():
    # k = 1, both logits 1 and far above the third: Phi(0) = 1/2 each
    loss = value("load_loss", [[1.0, 1.0, -9.0]], top_k=1, noise_std=1.0)
    np.testing.assert_allclose(loss, cv_squared([0.5, 0.5, 0.0]), rtol=1e-6)


def test_load_of_tokens_that_use_every_expert_is_zero():
    loss, _, (gradient, _) = run("load_loss", random_logits(5, experts=2))
    assert loss == 0.0
    assert not gradient.any()


def test_load_does_not_change_with_a_constant_added_to_the_logits_of_a_token():
    # the threshold has a gradient too, so the gradients of a token sum to 0
    gradient = run("load_loss", random_logits(5), noise_std=1.0)[2][0]
    assert abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient.sum(1), 0.0, atol=1e-6)


@pytest.mark.parametrize("method", ["importance_loss", "load_loss"])
def test_descending_importance_or_load_takes_from_the_favoured_expert(method):
    logits = random_logits(6) + np.asarray([1.0, 0.0, 0.0, -1.0], np.float32)
    gradient = run(method, logits)[2][0].sum(0)
    assert gradient[0] > 0 > gradient[3]


def test_variation_of_nothing_is_nothing_and_has_no_gradient():
    for sums in (np.zeros(4, np.float32), np.full(4, 1e-38, np.float32)):
        variation, gradient = jax.value_and_grad(squared_variation)(sums)
        assert variation == 0.0
        np.testing.assert_array_equal(gradient, np.zeros(4))


# --- losses of the router's weight --------------------------------------------------------------------------

ANY = np.zeros((2, 2), np.float32)  # logits of two tokens, for losses that do not read them


def of_router(method, *rows, **options):
    """(loss, gradient in the router) of a router with these rows, one for each expert."""
    loss, _, (_, gradient) = run(method, np.zeros((2, len(rows))), top_k=1, router=np.transpose(rows), **options)
    return loss, gradient


def test_orthogonal_loss_by_hand():
    # rows (1, 0) and (1, 1) / sqrt 2, whatever their lengths: cosine 0.7071, its square 1/2, twice
    np.testing.assert_allclose(of_router("orthogonal_loss", (3, 0), (2, 2), weight=0.1)[0], 0.1, rtol=1e-5)
    np.testing.assert_allclose(of_router("orthogonal_loss", (3, 0), (0, 5))[0], 0.0, atol=1e-6)


def test_orthogonal_loss_of_more_experts_than_dimensions_cannot_be_zero():
    # three rows at 120 degrees: six cosines of -1/2, 6 / 4 = E^2 / d - E = 9 / 2 - 3; and the gradient is 0 there
    rows = [(np.cos(a), np.sin(a)) for a in 2 * np.pi * np.arange(3) / 3]
    loss, gradient = of_router("orthogonal_loss", *rows)
    np.testing.assert_allclose(loss, 1.5, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_orthogonal_loss_of_a_row_of_zeros_is_one_and_has_a_finite_gradient():
    loss, gradient = of_router("orthogonal_loss", (0, 0), (1, 0))
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_similarity_loss_by_hand():
    # rows (1, 0) and (1, 1): R^T R - I = (1 1; 1 2) - I = (0 1; 1 1), absolute entries add up to 3
    np.testing.assert_allclose(of_router("similarity_loss", (1, 0), (1, 1), weight=0.1)[0], 0.3, rtol=1e-6)
    assert of_router("similarity_loss", (0, 1), (1, 0))[0] == 0.0
    # lengths matter: 2^2 - 1 for each expert
    np.testing.assert_allclose(of_router("similarity_loss", (2, 0), (0, 2))[0], 6.0, rtol=1e-6)


@pytest.mark.parametrize("method", ["orthogonal_loss", "similarity_loss"])
def test_losses_of_the_router_read_nothing_but_its_weight(method):
    # so token-weighted micro-batches give the value of the batch
    router = random_logits(7, tokens=3)
    values = {value(method, random_logits(seed, tokens=seed), router=router) for seed in (2, 5, 8)}
    assert len(values) == 1
    assert not run(method, random_logits(2), router=router)[2][0].any()


@pytest.mark.parametrize("method", ["orthogonal_loss", "similarity_loss"])
def test_losses_of_the_router_cost_nothing_without_a_token(method):
    for masked, costs in (([False, False], False), ([True, False], True)):
        loss, _, (_, gradient) = run(method, ANY, top_k=1, mask=masked, router=[[1, 0.5], [0, 2]])
        assert (loss > 0) == costs
        assert gradient.any() == costs


# --- every loss ---------------------------------------------------------------------------------------------

WORDS = {
    "aux device": ("aux_loss", DEVICES),
    "aux device sequence raw": ("aux_loss", {**DEVICES, "scope": "sequence", "normalize": False}),
    "aux visits": ("aux_loss", VISITS),
    "aux visits sequence": ("aux_loss", {**VISITS, "scope": "sequence"}),
    "aux visits global unbiased": ("aux_loss", {**VISITS, "scope": "global", "counts": "unbiased"}),
    "importance": ("importance_loss", {}),
    "importance raw": ("importance_loss", {"normalize_gates": False, "score": "sigmoid"}),
    "load": ("load_loss", {}),
    "load narrow": ("load_loss", {"noise_std": 1e-3}),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_loss_is_finite_with_its_gradient_at_extreme_logits_and_padding_has_none(word):
    method, options = WORDS[word]
    mask = np.asarray([True] * 6 + [False] * 2)
    for logits in (random_logits(8) * 100, random_logits(8) - 100, random_logits(8) + 100, np.zeros((8, 4))):
        loss, _, (gradient, _) = run(method, logits, mask=mask, row=ROW, **options)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()
        assert not gradient[6:].any()


@pytest.mark.parametrize("word", WORDS)
def test_a_loss_without_a_token_is_zero_and_so_is_its_gradient(word):
    method, options = WORDS[word]
    loss, _, (gradient, _) = run(method, random_logits(8), mask=np.zeros(8, bool), row=ROW, **options)
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((8, 4)))


SCHEDULES = {
    "warm-up": ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0]),
    "freeze": ({"freeze_step": 2}, [1.0, 1.0, 0.0, 0.0]),
    "linear": ({"schedule": "linear", "freeze_step": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    "warm-up and linear": ({"warmup_steps": 2, "schedule": "linear", "freeze_step": 4}, [0.5, 1.0, 1.0, 0.5, 0.0]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weight_of_a_loss_follows_its_schedule_through_the_updates(name):
    options, factors = SCHEDULES[name]
    balancer = balance.make({"aux_loss": {"weight": 1.0, **options}})

    @jax.jit
    def step(state, index):
        routing = route(jnp.asarray(log(TWO_TOKENS), jnp.float32), RouterConfig(top_k=2, score="softmax"))
        statistics = balancer.observe(routing)
        loss = balancer.loss(routing, statistics, state, jnp.asarray(NO_ROUTER))
        return loss, balancer.update(statistics, state, index)

    state = balancer.init(4)
    losses = []
    for index in range(len(factors)):
        loss, state = step(state, np.int32(index))
        losses.append(float(loss))
    np.testing.assert_allclose(losses, 1.25 * np.asarray(factors), atol=1e-6)


# --- balance held at a target -------------------------------------------------------------------------------


@functools.cache
def controller(num_zero_experts: int = 0, **options):
    """(balancer, its jitted update) of an auxiliary loss and the method that sets its weight."""
    model = ModelConfig(num_experts=4, num_zero_experts=num_zero_experts)
    balancer = balance.make({"aux_loss": {"weight": 1.0}, "target_violation": options}, model)
    return balancer, jax.jit(lambda loads, state: balancer.update({"loads": loads}, state, jnp.int32(0)))


def log_factor(loads, steps: int = 1, **options) -> float:
    """log of the factor after some steps with these loads."""
    balancer, update = controller(**options)
    state = balancer.init(len(loads))
    for _ in range(steps):
        state = update(np.asarray(loads, np.int32), state)
    assert state["target_violation"].dtype == jnp.float32
    return float(state["target_violation"])


def test_the_factor_rises_above_the_target_and_falls_below_it():
    # mean 3. Loads up to 6: MaxVio 1, twice the target, + rate; up to 4: 1/3, a third below the target, - rate / 3
    options = {"target": 0.5, "rate": 0.3}
    np.testing.assert_allclose(log_factor([6, 2, 2, 2], **options), 0.3, rtol=1e-5)
    np.testing.assert_allclose(log_factor([4, 3, 3, 2], **options), -0.1, rtol=1e-5)
    np.testing.assert_allclose(log_factor([3, 3, 3, 3], **options), -0.3, rtol=1e-5)


def test_one_step_changes_the_factor_by_no_more_than_the_rate():
    # MaxVio 3 is 300 times the target
    np.testing.assert_allclose(log_factor([12, 0, 0, 0], target=0.01, rate=0.3), 0.3, rtol=1e-5)


def test_a_balance_at_the_target_leaves_the_factor():
    # up to 6 with mean 4: MaxVio 1/2 exactly
    assert log_factor([6, 4, 4, 2], target=0.5, rate=0.3) == 0.0


def test_the_factor_stays_within_its_limit():
    options = {"target": 0.5, "rate": 0.3, "limit": 2.0}
    np.testing.assert_allclose(log_factor([6, 2, 2, 2], steps=5, **options), np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(log_factor([3, 3, 3, 3], steps=5, **options), -np.log(2.0), rtol=1e-6)


def test_the_violation_is_of_the_experts_that_compute():
    # (4, 3, 3, 2) and 50 copies for the zero-computation expert: as without it
    options = {"target": 0.5, "rate": 0.3}
    np.testing.assert_allclose(log_factor([4, 3, 3, 2, 50], num_zero_experts=1, **options), -0.1, rtol=1e-5)
    assert log_factor([0, 0, 0, 0, 50], num_zero_experts=1, **options) == 0.0


def test_the_factor_multiplies_the_loss_it_controls_and_no_other():
    both = balance.make({"near": {"method": "aux_loss"}, "z_loss": {}, "target_violation": {"controls": "near"}})
    routing = route(jnp.asarray(random_logits(9)), RouterConfig(top_k=2))
    statistics = both.observe(routing)
    state = both.init(4)
    before, after = (
        both.losses(routing, statistics, state | {"target_violation": jnp.float32(x)}, jnp.asarray(NO_ROUTER))
        for x in (0.0, np.log(3.0))
    )
    np.testing.assert_allclose(after["near"], 3 * before["near"], rtol=1e-6)
    assert float(after["z_loss"]) == float(before["z_loss"])


STEPS, TOKENS, PULL = 1500, 512, 0.02


@functools.cache
def held(target: float) -> np.ndarray:
    """MaxVio of every step of a router that its task pulls towards a skew and the auxiliary loss away from it.

    The logits are skew + offset + noise; the offset descends PULL x offset^2 / 2 and the controlled loss.
    """
    methods = {"aux_loss": {"weight": 1e-2}, "target_violation": {"target": target, "rate": 0.02}}
    balancer = balance.make(methods)
    skew = jnp.asarray([0.6, 0.2, -0.2, -0.6])

    def step(carry, key):
        offset, state = carry
        noise = 0.5 * jax.random.normal(key, (TOKENS, 4))

        def loss(offset):
            routing = route(skew + offset + noise, RouterConfig(top_k=1), state["bias"])
            statistics = balancer.observe(routing)
            task = 0.5 * PULL * (offset**2).sum()
            return task + balancer.loss(routing, statistics, state, jnp.asarray(NO_ROUTER)), statistics

        gradient, statistics = jax.grad(loss, has_aux=True)(offset)
        carry = offset - 2.0 * gradient, balancer.update(statistics, state, jnp.int32(0))
        return carry, max_violation(statistics["loads"])

    start = jnp.zeros(4), balancer.init(4)
    return np.asarray(
        jax.jit(lambda keys: jax.lax.scan(step, start, keys)[1])(jax.random.split(jax.random.key(0), STEPS))
    )


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_a_skewed_router_is_held_at_the_target_violation(target):
    violation = held(target)
    assert violation[:20].mean() > 1.5 * target
    np.testing.assert_allclose(violation[-500:].mean(), target, rtol=0.25)
