"""Laws of trained vocabularies: the bytes of every token, who opens a document, and corpora made with them."""

import json

import numpy as np
import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from moe_jax.config import Config
from moe_jax.data import evaluation_batches, get_tokenizer, make_corpus, open_corpus
from moe_jax.data.prepare import Options, main, prepare
from moe_jax.evaluate import check_tokenizer

HARD = [
    *vocabularies.TEXTS,
    "  two  spaces ",
    "👩‍👩‍👧 family",
    "a\u0301 combining",
    "<|end|> and <s> are text",
    "中文🙂 the cat",
]
KINDS = {
    "byte_level": vocabularies.byte_level,
    "with_prefix": vocabularies.with_prefix,
    "with_fallback": vocabularies.with_fallback,
    "with_metaspace": vocabularies.with_metaspace,
    "unigram": vocabularies.unigram,
}
ENDS = {"byte_level": "<|end|>", "with_prefix": "<|end|>"}  # others: </s>
PUTS_A_SPACE = ("with_prefix", "with_metaspace", "unigram")  # only before texts that begin with none


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder as a model's."""
    root = tmp_path_factory.mktemp("vocabularies")
    return {
        kind: vocabularies.write(root / kind, make(), tokenizer_config=dict(eos_token=ENDS.get(kind, "</s>")))
        for kind, make in KINDS.items()
    }


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {kind: get_tokenizer(str(folder)) for kind, folder in folders.items()}


