"""Laws of generation: the forward pass's own tokens, whoever is beside them, and text cut where it should be."""

import functools
import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies
from absl import flags
from drills import rig
from flax import nnx

from conftest import tiny_config
from moe_jax import balance, generate, harness
from moe_jax.config import as_dict
from moe_jax.config.balance import BALANCE_METHODS
from moe_jax.data import ByteTokenizer, get_tokenizer
from moe_jax.data.prepare import Options, prepare
from moe_jax.generate import chosen_layer, read_prompts
from moe_jax.mesh import make_mesh
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Inputs, Pass, PerLayer
from moe_jax.runtime import leaves, slices
from moe_jax.text import decoding
from moe_jax.text import model as model_
from moe_jax.text.colours import printable
from moe_jax.text.decoding import Growing, check_model, check_prompts, complete, notice_of_drops, score, trace
from moe_jax.text.model import Model, encode, known_length, tokenizer_of
from moe_jax.text.sampling import Sampling
from moe_jax.training.state import init_state, write_bias

BYTES = ByteTokenizer()
MLA = dict(attention="mla", kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
MODELS = {
    "gqa": {},
    "gqa, mtp": dict(mtp_depth=1),
    "mla": MLA,
    "mla, mtp": MLA | dict(mtp_depth=1, q_lora_rank=12),
}
PROMPTS = [[256, *b"The first"], [256], [256, *b"king"]]
NEW, WIDTH = 6, 16
GREEDY = Sampling(temperature=0)


@functools.cache
def built(name="gqa", **overrides):
    """A model with weights and a bias large enough to tell errors."""
    config = tiny_config(model=MODELS[name] | dict(init_std=0.2), balance=dict(bias_sign={}), **overrides)
    state = init_state(config)
    layers = 2 + config.model.mtp_depth
    bias = write_bias(state.bias, jnp.linspace(-0.7, 0.9, layers * 4).reshape(layers, 4)[::-1])
    return Model(config, state.params, bias, state.balance)


@functools.cache
def forward(name):
    """(params, bias, tokens [1, 16], segments) -> logits and routing of the training's forward pass, compiled."""
    model = built(name)

    def run(params, bias, tokens, segments):
        module = nnx.merge(abstract_model(model.config.model).graphdef, params, bias)
        balancer = balance.make(model.config.balance, model.config.model)
        inputs = Inputs(tokens, jnp.arange(WIDTH)[None], segments)
        logits, report = module(Pass(inputs, balancer, PerLayer(model.balance), jax.random.key(0)))
        return logits[0], report.details.routing

    return jax.jit(run)


def whole(name, tokens):
    """Logits [N, V], and expert ids and gates [L, N, S], of one text."""
    model, padding = built(name), [0] * (WIDTH - len(tokens))
    there = jnp.array([[1] * len(tokens) + padding])
    logits, routing = forward(name)(model.params, model.bias, jnp.array([[*tokens, *padding]]), there)
    return logits[: len(tokens)], routing.expert_ids[:, : len(tokens)], routing.gates[:, : len(tokens)]


# --- the model's own tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_argmax_of_the_forward_pass_at_every_step(name):
    found = complete(built(name), PROMPTS, BYTES, max_new_tokens=NEW, sampling=GREEDY)
    for prompt, one in zip(PROMPTS, found, strict=True):
        logits = whole(name, prompt + one.ids)[0][:, : BYTES.vocab_size]
        expected = np.asarray(logits.argmax(-1))[len(prompt) - 1 :]
        assert one.ids == expected[: len(one.ids)].tolist()
        assert len(one.ids) == NEW or (one.why == "end" and expected[len(one.ids)] == BYTES.separator)


def test_a_prompt_that_enters_in_pieces_gives_the_same(monkeypatch):
    expected = complete(built(), PROMPTS, BYTES, max_new_tokens=NEW, sampling=GREEDY)
    monkeypatch.setattr(decoding, "CHUNK", 4)  # prompts of 10, 1 and 5 tokens
    assert complete(built(), PROMPTS, BYTES, max_new_tokens=NEW, sampling=GREEDY) == expected


@pytest.mark.parametrize("row", range(3))
def test_a_text_does_not_depend_on_those_made_with_it(row):
    together = complete(built(), PROMPTS, BYTES, max_new_tokens=NEW, sampling=Sampling())
    others = [PROMPTS[row], [256, *b"else"], [97]]
    among_others = complete(built(), others, BYTES, max_new_tokens=NEW, sampling=Sampling(), rows=[row, 7, 8])
    assert among_others[0] == together[row]


def test_samples_of_one_prompt_differ_and_come_again_with_their_key():
    how = dict(max_new_tokens=NEW, sampling=Sampling())
    first, again = (complete(built(), [PROMPTS[0]] * 3, BYTES, **how) for _ in range(2))
    assert first == again and len({one.text for one in first}) > 1
    assert complete(built(), [PROMPTS[0]] * 3, BYTES, key=jax.random.key(1), **how) != first


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn():
    model = built()
    head = model.params["head"]
    unknown = model._replace(params=model.params | {"head": head.at[:, 257:].set(9.0 * jnp.sign(head[:, 257:]))})
    found = complete(unknown, PROMPTS, BYTES, max_new_tokens=NEW, sampling=Sampling())
    assert max(max(one.ids, default=0) for one in found) < 257


def test_a_text_ends_at_the_separator_which_is_no_part_of_it():
    model = built()
    head = model.params["head"]
    likely = jnp.zeros_like(head).at[:, 256].set(head[:, 0]).at[:, 0].set(-head[:, 0])  # one of the two is likeliest
    found = complete(
        model._replace(params=model.params | {"head": likely}), PROMPTS, BYTES, max_new_tokens=NEW, sampling=GREEDY
    )
    assert "end" in {one.why for one in found}
    for one in found:
        assert 256 not in one.ids and (one.why == "end") == (len(one.ids) < NEW)


def test_on_a_mesh_the_text_is_that_of_one_device():
    # two rows of shards for three prompts, experts on two devices
    model = built()
    config = replace(model.config, mesh=replace(model.config.mesh, data=2, expert=2))
    mesh = make_mesh(config.mesh)
    found = complete(model._replace(config=config, mesh=mesh), PROMPTS, BYTES, max_new_tokens=NEW, sampling=GREEDY)
    assert found == complete(model, PROMPTS, BYTES, max_new_tokens=NEW, sampling=GREEDY)


def test_scores_are_the_log_probabilities_of_the_forward_pass(monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 4)
    texts = [[256, *b"The first"], [256, 97], [256, *b"king"]]
    for text, (logs, likeliest) in zip(texts, score(built(), texts), strict=True):
        logits = np.asarray(jax.nn.log_softmax(whole("gqa", text)[0]))[:-1]
        np.testing.assert_allclose(logs, np.take_along_axis(logits, np.array(text[1:])[:, None], 1)[:, 0], atol=1e-4)
        np.testing.assert_array_equal(likeliest, logits.argmax(-1) == text[1:])


# --- text -------------------------------------------------------------------------------------------------------


def grown(text, stop=(), tokenizer=BYTES, opening=False, special=False):
    """The pieces that leave a growing text, and why it ended."""
    growing, pieces = Growing(tokenizer, stop, opening), []
    ids = tokenizer.encode(text, special=special).tolist()
    for number, token in enumerate(ids):
        pieces.append(growing.take(token, last=number + 1 == len(ids)))
        if growing.why:
            break
    return pieces, growing.why


@pytest.mark.parametrize(
    ("text", "stop", "expected", "why"),
    [
        ("one. two", (". ",), "one", "stop"),
        ("one. two", (". ", "e"), "on", "stop"),
        ("a.b..c", ("..",), "a.b", "stop"),
        ("aab", ("ab",), "a", "stop"),
        ("aaab", ("aaa", "b"), "", "stop"),
        ("日本語", ("本",), "日", "stop"),
        ("one.", (". ",), "one.", "length"),
        ("one", (), "one", "length"),
    ],
)
def test_text_is_cut_exactly_before_the_first_stop_string(text, stop, expected, why):
    pieces, ended = grown(text, stop)
    assert ("".join(pieces), ended) == (expected, why)


def test_what_may_become_a_stop_string_is_held_back_and_only_that():
    assert grown("a. b", (". c",))[0] == ["a", "", "", ". b"]


def test_only_whole_characters_leave():
    assert grown("é🙂")[0] == ["", "é", "", "", "", "🙂"]


@pytest.mark.parametrize(("token", "last", "why"), [(256, False, "end"), (0xC3, True, "length")])
def test_half_a_character_at_the_end_is_marked(token, last, why):
    growing = Growing(BYTES, ())
    assert growing.take(0xC3) == ""
    assert growing.take(token, last) == ("�" if token == 256 else "��")
    assert growing.why == why


@pytest.mark.parametrize("kind", ["byte_level", "with_prefix", "with_fallback", "with_metaspace", "without_spaces"])
def test_pieces_join_to_the_text_with_the_spaces_that_it_begins_with(tmp_path, kind):
    folder = vocabularies.write(tmp_path, getattr(vocabularies, kind)(), config=dict(eos_token_id=1))
    tokenizer = get_tokenizer(str(folder))
    for text in [*vocabularies.TEXTS, "  two", "   ", " ", ""]:
        ids = tokenizer.encode(text)
        assert "".join(grown(text, tokenizer=tokenizer, opening=True)[0]) == tokenizer.decode(ids)
        assert "".join(grown(text, tokenizer=tokenizer)[0]) == tokenizer.to_bytes(ids).decode()  # behind other text


@pytest.fixture
def chat(tmp_path):
    """A vocabulary with <|im_end|> and <|im_start|>, at which texts do not end by themselves; at <|end|> they do."""
    inner = vocabularies.byte_level()
    inner.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    return get_tokenizer(str(vocabularies.write(tmp_path, inner, tokenizer_config=dict(eos_token="<|end|>"))))


@pytest.mark.parametrize(
    ("stop", "expected", "why"),
    [
        ((), "the cat\nthe hat", "length"),
        (("<|im_end|>",), "the cat", "stop"),  # vllm-project/vllm#2123
        (("<|im_end|>\n",), "the cat", "stop"),
        (("cat<|im_end|>",), "the ", "stop"),
        (("t<|im_end|>\n<|im_start|>t",), "the ca", "stop"),
        (("\n<|im_start|>the",), "the cat", "stop"),
        (("<|im_",), "the cat", "stop"),
        (("_end|>\n",), "the cat", "stop"),
        (("<|im_start|>", "hat"), "the cat\n", "stop"),
        (("<|im_end|>\r", "<|im_middle|>"), "the cat\nthe hat", "length"),
    ],
)
def test_names_of_special_tokens_in_a_stop_string_end_the_text_and_never_show(chat, stop, expected, why):
    pieces, ended = grown("the cat<|im_end|>\n<|im_start|>the hat", stop, chat, special=True)
    assert ("".join(pieces), ended) == (expected, why)


def test_a_stop_string_that_is_written_in_letters_ends_the_text_too(chat):
    pieces, ended = grown("the cat<|im_end|> sat", ["<|im_end|>"], chat)  # plain characters
    assert ("".join(pieces), ended) == ("the cat", "stop")


@pytest.mark.parametrize("stop", [(), ("<|end|>",), ("cat<|end|>",)])
def test_at_an_end_the_text_ends_whatever_the_stop_strings(chat, stop):
    pieces, ended = grown("the cat<|end|>the hat", stop, chat, special=True)
    assert ("".join(pieces), ended) == ("the " if "cat<|end|>" in stop else "the cat", "end")


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", balance.names())
def test_a_method_that_needs_the_whole_batch_in_evaluation_is_refused_and_no_other(method):
    companions = dict(aux_loss={}) if method == "target_violation" else {}
    options = dict(num_devices=2) if method == "device_capacity" else {}
    config = tiny_config(balance={method: options} | companions, model=dict(BALANCE_METHODS[method].requires))
    if method in ("random", "forced", "moving_quantile"):
        with pytest.raises(ValueError, match=rf"balance\.{method} does not choose .* by that token alone"):
            check_model(config, BYTES)
    else:
        check_model(config, BYTES)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (dict(prompts=[]), "there is no prompt"),
        (dict(prompts=[[1], []]), "prompt 2 has no token to continue"),
        (dict(prompts=[[1, 2]], max_length=5), r"prompt 1 has 2 tokens, .* more than the 5 .*--max_length"),
        (dict(prompts=[[1]], max_new_tokens=0), "--max_new_tokens=0 must be at least 1"),
        (dict(prompts=[[1]], stop=[""]), "--stop is empty"),
    ],
)
def test_what_cannot_be_continued_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        check_prompts(**(dict(max_new_tokens=4) | arguments))


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"model\.vocab_size=100 is less than the 257 ids"):
        check_model(tiny_config(model=dict(vocab_size=100)), BYTES)


