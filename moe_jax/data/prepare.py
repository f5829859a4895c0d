"""Turns a folder of text into a corpus of memory-mapped tokens.

    python -m moe_jax.data.prepare --input=FOLDER --output=DIR [--validation_fraction=0.05] [--text_key=text]
                                   [--domain=NAME] [--include='*.txt,*.md,*.jsonl'] [--overwrite]
                                   [--tokenizer=DIR_OR_JSON [--separator=TOKEN]]

First-level subfolders are the domains; files directly in FOLDER belong to a domain named after it, or to
--domain. A file is one document, except that every line of a .jsonl, .ndjson or .json file is one, its text under
--text_key.

Tokens are bytes, or those of a trained vocabulary: --tokenizer names a tokenizer.json or the folder of the model that
holds it. Its files are copied into the output, which needs nothing else. Documents are opened by the model's bos or eos
token, or by --separator; names of special tokens in the text are text.

Everything is read twice. The first time checks it, so that bad input is named before anything is written, and
decides by a hash of each document's path and line which documents are held out. The second time writes,
domain after domain, and the manifest last. Killed at any moment and run again, finished domains are kept, and
the result is the same to the last byte. Run again with other settings beside the same tokenizer.json, as another
generation_config.json, only these are replaced.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of
from moe_jax.data.corpus import (
    FORMAT,
    MANIFEST,
    NAME,
    OFFSET_DTYPE,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    File,
    check_files,
    open_corpus,
    tokenize_documents,
)
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer, token_dtype
from moe_jax.data.vocabularies import get_tokenizer
from moe_jax.runtime.files import lock, write_whole

INCLUDE = "*.txt,*.md,*.jsonl"
MAX_PROBLEMS = 20
LINES = (".jsonl", ".ndjson", ".json")  # endings, in small or capital letters, of files with a document a line
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz")
MAX_IGNORED = 10  # names that are shown
PARTIAL = ".partial"  # of a run that has not ended: its plan, its lock, unfinished streams ...
FINISHED = "finished"  # ... and in a folder of their own, for a domain may have any name, notes on finished domains
PLAN = "plan.json"
CHARACTERS_AT_ONCE = 2**20  # documents are tokenized together until they have so many


@dataclasses.dataclass(frozen=True)
class Options:
    """What to prepare, and how; one field a flag."""

    input: pathlib.Path
    output: pathlib.Path
    validation_fraction: float = 0.05
    text_key: str = "text"
    domain: str = ""
    include: str = INCLUDE
    overwrite: bool = False
    tokenizer: str = ""
    separator: str = ""


class Piece(NamedTuple):
    """A document as found: where ("folder/file" or "folder/file:line"), and its text or what is wrong."""

    where: str
    text: str
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """An input file: path relative to the input folder, size in bytes, and sha256 of its text once it has been read."""

    name: str
    bytes: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class DomainPlan:
    """A domain after the first reading: its files, and the hash below which a document is held out."""

    name: str
    sources: tuple[Source, ...]
    threshold: int


def prepare(options: Options) -> None:
    """Prepares a corpus, or goes on with one that was interrupted.

    Args:
        options: see the flags of this command.

    Raises:
        ValueError: an option is out of range, the input has bad documents (up to 20 are named), or the output
            folder holds something else.
        FileNotFoundError: the input is not a folder.
    """
    _check_options(options)
    _refuse_foreign(options)
    tokenizer = get_tokenizer(options.tokenizer, options.separator) if options.tokenizer else ByteTokenizer()
    kept = _read_tokenizer_files(options)
    described = _describe_tokenizer(tokenizer, kept)
    plans = scan(options, find_sources(options))
    made_from = _made_from(options, plans, tokenizer)
    obstacle = _obstacle(options.output, made_from)
    if obstacle and not options.overwrite:
        raise obstacle
    partial, manifest = options.output / PARTIAL, options.output / MANIFEST
    there = {} if obstacle else _read_note(manifest)
    if there.get("tokenizer") == described and not partial.exists():
        print(f"{options.output} is complete already.")
        return
    with _locked(partial):
        if obstacle:
            _discard(options.output)
        elif there:
            _reopen(options.output, there)
        _write_json(partial / PLAN, {"fingerprint": made_from})
        domains = {plan.name: _finished(options, plan) or _write_domain(options, plan, tokenizer) for plan in plans}
        _keep_tokenizer(options.output, kept)
        _write_json(manifest, _manifest(options, made_from, domains, described, tokenizer))
        shutil.rmtree(partial)
    print(f"{manifest} is written.")


# What is there


def find_sources(options: Options) -> dict[str, list[Source]]:
    """Finds the input files of each domain, and prints which files are ignored and why.

    Args:
        options: see `prepare`.

    Returns:
        domain -> files in the order of their names, domains sorted.

    Raises:
        ValueError: nothing matches, a name cannot be a domain, or --domain names nothing or a subfolder's
        domain.
    """
    root = options.input
    taken: list[str] = []
    ignored: list[str] = []
    patterns = [pattern.strip() for pattern in options.include.split(",")]
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        skipped = [name for name in subfolders if name.startswith(".") or os.path.islink(os.path.join(folder, name))]
        subfolders[:] = [name for name in subfolders if name not in skipped]
        for name in [*files, *skipped]:
            path = pathlib.Path(folder, name).relative_to(root)
            wanted = name in files and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            (taken if wanted and not name.startswith(".") else ignored).append(path.as_posix())
    if ignored:
        names = [shown(name) for name in sorted(ignored)[:MAX_IGNORED]]
        more = f" and {len(ignored) - MAX_IGNORED} more" if len(ignored) > MAX_IGNORED else ""
        print(
            f"Ignored, for they do not match --include={options.include} or are hidden or linked folders: "
            f"{', '.join(names)}{more}"
        )
    if not taken:
        packed = " (compressed files must be unpacked first)" if any(map(_is_packed, ignored)) else ""
        raise ValueError(
            f"--input={root} has no file that matches --include={options.include}; give another "
            f"folder or other patterns{packed}."
        )
    return _by_domain(options, sorted(taken))


def shown(name: str) -> str:
    """A file's name for a message: what cannot be printed, or would command the terminal, is escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _is_packed(name: str) -> bool:
    return name.lower().endswith(PACKED)


