"""Packages are fetched by their clients, verified, and kept: each is there whole or not at all."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from moe_jax.data.progress import progress
from moe_jax.runtime.files import read_json, sha256_of, write_json

from . import packages
from .packages import APT, PACKAGES, Package

POLL_SECONDS = 0.2  # between two looks at how much a client has written
LOG = "output.log"
OURS = {LOG, packages.REQUIREMENTS}  # what is beside a client's files


class Archive(NamedTuple):
    """A fetched package: its file, and what the manifest says of it."""

    path: Path
    record: Mapping[str, Any]


def find(name: str, folder: Path) -> Archive | None:
    """The archive of a package that an earlier run fetched, or None; a file of another size is fetched again.

    Args:
        name: a key of PACKAGES.
        folder: of the archives.
    """
    record = read_json(folder / f"{name}.json", f"delete {folder}.")
    path = folder / str(record.get("file", ""))
    whole = bool(record) and path.is_file() and path.stat().st_size == record["bytes"]
    return Archive(path, record) if whole else None


def check_clients(names: Iterable[str], leave_out: Mapping[str, str]) -> None:
    """Makes sure that the clients of all packages can be started.

    Args:
        names: keys of PACKAGES.
        leave_out: package -> the flag with which its domains are left out.

    Raises:
        ValueError: one is missing.
    """
    missing: dict[str, list[str]] = {}
    for name in names:
        if not packages.is_there(client := PACKAGES[name].client):
            missing.setdefault(client, []).append(name)
    if missing:
        every = [name for group in missing.values() for name in group]
        clients = " and ".join(missing)
        raise ValueError(
            f"{clients} cannot be started here, and {'fetch' if len(missing) > 1 else 'fetches'} {', '.join(every)}; "
            f"{' and '.join(packages.INSTALL[client] for client in missing)}, or do without: "
            f"{without(every, leave_out)}"
        )


def without(names: Iterable[str], leave_out: Mapping[str, str]) -> str:
    """The flag that leaves out the domains of several packages.

    Args:
        names: the packages that cannot be had.
        leave_out: domain -> its package, "" for none, of all domains that are wanted.
    """
    lost = set(names)
    kept = [domain for domain, package in leave_out.items() if package not in lost]
    return f"--domains={','.join(kept)}" if kept else "but no requested domain is left."


def fetch(names: Iterable[str], folder: Path, scratch: Path, leave_out: Mapping[str, str]) -> None:
    """Fetches packages, verifies them and moves them into their folder.

    A package that cannot be had does not keep the others from being fetched, so that all failures are seen at once.

    Args:
        names: keys of PACKAGES.
        folder: of the archives.
        scratch: an existing folder on the same file system, for unfinished files.
        leave_out: as for `without`.

    Raises:
        ValueError: a client failed, or delivered another archive than the pinned one; a sentence for each.
    """
    failures: dict[str, str] = {}
    for name in names:
        try:
            _fetch(PACKAGES[name], folder, scratch)
        except ValueError as error:
            failures[name] = str(error)
    if failures:
        sentences = ".\n".join(failures.values())
        raise ValueError(f"{sentences}, or do without: {without(failures, leave_out)}")


def _fetch(package: Package, folder: Path, scratch: Path) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        here = Path(place)
        (here / packages.REQUIREMENTS).write_text(packages.requirements(package))
        failure = _run(package, here)
        found = [path for path in here.iterdir() if path.name.endswith(packages.SUFFIXES[package.client])]
        if failure is None and len(found) != 1:
            failure = f"it left {len(found)} archives"
        if failure is not None:
            fix = packages.OTHER if "MATCH THE HASHES" in failure else packages.REPAIR[package.client]
            raise ValueError(f"{package.client} could not fetch {package.name} {package.version} ({failure}); {fix}")
        record = _describe(package, found[0])
        if package.is_pinned and not record["as_listed"]:
            raise ValueError(
                f"{package.client} could not fetch {package.name} {package.version} (its file has sha256 "
                f"{record['sha256']} and must have {package.sha256}); {packages.OTHER}"
            )
        with open(found[0], "rb") as file:
            os.fsync(file.fileno())
        os.replace(found[0], folder / found[0].name)
    write_json(folder / f"{package.name}.json", record, durable=True)
    if line := report(record):
        print(f"! {line}", flush=True)


def report(record: Mapping[str, Any]) -> str:
    """One line for a package that is not the one in PACKAGES, with the consequence; "" for one that is."""
    if record.get("as_listed", True):
        return ""
    listed = PACKAGES[record["name"]]
    there = f"{listed.version}, sha256 {listed.sha256[:12]}"
    return (
        f"{record['name']} is {record['version']}, sha256 {record['sha256'][:12]}, and not {there}: other data, so "
        "the corpus has another fingerprint, and runs on it compare only with each other; if apt-get's lists are old, "
        "run apt-get update as root, and repeat with another --output."
    )


def _describe(package: Package, path: Path) -> dict[str, Any]:
    digest = sha256_of(path)
    # NAME_VERSION_ARCHITECTURE.deb, in which a colon is %3a
    version = unquote(path.name.split("_")[1]) if package.client == APT else package.version
    return {
        "client": package.client,
        "name": package.name,
        "version": version,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest,
        "as_listed": digest == package.sha256,
    }


def _run(package: Package, place: Path) -> str | None:
    """Runs the client in an empty folder; what it says went wrong, or None."""
    environ = os.environ | {"LC_ALL": "C", "TMPDIR": str(place)}  # its messages are quoted, its files are counted
    with (
        open(place / LOG, "w+", errors="replace") as log,
        progress(f"fetching {package.name}", package.bytes) as advance,
    ):
        try:
            client = subprocess.Popen(
                packages.command(package), cwd=place, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        except OSError as error:
            return str(error)
        seen = 0
        try:
            while client.poll() is None:
                try:
                    client.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    now = min(_written(place), package.bytes)
                    advance(now - seen)
                    seen = now
        finally:
            client.kill()  # on Ctrl-C; one that has ended is left alone
            client.wait()
        advance(package.bytes - seen)
        log.seek(0)
        return _complaint(log.read(), client.returncode) if client.returncode else None


def _written(place: Path) -> int:
    """The bytes of all files below a folder, from which a client may be removing some."""
    total = 0
    for folder, _, files in os.walk(place):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size if name not in OURS else 0
            except FileNotFoundError:
                continue
    return total


def _complaint(output: str, status: int) -> str:
    """What a client says went wrong, in one line: its error, or else its last line, or else its status."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()] or [f"status {status}"]
    apt = [line for line in lines if line.startswith("E: ")][:1]
    npm = [line for line in lines if re.match(r"npm (error|ERR!) (?!code|syscall|errno)", line)][:1]
    pip = [line for line in lines if line.startswith("ERROR: ")][-1:]
    return [*apt, *npm, *pip, lines[-1]][0].rstrip(".")
