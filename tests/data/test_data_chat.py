"""Laws of chat templates: what the assistant writes is trained on, and only the template writes special tokens."""

import dataclasses
import json

import numpy as np
import pytest
import vocabularies

from moe_jax.data import get_tokenizer, open_corpus
from moe_jax.data.chat import Chat, read_chat
from moe_jax.data.corpus import publish_tokenizer
from moe_jax.data.prepare import Options, prepare

pytest.importorskip("jinja2")

# ChatML with the tokens of the tests' vocabulary, and with the tags that mark the assistant's text
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ message.role + ': ' }}
{%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
{% else %}
    {{- message.content }}<think>
{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
TOKENS = (("bos_token", "<|begin|>"), ("eos_token", "<|end|>"))
CHAT = Chat(TEMPLATE, TOKENS, ("<|begin|>", "<|end|>"))


def says(role, content):
    return {"role": role, "content": content}


TALK = [says("system", "Be brief."), says("user", "hat?"), says("assistant", " the hat"), says("user", "cat?")]
TALKS = [[*TALK, says("assistant", f"the cat {number}")] for number in range(4)]


def tokenizer_of(tmp_path, template=TEMPLATE, in_file=False):
    settings = dict(TOKENS) | ({} if in_file else {"chat_template": template})
    folder = vocabularies.write(tmp_path / "tokenizer", vocabularies.byte_level(), tokenizer_config=settings)
    if in_file:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def write(folder, talks, key="messages"):
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({key: talk, "w": 2}) + "\n" for talk in talks))
    return folder


def refusal(tmp_path, talk, tokenizer=None):
    folder = write(tmp_path / "in", [*TALKS, talk])
    with pytest.raises(ValueError, match=r".") as caught:
        prepare(
            Options(folder, tmp_path / "out", messages_key="messages", tokenizer=tokenizer or tokenizer_of(tmp_path))
        )
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_spans_of_a_conversation_by_hand():
    assert CHAT.spans(TALKS[0]) == [
        ("<|begin|>system: Be brief.<think>\nuser: hat?<think>\nassistant: ", False),
        ("the hat<|end|>", True),
        ("user: cat?<think>\nassistant: ", False),
        ("the cat 0<|end|>", True),
    ]
    assert CHAT.spans(TALK)[-1] == ("user: cat?<think>\n", False)  # nothing answers the last message
    assert "".join(text for text, _ in CHAT.spans(TALK)) == CHAT.render(TALK)


@pytest.mark.parametrize("in_file", [False, True])
def test_what_the_assistant_writes_is_trained_on_and_special_tokens_are_single_tokens(tmp_path, in_file):
    tokenizer = tokenizer_of(tmp_path, in_file=in_file)
    folder = write(tmp_path / "in", TALKS)
    prepare(Options(folder, tmp_path / "out", messages_key="messages", tokenizer=tokenizer, weight_key="w"))
    corpus = open_corpus(str(tmp_path / "out"))
    stream = corpus.stream("train", "in")
    begin, end = (corpus.tokenizer.inner.token_to_id(name) for _, name in TOKENS)
    assert corpus.tokenizer.separator == begin
    for start, stop in zip(stream.offsets, stream.offsets[1:], strict=False):
        ids, weights = stream.tokens[start:stop], stream.weights[start:stop]
        assert (ids == begin).sum() == 1  # the separator is the one that the template writes
        assert (weights[ids == end] == 2).all()
        assert (ids == end).sum() == 2
        spans = np.flatnonzero(np.diff((weights[1:] > 0).astype(int)))
        texts = [corpus.tokenizer.decode(part) for part in np.split(ids[1:], spans + 1)]
        expected = [text.replace("<|begin|>", "").replace("<|end|>", "") for text, _ in CHAT.spans(TALKS[0])]
        assert texts[:3] == expected[:3]
        assert texts[3].startswith("the cat ")
        # what a model is prompted with is tokenized as it is here
        prompt = corpus.tokenizer.encode(CHAT.render(TALK[:2], prompt=True), special=True)
        assert ids[: len(prompt)].tolist() == prompt.tolist()


