"""Laws of the cost of a step, read from the compiled program: exchanges, gathered weights, rows and FLOPs."""

import functools
import re
from collections import Counter
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.balance_cost import get_config
from conftest import mesh_sizes, tiny_config
from experiments.cost import costs
from moe_jax.config import resolve, validate
from moe_jax.config.schema import Kept
from moe_jax.dispatch import ExpertWeights, apply_experts
from moe_jax.kernels import grouped
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.mesh import make_mesh
from moe_jax.planning import cost, loops
from moe_jax.planning.collectives import Collective
from moe_jax.planning.keeping import bytes_by_name
from moe_jax.routing import RouterConfig, Routing, route
from moe_jax.training.compile import abstract_batch, make_train_step
from moe_jax.training.state import abstract_state, step_key

# Token counts that no weight has as a dimension: 16 sequences of 60, 2 of them and 120 tokens a device
ROWS, SEQ, SLOTS, EMBED, EXPERTS, DEVICES = 16, 60, 2, 256, 8, 8
TOKEN_DIMS = {n * SEQ for n in (1, 2, 4, 8, 16, 32)}
MODEL = dict(num_layers=2, first_dense=0, num_experts=EXPERTS, num_heads=4, num_kv_heads=2, top_k=SLOTS)
LATENT = 128  # half of EMBED
MODEL |= dict(num_shared_experts=1, embed_dim=EMBED, head_dim=64, expert_ffw_dim=96)
BALANCE = dict(
    bias_sign=dict(rate=1e-2),
    aux_loss=dict(weight=1e-2),
    of_a_row=dict(method="aux_loss", weight=1e-4, scope="sequence", counts="unbiased"),
    z_loss=dict(),
)


def config_of(sizes, remat: str, dispatch: str, latent: int = 0):
    keep = dict(remat_keep=get_args(Kept)) if remat == "names" else {}
    config = tiny_config(
        batch_size=ROWS,
        sequence_length=SEQ,
        balance=BALANCE,
        mesh=mesh_sizes(sizes),
        model=MODEL | dict(remat=remat, dispatch=dispatch, latent_dim=latent) | keep,
    )
    return resolve(config, DEVICES, "cpu")


@functools.cache
def compiled_text(sizes, remat: str, dispatch: str, latent: int = 0) -> str:
    """One train step with balanced routing; "names" keeps all that has one."""
    config = config_of(sizes, remat, dispatch, latent)
    mesh = make_mesh(config.mesh)
    step = make_train_step(config, mesh).lower(
        abstract_state(config, mesh), abstract_batch(config, mesh), step_key(config)
    )
    return step.compile().as_text()


@functools.cache
def cost_of(sizes, remat: str, dispatch: str, latent: int = 0) -> cost.Cost:
    return cost.analyze(compiled_text(sizes, remat, dispatch, latent))


def collectives(sizes, remat: str, dispatch: str = "auto", latent: int = 0) -> dict[Collective, int]:
    """The exchanges of a device in the step, and how often each runs."""
    return dict(cost_of(sizes, remat, dispatch, latent).collectives)


def bytes_of_rows(remat: str, latent: int = 0) -> int:
    """What a device exchanges of its tokens in the step."""
    by_collective = collectives((1, 2, 4, 1), remat, latent=latent)
    return sum(c.bytes * n for c, n in by_collective.items() if c.kind == "all-to-all")


