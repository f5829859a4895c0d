"""Laws of expert-parallel dispatch on every mesh: the output and gradients of the dense oracle under any routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import mesh_sizes
from moe_jax.config import DISPATCHERS, MeshConfig, default, validate
from moe_jax.dispatch import ExpertWeights, apply_experts, exchange, gathered
from moe_jax.dispatch.repeated import sum_of_rounds
from moe_jax.kernels import native
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.routing import RouterConfig, Routing, count, route

TOKENS, EXPERTS, SLOTS, EMBED, FFW = 64, 8, 2, 8, 6
EMPTY = EXPERTS
SPLIT = [((1, 2, 4, 1), "xla"), ((2, 1, 2, 2), "native")]  # meshes that split the experts, and how CPUs multiply
WHOLE = [((1, 8, 1, 1), "xla"), ((2, 2, 1, 2), "native")]  # meshes on which every device has all experts
CASES = [
    (name, sizes, kernel)
    for name, facts in DISPATCHERS.items()
    if not facts.is_oracle
    for sizes, kernel in (SPLIT if facts.splits_experts else WHOLE)
]
# the default of expert parallelism is tested on more meshes
CASES += [("rounds", sizes, kernel) for sizes in ((1, 1, 8, 1), (1, 2, 2, 2)) for kernel in ("xla", "native")]
CASES += [("rounds", (1, 2, 4, 1), "native"), ("rounds", (2, 1, 2, 2), "xla")]
CASES += [("gathered", (1, 1, 4, 1, 2), "xla")]  # a device's tokens are not next to those of its group


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = ExpertWeights(array(1, EXPERTS, EMBED, FFW), array(2, EXPERTS, EMBED, FFW), array(3, EXPERTS, FFW, EMBED))
X, GATES = array(4, TOKENS, EMBED), np.abs(array(5, TOKENS, SLOTS))


def emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` by its documentation, on top of all_to_all; NaN where both sides disagree on sizes."""
    devices = input_offsets.shape[0]
    rows = lax.all_to_all(jnp.broadcast_to(operand, (devices, *operand.shape)), axis_name, 0, 0, tiled=True)
    parts = jnp.stack([input_offsets, send_sizes, output_offsets], axis=1)
    first, size, target = lax.all_to_all(parts, axis_name, 0, 0, tiled=True).T  # of every source, for this device
    index = jnp.arange(operand.shape[0])
    for source in range(devices):
        inside = index - first[source]
        at = jnp.where((inside >= 0) & (inside < size[source]), target[source] + inside, output.shape[0])
        output = output.at[at].set(rows[source], mode="drop")
    return jnp.where((recv_sizes == size).all(), output, jnp.nan)


@pytest.fixture(autouse=True)
def _cpu_has_no_ragged_all_to_all(monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged_all_to_all)


def mesh_of(sizes):
    return make_mesh(MeshConfig(**mesh_sizes(sizes)), jax.devices()[: int(np.prod(sizes))])


def routing_of(ids, gates) -> Routing:
    """A routing with these ids and gates; empty slots get a gate of 0, as in `route`."""
    routing = route(jnp.zeros((ids.shape[0], EXPERTS)), RouterConfig(top_k=1))
    return routing._replace(expert_ids=ids, gates=jnp.where(ids < EXPERTS, gates, 0.0), loads=count(ids, EXPERTS))


@functools.cache
def compiled(dispatcher: str, sizes=None, **options):
    """(x, gates, weights, ids) -> (y, traffic), and the gradients of a function of y in the first three."""
    mesh = None if sizes is None else mesh_of(sizes)

    def run(x, gates, weights, ids):
        y, traffic = apply_experts(x, routing_of(ids, gates), weights, mesh=mesh, dispatcher=dispatcher, **options)
        return (y * jnp.arange(1.0, y.size + 1.0).reshape(y.shape) ** 0.5).sum(), (y, traffic)

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))


def applied(dispatcher: str, sizes, ids, **options):
    """y, traffic, and gradients, as numpy."""
    args = X, GATES, WEIGHTS, np.asarray(ids, np.int32)
    if sizes is not None:
        tokens, whole = batch_sharding(mesh_of(sizes)), NamedSharding(mesh_of(sizes), P())
        args = jax.device_put(args, (tokens, tokens, whole, tokens))
    (_, (y, traffic)), gradients = compiled(dispatcher, sizes, **options)(*args)
    return jax.tree.map(np.asarray, (y, traffic, gradients))


def random_ids(seed: int) -> np.ndarray:
    """Two different experts for every token."""
    scores = np.random.default_rng(seed).random((TOKENS, EXPERTS))
    return scores.argsort(1)[:, :SLOTS]


def collapsed() -> np.ndarray:
    """Every copy to expert 5: top-k cannot give this routing, which would be the worst."""
    return np.full((TOKENS, SLOTS), 5)