def test_a_run_that_dropped_copies_is_told():
    assert notice_of_drops(tiny_config(balance=dict(bias_sign={}))) == ""
    assert "dispatch='capacity' dropped" in notice_of_drops(tiny_config(model=dict(dispatch="capacity")))
    dropper = dict(device_capacity=dict(num_devices=2))
    assert "balance.device_capacity dropped" in notice_of_drops(tiny_config(balance=dropper))


def test_layers_that_do_not_exist_are_refused_and_the_middle_one_is_shown():
    config = tiny_config(model=dict(mtp_depth=1))
    assert [chosen_layer(config, layer) for layer in (None, 0, 1)] == [1, 0, 1]
    with pytest.raises(ValueError, match="--layer=2 must be one of the MoE layers 0 to 1"):
        chosen_layer(config, 2)
    with pytest.raises(ValueError, match=r"model\.num_experts=0 has none"):
        chosen_layer(tiny_config(model=dict(num_experts=0, first_dense=0)), None)


# --- prompts and tokenizers -------------------------------------------------------------------------------------


def test_prompts_come_from_flags_and_a_file_one_a_line(tmp_path):
    (tmp_path / "prompts").write_text("uno\ndue\u2028tre\x0c\n\n", encoding="utf-8")
    assert read_prompts(["one"], str(tmp_path / "prompts")) == ["one", "uno", "due\u2028tre\x0c", ""]
    (tmp_path / "marked").write_text("uno\n", encoding="utf-8-sig")  # with a byte order mark
    assert read_prompts([], str(tmp_path / "marked")) == ["uno"]
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts([], str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="there is no prompt"):
        read_prompts([], "")


