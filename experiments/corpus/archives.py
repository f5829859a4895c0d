"""What is in a package: its files are read from the archive and never written, so that no name in it can do harm.

Links are left out: every file is read once, under its real name.
"""

import gzip
import lzma
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError)


def read(path: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """The regular files of an archive whose whole names match a pattern, unpacked where they are gzipped.

    Args:
        path: a .deb, .tgz or .tar.gz.
        wanted: a regular expression.

    Yields:
        The name, without "./" at its beginning, and the content.

    Raises:
        ValueError: the archive is damaged, or one of its names leads out of it.
    """
    again = f"delete {path} and run the command again."
    try:
        with _open(path) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if name.startswith("/") or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"{path} has a file named {name!r}, which leads out of the archive; {again}")
                if member.isreg() and re.fullmatch(wanted, name):
                    file = tar.extractfile(member)
                    assert file is not None
                    data = file.read()
                    yield name, gzip.decompress(data) if name.endswith((".gz", ".dz")) else data
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be unpacked ({str(error) or type(error).__name__}); {again}") from None


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    """The archive, as a stream that is read to its end, where its checksum is."""
    if path.suffix != ".deb":
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            yield tar
            _drain(file)
        return
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stderr is not None
        try:
            with tarfile.open(fileobj=program.stdout, mode="r|") as tar:
                yield tar
                _drain(program.stdout)
            wrong = b"" if program.wait() == 0 else program.stderr.read()
        except tarfile.ReadError as error:
            program.stdout.close()  # otherwise it may wait for a reader for ever
            wrong = program.stderr.read() or str(error).encode()
        finally:
            program.kill()  # where the reader stopped early; one that has ended is left alone
    if wrong:
        raise tarfile.ReadError(" ".join(wrong.decode(errors="replace").split()))


def _drain(stream: IO[bytes] | gzip.GzipFile) -> None:
    while stream.read(2**20):
        pass