def begins_with_one_space(text):
    """Where a space is put before texts that have none, its tokens are those of the text without it."""
    return text.startswith(" ") and not text.startswith("  ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*HARD, "  ", "   indented", "\tindented", ""])
def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    text = text.removeprefix(" ") if kind in PUTS_A_SPACE and begins_with_one_space(text) else text
    assert tokenizer.bytes_per_token[ids].sum() - tokenizer.lead(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_every_text_has_its_bytes(tokenizers, text):
    for kind, tokenizer in tokenizers.items():
        if not (kind in PUTS_A_SPACE and begins_with_one_space(text)):
            ids = tokenizer.encode(text)
            assert tokenizer.bytes_per_token[ids].sum() - tokenizer.lead(ids) == len(text.encode())
            assert tokenizer.lead(ids[: 2 * tokenizer.lead_bytes]) == tokenizer.lead(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_the_library(folders, tokenizers, kind):
    theirs = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    for text in vocabularies.TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizers[kind].encode(text).tolist() == ids
        if kind != "with_prefix":  # there the library leaves the space that it has put
            assert tokenizers[kind].decode(ids) == theirs.decode(ids)


def test_a_space_before_the_text_is_known(tokenizers):
    leads = {kind: [t.lead(t.encode(text)) for text in ("a", "  a", "")] for kind, t in tokenizers.items()}
    assert leads == {"byte_level": [0, 0, 0], "with_fallback": [1, 1, 0]} | {kind: [1, 0, 0] for kind in PUTS_A_SPACE}


@pytest.fixture(params=["added", "in the vocabulary only", "made of text"])
def ended(request, tmp_path):
    """A byte-level vocabulary with a token that is not special, the token's name, and a text that has the name."""
    tokenizer = vocabularies.byte_level()
    if request.param == "made of text":
        return tokenizer, "\u0120the", "on the mat"  # " the", as the vocabulary writes it
    if request.param == "added":
        tokenizer.add_tokens(["<eod>"])
    else:
        raw = json.loads(tokenizer.to_str())
        raw["model"]["vocab"]["<eod>"] = raw["added_tokens"].pop()["id"]  # that of <think>
        tokenizer = Tokenizer.from_str(json.dumps(raw))
    return tokenizer, "<eod>", "a<eod>b"


@pytest.mark.parametrize("by", ["flag", "file", "eos"])
def test_a_separator_and_an_end_are_no_text_whether_special_or_not(tmp_path, ended, by):
    inner, name, text = ended
    files = dict(file=dict(bos_token=name), eos=dict(bos_token="<|begin|>", eos_token=name)).get(by, {})
    folder = str(vocabularies.write(tmp_path / "model", inner, tokenizer_config=files))
    tokenizer = get_tokenizer(folder, name if by == "flag" else "")
    (token,) = [i for i in tokenizer.ends if i == inner.token_to_id(name)]
    assert tokenizer.bytes_per_token[token] == 0 and tokenizer.to_bytes([token]) == b""
    assert tokenizer.names[token] == name
    for ids in (tokenizer.encode(text), *tokenizer.encode_all([text])):
        assert token not in ids and tokenizer.decode(ids) == text
    assert token in tokenizer.encode(f"x{name}", special=True)
    corpus = make_corpus({"one": {"train": ["x"], "validation": ["the cat\n"] * 4}}, tokenizer)
    batches = evaluation_batches(corpus, batch_size=1, sequence_length=7)
    assert sum(int(b.num_bytes.sum()) for b in batches) == 4 * len("the cat\n")


def test_a_name_in_a_text_is_text_where_the_model_makes_the_token_of_it(tokenizers):
    tokenizer = tokenizers["unigram"]
    assert tokenizer.inner.token_to_id("</s>") in tokenizer.inner.encode("a</s>b").ids  # though it is special
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.separator not in ids and tokenizer.decode(ids) == "a</s>b"


def test_an_end_that_only_a_character_of_text_can_write_keeps_its_byte_and_opens_no_document(tmp_path):
    folder = str(vocabularies.write(tmp_path, vocabularies.byte_level(), config=dict(bos_token_id=0, eos_token_id=29)))
    tokenizer = get_tokenizer(folder)
    assert tokenizer.ends == (0, 29) and tokenizer.decode(tokenizer.encode("a<b")) == "a<b"  # token 29
    with pytest.raises(ValueError, match=r"would open documents with '<', a character that texts have.*--separator="):
        get_tokenizer(folder, "<")


def test_special_tokens_have_no_bytes_and_added_ones_their_own(tokenizers):
    tokenizer = tokenizers["byte_level"]
    begin, end, think = (tokenizer.inner.token_to_id(t) for t in ("<|begin|>", "<|end|>", "<think>"))
    assert tokenizer.bytes_per_token[[begin, end, think]].tolist() == [0, 0, len("<think>")]
    assert tokenizer.decode([begin, think, end]) == "<think>"


def test_names_of_special_tokens_are_text_unless_asked(tokenizers):
    tokenizer = tokenizers["byte_level"]
    end = tokenizer.inner.token_to_id("<|end|>")
    assert end not in tokenizer.encode("a<|end|>")
    assert tokenizer.encode("a<|end|>", special=True)[-1] == end


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (dict(tokenizer_config=dict(bos_token="<|begin|>", eos_token="<|end|>")), "<|begin|>"),
        (dict(tokenizer_config=dict(bos_token=dict(content="<|begin|>"))), "<|begin|>"),
        (dict(tokenizer_config=dict(bos_token=None, eos_token="<|end|>"), config=dict(bos_token_id=0)), "<|begin|>"),
        (dict(tokenizer_config=dict(eos_token="<|end|>")), "<|end|>"),
        (dict(generation_config=dict(eos_token_id=[1, 0])), "<|end|>"),
        (dict(special_tokens_map=dict(bos_token="<|begin|>", eos_token="<|end|>")), "<|begin|>"),
        (dict(tokenizer_config={}, special_tokens_map=dict(eos_token=dict(content="<|end|>"))), "<|end|>"),
        (dict(tokenizer_config=dict(eos_token="not there"), config=dict(eos_token_id=1)), "<|end|>"),
    ],
)
def test_the_separator_is_the_first_bos_that_is_named_or_else_the_first_eos(tmp_path, files, expected):
    tokenizer = get_tokenizer(str(vocabularies.write(tmp_path, vocabularies.byte_level(), **files)))
    assert tokenizer.separator == tokenizer.inner.token_to_id(expected)


def test_text_ends_at_every_eos_and_at_the_separator(tmp_path):
    files = dict(tokenizer_config=dict(bos_token="<|begin|>"), generation_config=dict(eos_token_id=[1, 5]))
    assert get_tokenizer(str(vocabularies.write(tmp_path, vocabularies.byte_level(), **files))).ends == (0, 1, 5)


def test_without_bos_and_eos_one_must_be_given_by_the_flag_of_the_command(tmp_path):
    folder = vocabularies.write(tmp_path, vocabularies.byte_level())
    with pytest.raises(ValueError, match=r"names no bos or eos in .*; give --separator=TOKEN"):
        get_tokenizer(str(folder))
    with pytest.raises(ValueError, match=r"names no bos or eos in .*; give --eos=TOKEN"):
        get_tokenizer(str(folder), flag="eos")
    assert get_tokenizer(str(folder), "<|end|>").separator == get_tokenizer(str(folder), 1).separator == 1
    assert get_tokenizer(str(folder), eos="<|end|>").separator == 1 and get_tokenizer(str(folder), eos="300").ends == (
        300,
    )
    for given_token in (dict(separator="<nope>"), dict(eos="<nope>", flag="eos")):
        with pytest.raises(
            ValueError, match=rf"has no token '<nope>'; give --{given_token.get('flag', 'separator')}=TOKEN"
        ):
            get_tokenizer(str(folder), **given_token)


def test_an_end_that_is_given_ends_texts_besides_those_that_are_named(tmp_path):
    folder = vocabularies.write(tmp_path, vocabularies.byte_level(), config=dict(bos_token_id=0))
    tokenizer = get_tokenizer(str(folder), eos="<think>")
    assert (tokenizer.separator, tokenizer.ends) == (0, (0, tokenizer.inner.token_to_id("<think>")))
    with pytest.raises(ValueError, match=r"--eos=x is a token of a trained vocabulary, and 'bytes' is not one"):
        get_tokenizer("bytes", eos="x", flag="eos")


def test_a_token_named_like_a_number_is_found_by_name_and_ids_by_integers(tmp_path):
    tokenizer = vocabularies.byte_level()
    tokenizer.add_special_tokens(["260"])
    folder = str(vocabularies.write(tmp_path, tokenizer))
    assert get_tokenizer(folder, "260").separator == tokenizer.token_to_id("260") != 260
    assert get_tokenizer(folder, 260).separator == 260


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"model": 3}', "no vocabulary that tokenizers can read"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, content, problem):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=problem):
        get_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        get_tokenizer(str(tmp_path))


