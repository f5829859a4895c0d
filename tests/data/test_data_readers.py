"""Documents of compressed files and tables."""

import bz2
import gzip
import hashlib
import lzma

import numpy as np
import pytest

from moe_jax.data import open_corpus, readers
from moe_jax.data.prepare import prepare
from moe_jax.data.readers import read_documents
from moe_jax.data.sources import Options
from moe_jax.data.spans import Piece

pyarrow = pytest.importorskip("pyarrow")

LINES = b'{"text": "a\\r b"}\n{"text": "zwei", "more": 1}\n'
TEXTS = ["a\r b", "zwei"]


def by_arrow(codec):
    def compress(data):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESSED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
}


def found(folder, name, **options):
    """The documents of a file, and the hash of what was read."""
    digest = hashlib.sha256()
    return list(read_documents(Options(folder, folder / "out", **options), name, digest)), digest.hexdigest()


def problem(folder, name, **options):
    *_, last = found(folder, name, **options)[0]
    return f"{last.where}: {last.problem}"


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_compressed_file_has_the_documents_and_the_hash_of_what_it_holds(tmp_path, ending):
    for name in ("x.jsonl", "X.JSONL"):
        (tmp_path / name).write_bytes(LINES)
        (tmp_path / f"{name}{ending}").write_bytes(COMPRESSED[ending](LINES))
        plain, packed = found(tmp_path, name), found(tmp_path, f"{name}{ending}")
        assert [p.text for p in packed[0]] == TEXTS
        assert packed[0][1].where == f"{name}{ending}:2"
        assert packed[1] == plain[1]
    (tmp_path / f"y.txt{ending}").write_bytes(COMPRESSED[ending]("über\nzwei Zeilen".encode()))
    assert found(tmp_path, f"y.txt{ending}")[0] == [Piece(f"y.txt{ending}", "über\nzwei Zeilen")]


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_truncated_or_foreign_file_is_named(tmp_path, ending):
    data = b"".join(b'{"text": "%d"}\n' % n for n in np.random.default_rng(0).integers(0, 2**62, 8_000))
    (tmp_path / f"x.jsonl{ending}").write_bytes(COMPRESSED[ending](data)[:-500])
    assert f"x.jsonl{ending}: is damaged" in problem(tmp_path, f"x.jsonl{ending}")
    (tmp_path / f"y.jsonl{ending}").write_bytes(b"no such thing")
    assert f"y.jsonl{ending}: is damaged (" in problem(tmp_path, f"y.jsonl{ending}")
    (tmp_path / f"z.jsonl{ending}").write_bytes(COMPRESSED[ending](b""))
    assert problem(tmp_path, f"z.jsonl{ending}") == f"z.jsonl{ending}: is empty"


def write_table(path, table):
    from pyarrow import ipc, parquet

    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
        return
    make = ipc.new_file if "file" in path.name else ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


TABLES = ("a.parquet", "a.arrow", "a_file.arrow")


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_is_a_document(tmp_path, name):
    write_table(tmp_path / name, pyarrow.table({"text": ["eins", "zwei ü", "drei"], "n": [1, 2, 3]}))
    pieces, digest = found(tmp_path, name)
    assert pieces == [Piece(f"{name}:{n}", text) for n, text in enumerate(["eins", "zwei ü", "drei"], 1)]
    write_table(tmp_path / name, pyarrow.table({"text": ["einsz", "wei ü", "drei"], "n": [1, 2, 3]}))
    assert found(tmp_path, name)[1] != digest  # the same bytes, divided otherwise


@pytest.mark.parametrize("name", TABLES)
def test_bad_rows_and_columns_are_named(tmp_path, name):
    table = pyarrow.table({"body": ["eins", None, "a\0", " "], "n": [1, 2, 3, 4]})
    write_table(tmp_path / name, table)
    assert problem(tmp_path, name) == f"{name}: has no column 'text', only body, n; give --text_key=COLUMN"
    problems = [piece.problem for piece in found(tmp_path, name, text_key="body")[0]]
    assert problems[:2] == ["", "must be a string under 'body' (see --text_key)"]
    assert "NUL byte" in problems[2]
    assert problems[3] == "is empty"
    assert problem(tmp_path, name, text_key="n") == f"{name}:4: must be a string under 'n' (see --text_key)"
    write_table(tmp_path / name, table.slice(0, 0))
    assert problem(tmp_path, name, text_key="body") == f"{name}: is empty"
    (tmp_path / name).write_bytes(b"no such thing")
    assert f"{name}: is damaged (" in problem(tmp_path, name)


def test_without_pyarrow_what_needs_it_is_refused_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers.importlib.util, "find_spec", lambda name: None)
    for name in ("a.parquet", "a.arrow", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
        assert (
            problem(tmp_path, name)
            == f"{name}: needs pyarrow, which is not installed; run pip install 'moe_jax[arrow]'"
        )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert [p.text for p in found(tmp_path, "a.jsonl.gz")[0]] == TEXTS


def test_prepare_reads_a_folder_that_datasets_saved_beside_other_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["eins", "zwei", "drei", "vier"]})
    rows.select([2, 0]).save_to_disk(tmp_path / "in" / "saved")
    (tmp_path / "in" / "packed").mkdir()
    (tmp_path / "in" / "packed" / "x.jsonl.gz").write_bytes(gzip.compress(LINES))
    prepare(Options(tmp_path / "in", tmp_path / "out"))
    corpus = open_corpus(str(tmp_path / "out"))
    assert corpus.domains == ("packed", "saved")
    streams = [corpus.stream(split, "saved") for split in ("train", "validation")]
    assert sorted(corpus.tokenizer.decode(stream.tokens) for stream in streams) == ["drei", "eins"]