def _by_domain(options: Options, names: Sequence[str]) -> dict[str, list[Source]]:
    own = options.domain or options.input.resolve().name
    direct = [name for name in names if "/" not in name]
    if options.domain and not direct:
        raise ValueError(
            f"--domain={own} names the files directly in --input={options.input}, and there are "
            f"none; leave it out: subfolders name their own domains."
        )
    domains: dict[str, list[Source]] = {}
    for name in names:
        domain = name.split("/")[0] if "/" in name else own
        path = options.input / name
        domains.setdefault(domain, []).append(Source(name, path.stat().st_size if path.is_file() else 0))
    if direct and len(domains[own]) > len(direct):
        raise ValueError(
            f"--input={options.input} has a subfolder {own}, and the files beside it would "
            f"belong to the same domain; name theirs with --domain=NAME."
        )
    for domain in domains:
        if not NAME.fullmatch(domain):
            raise ValueError(
                f"Domain {domain!r} must be letters, digits, '_', '-' and '.'; rename the "
                f"folder, or use --domain=NAME for files directly in --input."
            )
    return dict(sorted(domains.items()))


def _raise(error: OSError) -> None:
    raise error  # os.walk leaves out unreadable folders otherwise


# The first reading


def scan(options: Options, domains: dict[str, list[Source]]) -> list[DomainPlan]:
    """Reads and checks every document, hashes every file, and decides the splits.

    Args:
        options: see `prepare`.
        domains: what `find_sources` found.

    Returns:
        One plan a domain, in order.

    Raises:
        ValueError: bad documents, up to 20 of them named one a line; or a domain with fewer than two
        documents.
    """
    problems: list[str] = []
    plans = []
    total = sum(source.bytes for sources in domains.values() for source in sources)
    with _progress("checking", total) as advance:
        for domain, sources in domains.items():
            plans.append(_scan_domain(options, domain, sources, problems, advance))
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        more = f" (the first {MAX_PROBLEMS}; there may be more)" if len(problems) >= MAX_PROBLEMS else ""
        raise ValueError(
            "\n".join(
                [
                    f"--input={options.input} has bad documents; mend or remove them{more}:",
                    *problems[:MAX_PROBLEMS],
                ]
            )
        )
    return plans