def test_a_vocabulary_whose_tokens_have_no_bytes_of_their_own_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = vocabularies.write(tmp_path, words, tokenizer_config=dict(eos_token="[UNK]"))
    with pytest.raises(ValueError, match="neither byte-level nor falls back to bytes"):
        get_tokenizer(str(folder))


def test_limits_that_a_file_stores_cut_nothing(tmp_path):
    tokenizer = vocabularies.byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7)
    folder = vocabularies.write(tmp_path, tokenizer, tokenizer_config=dict(eos_token="<|end|>"))
    assert get_tokenizer(str(folder)).decode(get_tokenizer(str(folder)).encode("abcdefgh")) == "abcdefgh"


# --- corpora --------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    (folder / "prose").mkdir(parents=True)
    for number, text in enumerate(HARD):
        (folder / "prose" / f"{number}.txt").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_folder_needs_nothing_else(source, folders, tmp_path, kind):
    settings = dict(special_tokens_map=dict(eos_token=ENDS.get(kind, "</s>")))
    model = vocabularies.write(tmp_path / "model", KINDS[kind](), **settings)
    (source / "prose" / "1.txt").unlink()  # " a leading space", which some cannot tell from one without
    prepare(Options(source, tmp_path / "out", 0.4, tokenizer=str(model)))
    (model / "tokenizer.json").unlink()
    corpus = open_corpus(str((tmp_path / "out").rename(tmp_path / "moved")))
    streams = [corpus.stream(split, "prose") for split in ("train", "validation")]
    found = [corpus.tokenizer.decode(d) for s in streams for d in np.split(s.tokens, s.offsets[1:-1])]
    assert sorted(found) == sorted(text for text in HARD if text != " a leading space")


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_held_out_batches_are_those_of_the_documents(tokenizers, kind):
    # every token but the stream's very first, a separator, is a target once; windows cut texts anywhere
    texts = [text for text in [*HARD, "  ", "   x", "a", ""] if not begins_with_one_space(text)]
    corpus = make_corpus({"one": {"train": ["x"], "validation": texts}}, tokenizers[kind])
    for length in (1, 2, 3, 7):
        batches = evaluation_batches(corpus, batch_size=4, sequence_length=length)
        assert sum(int(b.num_bytes.sum()) for b in batches) == sum(len(text.encode()) for text in texts)


def test_ids_of_a_large_vocabulary_are_stored_in_four_bytes(source, tmp_path):
    tokenizer = vocabularies.byte_level()
    raw = json.loads(tokenizer.to_str())
    raw["model"]["vocab"] |= {f"word{n}": 300 + n for n in range(70_000)}
    raw["added_tokens"][2]["id"] = 80_000
    model = vocabularies.write(tmp_path / "model", Tokenizer.from_str(json.dumps(raw)))
    prepare(Options(source, tmp_path / "out", tokenizer=str(model), separator="<|end|>"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dtypes"]["tokens"] == "uint32, little-endian" and manifest["vocab_size"] > 2**16
    corpus = open_corpus(str(tmp_path / "out"))
    assert corpus.stream("train", "prose").tokens.dtype == np.uint32
    assert corpus.tokenizer.decode(corpus.stream("validation", "prose").tokens) in HARD


def test_a_changed_vocabulary_in_the_folder_is_noticed(source, folders, tmp_path):
    prepare(Options(source, tmp_path / "out", tokenizer=str(folders["byte_level"])))
    file = tmp_path / "out" / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"<think>", b"<thing>"))
    with pytest.raises(ValueError, match=r"the sha256 of tokenizer\.json is not the one"):
        open_corpus(str(tmp_path / "out"))


