"""The steps from packages to two prepared corpora, each of which is done whole or not at all.

In the output folder, in the order in which they appear:

    packages/          the archives as fetched, and a record of each
    text/DOMAIN/       documents.jsonl: a document a line, `id` and `text`
    notes/             a note on every finished step; lock
    tokenizer/         the vocabulary of 8192 tokens
    bytes/, bpe8192/   what `data.path` of a config names
    manifest.json      where every byte came from; last

A command that was killed at any moment is repeated: finished steps are kept, the others are done again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.data import check_corpus
from moe_jax.data.manifest import MANIFEST, SPLITS
from moe_jax.data.prepare import prepare
from moe_jax.data.progress import progress
from moe_jax.data.scan import scan
from moe_jax.data.sources import Options, find_sources
from moe_jax.runtime.files import lock, read_json, write_json

from . import documents, fetch, vocabulary
from .domains import DOMAINS, describe_library, library
from .packages import APT, PACKAGES

FORMAT = "moe_jax packages' text"
CORPORA = ("bytes", f"bpe{vocabulary.SIZE}")
UNFINISHED = r"manifest\.\d+\.tmp"  # what a kill leaves of a manifest
FOLDERS = ("packages", "text", "notes", ".unfinished", "tokenizer", *CORPORA)


def build(output: Path, domains: Sequence[str]) -> dict[str, Any]:
    """Builds what is not there yet.

    Args:
        output: the folder, created if absent.
        domains: keys of DOMAINS.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder holds something else, a client is missing or failed, or an archive is wrong.
        OSError: the disk.
    """
    domains = sorted(domains)
    there = _refuse_foreign(output, domains)
    if there and _is_whole(output, there):
        return there
    leave_out = {domain: DOMAINS[domain].package for domain in domains}
    missing = _to_fetch(output, domains)
    # apt-get comes with what unpacks its archives
    fetch.check_clients(
        [name for name in _unread(output, domains) if name in missing or PACKAGES[name].client == APT], leave_out
    )
    with _locked(output) as scratch:
        (output / MANIFEST).unlink(missing_ok=True)
        _drop_other_domains(output, domains)
        with progress("corpus", _work(output, domains)):
            fetch.fetch(missing, output / "packages", scratch, leave_out)
            notes = {domain: _text(output, domain, scratch) for domain in domains}
            inputs = _inputs(notes)
            _prepare(output, CORPORA[0], Options(output / "text", output / CORPORA[0]), inputs)
            options = Options(output / "text", output / CORPORA[1], tokenizer=str(output / "tokenizer"))
            if not vocabulary.finished(output / "tokenizer", inputs):
                vocabulary.write(output / "tokenizer", options, scan(options, find_sources(options)), inputs)
            _prepare(output, CORPORA[1], options, inputs)
        manifest = _manifest(output, notes)
        write_json(output / MANIFEST, manifest, durable=True)
    return manifest


def report(manifest: Mapping[str, Any]) -> list[str]:
    """Lines with what came out: a table of the domains, packages that are not the listed ones, fingerprints."""
    lines = [
        f"{'domain':12} {'documents':>9} {'held out':>8} {'MB':>7} {'held out':>8} {'bytes/token':>11} {'xz bpb':>7}"
    ]
    for name, entry in manifest["domains"].items():
        train, held_out = (entry["splits"][split] for split in SPLITS)
        size = train["bytes"] + held_out["bytes"]
        lines.append(
            f"{name:12} {entry['documents']:9,} {held_out['documents']:8,} {size / 1e6:7.2f} "
            f"{held_out['bytes'] / 1e6:8.2f} {size / (train['bpe_tokens'] + held_out['bpe_tokens']):11.2f} "
            f"{entry['xz_bits_per_byte']:7.3f}"
        )
    records = {entry["package"]["name"]: entry["package"] for entry in manifest["domains"].values()}
    lines += [f"! {line}" for record in records.values() if (line := fetch.report(record))]
    return lines + [f"{name}: fingerprint {found}" for name, found in manifest["fingerprints"].items()]


def _refuse_foreign(output: Path, domains: Sequence[str]) -> dict[str, Any]:
    """The manifest of an earlier run, empty if there is none.

    Raises:
        ValueError: the folder is not ours, or is finished with other domains.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file and must be a folder; give another path.")
    names = [path.name for path in output.iterdir()] if output.exists() else []
    other = [name for name in names if name not in (*FOLDERS, MANIFEST) and not re.fullmatch(UNFINISHED, name)]
    manifest = read_json(output / MANIFEST, f"delete it, or give another --output than {output}.")
    if other or (manifest and manifest.get("format") != FORMAT):
        raise ValueError(
            f"--output={output} holds {other[0] if other else f'a {MANIFEST}'}, which is not of this command, and must "
            "be new or empty; give another folder."
        )
    if manifest and list(manifest["domains"]) != domains:
        raise ValueError(
            f"--output={output} is finished, with --domains={','.join(manifest['domains'])}; give another folder for "
            "other domains, or delete this one."
        )
    return manifest


