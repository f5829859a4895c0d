"""Laws of weights in and out against transformers: the same logits and the same experts, before training and after.

Small random models, float32, eager attention, on CPU; one torch model a family.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drills.folders import CASES, config_of, model_of

from conftest import tiny_config
from moe_jax.config import as_dict, validate
from moe_jax.convert import run
from moe_jax.data import open_corpus, training_batches
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.huggingface import LanguageModel, load_hf, save_hf, shards
from moe_jax.model.abstract import abstract_weights
from moe_jax.runtime.workdir import config_of_run
from moe_jax.text.decoding import generate, score
from moe_jax.text.model import known_length, restore
from moe_jax.training.compile import make_train_step
from moe_jax.training.state import abstract_state, read_bias

torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install 'moe_jax[peers]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'moe_jax[peers]'")
modeling_layers = pytest.importorskip("transformers.modeling_layers")
TOLERANCE = 1e-4  # of a logit
# a row of one document; two documents and padding; padding in front
SEGMENTS = np.array([[1] * 10, [1] * 4 + [2] * 4 + [0] * 2, [0] * 3 + [1] * 7], np.int32)
TOKENS = np.random.default_rng(0).integers(3, 264, SEGMENTS.shape).astype(np.int32)
REAL = SEGMENTS > 0


def make(case, **changed):
    """A torch model whose routers are decided and whose biases are far from zero."""
    name, keys = CASES[case]
    config = getattr(transformers, f"{name}Config")(**keys | changed)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key:
                value.normal_(1.0, 0.2)
            elif "e_score_correction_bias" in key or "expert_bias" in key:
                value.normal_(0.0, 1.0)
            elif "inv_freq" not in key:
                value.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """case, torch's model, its folder, and ours."""
    model, folder = make(request.param), tmp_path_factory.mktemp(request.param) / "hf"
    model.save_pretrained(folder)
    return request.param, model, folder, load_hf(folder)


def theirs(model, segments=SEGMENTS):
    """Logits of packed and padded rows, and the experts of every layer: sorted ids [L, B, S, K]."""
    ids, hooks = [], []
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            hooks.append(module.register_forward_hook(lambda _, __, out: ids.append(out[2].sort(-1)[0])))
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    allowed = np.tril(same) | np.eye(segments.shape[1], dtype=bool)  # padding sees itself: a softmax needs something
    places = np.zeros_like(segments)
    for row, start in np.ndindex(segments.shape):
        if start and segments[row, start] == segments[row, start - 1]:
            places[row, start] = places[row, start - 1] + 1
    mask = masks(model, allowed)
    with torch.no_grad():
        out = model(torch.tensor(TOKENS), attention_mask=mask, position_ids=torch.tensor(places), use_cache=False)
    for hook in hooks:
        hook.remove()
    return out.logits.numpy(), np.stack([i.numpy().reshape(*TOKENS.shape, -1) for i in ids])


def masks(model, allowed):
    """The mask that transformers adds to scores; for each kind of layers one, if there are layers with a window."""

    def added(seen):
        return torch.where(torch.tensor(seen)[:, None], 0.0, torch.finfo(torch.float32).min)

    types, window = getattr(model.config, "layer_types", None) or (), getattr(model.config, "sliding_window", None)
    if "sliding_attention" not in types:
        return added(allowed)
    place = np.arange(allowed.shape[1])
    near = place[:, None] - place < window
    return dict(full_attention=added(allowed), sliding_attention=added(allowed & near))


def agree(model, ours):
    logits, ids = theirs(model)
    found = np.asarray(ours(TOKENS, SEGMENTS))
    np.testing.assert_allclose(found[REAL], logits[REAL], rtol=0, atol=TOLERANCE)
    assert np.abs(logits[REAL]).max() > 1.0  # so that the tolerance is a small one
    chosen = np.sort(np.asarray(ours.expert_ids(TOKENS, SEGMENTS)), -1)
    np.testing.assert_array_equal(chosen[:, REAL], ids[:, REAL])


def test_logits_and_experts_are_those_of_transformers(pair):
    _, model, _, ours = pair
    agree(model, ours)


def test_a_padded_batch_has_the_logits_that_transformers_gives_it(pair):
    _, model, _, ours = pair
    mask = REAL.astype(np.int64) * (SEGMENTS == 1)
    places = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS), attention_mask=torch.tensor(mask), position_ids=torch.tensor(places))
    found = np.asarray(ours(TOKENS, mask.astype(np.int32)))
    np.testing.assert_allclose(found[mask > 0], expected.logits.numpy()[mask > 0], rtol=0, atol=TOLERANCE)


def test_kimi_k2_is_deepseek_v3_without_groups_and_with_a_step_in_its_frequencies(tmp_path):
    # its YaRN has beta_fast = beta_slow = 1
    yarn = CASES["deepseek_v3"][1]["rope_parameters"] | dict(beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0)
    model = make("deepseek_v3", n_group=1, topk_group=1, rope_parameters=yarn)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    agree(model, load_hf(tmp_path))


# what only differs where gradients do not: in the keys and names, or in what another case has
SIMILAR = dict(
    deepseek_v2_lite="deepseek_v2",
    deepseek_v32="deepseek_v3",
    glm_moe_dsa="deepseek_v3",
    exaone_moe="afmoe",
    laguna="afmoe",
    mellum="granitemoe_swa",
    flint="granitemoe_swa",
    kolibri1="afmoe",
)