def _scan_domain(
    options: Options,
    domain: str,
    sources: Sequence[Source],
    problems: list[str],
    advance: Callable[[int], None],
) -> DomainPlan:
    ranks: list[int] = []  # the smallest and the largest
    read: list[Source] = []
    count = 0
    for source in sources:
        digest = hashlib.sha256()
        for piece in read_documents(options, source.name, digest):
            if piece.problem:
                problems.append(f"{shown(piece.where)}: {piece.problem}")
            if len(problems) >= MAX_PROBLEMS:
                return DomainPlan(domain, (), 0)
            rank = document_rank(piece.where)
            ranks = [min([*ranks[:1], rank]), max([*ranks[1:], rank])]
            count += 1
        read.append(dataclasses.replace(source, sha256=digest.hexdigest()))
        advance(source.bytes)
    if count < 2 and not problems:
        raise ValueError(
            f"Domain '{domain}' has {count} document and must have at least 2, one to train on "
            f"and one to hold out; add documents to it or move its file to another domain."
        )
    wanted = int(options.validation_fraction * 2**64)
    # The document of smallest rank is always held out, and that of largest rank never.
    return DomainPlan(domain, tuple(read), min(max(wanted, ranks[0] + 1), ranks[1]))


def document_rank(where: str) -> int:
    """A uniform number in 0..2**64-1, fixed by a document's name; below the threshold it is held out."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(where), digest_size=8).digest(), "big")


def read_documents(options: Options, name: str, digest: Any) -> Iterator[Piece]:
    """Reads a file's documents one at a time.

    Args:
        options: see `prepare`.
        name: the file, relative to the input folder.
        digest: a hashlib object, fed with the file's bytes, without a byte order mark.

    Yields:
        Its documents; a bad one has a `problem` and no text.
    """
    path = options.input / name
    if problem := _unreadable(path):
        yield Piece(name, "", problem)
        return
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        if not _has_lines(name):
            data = file.read()
            digest.update(data)
            yield _check_text(name, data, *_decode(data))
            return
        number = 0
        for number, line in enumerate(file, 1):
            digest.update(line)
            yield _read_line(f"{name}:{number}", line, options.text_key)
        if not number:
            yield Piece(name, "", "is empty")


def _unreadable(path: pathlib.Path) -> str:
    """Why a file cannot be read as text, if that is known before: a pipe would be waited for without end."""
    if _is_packed(path.name):
        return "is compressed; unpack it first"
    if path.is_symlink() and not path.exists():
        return "is a link to a file that is not there"
    if not path.is_file():
        return "is a pipe, a socket or a device, and no file"
    return "" if os.access(path, os.R_OK) else "may not be read by you"


def _has_lines(name: str) -> bool:
    return name.lower().endswith(LINES)


def _decode(data: bytes) -> tuple[str, str]:
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 (byte {error.start}, line {_line(data, error.start)})"


def _line(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def _check_text(where: str, data: bytes, text: str, problem: str) -> Piece:
    if b"\0" in data:
        problem = f"has a NUL byte (line {_line(data, data.index(0))}): it is not text"
    if not problem and not text.strip():
        problem = "is empty"
    return Piece(where, "" if problem else text, problem)


def _read_line(where: str, line: bytes, text_key: str) -> Piece:
    text, problem = _decode(line)
    if problem:
        return Piece(where, "", problem)
    if not text.strip():
        return Piece(where, "", "is an empty line")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Piece(where, "", f"is not JSON ({error}), as every line of a {', '.join(LINES)} file must be")
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
        return Piece(where, "", f"must be a JSON object with a string under '{text_key}' (see --text_key)")
    try:
        data = value[text_key].encode("utf-8")
    except UnicodeEncodeError as error:
        return Piece(where, "", f"has half a surrogate pair (character {error.start} of its text)")
    return _check_text(where, data, value[text_key], "")


# The second reading


class _SplitWriter:
    """Writes one split of one domain, document by document, and remembers sizes and hashes."""

    def __init__(self, folder: pathlib.Path, domain: str, split: str) -> None:
        names = {"tokens": f"{domain}.{split}.bin", "offsets": f"{domain}.{split}.offsets.bin"}
        self._files = {part: open(folder / name, "wb") for part, name in names.items()}  # noqa: SIM115
        self._digests = {part: hashlib.sha256() for part in names}
        self._bytes = dict.fromkeys(names, 0)
        self._tokens, self._documents = 0, 0
        self._write("offsets", np.zeros(1, OFFSET_DTYPE))

    def add(self, tokens: np.ndarray) -> None:
        """Writes a document."""
        self._tokens, self._documents = self._tokens + len(tokens), self._documents + 1
        self._write("tokens", tokens)
        self._write("offsets", np.array([self._tokens], OFFSET_DTYPE))

    def close(self) -> None:
        """Makes sure that everything is on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def entry(self) -> dict[str, Any]:
        """The manifest's entry of this split."""
        parts = {
            part: {
                "file": pathlib.Path(file.name).name,
                "bytes": self._bytes[part],
                "sha256": self._digests[part].hexdigest(),
            }
            for part, file in self._files.items()
        }
        return {"num_tokens": self._tokens, "num_documents": self._documents, **parts}

    def _write(self, part: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._digests[part].update(data)
        self._bytes[part] += self._files[part].write(data)


def _write_domain(options: Options, plan: DomainPlan, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes a domain beside the final files, then moves it there, then notes that it is finished."""
    partial = options.output / PARTIAL
    with contextlib.ExitStack() as stack:
        writers = {split: _SplitWriter(partial, plan.name, split) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        _fill(options, plan, writers, tokenizer)
    entry = {split: writer.entry() for split, writer in writers.items()}
    for file in _files(options.output, entry):
        os.replace(partial / file.path.name, file.path)
    _write_json(_note(options.output, plan.name), entry)
    return entry


def _note(output: pathlib.Path, domain: str) -> pathlib.Path:
    return output / PARTIAL / FINISHED / f"{domain}.json"


def _fill(options: Options, plan: DomainPlan, writers: dict[str, _SplitWriter], tokenizer: Tokenizer) -> None:
    changed = Changed(tokenizer)
    with _progress(f"writing {plan.name}", sum(source.bytes for source in plan.sources)) as advance:
        for source in plan.sources:
            digest = hashlib.sha256()
            for pieces in _together(read_documents(options, source.name, digest)):
                documents = tokenize_documents([piece.text for piece in pieces], tokenizer)
                for piece, tokens in zip(pieces, documents, strict=True):
                    held_out = document_rank(piece.where) < plan.threshold
                    writers["validation" if held_out else "train"].add(tokens)
                    changed.count(piece.text, tokens)
            if digest.hexdigest() != source.sha256:
                raise ValueError(
                    f"{shown(source.name)} changed while it was read; run again when --input={options.input} is at "
                    "rest."
                )
            advance(source.bytes)
    changed.tell(plan.name)


def _together(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """The pieces in their order, as many at once as have CHARACTERS_AT_ONCE, the last one over it."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


class Changed:
    """Counts the documents whose tokens stand for other bytes than theirs, by reason."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.reasons: dict[str, tuple[int, int]] = {}  # -> documents, and bytes that they have more

    def count(self, text: str, tokens: np.ndarray) -> None:
        """Notes a document, given with its separator."""
        ids, own = tokens[1:], text.encode()
        found = self._tokenizer.to_bytes(ids)[self._tokenizer.lead(ids) :]
        if found != own:
            why = self._tokenizer.why_changed(text, ids)
            documents, more = self.reasons.get(why, (0, 0))
            self.reasons[why] = documents + 1, more + len(found) - len(own)

    def tell(self, domain: str) -> None:
        """Prints one line a reason, for bits per byte are then of another text."""
        for why, (documents, more) in self.reasons.items():
            print(
                f"{domain}: the tokens of {documents} documents stand for other bytes than the text has "
                f"({more:+d} in all), for {why}; bits per byte count those of the tokens."
            )


def _finished(options: Options, plan: DomainPlan) -> dict[str, Any] | None:
    """The entry of a domain that an earlier run finished, if its files are still what they were."""
    note = _note(options.output, plan.name)
    if not note.exists():
        return None
    entry = json.loads(note.read_text(encoding="utf-8"))
    try:
        check_files(_files(options.output, entry), full=True)
    except (FileNotFoundError, ValueError) as error:
        print(f"{plan.name}: {error} Writing it again.")
        return None
    print(f"{plan.name}: kept from an earlier run.")
    return entry


def _files(folder: pathlib.Path, entry: dict[str, Any]) -> list[File]:
    parts = [entry[split][part] for split in SPLITS for part in ("tokens", "offsets")]
    return [File(folder / part["file"], part["bytes"], part["sha256"]) for part in parts]


# The output folder


def _read_tokenizer_files(options: Options) -> dict[str, bytes]:
    """The files of a trained vocabulary, by the names that their copies have; read before anything is removed."""
    if not options.tokenizer:
        return {}
    from moe_jax.data.trained import TOKENIZER_FILE, tokenizer_files

    first, *others = tokenizer_files(path_of(options.tokenizer, "--tokenizer"))
    return {TOKENIZER_FILE: first.read_bytes()} | {file.name: file.read_bytes() for file in others}


def _describe_tokenizer(tokenizer: Tokenizer, files: dict[str, bytes]) -> Any:
    """What the manifest says of the tokenizer."""
    if not files:
        return tokenizer.name
    entries = [
        {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    ]
    return {"name": tokenizer.name, "separator": tokenizer.separator, "files": entries}


def _keep_tokenizer(output: pathlib.Path, files: dict[str, bytes]) -> None:
    """Copies a trained vocabulary's files into the output, where no others of an earlier one stay."""
    folder = output / TOKENIZER_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        folder.mkdir(exist_ok=True)
        write_whole(folder / name, data, durable=True)


def _refuse_foreign(options: Options) -> None:
    """Refuses an output folder that is not empty and not ours, for what is in it cannot be made again."""
    output = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file and must be a folder; give another path.")
    ours = not output.exists() or (output / MANIFEST).exists() or (output / PARTIAL).exists()
    if not ours and any(output.iterdir()):
        raise ValueError(f"--output={output} holds other files and must be new or empty; give another folder.")
    if (output / MANIFEST).exists() and _read_note(output / MANIFEST).get("format") != FORMAT:
        raise ValueError(
            f"--output={output} has a {MANIFEST} that is not a corpus's; give another folder, or remove it yourself."
        )


def _obstacle(output: pathlib.Path, made_from: str) -> Exception | None:
    """What is wrong with a corpus that is there already: it is made from something else, or damaged."""
    for path in (output / MANIFEST, output / PARTIAL / PLAN):
        if path.exists() and _read_note(path).get("fingerprint") != made_from:
            return ValueError(
                f"--output={output} holds a corpus made from other inputs or options; give another folder, or "
                "--overwrite to replace it."
            )
    return _damage(output) if (output / MANIFEST).exists() else None


def _damage(output: pathlib.Path) -> Exception | None:
    try:
        open_corpus(str(output), verify="full")
    except (FileNotFoundError, ValueError) as error:
        return error
    return None


def _discard(output: pathlib.Path) -> None:
    """Removes a corpus of ours, data first: killed in between, what is left still says that it is ours."""
    for split in SPLITS:
        for path in [*output.glob(f"*.{split}.bin"), *output.glob(f"*.{split}.offsets.bin")]:
            path.unlink()
    for folder in (output / TOKENIZER_FOLDER, output / PARTIAL / FINISHED):
        shutil.rmtree(folder, ignore_errors=True)
    for path in (output / PARTIAL / PLAN, output / MANIFEST):
        path.unlink(missing_ok=True)


def _reopen(output: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Makes a finished corpus one of which only the domains are finished: its tokenizer's settings have changed."""
    for domain, entry in manifest["domains"].items():
        _write_json(_note(output, domain), entry)
    _write_json(output / PARTIAL / PLAN, {"fingerprint": manifest["fingerprint"]})
    (output / MANIFEST).unlink()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the same folder; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        lock(file, folder, f"--output={folder.parent} is being written by another run; wait for it to end.")
        yield


def _read_note(path: pathlib.Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_bytes()) if path.exists() else None
    except ValueError:
        note = None  # not written by us, so nothing in it is as expected
    return note if isinstance(note, dict) else {}


def _made_from(options: Options, plans: Sequence[DomainPlan], tokenizer: Tokenizer) -> str:
    """A hash of all that the streams depend on."""
    everything = [
        VERSION,
        tokenizer.name,
        options.validation_fraction,
        options.text_key,
        [[plan.name, [_identity(source) for source in plan.sources]] for plan in plans],
    ]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _identity(source: Source) -> list[str]:
    """What of a file decides its documents; earlier versions took each of these names but .jsonl for one document."""
    how = ["lines"] if _has_lines(source.name) and not source.name.endswith(LINES[0]) else []
    return [source.name, source.sha256, *how]


def _manifest(
    options: Options, made_from: str, domains: dict[str, Any], described: Any, tokenizer: Tokenizer
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": made_from,
        "options": {"validation_fraction": options.validation_fraction, "text_key": options.text_key},
        "tokenizer": described,
        "vocab_size": tokenizer.vocab_size,
        "dtypes": {
            "tokens": f"{token_dtype(tokenizer.vocab_size).name}, little-endian",
            "offsets": "int64, little-endian",
        },
        "domains": domains,
    }


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.parent / f"{path.name}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one plain line elsewhere; gives the function that adds bytes."""
    if not sys.stdout.isatty():
        print(f"{title}: {total} bytes", flush=True)
        yield lambda count: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


# The command


def _check_options(options: Options) -> None:
    if not options.input.is_dir():
        raise FileNotFoundError(f"--input={options.input} is not a folder; give the folder that holds the text.")
    if not 0 < options.validation_fraction < 1:
        raise ValueError(f"--validation_fraction={options.validation_fraction} must be above 0 and below 1; try 0.05.")
    if options.separator and not options.tokenizer:
        raise ValueError(f"--separator={options.separator} is a token of a --tokenizer, which is not given; give both.")
    source, target = options.input.resolve(), options.output.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ValueError(
            f"--output={options.output} and --input={options.input} must not lie one in the "
            f"other; give an output folder elsewhere."
        )


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.data.prepare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="folder of text")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="share held out (0.05)")
    parser.add_argument("--text_key", default="text", help="key of the text in a .jsonl line (text)")
    parser.add_argument("--domain", default="", help="domain of files directly in the input")
    parser.add_argument("--include", default=INCLUDE, help=f"patterns of file names ({INCLUDE})")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json, or the folder that holds it (bytes)")
    parser.add_argument("--separator", default="", help="token of it that opens documents (its bos or eos)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    values = vars(parser.parse_args(arguments))
    return Options(**values | {name: path_of(values[name], f"--{name}") for name in ("input", "output")})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; bad input ends it with a message and status 2."""
    print_any_name()
    try:
        prepare(parse(arguments))
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