def _is_whole(output: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether both corpora are there as the manifest says, by the sizes of their files."""
    if any(entry["recipe"] != documents.RECIPE for entry in manifest["domains"].values()):
        print(f"{output} is of an earlier recipe; its text is made again.")
        return False
    try:
        return all(check_corpus(str(output / name)).fingerprint == manifest["fingerprints"][name] for name in CORPORA)
    except (FileNotFoundError, ValueError) as error:
        print(f"{error} It is made again.")
        return False


@contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """Keeps a second run out; yields an empty folder for unfinished files."""
    for folder in (output / "packages", output / "text", output / "notes"):
        folder.mkdir(parents=True, exist_ok=True)
    scratch = output / ".unfinished"
    with open(output / "notes" / "lock", "w") as file:
        lock(file, output, f"--output={output} is being written by another run; wait for it to end.")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(exist_ok=True)
        for path in [*output.glob("*.tmp"), *output.glob("*/*.tmp")]:  # what a kill left of a note
            path.unlink()
        yield scratch
        shutil.rmtree(scratch)


def _unread(output: Path, domains: Sequence[str]) -> list[str]:
    """The packages of unfinished domains."""
    names = [DOMAINS[domain].package for domain in domains if not documents.finished(output, domain)]
    return [name for name in dict.fromkeys(names) if name]


def _to_fetch(output: Path, domains: Sequence[str]) -> list[str]:
    """Those of them that are not there yet."""
    return [name for name in _unread(output, domains) if not fetch.find(name, output / "packages")]


def _drop_other_domains(output: Path, domains: Sequence[str]) -> None:
    """Removes the text of domains that an earlier, unfinished run had."""
    for folder in (output / "text").iterdir():
        if folder.name not in domains:
            documents.note_of(output, folder.name).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _work(output: Path, domains: Sequence[str]) -> int:
    """About how many bytes the steps that are left will count on the bar."""
    text = sum(DOMAINS[domain].bytes for domain in domains)
    reading = sum(DOMAINS[domain].bytes for domain in domains if not documents.finished(output, domain))
    fetching = sum(PACKAGES[name].bytes for name in _to_fetch(output, domains))
    # prepare reads everything twice, for each corpus, and once more for the sample
    return fetching + reading + 5 * text + len(domains) * vocabulary.SAMPLE_BYTES


def _text(output: Path, domain: str, scratch: Path) -> dict[str, Any]:
    """Writes a domain, unless an earlier run did; returns its note."""
    if note := documents.finished(output, domain):
        return note
    if not (package := DOMAINS[domain].package):
        return documents.write(output, domain, library(), describe_library(library()), scratch)
    archive = fetch.find(package, output / "packages")
    assert archive is not None  # it has been fetched
    return documents.write(output, domain, archive.path, archive.record, scratch)


def _inputs(notes: Mapping[str, Mapping[str, Any]]) -> str:
    """A hash of all text."""
    return hashlib.sha256(json.dumps({name: note["sha256"] for name, note in notes.items()}).encode()).hexdigest()


def _prepare(output: Path, name: str, options: Options, inputs: str) -> None:
    """Prepares one corpus, unless an earlier run did; it replaces one of other text, for it is ours."""
    note = output / "notes" / f"{name}.prepared"
    if read_json(note, "delete it.").get("inputs") == inputs:
        try:
            check_corpus(str(options.output))
        except (FileNotFoundError, ValueError) as error:
            print(f"{error} It is made again.")
        else:
            return
    prepare(Options(**vars(options) | {"overwrite": True}))
    write_json(note, {"inputs": inputs}, durable=True)


def _manifest(output: Path, notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    from tokenizers import __version__ as version

    prepared = [read_json(output / name / MANIFEST, "")["domains"] for name in CORPORA]
    return {
        "format": FORMAT,
        "domains": {
            domain: {**note, "file": str(documents.path_of(output, domain).relative_to(output))}
            | {"splits": {split: _split(*(entry[domain][split] for entry in prepared)) for split in SPLITS}}
            for domain, note in notes.items()
        },
        "tokenizer": {
            "vocab_size": vocabulary.SIZE,
            "trained_by": f"tokenizers {version}",
            "sha256": vocabulary.sha256_of_file(output / "tokenizer" / vocabulary.FILES[0]),
        },
        "fingerprints": {name: check_corpus(str(output / name)).fingerprint for name in CORPORA},
    }


def _split(as_bytes: Mapping[str, Any], as_bpe: Mapping[str, Any]) -> dict[str, int]:
    """Documents, bytes and BPE tokens of one split, without the separators that open documents."""
    count = as_bytes["num_documents"]
    return {
        "documents": count,
        "bytes": as_bytes["num_tokens"] - count,
        "bpe_tokens": as_bpe["num_tokens"] - as_bpe["num_documents"],
    }