def test_another_vocabulary_makes_another_corpus(source, folders, tmp_path):
    prepare(Options(source, tmp_path / "out"))
    with pytest.raises(ValueError, match="made from other inputs"):
        prepare(Options(source, tmp_path / "out", tokenizer=str(folders["byte_level"])))
    prepare(Options(source, tmp_path / "out", tokenizer=str(folders["byte_level"]), overwrite=True))
    assert open_corpus(str(tmp_path / "out")).tokenizer.name.startswith("tokenizer-")
    prepare(Options(source, tmp_path / "out", overwrite=True))
    assert not (tmp_path / "out" / "tokenizer").exists()


def lower():
    tokenizer = vocabularies.byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


def lossy():
    raw = json.loads(vocabularies.byte_level().to_str())
    raw["model"]["vocab"].pop("Ã")  # the first byte of ï
    raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if "Ã" not in "".join(pair)]
    return Tokenizer.from_str(json.dumps(raw))


@pytest.mark.parametrize(
    ("make", "text", "why"),
    [
        (lower, "The Cat SAT", "(+0 in all), because the tokenizer's normalizer (NFC, Lowercase) changes text;"),
        (lower, "a\u0301", "(-1 in all), because the tokenizer's normalizer (NFC, Lowercase) changes text;"),
        (
            vocabularies.without_spaces,
            "a cat",
            "(+2 in all), because the tokenizer writes a space as ▁, and that as three",
        ),
        (
            vocabularies.with_metaspace,
            "a▁b",
            "(-2 in all), because the tokenizer writes a space as ▁, and that character",
        ),
        (
            vocabularies.with_metaspace,
            " one",
            "(-1 in all), because the tokenizer does not distinguish a text that begins with",
        ),
        (
            vocabularies.with_prefix,
            " one",
            "(-1 in all), because the tokenizer does not distinguish a text that begins with",
        ),
        (lossy, "naïve", "(-1 in all), because the vocabulary lacks some bytes;"),
    ],
)
def test_a_text_that_a_vocabulary_changes_is_reported_with_the_reason(tmp_path, capsys, make, text, why):
    (tmp_path / "in" / "prose").mkdir(parents=True)
    (tmp_path / "in" / "prose" / "1.txt").write_text(text)
    (tmp_path / "in" / "prose" / "2.txt").write_text("cat")
    model = vocabularies.write(tmp_path / "model", make(), config=dict(eos_token_id=1))
    prepare(Options(tmp_path / "in", tmp_path / "out", tokenizer=str(model)))
    assert f"prose: the tokens of 1 documents stand for other bytes than the text has {why}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_a_vocabulary_keeps_is_not_reported(source, folders, tmp_path, capsys, kind):
    (source / "prose" / "1.txt").unlink()  # " a leading space"
    prepare(Options(source, tmp_path / "out", tokenizer=str(folders[kind])))
    assert "stand for other bytes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tokenizer=nowhere"], "tokenizer='nowhere' is not known"),
        (["--separator=x"], "--separator=x is a token of a --tokenizer, which is missing"),
    ],
)
def test_the_command_reports_what_is_wrong(source, tmp_path, capsys, flags, problem):
    with pytest.raises(SystemExit):
        main([f"--input={source}", f"--output={tmp_path / 'out'}", *flags])
    assert problem in capsys.readouterr().err


def test_evaluation_refuses_to_read_another_vocabulary_than_the_model_s_own(tmp_path):
    vocabularies.write(tmp_path / "tokenizer", vocabularies.byte_level())
    same = make_corpus({"one": {"train": ["x"], "validation": ["y"]}}, get_tokenizer(str(tmp_path / "tokenizer"), 0))
    check_tokenizer(Config(), tmp_path, same)
    with pytest.raises(ValueError, match=r"has a tokenizer of its own, but data\.path='' is of 'bytes'.*--data"):
        check_tokenizer(Config(), tmp_path, open_corpus())
    check_tokenizer(Config(), tmp_path / "elsewhere", open_corpus())
