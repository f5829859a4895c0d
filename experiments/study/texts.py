"""What the committed text of a log says: shorter numbers, and no path, host or user of the machine that wrote it."""

import getpass
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..report.sweep import SweepError

# a path at the beginning of a text or a word, after = as in a flag, or in quotes
ABSOLUTE = re.compile(r"""(?<![^\s=,'"(\[])[/~][^\s,'")\]]+""")
CLOCKED = re.compile(r"time/|tokens_per_second|data_wait|gflops_per_second|mfu|goodput")  # keys that depend on a clock
CLOCK_DIGITS = 4


class Private:
    """The names of a machine that no committed text may have, and how paths are rewritten without them."""

    def __init__(self, workdir: Path) -> None:
        """Args: workdir: of the study; paths below it, or below the current folder, become relative to it."""
        home = Path.home()
        roots = {folder for at in (workdir, Path.cwd()) for folder in (at.absolute(), at.resolve())}
        self._roots = sorted((r for r in roots if r != home and r not in home.parents), key=lambda r: -len(r.parts))
        folders = {home, home.resolve(), workdir.absolute(), workdir.resolve()} - {Path("/")}
        found = [(f"the folder {folder}", rf"(?<!\w){re.escape(str(folder))}(?![\w.-])") for folder in sorted(folders)]
        host = platform.node().partition(".")[0]
        if host not in ("", "localhost"):
            found.append((f"the host's name, {host}", rf"(?<![\w.-]){re.escape(host)}(?![\w-])"))
        found.append((f"the user's name, {_user()}", rf"(?<!\w){re.escape(_user())}@|/home/{re.escape(_user())}(?!\w)"))
        self._forbidden = [(name, re.compile(pattern)) for name, pattern in found if name]

    def without_paths(self, value: Any) -> Any:
        """JSON with paths below the workdir or the current folder relative to it, and only the last name of others."""
        if isinstance(value, str):
            below = self._below(value)
            return below if below is not None else ABSOLUTE.sub(lambda found: self._relative(found[0]), value)
        if isinstance(value, Mapping):
            return {key: self.without_paths(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.without_paths(one) for one in value]
        return value

    def _below(self, path: str) -> str | None:
        for root in self._roots:
            if path == str(root) or path.startswith(f"{root}/"):
                return path[len(str(root)) :].strip("/") or "."
        return None

    def _relative(self, path: str) -> str:
        below = self._below(path)
        return path.rstrip("/").rpartition("/")[2] if below is None else below

    def check(self, name: str, value: Any) -> None:
        """Refuse JSON in which a text names this machine.

        Args:
            name: where the JSON is from, for the message.
            value: any JSON; numbers and the keys of objects are not texts.

        Raises:
            SweepError: a text has the home folder, the workdir, the host's name or the user's name.
        """
        for text in _texts(value):
            for what, pattern in self._forbidden:
                if pattern.search(text):
                    raise SweepError(
                        f"{name} has {what}, in {text!r}, which must not be committed; take it out of the config or "
                        "the command, and repeat."
                    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "nobody"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def as_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    """Lines of a log as JSON, their numbers shortened: see `short`."""
    return "".join(json.dumps({key: short(key, value) for key, value in line.items()}) + "\n" for line in lines)


def short(key: str, value: Any) -> Any:
    """A logged number with no more digits than it needs; other values as they are.

    A float32 gets the fewest decimal digits that give the same float32, which is 6e-8 of it away at most. Others keep
    all their digits, except that what a clock measured has `CLOCK_DIGITS`.
    """
    if isinstance(value, list):
        return [short(key, one) for one in value]
    if not isinstance(value, float):
        return value
    if CLOCKED.match(key):
        return float(f"{value:.{CLOCK_DIGITS}g}")
    with np.errstate(over="ignore"):  # a float64 may be too large for a float32
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value
