"""Laws of the corpus: what is embedded, how streams are laid out, and that damage is refused by name."""

import itertools
import json
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import vocabularies

from moe_jax.data import check_corpus, corpus, make_corpus, open_corpus
from moe_jax.data.embedded import build
from moe_jax.data.prepare import Options, prepare

SEPARATOR = 256


@pytest.fixture(scope="module")
def embedded():
    return open_corpus()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    for domain, number in itertools.product(("one", "two"), range(3)):
        (root / "in" / domain).mkdir(parents=True, exist_ok=True)
        (root / "in" / domain / f"{number}.txt").write_text(f"text {number} of {domain}")
    prepare(Options(root / "in", root / "out"))
    return root / "out"


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "corpus")


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_stream_is_each_document_behind_its_separator():
    stream = make_corpus({"a": {"train": ["ab", "c"], "validation": ["d"]}}).stream("train", "a")
    assert stream.tokens.tolist() == [SEPARATOR, 97, 98, SEPARATOR, 99]
    assert stream.offsets.tolist() == [0, 3, 5]
    assert (stream.num_tokens, stream.num_documents) == (5, 2)


def test_a_domain_without_held_out_documents_is_refused():
    with pytest.raises(ValueError, match="Domain 'a' has no validation document"):
        make_corpus({"a": {"train": ["x"], "validation": []}})


def test_the_embedded_corpus_is_what_its_manifest_says(embedded):
    manifest = json.loads((corpus.EMBEDDED / "manifest.json").read_text())["domains"]
    assert embedded.domains == tuple(manifest) == ("austen", "factbook", "milton", "shakespeare")
    for (split, domain), stream in embedded.streams.items():
        entry = manifest[domain]
        assert stream.num_documents == entry["documents"][split]
        assert stream.num_tokens == entry["text_bytes"][split] + entry["documents"][split]
        assert np.array_equal(np.flatnonzero(stream.tokens == SEPARATOR), stream.offsets[:-1])


def test_the_embedded_corpus_is_small_balanced_and_names_its_sources(embedded):
    manifest = json.loads((corpus.EMBEDDED / "manifest.json").read_text())["domains"]
    assert sum(entry["bytes"] for entry in manifest.values()) < 900_000
    for entry in manifest.values():
        total = sum(entry["text_bytes"].values())
        assert 400_000 < total < 800_000
        assert 0.08 < entry["text_bytes"]["validation"] / total < 0.13
        assert entry["licence"]
        assert entry["held_out"]
        assert len(entry["source"]["sha256"]) == 64


def test_the_fingerprint_is_of_the_content_wherever_it_is_and_however_it_is_listed(prepared, folder):
    (found,) = {open_corpus(str(prepared)).fingerprint, open_corpus(str(folder)).fingerprint}
    assert check_corpus(str(folder)).fingerprint == found

    def list_backwards(manifest):  # of each domain first the validation split, of each split first the offsets
        for domain, splits in manifest["domains"].items():
            parts = {split: dict(reversed(entry.items())) for split, entry in reversed(splits.items())}
            manifest["domains"][domain] = parts
        manifest["fingerprint"] = "of other inputs that give the same tokens"

    edit(folder, list_backwards)
    assert open_corpus(str(folder)).fingerprint == found


def test_the_fingerprint_needs_no_token_to_be_read(folder):
    before = check_corpus(str(folder)).fingerprint
    path = folder / "one.train.bin"
    path.write_bytes(bytes(path.stat().st_size))
    assert open_corpus(str(folder), verify="sizes").fingerprint == before


