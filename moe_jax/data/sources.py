"""The input of `prepare`: its options, and the text files of each domain."""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_jax.data.manifest import NAME

INCLUDE = "*.txt,*.md,*.jsonl,*.txt.gz,*.jsonl.gz,*.jsonl.zst,*.parquet,*.arrow"
LINES = (".jsonl", ".ndjson", ".json")  # suffixes, in any case, of files with one document a line
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # suffixes behind that of the file that they hold
TABLES = (".parquet", ".arrow")
ARCHIVES = (".zip", ".7z", ".tar", ".tgz", *(f".tar{packed}" for packed in COMPRESSED))
MAX_IGNORED = 10  # ignored files that are listed by name


@dataclass(frozen=True)
class Options:
    """What to prepare, and how; one field a flag."""

    input: Path
    output: Path
    validation_fraction: float = 0.05
    text_key: str = "text"
    domain: str = ""
    include: str = INCLUDE
    overwrite: bool = False
    tokenizer: str = ""
    separator: str = ""
    processes: int = 0
    prompt_key: str = ""
    answer_key: str = ""
    messages_key: str = ""
    weight_key: str = ""


@dataclass(frozen=True)
class Source:
    """An input file: path relative to the input folder, size in bytes, and sha256 of its text once it has been read."""

    name: str
    bytes: int
    sha256: str = ""


def find_sources(options: Options) -> dict[str, list[Source]]:
    """Finds the input files of each domain, and prints which files are ignored and why.

    Args:
        options: see the flags of `prepare`.

    Returns:
        domain -> files sorted by name, domains sorted.

    Raises:
        ValueError: nothing matches, a name cannot be a domain, or --domain names nothing or the domain of a subfolder.
    """
    matching, ignored = _list_files(options)
    if ignored:
        names = [printable(name) for name in sorted(ignored)[:MAX_IGNORED]]
        more = f" and {len(ignored) - MAX_IGNORED} more" if len(ignored) > MAX_IGNORED else ""
        print(
            f"Ignored because they do not match --include={options.include} or are hidden or linked folders: "
            f"{', '.join(names)}{more}"
        )
    if not matching:
        packed = " (archives must be unpacked first)" if any(n.lower().endswith(ARCHIVES) for n in ignored) else ""
        raise ValueError(
            f"--input={options.input} has no file that matches --include={options.include}; give another folder or "
            f"other patterns{packed}."
        )
    return _by_domain(options, sorted(matching))


def printable(name: str) -> str:
    """A file's name for a message: what cannot be printed, or would control the terminal, is escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def compression(name: str) -> str:
    """The suffix that says how a file is compressed; "" if it is not."""
    return next((suffix for suffix in COMPRESSED if name.lower().endswith(suffix)), "")


def is_table(name: str) -> bool:
    """Whether every row of a file is a document, by its suffix."""
    return name.lower().endswith(TABLES)


def has_lines(name: str) -> bool:
    """Whether every line of a file is a document, by its suffix, or by the one before that of its compression."""
    return name.lower().removesuffix(compression(name)).endswith(LINES)


def _list_files(options: Options) -> tuple[list[str], list[str]]:
    """The files that match, and those (and folders) that are ignored; paths relative to the input."""
    matching: list[str] = []
    ignored: list[str] = []
    patterns = [pattern.strip() for pattern in options.include.split(",")]
    for folder, subfolders, files in os.walk(options.input, onerror=_raise):
        skipped = [name for name in subfolders if name.startswith(".") or os.path.islink(os.path.join(folder, name))]
        subfolders[:] = [name for name in subfolders if name not in skipped]  # os.walk descends into what is left
        for name in [*files, *skipped]:
            path = Path(folder, name).relative_to(options.input)
            matches = name in files and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            (matching if matches and not name.startswith(".") else ignored).append(path.as_posix())
    return matching, ignored


def _raise(error: OSError) -> None:
    raise error  # otherwise os.walk skips folders it cannot read


def _by_domain(options: Options, names: Sequence[str]) -> dict[str, list[Source]]:
    own = options.domain or options.input.resolve().name  # of files directly in the input
    direct = [name for name in names if "/" not in name]
    if options.domain and not direct:
        raise ValueError(
            f"--domain={own} names the files directly in --input={options.input}, and there are none; leave it out: "
            "subfolders name their own domains."
        )
    domains: dict[str, list[Source]] = {}
    for name in names:
        domain = name.split("/")[0] if "/" in name else own
        path = options.input / name
        domains.setdefault(domain, []).append(Source(name, path.stat().st_size if path.is_file() else 0))
    if direct and len(domains[own]) > len(direct):
        raise ValueError(
            f"--input={options.input} has a subfolder {own}, and the files beside it would belong to the same domain; "
            "name theirs with --domain=NAME."
        )
    for domain in domains:
        if not NAME.fullmatch(domain):
            raise ValueError(
                f"Domain {domain!r} must be letters, digits, '_', '-' and '.'; rename the folder, or use "
                "--domain=NAME for files directly in --input."
            )
    return dict(sorted(domains.items()))
