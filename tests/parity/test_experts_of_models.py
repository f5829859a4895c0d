"""Experts and routers against the code of their models in transformers, of which we do not have every other part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.huggingface.families import MIXTRAL
from moe_jax.huggingface.tensors import join, split, tensors
from moe_jax.model.forward import Pass, PerLayer
from moe_jax.model.moe import MoE
from moe_jax.routing import RouterConfig, Tokens, route

torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install 'moe_jax[peers]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'moe_jax[peers]'")

X = np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32)
UNREAD = dict(gate=np.zeros((4, 16, 8)), up=np.zeros((4, 16, 8)), down=np.zeros((4, 8, 16)))  # by a test of a router


def modeling(name):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def drawn(module):
    """The module with random parameters and biases, and these by name."""
    torch.manual_seed(0)
    values = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for value in values.values():
            value.normal_(0.0, 0.5)
    return module.eval(), {name: value.detach().numpy() for name, value in values.items()}


def layer_of(keys, arrays):
    """Our layer with these arrays; every parameter must be among them."""
    layer = MoE(tiny_config(model=dict(num_layers=1, first_dense=0, num_shared_experts=0) | keys).model, nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    assert {".".join(map(str, path)) for path, _ in flat} == arrays.keys() - {"bias"}
    for name, value in arrays.items():
        *parents, last = name.split(".")
        owner = layer
        for parent in parents:
            owner = getattr(owner, parent)
        assert getattr(owner, last).shape == value.shape, name
        getattr(owner, last)[...] = jnp.asarray(value)
    return layer


def computed(layer):
    """The output of our layer, and its experts and gates in the order of ids."""
    graphdef, state = nnx.split(layer)
    fwd = Pass(None, balance.make({}), PerLayer({}), jax.random.key(0))  # a layer alone reads no inputs

    def run(state, x):
        y, report = nnx.merge(graphdef, state)(x[None], Tokens(), fwd)
        return y[0], report.details.routing

    y, routing = jax.jit(run)(state, X)
    return y, *by_id(routing.expert_ids, routing.gates)


def by_id(ids, gates):
    ids, gates = np.asarray(ids), np.asarray(gates)
    order = ids.argsort(-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(gates, order, -1)


def assert_same_routing(found, ids, gates):
    ids, gates = by_id(ids.numpy(), gates.numpy())
    np.testing.assert_array_equal(found[1], ids)
    np.testing.assert_allclose(found[2], gates, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_router_of_kolibri_adds_its_bias_to_logits():
    config = transformers.Kolibri1Config(hidden_size=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    theirs, stored = drawn(modeling("kolibri1").Kolibri1TopKRouter(config))
    ours = dict(router=stored["weight"].T, bias=stored["e_score_correction_bias"]) | UNREAD
    _, gates, ids = theirs(torch.from_numpy(X))
    assert_same_routing(computed(layer_of(dict(select_by="logits"), ours)), ids, gates)


@torch.no_grad()
def test_the_router_of_gemma_4_has_a_norm_a_scale_a_factor_and_scales_of_experts():
    config = transformers.Gemma4TextConfig(hidden_size=16, num_experts=4, top_k_experts=2, rms_norm_eps=1e-6)
    theirs, stored = drawn(modeling("gemma4").Gemma4TextRouter(config))
    ours = dict(router=stored["proj.weight"].T, router_norm=stored["scale"]) | UNREAD
    ours["expert_scale"] = stored["per_expert_scale"]
    keys = dict(router_norm="scaled", router_scale=16**-0.5, expert_scale=True, score="softmax")
    _, gates, ids = theirs(torch.from_numpy(X))
    assert_same_routing(computed(layer_of(keys, ours)), ids, gates)


# with the least share of gates below 1; a distance is never more than twice the larger logit
@pytest.mark.parametrize(("jitter", "shared"), [(0.01, 0.0), (0.3, 0.2), (2.0, 1.0)])
@torch.no_grad()
def test_the_router_of_phi_3_5_chooses_and_weighs_one_expert_after_the_other(jitter, shared):
    theirs = modeling("phimoe").PhimoeTopKRouter(
        transformers.PhimoeConfig(hidden_size=16, num_local_experts=4, router_jitter_noise=jitter)
    )
    theirs, stored = drawn(theirs)
    keys = dict(score="softmax", normalize_gates=False, sparsemixer=jitter)
    _, gates, ids = theirs(torch.from_numpy(X))
    found = computed(layer_of(keys, dict(router=stored["weight"].T) | UNREAD))
    assert_same_routing(found, ids, gates)
    assert (found[2] < 1).mean() >= shared


def test_the_gradient_of_gates_in_turn_is_that_of_phi_3_5_where_it_draws_nothing():
    logits = torch.from_numpy(X[:, :8]).clone().requires_grad_()
    weights = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)
    gates, _ = modeling("phimoe").sparsemixer(logits, 0.3, training=False)
    (gates * torch.from_numpy(weights)).sum().backward()
    router = RouterConfig(2, "softmax", normalize_gates=False, sparsemixer=0.3)
    ours = jax.grad(lambda logits: (route(logits, router).gates * weights).sum())(X[:, :8])
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, logits.grad.numpy(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_layer_of_llama_4_weighs_what_its_experts_read():
    sizes = dict(hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=1)
    theirs, stored = drawn(modeling("llama4").Llama4TextMoe(transformers.Llama4TextConfig(**sizes)))
    gate, up = np.split(stored["experts.gate_up_proj"], 2, -1)
    ours = dict(router=stored["router.weight"].T, gate=gate, up=up, down=stored["experts.down_proj"])
    ours |= {f"shared.{name}": stored[f"shared_expert.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    keys = dict(gate_on="input", top_k=1, normalize_gates=False, num_shared_experts=1)
    y, *_ = computed(layer_of(keys, ours))
    np.testing.assert_allclose(y, theirs(torch.from_numpy(X))[0].numpy(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_layer_of_nemotron_has_no_gate_and_a_latent():
    sizes = dict(hidden_size=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_group=1)
    sizes |= dict(moe_latent_size=6, moe_shared_expert_intermediate_size=8, mlp_hidden_act="relu2", topk_group=1)
    config = transformers.NemotronHConfig(**sizes, routed_scaling_factor=2.5, norm_topk_prob=True)
    theirs, stored = drawn(modeling("nemotron_h").NemotronHMoE(config))
    ours = dict(router=stored["gate.weight"].T, bias=stored["gate.e_score_correction_bias"])
    ours |= {name: stored[f"experts.{name}_proj"].swapaxes(1, 2) for name in ("up", "down")}
    ours |= {f"shared.{name}": stored[f"shared_experts.{name}_proj.weight"].T for name in ("up", "down")}
    ours |= dict(latent_down=stored["fc1_latent_proj.weight"].T, latent_up=stored["fc2_latent_proj.weight"].T)
    keys = dict(activation="relu2", latent_dim=6, num_shared_experts=1, gate_scale=2.5)
    y, *_ = computed(layer_of(keys, ours))
    np.testing.assert_allclose(y, theirs(torch.from_numpy(X)[None])[0].numpy(), rtol=0, atol=1e-4)


GPT_OSS = MIXTRAL._replace(  # but for its attention
    fused=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    in_turn=True,
    renamed={"mlp.gate.weight": "mlp.router.weight", "mlp.gate.bias": "mlp.router.bias"},
)
PREFIX, PATH = "model.layers.0.mlp.", "params/stacks/0/blocks/0/ffw/"


@torch.no_grad()
def test_the_layer_of_gpt_oss_has_biases_and_its_tensors_go_back_bit_by_bit():
    sizes = dict(hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2)
    theirs, stored = drawn(modeling("gpt_oss").GptOssMLP(transformers.GptOssConfig(**sizes, swiglu_limit=1.0)))
    keys = dict(score="softmax", router_bias=True, expert_bias=True, activation="swiglu_oai", activation_limit=1.0)
    config = tiny_config(model=dict(num_layers=1, first_dense=0, num_shared_experts=0) | keys).model
    own = [tensor for tensor in tensors(GPT_OSS, config) if tensor.name.startswith(PREFIX)]
    assert {tensor.name.removeprefix(PREFIX) for tensor in own} == stored.keys()
    ours = {}
    for tensor in own:
        value = stored[tensor.name.removeprefix(PREFIX)]
        assert value.shape == tensor.shape
        parts = list(split(tensor, value))
        for part, one in parts:
            ours.setdefault(part.leaf.removeprefix(PATH), {})[part.at[1:]] = one
        np.testing.assert_array_equal(join(tensor, [one for _, one in parts]), value)
    ours = {name: np.stack([at[key] for key in sorted(at)]) if () not in at else at[()] for name, at in ours.items()}
    y, ids, _ = computed(layer_of(keys, ours))
    expected, _ = theirs(torch.from_numpy(X)[None])
    np.testing.assert_allclose(y, expected[0].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ids, by_id(*theirs.router(torch.from_numpy(X))[2:0:-1])[0])
