"""Resolves a flag or a config key that names a file: a path on this machine, or a workdir in a bucket."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(/?)")
BUCKETS = {"gs", "s3", "az", "hf"}  # names that Orbax takes for a bucket's scheme, wherever they are in a path


def path_of(text: str, flag: str) -> Path:
    """The file or folder on this machine that a flag or a config key names; `~` is the home folder, as in a shell.

    Args:
        text: the value of the flag or key.
        flag: its name in error messages, such as "--output" or "data.path".

    Raises:
        ValueError: the value is an address, which would be taken for a folder here, or names the home folder of a user
            who does not exist.
    """
    scheme = SCHEME.match(text)
    if scheme and (scheme[2] or scheme[1] in {*BUCKETS, "file"}):
        remedy = {
            "file": f"write the path alone, /{text[len(scheme[0]) :].lstrip('/')}",
            "gs": f"a bucket is written gs://{text[len(scheme[0]) :]}, and only a workdir can be in one",
        }
        instead = remedy.get(scheme[1], "copy the files to this machine, or mount them, and give that folder")
        raise ValueError(f"{flag}={text} is an address and must be a path of this machine; {instead}.")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ValueError(
            f"{flag}={text} begins with a user's home folder, and there is none; write ./{text} for a name with a ~."
        )
    return Path(expanded)


def workdir_of(text: str, flag: str = "--workdir") -> Path:
    """The folder of checkpoints that a flag or a config key names, on this machine or `gs://bucket/folder`.

    Raises:
        ValueError: as in `path_of`; or the folder's name cannot hold checkpoints; or gcsfs is not installed.
    """
    if not text.startswith("gs://"):
        path = path_of(text, flag)
        _refuse_ambiguous_names(path, flag)
        return path
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{flag}={text} needs gcsfs, which is not installed; pip install 'moe_jax[gcs]'.")
    import fsspec
    from etils import epath

    # other processes write there too, so a cached listing may be out of date
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    remote: Any = epath.Path(text)
    return remote


def _refuse_ambiguous_names(path: Path, flag: str) -> None:
    """Raise a ValueError for a path that Orbax or tensorstore, which write checkpoints, would not read as a folder."""
    root, *names = path.absolute().parts
    wrong = [f"{root}{name}" for name in names[:1] if name in BUCKETS]
    wrong += [n for n in names if "\\" in n or n.endswith("gs:") or n.encode("utf-8", "ignore").decode() != n]
    if wrong:
        raise ValueError(
            f"{flag}={str(path)!r} cannot hold checkpoints, because the libraries that write them do not read "
            f"{wrong[0]!r} as a folder; use another folder, or a link to this one by another name."
        )