@pytest.mark.parametrize(("remat", "hops"), [("none", 4), ("names", 4), ("full", 5)])
def test_tokens_are_exchanged_no_more_than_the_algorithm_needs(remat, hops):
    # forward to the experts and back, backward likewise: 4 hops of tokens x k x d x 4 bytes. Capacity pads each by
    # 1.25, and rematerialisation repeats one of them unless its rows are kept. Besides the vectors only one gate per
    # copy is sent.
    ideal = 4 * (ROWS * SEQ // DEVICES) * SLOTS * EMBED * 4 * MODEL["num_layers"]
    assert bytes_of_rows(remat) <= 1.6 * ideal
    np.testing.assert_allclose(bytes_of_rows(remat) / ideal, 1.25 * hops / 4, rtol=0.01)


@pytest.mark.parametrize(("remat", "hops"), [("names", 4), ("full", 6)])
def test_rows_of_a_latent_are_exchanged_at_its_width(remat, hops):
    # where nothing is kept, two are repeated: the gradient of the projection from the latent reads what came back
    hop = (ROWS * SEQ // DEVICES) * SLOTS * LATENT * 4 * MODEL["num_layers"]
    np.testing.assert_allclose(bytes_of_rows(remat, LATENT), 1.25 * hops * hop, rtol=0.01)


@pytest.mark.parametrize(("remat", "gathers"), [("none", 2), ("names", 2), ("full", 3)])
def test_gathered_tokens_are_exchanged_no_more_than_the_algorithm_needs(remat, gathers):
    # forward x is gathered and y scattered, backward the gradient of y gathered and that of x scattered, each time
    # 3 / 4 of the 480 tokens of a group; rematerialisation gathers x again unless it is kept. No copy is exchanged.
    found = collectives((1, 2, 4, 1), remat, "gathered")
    group = 4 * ROWS * SEQ // DEVICES
    sent = Counter()
    for c, n in found.items():
        if any(EMBED in dims and TOKEN_DIMS & set(dims) for dims in shapes(c)):
            sent[c.kind] += n * c.sent
    ideal = 3 / 4 * group * EMBED * 4 * MODEL["num_layers"]
    assert sent == {"all-gather": gathers * ideal, "reduce-scatter": 2 * ideal}
    assert not [c for c in found if c.kind == "all-to-all"]


def recomputed(remat: str) -> float:
    return sum(n for name, n in cost_of((1, 2, 4, 1), remat, "auto").flops.items() if "rematted_computation" in name)


def test_what_is_kept_by_name_is_not_computed_again():
    # in a layer and on a device, of 120 tokens: the products of scores and values, over the square of 60 tokens, and
    # attention's output projection. The experts are in C++ here, and have no FLOPs
    tokens, width = ROWS * SEQ // DEVICES, MODEL["num_heads"] * MODEL["head_dim"]
    saved = 2 * 2 * tokens * SEQ * width + 2 * tokens * width * EMBED
    np.testing.assert_allclose(recomputed("full") - recomputed("names"), MODEL["num_layers"] * saved, rtol=0.01)


@pytest.mark.parametrize(("dispatch", "latent"), [("auto", 0), ("gathered", 0), ("auto", LATENT)])
def test_layers_keep_as_many_bytes_as_the_names_are_said_to_have(dispatch, latent):
    sizes = (1, 2, 4, 1)
    names, full = (loops.saved_bytes(compiled_text(sizes, remat, dispatch, latent)) for remat in ("names", "full"))
    config = config_of(sizes, "names", dispatch, latent)
    np.testing.assert_allclose(names - full, sum(bytes_by_name(config, make_mesh(config.mesh)).values()), rtol=0.02)


def test_nothing_is_kept_of_rounds_that_are_possible_but_not_needed():
    # 240 copies by at most 75 for each of 4 devices: 4 rounds are possible, 3 of them after the first, of 300 rows
    text = compiled_text((1, 2, 4, 1), "names", "auto")
    assert f"[300,{EMBED}]" in text
    assert not re.findall(r"\[(?:\d+,)*3,300\b[\d,]*\]", text)


def shapes(collective: Collective) -> list[list[int]]:
    """The dimensions of every array that an exchange moves."""
    return [[int(d) for d in dims.split(",") if d] for dims in re.findall(r"\[([\d,]*)\]", collective.shape)]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_tokens_and_no_scores_are_gathered_or_reduced_over_devices(remat):
    others = [c for c in collectives((1, 2, 4, 1), remat) if c.kind != "all-to-all"]
    assert {c.kind for c in others} >= {"all-gather", "all-reduce", "reduce-scatter"}
    for c in others:
        assert not TOKEN_DIMS & {d for dims in shapes(c) for d in dims}, c


def test_gradients_are_summed_axis_by_axis_and_never_whole_over_all_devices():
    # over the 4 devices of `expert` parts that are split over `data`: 128 of 256 rows; over all 8 only vectors
    for c in collectives((1, 2, 4, 1), "full"):
        if c.kind == "all-reduce" and len(c.group) == 4:
            assert EMBED not in {d for dims in shapes(c) for d in dims}, c
        if c.kind == "all-reduce" and len(c.group) == 8:
            assert max(map(len, shapes(c))) <= 1, c


def test_expert_weights_are_gathered_over_data_only():
    # gathered whole over `data`, an expert's gate is [2 experts here, 256, 96]; devices 0 and 4 are a data group
    gathered = [c for c in collectives((1, 2, 4, 1), "full") if c.kind == "all-gather" and "[2,256,96]" in c.shape]
    assert gathered
    assert {c.group for c in gathered} == {(0, 4)}
    assert not [c for c in collectives((1, 2, 4, 1), "full") if c.kind == "all-gather" and "[8,256,96]" in c.shape]


def test_loads_are_one_small_all_reduce_a_layer():
    # int32 [8] of loads with other sums of a layer's report; the recomputed forward pass may do it again
    summed = {c: n for c, n in collectives((1, 2, 4, 1), "full").items() if [EXPERTS] in shapes(c)}
    loads = {c: n for c, n in summed.items() if "s32[8]" in c.shape}
    assert {c.kind for c in loads} == {"all-reduce"}
    assert sum(loads.values()) <= 2 * MODEL["num_layers"]
    assert max(c.bytes for c in loads) < 1024


# --- cost does not grow with the number of experts ------------------------------------------------------------

COPIES = 256 * 256  # 256 copies for each of 256 experts
WIDTH, HIDDEN, TOP_K = 64, 512, 8


def random_routing(num_experts: int) -> Routing:
    logits = np.random.default_rng(0).normal(size=(COPIES // TOP_K, num_experts)).astype(np.float32)
    return jax.jit(lambda x: route(x, RouterConfig(top_k=TOP_K)))(logits)


def layer_flops(num_experts: int, routing: Routing, monkeypatch, stack=lambda layer: layer) -> int:
    """FLOPs of router and experts, forward and backward, every loop as often as it runs; of one layer by default."""
    tiles = int(rows_multiplied(routing.loads)) // grouped.TILE_ROWS
    bounded = jax.lax.fori_loop
    # the number of tiles is known at run time only; a bound in the text lets them be counted
    monkeypatch.setattr(grouped.lax, "fori_loop", lambda low, high, *args: bounded(low, tiles, *args))
    x = jax.ShapeDtypeStruct((COPIES // TOP_K, WIDTH), jnp.float32)
    router = jax.ShapeDtypeStruct((WIDTH, num_experts), jnp.float32)
    shapes = [(num_experts, WIDTH, HIDDEN)] * 2 + [(num_experts, HIDDEN, WIDTH)]
    weights = ExpertWeights(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))

    def layer(x, router, weights):
        chosen = route(x @ router, RouterConfig(top_k=TOP_K))
        return apply_experts(x, chosen, weights, dispatcher="local", cpu_kernel="xla")[0]

    def loss(*args):
        return (stack(layer)(*args) ** 2).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, router, weights).compile()
    return cost.analyze(program.as_text()).flops


@pytest.mark.parametrize(("keep", "products"), [((), 3 + 2 + 6), (("hidden",), 3 + 6)])
def test_a_backward_pass_never_repeats_the_experts_last_product(keep, products, monkeypatch):
    # three products forward, twice as many backward, and the first two again unless their results are kept
    routing = random_routing(16)
    policy = jax.checkpoint_policies.save_only_these_names(*keep)

    def two(layer):
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return lambda x, *weights: jax.lax.scan(lambda x, _: (x + layer(x, *weights), None), x, length=2)[0]

    flops = layer_flops(16, routing, monkeypatch, two).total()
    one = 2 * int(rows_multiplied(routing.loads)) * WIDTH * HIDDEN
    assert round(flops / one / 2, 1) == products


def test_rows_and_flops_at_256_experts_are_within_1_3_of_those_at_16(monkeypatch):
    few, many = random_routing(16), random_routing(256)
    assert int(few.loads.sum()) == int(many.loads.sum()) == COPIES
    rows = [int(rows_multiplied(r.loads)) for r in (few, many)]
    assert COPIES <= rows[0] <= rows[1] <= 1.3 * rows[0]
    with monkeypatch.context() as m:
        few_flops = layer_flops(16, few, m)
    with monkeypatch.context() as m:
        many_flops = layer_flops(256, many, m)
    experts = [sum(f for name, f in flops.items() if "while" in name) for flops in (few_flops, many_flops)]
    assert experts[0] == 9 * 2 * rows[0] * WIDTH * HIDDEN  # 3 matrices, forward and two products each backward
    assert many_flops.total() <= 1.3 * few_flops.total()  # the router included, which does grow with E


# --- the cost of balancing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def balancing_costs():
    return dict(costs(validate(get_config()), ["none", "bias_sign", "quantile"]))


@pytest.mark.parametrize(("method", "flops", "bytes_accessed"), [("bias_sign", 1e-3, 1e-2), ("quantile", 2e-2, 2e-2)])
def test_moving_a_bias_costs_next_to_nothing(balancing_costs, method, flops, bytes_accessed):
    # compared with a step without balancing, which also counts loads
    none, ours = balancing_costs["none"], balancing_costs[method]
    assert none.flops < ours.flops <= (1 + flops) * none.flops
    assert ours.bytes <= (1 + bytes_accessed) * none.bytes
