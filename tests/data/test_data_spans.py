"""Laws of fine-tuning data: what is trained on, what it weighs, and which rows are refused."""

import dataclasses
import json

import numpy as np
import pytest
import vocabularies

from moe_jax.data import check_corpus, open_corpus
from moe_jax.data.prepare import Options, main, prepare

PAIRS = [{"q": "Why? ", "a": "So.", "w": 0.5}, {"q": "", "a": "Alone", "w": 3}, {"q": "Who? ", "a": "Me\n", "w": 1}]
KEYS = dict(prompt_key="q", answer_key="a")


def write(folder, rows, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def found(output, domain="in"):
    """document -> (weight of each of its tokens behind the separator, weight of its end, None for a stream's last)."""
    corpus = open_corpus(str(output))
    documents = {}
    for split in ("train", "validation"):
        stream = corpus.stream(split, domain)
        weights = np.ones(stream.num_tokens) if stream.weights is None else stream.weights
        for start, stop in zip(stream.offsets, stream.offsets[1:], strict=False):
            text = corpus.tokenizer.decode(stream.tokens[start + 1 : stop])
            end = float(weights[stop]) if stop < stream.num_tokens else None
            documents[text] = weights[start + 1 : stop].tolist(), end
    return documents


def read(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder, **options):
    with pytest.raises(ValueError, match=r".") as caught:
        prepare(Options(folder, folder.parent / "out", **options))
    assert not (folder.parent / "out").exists()
    return str(caught.value)


def test_a_prompt_weighs_nothing_and_an_answer_with_its_end_as_much_as_its_document(tmp_path):
    prepare(Options(write(tmp_path / "in", PAIRS), tmp_path / "out", weight_key="w", **KEYS))
    documents = found(tmp_path / "out")
    expected = {"Why? So.": ([0] * 5 + [0.5] * 3, 0.5), "Alone": ([3] * 5, 3.0), "Who? Me\n": ([0] * 5 + [1] * 3, 1.0)}
    assert documents.keys() == expected.keys()
    for text, (weights, end) in expected.items():
        assert documents[text] == (weights, end if documents[text][1] is not None else None)
    assert [end for _, end in documents.values()].count(None) == 2  # the last one of each split


def test_the_same_text_without_a_prompt_is_the_corpus_of_plain_text_to_the_last_byte(tmp_path):
    texts = [{"text": row["q"] + row["a"], "w": 1, "e": ""} for row in PAIRS]
    folder = write(tmp_path / "in", texts)
    prepare(Options(folder, tmp_path / "plain"))
    prepare(Options(folder, tmp_path / "weighed", weight_key="w"))
    prepare(Options(folder, tmp_path / "answered", prompt_key="e", answer_key="text"))
    plain = read(tmp_path / "plain")
    assert not any("weights" in name for name in plain)
    for other in ("weighed", "answered"):
        files = read(tmp_path / other)
        manifests = [json.loads(f["manifest.json"]) for f in (plain, files)]
        assert manifests[0]["domains"] == manifests[1]["domains"]
        assert manifests[1]["version"] == 1
        assert {n: b for n, b in files.items() if n != "manifest.json"} == {
            n: b for n, b in plain.items() if n != "manifest.json"
        }


def test_weights_are_in_the_fingerprint_and_the_manifest_and_their_file_is_checked(tmp_path):
    folder = write(tmp_path / "in", [{"text": f"text {i}", "w": 1 + i % 2} for i in range(12)])
    prepare(Options(folder, tmp_path / "plain"))
    prepare(Options(folder, tmp_path / "out", weight_key="w"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["dtypes"]["weights"] == "float16, little-endian"
    assert check_corpus(str(tmp_path / "out")).fingerprint != check_corpus(str(tmp_path / "plain")).fingerprint
    path = tmp_path / "out" / "in.train.weights.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"in.train.weights.bin has \d+ bytes and must have"):
        check_corpus(str(tmp_path / "out"))
    manifest["version"] = 1
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="version=1 and this program reads version 1, or 2 where tokens have weights"):
        check_corpus(str(tmp_path / "out"))


def test_tokens_before_the_first_of_another_weight_count_once(tmp_path):
    rows = [{"text": f"text {i}", "w": 1} for i in range(40)] + [{"text": "last", "w": 2}] * 20
    prepare(Options(write(tmp_path / "in", rows), tmp_path / "out", weight_key="w"))
    stream = open_corpus(str(tmp_path / "out")).stream("train", "in")
    first = bytes(stream.tokens.astype(np.uint8)).index(b"last")  # before it is a separator, the end of "text 39"
    assert first > 100
    assert (stream.weights[:first] == 1).all()
    assert (stream.weights[first:] == 2).all()


def test_tables_and_lines_and_any_number_of_processes_give_the_same_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [PAIRS[i % 3] | {"a": f"answer {i}"} for i in range(30)]
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    prepare(Options(tmp_path / "in", tmp_path / "table", weight_key="w", **KEYS))
    for domain in ("one", "two"):
        (tmp_path / "lines").mkdir(exist_ok=True)
        write(tmp_path / "lines" / domain, rows)
    for processes in (1, 2):
        prepare(Options(tmp_path / "lines", tmp_path / str(processes), processes=processes, weight_key="w", **KEYS))
    assert read(tmp_path / "1") == read(tmp_path / "2")
    table, lines = found(tmp_path / "table"), found(tmp_path / "1", "one")
    assert {text: weights for text, (weights, _) in table.items()} == {text: own for text, (own, _) in lines.items()}


def test_an_interrupted_preparation_is_resumed_to_the_same_bytes(tmp_path, monkeypatch):
    from moe_jax.data.writer import SplitWriter

    folder = write(tmp_path / "in", [PAIRS[i % 3] | {"a": f"answer {i}"} for i in range(9)])
    options = Options(folder, tmp_path / "out", weight_key="w", **KEYS)
    prepare(dataclasses.replace(options, output=tmp_path / "whole"))
    real, calls = SplitWriter.add, []

    def add(self, document):
        calls.append(document)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(self, document)

    monkeypatch.setattr(SplitWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        prepare(options)
    prepare(options)
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds a corpus made from other inputs or options"):
        prepare(dataclasses.replace(options, weight_key=""))


ROWS = {
    "missing": ({"q": "x"}, "must be a JSON object with a string under 'a' (see --answer_key)"),
    "number": ({"q": 3, "a": "x", "w": 1}, "must be a JSON object with a string under 'q' (see --prompt_key)"),
    "blank": ({"q": "x", "a": " \n", "w": 1}, "has an empty string under 'a' (see --answer_key)"),
    "text": ({"q": "x", "a": "y", "w": "1"}, "must be a JSON object with a number under 'w' (see --weight_key)"),
    "flag": ({"q": "x", "a": "y", "w": True}, "must be a JSON object with a number under 'w' (see --weight_key)"),
    "zero": ({"q": "x", "a": "y", "w": 0}, "has 0 under 'w' and must have a weight from 6.1e-05 to 65504 there"),
    "negative": ({"q": "x", "a": "y", "w": -1}, "has -1 under 'w' and must have a weight from"),
    "infinite": ({"q": "x", "a": "y", "w": float("inf")}, "has inf under 'w' and must have a weight from"),
    "huge": ({"q": "x", "a": "y", "w": 1e6}, "has 1000000.0 under 'w' and must have a weight from"),
    "surrogate": ({"q": "x", "a": "\ud800", "w": 1}, "has half a surrogate pair (character 1 of its text)"),
    "nul": ({"q": "x\0", "a": "y", "w": 1}, "has a NUL byte (line 1): it is not text"),
    "list": (["q", "a"], "must be a JSON object with a string under 'q' (see --prompt_key)"),
}


def test_bad_rows_are_named_with_file_and_line(tmp_path):
    for name, (row, _) in ROWS.items():
        write(tmp_path / "in", [PAIRS[0], row], f"{name}.jsonl")
    write(tmp_path / "in", [], "plain.txt")
    message = refusal(tmp_path / "in", weight_key="w", **KEYS)
    for name, (_, sentence) in ROWS.items():
        assert f"\n{name}.jsonl:2: {sentence}" in message
    assert "\nplain.txt: is text, without a field for --prompt_key=q; leave it out with --include='*.jsonl'" in message


OPTIONS = [
    (dict(prompt_key="q"), "--prompt_key=q is one half of a pair; give --prompt_key and --answer_key."),
    (dict(answer_key="a"), "--answer_key=a is one half of a pair"),
    (dict(messages_key="m", prompt_key="q", answer_key="a"), "--messages_key=m and --prompt_key=q both say where"),
    (dict(text_key="t", prompt_key="q", answer_key="a"), "--prompt_key=q and --text_key=t both say where"),
    (dict(prompt_key="q", answer_key="q"), "--prompt_key=q and --answer_key=q must name different fields"),
    (dict(text_key="w", weight_key="w"), "--text_key=w and --weight_key=w must name different fields"),
    (dict(messages_key="m"), "--messages_key=m needs the chat template of a --tokenizer, which is missing"),
]


@pytest.mark.parametrize(("options", "sentence"), OPTIONS, ids=lambda value: str(value)[:40])
def test_keys_that_contradict_each_other_are_refused(tmp_path, options, sentence):
    assert sentence in refusal(write(tmp_path / "in", PAIRS), **options)


def test_the_command_takes_the_keys(tmp_path):
    folder = write(tmp_path / "in", PAIRS)
    keys = ["--prompt_key=q", "--answer_key=a", "--weight_key=w"]
    main([f"--input={folder}", f"--output={tmp_path / 'out'}", *keys])
    options = json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]
    assert options == {"validation_fraction": 0.05, "prompt_key": "q", "answer_key": "a", "weight_key": "w"}


@pytest.mark.parametrize("make", [vocabularies.with_fallback, vocabularies.with_metaspace, vocabularies.with_prefix])
def test_no_token_is_in_prompt_and_answer_and_no_space_is_put_between_them(tmp_path, make):
    special = dict(bos_token="<|begin|>" if make is vocabularies.with_prefix else "<s>")
    tokenizer = vocabularies.write(tmp_path / "tokenizer", make(), tokenizer_config=special)
    folder = write(tmp_path / "in", [{"q": "the c", "a": "at sat"}, {"q": "the", "a": " hat"}] * 3)
    prepare(Options(folder, tmp_path / "out", tokenizer=str(tokenizer), **KEYS))
    corpus = open_corpus(str(tmp_path / "out"))
    stream = corpus.stream("train", "in")
    answers = set()
    for start, stop in zip(stream.offsets, stream.offsets[1:], strict=False):
        ids, trained = stream.tokens[start + 1 : stop], stream.weights[start + 1 : stop] > 0
        answers.add((corpus.tokenizer.decode(ids[~trained]), corpus.tokenizer.to_bytes(ids[trained])))
    assert answers <= {("the c", b"at sat"), ("the", b" hat")}
