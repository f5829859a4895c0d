"""Laws of `prepare`: bad input is refused by name, nothing is ignored silently, a kill changes nothing."""

import codecs
import fcntl
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vocabularies

from moe_jax.data import open_corpus, sources
from moe_jax.data import output as folder
from moe_jax.data.prepare import Options, main, prepare

# Kills a run before its n-th change of the disk, for every n, finishes it with a second run, and compares.
KILL_EVERYWHERE = """
import os, pathlib, shutil, signal, sys
from moe_jax.data.prepare import Options, prepare
from moe_jax.data.writer import SplitWriter
source, expected, work = map(pathlib.Path, sys.argv[1:])

def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def deadly(real, left):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

for kill_at in range(1000):
    output = work / str(kill_at)
    if not (child := os.fork()):
        left = [kill_at]
        SplitWriter.add = deadly(SplitWriter.add, left)
        os.replace = deadly(os.replace, left)
        shutil.rmtree = deadly(shutil.rmtree, left)
        prepare(Options(source, output))
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    prepare(Options(source, output))
    assert read(output) == read(expected), f"killed before change {kill_at}"
    if not killed:
        break
print("changes:", kill_at)
"""


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    lines = '{"text": "uno"}\n{"text": "due", "more": 1}\n{"text": "tre"}'
    for name, text in {
        "prose/one.txt": "first",
        "prose/deep/two.md": "second ü",
        "prose/three.txt": "third\r\n",
        "lines/all.jsonl": lines,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def texts(output, domain):
    corpus = open_corpus(str(output))
    streams = [corpus.stream(split, domain) for split in ("train", "validation")]
    return sorted(
        corpus.tokenizer.decode(document)
        for stream in streams
        for document in np.split(stream.tokens, stream.offsets[1:-1])
    )


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare(options)
    return str(caught.value)


def test_subfolders_are_domains_and_every_document_lands_in_one_split_unchanged(source, output):
    prepare(Options(source, output))
    assert open_corpus(str(output)).domains == ("lines", "prose")
    assert texts(output, "prose") == ["first", "second ü", "third\r\n"]
    assert texts(output, "lines") == ["due", "tre", "uno"]
    assert not (output / ".partial").exists()


def test_files_are_little_endian_tokens_and_offsets_behind_separators(source, output):
    prepare(Options(source, output))
    entry = json.loads((output / "manifest.json").read_text())["domains"]["lines"]["validation"]
    tokens = np.fromfile(output / "lines.validation.bin", "<u2")
    offsets = np.fromfile(output / "lines.validation.offsets.bin", "<i8")
    assert entry["num_tokens"] == len(tokens)
    assert entry["num_documents"] == len(offsets) - 1
    assert offsets.tolist() == [*np.flatnonzero(tokens == 256), len(tokens)]


@pytest.mark.parametrize("fraction", [1e-9, 0.3, 1 - 1e-9])
def test_every_domain_has_a_training_and_a_held_out_document(source, output, fraction):
    prepare(Options(source, output, validation_fraction=fraction))
    corpus = open_corpus(str(output))
    assert min(stream.num_documents for stream in corpus.streams.values()) >= 1


def test_the_share_held_out_is_near_the_fraction_and_grows_with_it(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(2000)))
    held_out = []
    for fraction in (0.05, 0.2):
        output = tmp_path / str(fraction)
        prepare(Options(tmp_path / "in", output, validation_fraction=fraction))
        corpus = open_corpus(str(output))
        stream = corpus.stream("validation", "in")
        assert abs(stream.num_documents / 2000 - fraction) < 0.02  # 4 standard deviations at 0.05
        held_out.append({corpus.tokenizer.decode(d) for d in np.split(stream.tokens, stream.offsets[1:-1])})
    assert held_out[0] < held_out[1]


def test_the_same_input_elsewhere_gives_the_same_bytes(source, output, tmp_path):
    prepare(Options(source, output))
    moved = source.rename(tmp_path / "moved")
    prepare(Options(moved, tmp_path / "again"))
    assert read(output) == read(tmp_path / "again")


def test_files_directly_in_the_folder_belong_to_its_name_or_to_domain(source, tmp_path):
    (source / "prose" / "deep" / "two.md").rename(source / "prose" / "two.md")
    prepare(Options(source / "prose", tmp_path / "one"))
    assert open_corpus(str(tmp_path / "one")).domains == ("prose",)
    prepare(Options(source / "prose", tmp_path / "two", domain="novels"))
    assert open_corpus(str(tmp_path / "two")).domains == ("novels",)