def test_other_data_has_another_fingerprint():
    texts = {"a": {"train": ["xy", "z"], "validation": ["v"]}, "b": {"train": ["u"], "validation": ["w"]}}
    others = [
        texts,
        dict(reversed(texts.items())),  # batches number domains in their order
        texts | {"a": {"train": ["x", "yz"], "validation": ["v"]}},  # cut elsewhere
        {"a": texts["a"], "c": texts["b"]},
        texts | {"b": {"train": ["w"], "validation": ["u"]}},  # splits exchanged
    ]
    found = [make_corpus(other).fingerprint for other in others]
    assert len({*found, open_corpus().fingerprint}) == len(others) + 1
    assert make_corpus(texts).fingerprint == found[0]


def test_a_corpus_in_memory_and_in_a_folder_of_the_same_tokens_have_one_fingerprint(prepared):
    folder = open_corpus(str(prepared))
    splits = ("train", "validation")
    texts = {d: {split: list(corpus.documents(folder, split, d)) for split in splits} for d in folder.domains}
    assert make_corpus(texts).fingerprint == folder.fingerprint


def test_the_embedded_corpus_has_one_fingerprint_opened_or_checked(embedded):
    assert embedded.fingerprint == check_corpus().fingerprint
    assert len(bytes.fromhex(embedded.fingerprint)) == 32


def test_every_file_of_a_tokenizer_is_in_the_fingerprint(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "the cat"}\n{"text": "the hat"}\n')
    settings = dict(tokenizer_config=dict(bos_token="<|begin|>"), generation_config=dict(eos_token_id=[1]))
    found = []
    for number, change in enumerate([{}, dict(tokenizer_config=dict(bos_token="<|end|>")), dict(generation_config={})]):
        folder = vocabularies.write(tmp_path / f"tokenizer{number}", vocabularies.byte_level(), **settings | change)
        prepare(Options(tmp_path / "in", tmp_path / str(number), tokenizer=str(folder)))
        found.append(open_corpus(str(tmp_path / str(number))).fingerprint)
    assert len(set(found)) == 3