def half_collapsed() -> np.ndarray:
    """The first half of the tokens (one data or replica group) to experts 0 and 1, the other half anywhere."""
    ids = random_ids(7)
    ids[: TOKENS // 2] = [0, 1]
    return ids


def empty_rank() -> np.ndarray:
    """No token for the last half of the experts, so for the last devices, nor for expert 1."""
    return np.where(random_ids(8) % 4 == 1, 2, random_ids(8) % 4)


def padded() -> np.ndarray:
    """Some tokens are padding, some have one expert; one shard of 8 tokens is empty."""
    ids = random_ids(9)
    ids[::3] = EMPTY
    ids[1::4, 1] = EMPTY
    ids[8:16] = EMPTY
    return ids


ROUTINGS = {
    "random": lambda: random_ids(6),
    "collapsed": collapsed,
    "half_collapsed": half_collapsed,
    "empty_rank": empty_rank,
    "padded": padded,
    "nothing": lambda: np.full((TOKENS, SLOTS), EMPTY),
}


@functools.cache
def oracle(routing: str):
    return applied("dense", None, ROUTINGS[routing]())


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("dispatcher", "sizes", "kernel"), CASES, ids=str)
def test_output_and_gradients_are_the_dense_ones_and_nothing_is_dropped(dispatcher, sizes, kernel, routing):
    if kernel == "native" and (why := native.missing()):
        pytest.skip(why)
    ids = ROUTINGS[routing]()
    # with E times the balanced load a sequence of 8 tokens fits into one expert, and no dispatcher has to drop
    room = {} if DISPATCHERS[dispatcher].dropless else dict(num_sequences=8, capacity_factor=float(EXPERTS))
    y, traffic, gradients = applied(dispatcher, sizes, ids, cpu_kernel=kernel, **room)
    exact, _, its_gradients = oracle(routing)
    assert traffic.dropped == 0
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(its_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    idle = np.bincount(ids.ravel(), minlength=EXPERTS + 1)[:EXPERTS] == 0
    for dw in jax.tree.leaves(gradients[2]):
        assert (dw[idle] == 0).all()


@pytest.mark.usefixtures("own_dispatchers")
@pytest.mark.parametrize("sizes", [sizes for sizes, _ in WHOLE], ids=str)
def test_the_example_of_a_dispatcher_obeys_the_laws(repo, sizes):
    example = (repo / "docs/examples/dispatcher.py").read_text()
    exec(example, {"__name__": "example"})
    y, _, gradients = applied("loop", sizes, ROUTINGS["padded"]())
    exact, _, its_gradients = oracle("padded")
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(its_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    with pytest.raises(ValueError, match=r"model\.dispatch='loop' needs every expert on every device"):
        validate(default(model=dict(num_experts=8, dispatch="loop"), mesh=dict(expert=2)))


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 1, 2)], ids=str)
def test_without_an_expert_axis_every_device_has_all_experts(sizes):
    y, traffic, gradients = applied("auto", sizes, ROUTINGS["half_collapsed"]())
    exact, _, its_gradients = oracle("half_collapsed")
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(its_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    assert (traffic.rounds, traffic.visits) == (1, TOKENS)


def test_rounds_are_those_of_the_busiest_pair_of_devices():
    # (1, 2, 4, 1): 8 shards of 8 tokens, 16 copies each; C = 1.25 x 16 / 4 = 5; 16 copies to one device are 4 rounds
    assert applied("rounds", (1, 2, 4, 1), ROUTINGS["collapsed"]())[1].rounds == 4
    # experts 0 and 1 are on one device: the 16 copies a shard of one group decide the rounds of the other
    assert applied("rounds", (1, 2, 4, 1), ROUTINGS["half_collapsed"]())[1].rounds == 4
    # 4 copies for each of 4 devices
    balanced = (np.arange(TOKENS * SLOTS) % EXPERTS).reshape(TOKENS, SLOTS)
    assert applied("rounds", (1, 2, 4, 1), balanced)[1].rounds == 1
    assert applied("rounds", (1, 2, 4, 1), ROUTINGS["nothing"]())[1].rounds == 0


def test_ragged_rounds_are_those_of_the_busiest_receiver():
    # a device takes in 1.25 x 16 = 20 copies a round; 4 sources x 16 copies are 64: 4 rounds
    assert applied("ragged", (1, 2, 4, 1), ROUTINGS["collapsed"]())[1].rounds == 4
    # source s sends all its 16 copies to device s: too many for a pair in `rounds`, one round in `ragged`
    ids = np.repeat(np.tile(np.arange(4), 2), 8)[:, None] * 2 + np.array([0, 1])
    assert applied("ragged", (1, 2, 4, 1), ids)[1].rounds == 1
    assert applied("rounds", (1, 2, 4, 1), ids)[1].rounds == 4


def test_gathered_rounds_are_those_of_the_busiest_device():
    # a device has room for 1.25 x 16 = 20 of the 64 copies of its group of 4
    balanced = (np.arange(TOKENS * SLOTS) % EXPERTS).reshape(TOKENS, SLOTS)
    for ids, needed in ((ROUTINGS["collapsed"](), 4), (balanced, 1), (ROUTINGS["nothing"](), 0)):
        assert applied("gathered", (1, 2, 4, 1), ids)[1].rounds == needed
    # 21 copies for the experts 6 and 7 of the first group, none for others: a second round for one copy
    ids = np.full((TOKENS, SLOTS), EMPTY)
    ids[:10], ids[31, 1] = [6, 7], 6
    assert applied("gathered", (1, 2, 4, 1), ids)[1].rounds == 2
    ids[31] = EMPTY
    assert applied("gathered", (1, 2, 4, 1), ids)[1].rounds == 1


def test_gathered_rows_are_padded_in_each_round_that_a_device_runs():
    # one expert's 64 copies in each group: four rounds of at most 20, each padded to a tile of 128
    options = dict(cpu_kernel="xla")
    assert applied("gathered", (1, 2, 4, 1), ROUTINGS["collapsed"](), **options)[1].rows == 2 * 4 * 128
    # the other group sends 32 copies to each of experts 0 and 1: 64 to one device, of four rounds each. In the order
    # of tokens a round has rows of both.
    ids = ROUTINGS["collapsed"]()
    ids[: TOKENS // 2] = [0, 1]
    assert applied("gathered", (1, 2, 4, 1), ids, **options)[1].rows == 4 * 2 * 128 + 4 * 128


@pytest.mark.parametrize("dispatcher", ["rounds", "gathered"])
def test_visits_count_the_devices_of_a_token_once(dispatcher):
    ids = np.full((TOKENS, SLOTS), EMPTY)
    ids[0], ids[1], ids[2] = [0, 1], [0, 7], [3, EMPTY]  # on 4 devices of 2 experts: one, two, one
    assert applied(dispatcher, (1, 2, 4, 1), ids)[1].visits == 4


def test_capacity_drops_the_same_copies_on_any_mesh():
    # sequences of 8 tokens are whole on a device, so that seats are assigned as on one device
    options = dict(num_sequences=8, capacity_factor=1.0)
    y, traffic, gradients = applied("capacity", (1, 2, 4, 1), ROUTINGS["half_collapsed"](), **options)
    exact, its_traffic, its_gradients = applied("capacity", None, ROUTINGS["half_collapsed"](), **options)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(its_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    assert traffic.dropped == its_traffic.dropped > 0


# --- memory ---------------------------------------------------------------------------------------------------


def temporary_bytes(dispatcher, capacity_factor=1.25) -> int:
    """Temporary memory of a layer, forward and backward on 8 devices."""
    mesh = mesh_of((1, 1, 8, 1))
    tokens, embed, ffw = 2048, 64, 64
    rows, experts = batch_sharding(mesh), NamedSharding(mesh, P("expert"))
    x = jax.ShapeDtypeStruct((tokens, embed), jnp.float32, sharding=rows)
    gates = jax.ShapeDtypeStruct((tokens, SLOTS), jnp.float32, sharding=rows)
    ids = jax.ShapeDtypeStruct((tokens, SLOTS), jnp.int32, sharding=rows)
    shapes = [(EXPERTS, embed, ffw)] * 2 + [(EXPERTS, ffw, embed)]
    weights = ExpertWeights(*(jax.ShapeDtypeStruct(s, jnp.float32, sharding=experts) for s in shapes))
    options = dict(mesh=mesh, dispatcher=dispatcher, capacity_factor=capacity_factor)

    def run(x, gates, weights, ids):
        return (apply_experts(x, routing_of(ids, gates), weights, **options)[0] ** 2).sum()

    step = jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(x, gates, weights, ids).compile()
    return step.memory_analysis().temp_size_in_bytes


def of_one_round(monkeypatch, dispatcher) -> int:
    """The same, if no further round could be needed."""

    def first(plan, *others):
        return sum_of_rounds(lambda copies: plan(copies)._replace(needed=jnp.int32(1)), *others)

    with monkeypatch.context() as patch:
        patch.setattr({"rounds": exchange, "gathered": gathered}[dispatcher], "sum_of_rounds", first)
        return temporary_bytes(dispatcher)


@pytest.mark.parametrize("dispatcher", ["rounds", "gathered"])
def test_memory_is_at_most_that_of_two_rounds_and_does_not_grow_with_the_possible_ones(monkeypatch, dispatcher):
    # a device has 512 copies at 80 a round, or those of 8 devices at 640: 7 rounds are possible, or 28 at a quarter
    usual = temporary_bytes(dispatcher)
    assert usual <= 2 * of_one_round(monkeypatch, dispatcher)
    assert temporary_bytes(dispatcher, capacity_factor=1.25 / 4) <= usual