def trained(ours, balance, steps=2):
    """The state after some steps from the model's weights."""
    config = replace(tiny_config(balance=balance, optimizer=dict(learning_rate=1e-2)), model=ours.config)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_state(config))
    state = state._replace(params=jax.tree.map(jnp.copy, ours.params), bias=jax.tree.map(jnp.copy, ours.bias))
    batches = training_batches(open_corpus(), seed=0, batch_size=8, sequence_length=16)
    step = make_train_step(config)
    for number in range(steps):
        state, _ = step(state, batches(number), jax.random.key(0))
    return state


def test_after_training_here_transformers_gives_the_same_logits(pair, tmp_path):
    case, _, _, ours = pair
    if case in SIMILAR:
        pytest.skip(f"in training it is {SIMILAR[case]}, whose compilation takes seconds")
    has_bias = model_of(config_of(case))[0].has_bias
    balance = dict(bias_sign=dict(rate=0.1)) if has_bias else dict(aux_loss=dict(weight=1e-2))
    state = trained(ours, balance)
    after = LanguageModel(ours.config, state.params, state.bias)
    assert np.abs(after(TOKENS) - ours(TOKENS)).max() > 100 * TOLERANCE
    if has_bias:
        assert not np.array_equal(read_bias(state.bias), read_bias(ours.bias))
    save_hf(replace(after, folder=ours.folder), tmp_path / "out")
    kind = dict(dtype=torch.float32, attn_implementation="eager")
    again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, **kind)
    assert not (told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"])
    agree(again.eval(), after)


@pytest.mark.parametrize("case", ["deepseek_v32", "glm_moe_dsa"])
def test_an_indexer_is_left_out_with_a_sentence_and_longer_sequences_are_refused(case, tmp_path, capsys):
    make(case, index_topk=128).save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "run", None, "")
    layers = 2 if case == "deepseek_v32" else 1  # the other one is shared
    sentence = f"left out {5 * layers} tensors of attention's indexer, which picks every token up to index_topk=128"
    assert sentence in capsys.readouterr().out
    ours = load_hf(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"tokens of a row=129 must be at most model\.index_topk=128: .*; lower it"):
        ours(np.zeros((1, 129), np.int32))
    config = config_of_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"sequence_length=129 must be at most model\.index_topk=128"):
        validate(as_dict(config) | dict(sequence_length=129))
    model = restore(tmp_path / "run")[0]
    prompt = [[3] * 100]
    with pytest.raises(ValueError, match=r"prompt and new tokens=129 must be at most model\.index_topk=128"):
        next(generate(model, prompt, ByteTokenizer(), max_new_tokens=29))
    with pytest.raises(ValueError, match=r"tokens of a text=129 must be at most model\.index_topk=128"):
        score(model, [[3] * 130])
    assert known_length(tmp_path / "run", config) == 64  # its max_position_embeddings
    save_hf(ours, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["architectures"], written["max_position_embeddings"]) == (["DeepseekV3ForCausalLM"], 64)
    before, after = (shards.open_folder(tmp_path / name) for name in ("hf", "out"))
    assert after.keys() == {name for name in before if "indexer" not in name}
    assert all(shards.digest(before[name]) == shards.digest(entry) for name, entry in after.items())
    kind = dict(dtype=torch.float32, attn_implementation="eager")
    agree(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **kind).eval(), ours)


def test_an_indexer_that_picks_fewer_tokens_would_give_other_logits():
    # so that equal logits up to its number of tokens say something
    few, all_of_them = (make("deepseek_v32", index_topk=k) for k in (4, 128))
    assert np.abs(theirs(few)[0] - theirs(all_of_them)[0])[0, 4:].max() > 100 * TOLERANCE


def test_a_sequence_for_which_longrope_has_other_factors_is_refused(tmp_path):
    make("phimoe", max_position_embeddings=512).save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "run", None, "")
    with pytest.raises(ValueError, match=r"tokens of a row=129 must be at most model\.longrope\.original_length=128"):
        load_hf(tmp_path / "hf")(np.zeros((1, 129), np.int32))
    assert known_length(tmp_path / "run", config_of_run(tmp_path / "run")) == 128
    run(tmp_path / "run", tmp_path / "out", None, "")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "out"))
    assert after["max_position_embeddings"] == 512
    assert after["rope_parameters"] == before["rope_parameters"]


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe"])
def test_multi_token_prediction_has_the_logits_of_transformers(case, tmp_path):
    # depth k at place i reads the token i + k, and is right wherever there is one
    model = make(case)
    model.save_pretrained(tmp_path / "one")
    config = replace(load_hf(tmp_path / "one").config, mtp_depth=2)
    draw, abstract = np.random.default_rng(0), abstract_weights(config)
    weights = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0.2, 0.3, leaf.shape), leaf.dtype), abstract)
    save_hf(LanguageModel(config, **weights), tmp_path / "hf", architecture=case)
    ours = load_hf(tmp_path / "hf")
    model = type(model).from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[23]\."]  # where it looks for these weights
    ahead = modeling_layers.MtpModel.from_pretrained(model).eval()
    tokens, found = torch.tensor(TOKENS), np.asarray(ours.ahead(TOKENS))
    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        for depth in range(2):
            tokens, hidden = tokens[:, 1:], hidden[:, : tokens.shape[1] - 1]
            places = torch.arange(tokens.shape[1]).expand(tokens.shape)
            hidden = ahead.forward_layer(depth, hidden, places, None, input_ids=tokens)
            expected = ahead._project_to_logits(hidden).numpy()
            assert np.abs(expected).max() > 1.0
            np.testing.assert_allclose(found[depth][:, : tokens.shape[1]], expected, rtol=0, atol=TOLERANCE)