def test_ignored_files_are_listed(source, output, capsys):
    (source / "prose" / "table.csv").write_text("a,b")
    (source / ".git").mkdir()
    (source / "prose" / ".hidden.txt").write_text("x")
    prepare(Options(source, output))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Ignored"))
    assert line.endswith(": .git, prose/.hidden.txt, prose/table.csv")


def test_include_chooses_other_endings(source, output):
    (source / "prose" / "x.rst").write_text("fourth")
    prepare(Options(source, output, include="*.txt, *.rst,*.jsonl"))
    assert texts(output, "prose") == ["first", "fourth", "third\r\n"]


def test_of_the_ignored_files_ten_are_named_and_the_rest_counted(source, output, capsys):
    for number in range(12):
        (source / "prose" / f"{number:02}.png").write_bytes(b"\xff")
    prepare(Options(source, output))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Ignored"))
    assert line.endswith("prose/08.png, prose/09.png and 2 more")


@pytest.mark.parametrize("name", [b"caf\xe9.bin", b"caf\xe9.txt", b"two\nlines\x1b[2J.bin"])
def test_a_name_that_cannot_be_printed_is_escaped_and_stops_nothing(source, output, name):
    (source / "prose" / os.fsdecode(name)).write_text("fourth")
    command = [sys.executable, "-m", "moe_jax.data.prepare", f"--input={source}", f"--output={output}"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=strict)
    assert run.returncode == 0, run.stderr
    escaped = {b"caf\xe9.bin": r"caf\udce9.bin", b"two\nlines\x1b[2J.bin": r"two\nlines\x1b[2J.bin"}.get(name, "")
    assert not escaped or run.stdout.splitlines()[0].endswith(f"prose/{escaped}")
    assert ("fourth" in texts(output, "prose")) == name.endswith(b".txt")


def test_an_output_folder_whose_name_cannot_be_printed_is_written_and_named(source, tmp_path):
    output = tmp_path / os.fsdecode(b"caf\xe9")
    command = [sys.executable, "-m", "moe_jax.data.prepare", f"--input={source}", f"--output={output}"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=strict)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, rf"Wrote {tmp_path}/caf\udce9/manifest.json.")


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".ndjson", ".json"])
def test_json_lines_are_read_by_lines_under_each_of_their_names(tmp_path, output, ending):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"x{ending}").write_text('{"text": "first\\n"}\n{"text": "second"}\n')
    prepare(Options(tmp_path / "a", output, include=f"*{ending}"))
    assert texts(output, "a") == ["first\n", "second"]