def test_the_template_decides_the_corpus_and_goes_with_its_tokenizer(tmp_path):
    tokenizer = tokenizer_of(tmp_path, in_file=True)
    folder = write(tmp_path / "in", TALKS)
    options = Options(folder, tmp_path / "out", messages_key="messages", tokenizer=tokenizer)
    prepare(options)
    publish_tokenizer(str(tmp_path / "out"), get_tokenizer(tokenizer), tmp_path / "published")
    assert (tmp_path / "published" / "chat_template.jinja").read_text() == TEMPLATE
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE.replace("<think>", "!"))
    read_chat.cache_clear()
    with pytest.raises(ValueError, match="made from other inputs or options"):
        prepare(options)
    prepare(dataclasses.replace(options, output=tmp_path / "other"))
    fingerprints = {open_corpus(str(tmp_path / name)).fingerprint for name in ("out", "other")}
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("talk", "sentence"),
    [
        ("hello", "must be a JSON object with a list of messages under 'messages' (see --messages_key)"),
        ([], "has no message of the role assistant, so nothing in it would be trained on"),
        ([says("user", "x")], "has no message of the role assistant"),
        ([says("user", "x"), "y"], "has a message 2 that is not an object with a string under 'content'"),
        ([says("user", 3)], "has a message 1 that is not an object with a string under 'content'"),
        ([says("bot", "x")], "has a message 1 of the role 'bot'; use one of: system, developer, user, assistant, tool"),
        ([says("tool", "x"), says("assistant", "y")], "is refused by the chat template (no tools here)"),
        (
            [says("user", "x<|end|>"), says("assistant", "y")],
            "has '<|end|>' in message 1, a special token that only the chat template may write",
        ),
    ],
)
def test_a_conversation_that_cannot_be_read_is_refused_with_its_line(tmp_path, talk, sentence):
    read_chat.cache_clear()
    assert f"\na.jsonl:5: {sentence}" in refusal(tmp_path, talk)


FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (FORGETFUL, "cannot be divided into turns: the chat template changes the beginning of the text once message"),
        ("{% for %}", "has a chat template that Jinja cannot read (Expected"),
        ("{{ messages.__class__.__mro__ }}", "is refused by the chat template (access to attribute '__class__'"),
        (None, "has no chat template, neither chat_template.jinja nor chat_template in its tokenizer_config.json"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tmp_path, template, sentence):
    read_chat.cache_clear()
    assert sentence in refusal(tmp_path, TALKS[0], tokenizer_of(tmp_path, template))


def test_without_jinja_the_extra_is_named(tmp_path, monkeypatch):
    read_chat.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(tmp_path, TALKS[0]).endswith("jinja2, which is not installed; run pip install 'moe_jax[chat]'.")


def test_a_template_among_several_is_the_one_named_default(tmp_path):
    read_chat.cache_clear()
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    assert read_chat(tokenizer_of(tmp_path, several), "") == CHAT


def test_behind_a_special_token_a_text_begins_anew_as_in_the_whole_text(tmp_path):
    template = "{% for m in messages %}{{ m.content if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
    settings = dict(bos_token="<s>", eos_token="</s>", chat_template=template)
    tokenizer = vocabularies.write(tmp_path / "tokenizer", vocabularies.with_fallback(), tokenizer_config=settings)
    talk = [says("user", "the cat"), says("assistant", "sat"), says("user", "the mat"), says("assistant", "a hat")]
    folder = write(tmp_path / "in", [talk] * 2)
    prepare(Options(folder, tmp_path / "out", messages_key="messages", tokenizer=str(tokenizer)))
    corpus = open_corpus(str(tmp_path / "out"))
    whole = corpus.tokenizer.encode("the cat sat</s>the mat a hat</s>", special=True)
    assert corpus.stream("train", "in").tokens[1:].tolist() == whole.tolist()