def test_a_converted_model_speaks_by_its_own_tokenizer_and_others_by_their_corpus(tmp_path):
    assert tokenizer_of(tmp_path, tiny_config()) == (BYTES, True)
    files = dict(tokenizer_config=dict(bos_token="<|begin|>", add_bos_token=False))
    vocabularies.write(tmp_path / "tokenizer", vocabularies.byte_level(), **files)
    tokenizer, opened = tokenizer_of(tmp_path, tiny_config())
    assert tokenizer.vocab_size == 301 and not opened
    assert tokenizer_of(tmp_path, tiny_config(), "bytes") == (BYTES, True)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json.*give --tokenizer"):
        tokenizer_of(tmp_path, tiny_config())


def test_an_end_can_be_named_where_no_file_names_one(tmp_path):
    vocabularies.write(tmp_path / "tokenizer", vocabularies.byte_level())
    with pytest.raises(ValueError, match=r"names no bos or eos in .*special_tokens_map.json.*; give --eos=TOKEN"):
        tokenizer_of(tmp_path, tiny_config())
    for asked in ("", str(tmp_path / "tokenizer")):
        assert tokenizer_of(tmp_path, tiny_config(), asked, "<|end|>")[0].ends == (1,)
    with pytest.raises(ValueError, match="--eos=x is a token of a trained vocabulary, and 'bytes' is not one"):
        tokenizer_of(tmp_path / "elsewhere", tiny_config(), eos="x")