def test_a_file_that_is_read_by_lines_now_and_was_one_text_is_another_input(tmp_path, output, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("x", "y"):
        (tmp_path / "a" / f"{name}.json").write_text('{"text": "first"}\n{"text": "second"}\n')
    monkeypatch.setattr(sources, "LINES", (".jsonl",))  # as versions before had it
    prepare(Options(tmp_path / "a", output, include="*.json"))
    monkeypatch.undo()
    assert "made from other inputs or options" in refusal(Options(tmp_path / "a", output, include="*.json"))


def test_a_byte_order_mark_is_no_text(source, output):
    (source / "prose" / "one.txt").write_bytes(codecs.BOM_UTF8 + b"first")
    lines = source / "lines" / "all.jsonl"
    lines.write_bytes(codecs.BOM_UTF8 + lines.read_bytes())
    prepare(Options(source, output))
    assert texts(output, "prose") == ["first", "second ü", "third\r\n"]
    assert texts(output, "lines") == ["due", "tre", "uno"]
    (source / "prose" / "one.txt").write_bytes(codecs.BOM_UTF8)
    assert "prose/one.txt: is empty" in refusal(Options(source, output))


def test_what_is_no_file_is_refused_by_name_and_not_waited_for(source, output):
    os.mkfifo(source / "prose" / "pipe.txt")
    (source / "prose" / "lost.txt").symlink_to(source / "nowhere")
    (source / "prose" / "loop.txt").symlink_to("loop.txt")
    (source / "prose" / "zero.txt").symlink_to("/dev/zero")
    message = refusal(Options(source, output))
    assert "\nprose/pipe.txt: is a pipe, a socket or a device, and no file" in message
    assert "\nprose/zero.txt: is a pipe, a socket or a device, and no file" in message
    assert "\nprose/lost.txt: is a link to a file that does not exist" in message
    assert "\nprose/loop.txt: is a link to a file that does not exist" in message
    assert not output.exists()


def test_a_link_to_a_file_is_read(source, output):
    (source / "prose" / "one.txt").rename(source.parent / "elsewhere.txt")
    (source / "prose" / "one.txt").symlink_to(source.parent / "elsewhere.txt")
    prepare(Options(source, output))
    assert "first" in texts(output, "prose")


def test_an_archive_is_refused_with_what_to_do(source, output):
    (source / "prose" / "more.tar.gz").write_bytes(gzip.compress(b"x"))
    assert "prose/more.tar.gz: is an archive; unpack it first" in refusal(Options(source, output, include="*.gz"))
    assert "(archives must be unpacked first)" in refusal(Options(source, output, include="*.rst"))


# Names that are taken in the output folder or in the notes of a run, and one that ends as our own files do
OURS = ("plan", "lock", "manifest", "manifest.json", "tokenizer", "finished", "train", "plan.json", "a.train", "a")


def test_a_domain_may_have_any_name_that_our_own_files_have(tmp_path, output):
    for name in OURS:
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.jsonl").write_text(f'{{"text": "1 {name}"}}\n{{"text": "2 {name}"}}\n')
    prepare(Options(tmp_path / "in", output))
    assert open_corpus(str(output)).domains == tuple(sorted(OURS))
    for name in OURS:
        assert texts(output, name) == [f"1 {name}", f"2 {name}"]


BAD = {
    "binary.txt": (b"a\nb\0c", "prose/binary.txt: has a NUL byte (line 2): it is not text"),
    "latin.txt": ("a\n\né".encode("latin-1"), "prose/latin.txt: is not UTF-8 (byte 3, line 3)"),
    "empty.md": (b"", "prose/empty.md: is empty"),
    "blank.md": (b" \n", "prose/blank.md: is empty"),
    "nothing.jsonl": (b"", "prose/nothing.jsonl: is empty"),
    "a.jsonl": (b'{"text": "x"}\n{"text": ', "prose/a.jsonl:2: is not JSON ("),
    "b.jsonl": (b'{"body": "x"}\n', "prose/b.jsonl:1: must be a JSON object with a string under 'text'"),
    "c.jsonl": (b'["text"]\n', "prose/c.jsonl:1: must be a JSON object with a string under 'text'"),
    "d.jsonl": (b'{"text": 3}\n', "prose/d.jsonl:1: must be a JSON object with a string under 'text'"),
    "e.jsonl": (b'{"text": "x"}\n\n{"text": "y"}\n', "prose/e.jsonl:2: is an empty line"),
    "f.jsonl": (b'{"text": ""}\n', "prose/f.jsonl:1: is empty"),
    "g.jsonl": (b'{"text": "\\ud800"}\n', "prose/g.jsonl:1: has half a surrogate pair (character 0"),
    "h.jsonl": (b'{"text": "\xff"}\n', "prose/h.jsonl:1: is not UTF-8 (byte 10, line 1)"),
    "i.jsonl": (b'{"text": "a\\u0000"}\n', "prose/i.jsonl:1: has a NUL byte (line 1): it is not text"),
    "j.jsonl": (b"[" * 100_000, "prose/j.jsonl:1: is not JSON ("),
}


def test_all_bad_documents_are_named_before_anything_is_written(source, output):
    for name, (data, _) in BAD.items():
        (source / "prose" / name).write_bytes(data)
    message = refusal(Options(source, output))
    assert not output.exists()
    for _, expected in BAD.values():
        assert f"\n{expected}" in message


def test_only_the_first_twenty_bad_documents_are_named(source, output):
    (source / "lines" / "bad.jsonl").write_text("{\n" * 30)
    message = refusal(Options(source, output))
    assert message.count("bad.jsonl:") == 20
    assert "the first 20; there may be more" in message


def test_the_command_ends_with_status_two_and_the_list(source, output):
    (source / "prose" / "bad.txt").write_bytes(b"\xff")
    command = [sys.executable, "-W", "error", "-m", "moe_jax.data.prepare"]
    run = subprocess.run(
        [*command, f"--input={source}", f"--output={output}"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: --input={source} has bad documents")
    assert "prose/bad.txt: is not UTF-8" in run.stderr


def test_the_command_takes_every_option(source, output, capsys):
    main(
        [
            f"--input={source}",
            f"--output={output}",
            "--validation_fraction=0.5",
            "--text_key=text",
            "--include=*.txt,*.jsonl,*.md",
        ]
    )
    assert json.loads((output / "manifest.json").read_text())["options"] == {
        "validation_fraction": 0.5,
        "text_key": "text",
    }
    main([f"--input={source}", f"--output={output}", "--overwrite"])
    assert json.loads((output / "manifest.json").read_text())["options"]["validation_fraction"] == 0.05


def test_another_text_key_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    prepare(Options(tmp_path / "in", tmp_path / "out", text_key="body"))
    assert texts(tmp_path / "out", "in") == ["x", "y"]


def test_bad_options_are_refused_in_a_sentence(source, output, tmp_path):
    assert "is not a folder; give the folder" in refusal(Options(tmp_path / "nowhere", output))
    assert "--validation_fraction=1.0 must be above 0 and below 1" in refusal(
        Options(source, output, validation_fraction=1.0)
    )
    assert "must not be inside each other" in refusal(Options(source, source / "prose"))
    assert "must not be inside each other" in refusal(Options(source, tmp_path))
    assert "has no file that matches --include=*.rst" in refusal(Options(source, output, include="*.rst"))
    assert "--domain=name names the files directly in" in refusal(Options(source, output, domain="name"))


def test_a_domain_of_one_document_or_of_an_odd_name_is_refused_by_name(source, output):
    (source / "lonely").mkdir()
    (source / "lonely" / "a.txt").write_text("x")
    assert "Domain 'lonely' has 1 document and must have at least 2" in refusal(Options(source, output))
    (source / "lonely").rename(source / "two words")
    assert "Domain 'two words' must be letters, digits" in refusal(Options(source, output))


def test_a_subfolder_and_loose_files_may_not_share_a_domain(source, output):
    (source / "loose.txt").write_text("x")
    message = refusal(Options(source, output, domain="prose"))
    assert "has a subfolder prose, and the files beside it" in message


def test_many_processes_write_the_same_bytes_and_name_the_same_bad_documents(source, output, capfd):
    prepare(Options(source, output))
    other = output.with_name("other")
    prepare(Options(source, other, processes=2))
    assert read(other) == read(output)
    (source / "prose" / "bad.txt").write_bytes(b"\xff")
    (source / "lines" / "bad.jsonl").write_text("{\n" * 30)
    sequential = refusal(Options(source, output, overwrite=True, processes=1))
    assert refusal(Options(source, output, overwrite=True, processes=2)) == sequential
    assert "--processes=-1 must be at least 1" in refusal(Options(source, output, processes=-1))
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_killed_anywhere_and_run_again_gives_the_same_bytes(source, output, tmp_path):
    prepare(Options(source, output))
    (tmp_path / "work").mkdir()
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            KILL_EVERYWHERE,
            str(source),
            str(output),
            str(tmp_path / "work"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # 6 documents; 4 files and a note for each of 2 domains; plan, manifest and its move; the removal of two folders.
    assert run.stdout.endswith("changes: 21\n")


def test_resuming_keeps_finished_domains_and_writes_damaged_ones_again(source, output, monkeypatch, capsys):
    prepare(Options(source, output))
    expected = read(output)

    def interrupt(path, manifest):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "complete", interrupt)
    other = output.with_name("third")
    with pytest.raises(KeyboardInterrupt):
        prepare(Options(source, other))
    monkeypatch.undo()
    (other / "prose.train.bin").write_bytes(b"")
    capsys.readouterr()
    prepare(Options(source, other))
    said = capsys.readouterr().out
    assert "lines: kept from an earlier run." in said
    assert "Writing it again." in said
    assert read(other) == expected


def test_running_again_on_the_same_input_changes_nothing(source, output, capsys):
    prepare(Options(source, output))
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    prepare(Options(source, output))
    assert "is complete already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}


def test_the_same_input_elsewhere_is_complete_already(source, output, tmp_path, capsys):
    prepare(Options(source, output))
    moved = source.rename(tmp_path / "moved")
    for file in moved.rglob("*.txt"):
        os.utime(file, (1, 1))
    prepare(Options(moved, output))
    assert "is complete already" in capsys.readouterr().out


def test_a_folder_made_from_other_inputs_or_options_is_refused_unless_overwritten(source, output):
    prepare(Options(source, output))
    before = read(output)
    (source / "prose" / "one.txt").write_text("First")
    for options in (Options(source, output), Options(source, output, validation_fraction=0.5)):
        assert "holds a corpus made from other inputs or options" in refusal(options)
        assert read(output) == before
    (source / "lines" / "all.jsonl").unlink()
    prepare(Options(source, output, overwrite=True))
    assert open_corpus(str(output)).domains == ("prose",)
    assert "First" in texts(output, "prose")
    assert not list(output.glob("lines*"))


@pytest.fixture
def vocabulary(tmp_path):
    settings = dict(tokenizer_config=dict(bos_token="<|begin|>"), generation_config=dict(eos_token_id=[1]))
    return vocabularies.write(tmp_path / "vocabulary", vocabularies.byte_level(), **settings)


def test_settings_beside_the_same_vocabulary_are_replaced_and_the_streams_kept(source, output, vocabulary):
    options = Options(source, output, tokenizer=str(vocabulary))
    prepare(options)
    streams = {path: path.stat().st_mtime_ns for path in output.glob("*.bin")}
    (vocabulary / "generation_config.json").write_text('{"eos_token_id": [1, 300]}')
    (vocabulary / "config.json").write_text('{"bos_token_id": 0}')
    prepare(options)
    assert open_corpus(str(output)).tokenizer.ends == (0, 1, 300)
    assert {path: path.stat().st_mtime_ns for path in streams} == streams
    (vocabulary / "config.json").unlink()
    (vocabulary / "generation_config.json").write_text('{"eos_token_id": [1]}')
    prepare(options)
    assert open_corpus(str(output)).tokenizer.ends == (0, 1)
    assert not (output / "tokenizer" / "config.json").exists()
    assert not (output / ".partial").exists()


def test_replaced_settings_survive_a_kill_at_any_moment(source, output, vocabulary, monkeypatch):
    options = Options(source, output, tokenizer=str(vocabulary))
    for number in range(100):
        prepare(options)
        (vocabulary / "generation_config.json").write_text(f'{{"eos_token_id": [1, {number % 256 + 2}]}}')
        interrupt_at(monkeypatch, number)
        try:
            prepare(options)
        except KeyboardInterrupt:
            monkeypatch.undo()
            prepare(options)
            assert open_corpus(str(output)).tokenizer.ends == (0, 1, number % 256 + 2)
        else:
            break
    assert 5 < number < 99


def interrupt_at(monkeypatch, count):
    """A KeyboardInterrupt in place of the n-th change of the disk."""
    left = [count]
    for holder, name in ((os, "replace"), (shutil, "rmtree"), (Path, "replace"), (Path, "unlink")):
        real = getattr(holder, name)

        def call(*args, real=real, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(holder, name, call)


def test_a_corpus_may_be_prepared_over_with_its_own_tokenizer(source, output, vocabulary):
    prepare(Options(source, output, tokenizer=str(vocabulary)))
    (source / "prose" / "one.txt").write_text("First")
    prepare(Options(source, output, tokenizer=str(output / "tokenizer"), overwrite=True))
    assert "First" in texts(output, "prose")


def test_another_separator_is_another_corpus(source, output, vocabulary):
    prepare(Options(source, output, tokenizer=str(vocabulary)))
    (vocabulary / "tokenizer_config.json").write_text('{"bos_token": "<|end|>"}')
    assert "made from other inputs or options" in refusal(Options(source, output, tokenizer=str(vocabulary)))


def test_a_damaged_corpus_is_refused_and_overwrite_mends_it(source, output):
    prepare(Options(source, output))
    expected = read(output)
    (output / "prose.train.bin").write_bytes(b"\1" * len(expected["prose.train.bin"]))
    assert "sha256 of prose.train.bin" in refusal(Options(source, output))
    prepare(Options(source, output, overwrite=True))
    assert read(output) == expected


def test_a_folder_of_other_things_is_never_touched(source, output):
    output.mkdir()
    (output / "thesis.doc").write_text("x")
    assert "holds other files and must be new or empty" in refusal(Options(source, output, overwrite=True))
    (output / "manifest.json").write_text('{"name": "app"}')
    assert "has a manifest.json that is not a corpus's" in refusal(Options(source, output, overwrite=True))
    assert sorted(read(output)) == ["manifest.json", "thesis.doc"]


def test_input_that_changes_between_the_two_readings_is_refused(source, output, monkeypatch):
    real = folder.obstacle

    def change(*args):
        (source / "prose" / "one.txt").write_text("changed")
        return real(*args)

    monkeypatch.setattr(folder, "obstacle", change)
    assert "prose/one.txt changed while it was read" in refusal(Options(source, output))
    assert not (output / "manifest.json").exists()


def test_a_second_run_on_the_same_folder_waits_its_turn(source, output):
    (output / ".partial").mkdir(parents=True)
    with open(output / ".partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being written by another run" in refusal(Options(source, output))
