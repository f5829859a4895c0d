"""Files that are whole or not there, and how their bytes are told apart."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """The file with the value, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # shards of a sweep write sweep.json at the same time
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