def test_an_end_can_be_added_to_those_of_a_corpus(tmp_path):
    (tmp_path / "in" / "one").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "in" / "one" / f"{n}.txt").write_text(f"text {n}")
    inner = vocabularies.byte_level()
    model = vocabularies.write(tmp_path / "model", inner, config=dict(bos_token_id=0))
    prepare(Options(tmp_path / "in", tmp_path / "out", tokenizer=str(model), separator="<|end|>"))
    config = tiny_config(data=dict(path=str(tmp_path / "out")))
    tokenizer, opened = tokenizer_of(tmp_path, config, eos="<think>")
    assert (tokenizer.separator, tokenizer.ends, opened) == (1, (1, inner.token_to_id("<think>")), True)


def test_a_flag_that_an_error_advises_is_one_of_the_command():
    for module in (generate, harness):
        known = flags.FlagValues()
        module.define_flags(known)
        assert "eos" in known and "tokenizer" in known


def test_a_converted_model_is_as_long_as_its_maker_says(tmp_path):
    assert known_length(tmp_path, tiny_config()) == 16
    vocabularies.write(tmp_path / "tokenizer", vocabularies.byte_level(), config=dict(max_position_embeddings=4096))
    assert known_length(tmp_path, tiny_config()) == 4096


def test_a_prompt_is_opened_once_and_its_special_tokens_are_read(tmp_path):
    folder = vocabularies.write(tmp_path, vocabularies.byte_level(), tokenizer_config=dict(bos_token="<|begin|>"))
    tokenizer = get_tokenizer(str(folder))
    text = tokenizer.encode("the").tolist()
    assert encode(tokenizer, "the", False) == text
    assert encode(tokenizer, "the", True) == encode(tokenizer, "<|begin|>the", True) == [0, *text]
    assert encode(BYTES, "", True) == [256]