def test_embedded_text_is_clean_and_held_out_documents_are_not_in_training(embedded):
    for domain in embedded.domains:
        splits = corpus._read_documents(corpus.EMBEDDED / f"{domain}.jsonl.xz")
        training = "".join(splits["train"])
        for text in splits["train"] + splits["validation"]:
            assert text == build.clean(text) == unicodedata.normalize("NFC", text)
        for text in splits["validation"]:
            assert text[len(text) // 2 :][:200] not in training


def test_packing_the_embedded_documents_again_gives_the_same_text():
    documents = [build.Document("a/1", "train", "é\n"), build.Document("a/2", "validation", "x\n")]
    assert build.pack(documents) == build.pack(documents)


def test_clean_normalises_newlines_blanks_tabs_controls_and_unicode():
    assert build.clean("\ufeff\r\na\tb  \r\n\r\n\r\n\r\ne\u0301\x1a\rz") == "a   b\n\n\u00e9\nz\n"


def test_a_profile_becomes_lines_of_fields():
    area = {"total": {"text": "1 <b>sq</b>\n km ++ two"}, "lost": {"text": "\ufffd"}}
    profile = {"Geography": {"Area": area, "Map": {"text": None}}, "Economy": {"left": {"text": "out"}}}
    assert build.render("Land", profile) == "Land\n\nIntroduction\n\nGeography\nArea: total: 1 sq km; two\n"


def test_a_prepared_folder_opens_memory_mapped_with_the_same_documents(prepared):
    opened = open_corpus(str(prepared))
    assert opened.domains == ("one", "two")
    for domain in opened.domains:
        streams = [opened.stream(split, domain) for split in corpus.SPLITS]
        assert all(isinstance(stream.tokens, np.memmap) for stream in streams)
        texts = {
            opened.tokenizer.decode(document)
            for stream in streams
            for document in np.split(stream.tokens, stream.offsets[1:-1])
        }
        assert texts == {f"text {number} of {domain}" for number in range(3)}


def test_checking_a_corpus_tells_its_domains_and_tokenizer(prepared):
    assert check_corpus(str(prepared)).domains == ("one", "two")
    assert check_corpus().domains == ("austen", "factbook", "milton", "shakespeare")
    assert check_corpus().tokenizer.vocab_size == 257


def test_a_missing_folder_manifest_or_file_is_named_with_the_command_that_makes_it(tmp_path, folder):
    for call in (open_corpus, check_corpus):
        with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; create one with python -m "):
            call(str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match=r"has no manifest.json; create one with .* --output="):
            call(str(tmp_path))
    (folder / "one.train.bin").unlink()
    for call in (open_corpus, check_corpus):
        with pytest.raises(FileNotFoundError, match=r"has no one.train.bin, which its manifest.json lists"):
            call(str(folder))


def test_a_truncated_file_is_refused_even_when_only_sizes_are_checked(folder):
    path = folder / "two.train.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    for call in (check_corpus, lambda path: open_corpus(path, verify="sizes")):
        with pytest.raises(ValueError, match=f"two.train.bin has {size - 2} bytes and must have {size}"):
            call(str(folder))


@pytest.mark.parametrize("verify", ["auto", "full"])
def test_one_flipped_bit_is_refused_by_sha256(folder, verify):
    path = folder / "one.validation.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"sha256 of one.validation.bin is not the one in manifest.json"):
        open_corpus(str(folder), verify=verify)
    open_corpus(str(folder), verify="sizes")  # what "sizes" promises, and no more


def test_auto_checks_sizes_only_above_ten_gigabytes(folder, monkeypatch):
    path = folder / "one.validation.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    monkeypatch.setattr(corpus, "FULL_VERIFY_BELOW_BYTES", 1)
    open_corpus(str(folder))


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a/../../b", "..", "a\\b", ""])
def test_a_manifest_cannot_lead_outside_its_folder(folder, name):
    edit(folder, lambda manifest: manifest["domains"]["one"]["train"]["tokens"].update(file=name))
    for call in (open_corpus, check_corpus):
        with pytest.raises(ValueError, match="must have a plain file name"):
            call(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), r"version=2 and this program reads version 1"),
        (lambda m: m.update(format="x"), r"format='x' and must have 'moe_jax corpus'"),
        (lambda m: m.update(tokenizer="bpe"), r"tokenizer='bpe' is not known"),
        (lambda m: m.update(domains={}), r"lists no domain"),
        (lambda m: m["domains"]["one"].pop("train"), r"train=None and must have a dict there"),
        (
            lambda m: m["domains"]["one"]["train"]["tokens"].update(bytes="9"),
            r"bytes='9' and must have a int",
        ),
        (lambda m: m["domains"]["one"]["train"].update(num_tokens=3), r"do not fit the sizes of its files"),
    ],
)
def test_a_manifest_of_another_shape_is_refused_in_a_sentence(folder, change, message):
    edit(folder, change)
    for call in (open_corpus, check_corpus):
        with pytest.raises(ValueError, match=message):
            call(str(folder))


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_manifest_is_refused(folder, text, message):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_corpus(str(folder))


def test_a_damaged_embedded_file_is_refused_whatever_verify_says(tmp_path, monkeypatch):
    folder = shutil.copytree(corpus.EMBEDDED, tmp_path / "embedded")
    data = bytearray((folder / "milton.jsonl.xz").read_bytes())
    data[1000] ^= 1
    (folder / "milton.jsonl.xz").write_bytes(data)
    monkeypatch.setattr(corpus, "EMBEDDED", folder)
    with pytest.raises(ValueError, match=r"sha256 of milton.jsonl.xz"):
        open_corpus(verify="sizes")


def test_an_unknown_verify_is_refused():
    with pytest.raises(ValueError, match=r"data.verify='some' is not known; use one of: auto, full, sizes"):
        open_corpus(verify="some")


def test_importing_and_checking_needs_neither_jax_nor_grain():
    program = (
        "import sys, moe_jax.data as data; data.check_corpus(); data.open_corpus();"
        "assert not {'jax', 'flax', 'grain', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