# --- whose experts ----------------------------------------------------------------------------------------------


def test_the_experts_shown_are_those_of_the_forward_pass():
    name = "gqa, mtp"
    texts = [[256, *b"some text"], [256, *b"more"]]
    for text, traced in zip(texts, trace(built(name), texts, [1, 1], BYTES), strict=True):
        _, expert_ids, gates = whole(name, text)
        np.testing.assert_array_equal(traced.expert_ids, expert_ids[:2])
        np.testing.assert_allclose(traced.gates, gates[:2], atol=1e-6)
        assert b"".join(traced.pieces) == bytes(text[1:])


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    made = rig.uninterrupted(tmp_path_factory, rig.drill_config())
    return shutil.copytree(made / "run", tmp_path_factory.mktemp("generate") / "run")


def test_the_command_prints_the_texts_that_the_library_makes(workdir, tmp_path):
    flags = ["--prompt=The", "--prompt=A <b>", "--max_new_tokens=8", "--seed=3", f"--html={tmp_path / 'x.html'}"]
    command = rig.Command("moe_jax.generate", tmp_path / "log", f"--workdir={workdir}", *flags)
    assert command.wait() == 0, command.text
    model, step = model_.restore(workdir)
    prompts = [[256, *b"The"], [256, *b"A <b>"]]
    found = complete(model, prompts, BYTES, max_new_tokens=8, key=jax.random.key(3))
    for one, prompt in zip(found, ("The", "A <b>"), strict=True):
        assert f"{prompt}{printable(one.text)}" in command.text
    assert f"step {step}" in command.text and step == 20
    page = (tmp_path / "x.html").read_text()
    data = json.loads(re.search(r'id="data">(.*)</script>', page)[1])
    assert np.shape(data["shares"]) == (2, 4)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--prompt=x", "--max_new_tokens=99"], "more than the 16 that the model was trained for"),
        (["--prompt=x", "--temperature=-1"], "--temperature=-1.0 must be 0, which is greedy, or from"),
        (["--prompt=x", "--layer=0"], "--layer=0 is for colours"),
        (["--prompt=x", "--html=/nowhere/x.html"], "--html=/nowhere/x.html cannot be written"),
        (["--prompt=x", "--html=/"], "--html=/ cannot be written"),
        (["--prompt=x", "--noseparator", "--prompt=", "--max_new_tokens=8"], "prompt 2 has no token"),
        ([], "there is no prompt"),
    ],
)
def test_mistakes_are_told_in_a_sentence(workdir, flags, problem):
    with pytest.raises(ValueError, match=problem):
        generate.run(parsed(workdir, *flags))


@pytest.mark.parametrize("seed", [-1, 2**31, 2**70])
def test_a_seed_of_which_only_some_bits_would_count_is_refused(workdir, seed):
    from absl.flags import IllegalFlagValueError

    with pytest.raises(IllegalFlagValueError, match=rf"--seed={seed}"):
        parsed(workdir, f"--seed={seed}")


def parsed(workdir, *arguments):
    """The flags of the command, read anew."""
    from absl import flags

    values = flags.FlagValues()
    generate.define_flags(values)
    values(["generate", f"--workdir={workdir}", *arguments])
    return values


def test_a_converted_model_without_a_bias_speaks(tmp_path):
    model, path = built(), tmp_path / "checkpoints" / "00000000"
    weights = {"params": model.params, "bias": model.bias}
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights)
    path.parent.mkdir()
    arrays = slices.create(path, abstract, lambda leaf: 1)
    for name, leaf in jax.tree_util.tree_leaves_with_path({"params": model.params}):
        arrays[leaves.path_name(name)].write((), np.asarray(leaf))
    slices.commit(path, abstract, {})
    config = replace(model.config, balance=())
    (tmp_path / "config.json").write_text(json.dumps(as_dict(config)))
    restored, step = model_.restore(tmp_path)
    how = dict(max_new_tokens=NEW, sampling=GREEDY)
    unbiased = model._replace(config=config, bias=jax.tree.map(jnp.zeros_like, model.bias), balance={})
    assert step == 0
    assert complete(restored, PROMPTS, BYTES, **how) == complete(unbiased, PROMPTS, BYTES, **how)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json, so no run"):
        generate.run(parsed(tmp_path, "--prompt=x"))
