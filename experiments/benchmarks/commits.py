"""Our train step in a process of its own, as a command runs it, at this or at another commit of this clone."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Reads settings, then takes a step for every line, and writes its loss. Its imports exist at every commit, except for
# what the commands of younger commits begin with.
WORKER = """
import json, sys
try:
    from moe_jax.runtime.memory import use_huge_pages
    use_huge_pages()
except ImportError:
    pass
from experiments.benchmarks.step import trainer
from moe_jax.config import default, validate
step = trainer(validate(default(**json.loads(sys.stdin.readline())))).step
for _ in sys.stdin:
    print(step(), flush=True)
"""


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, while the block runs.

    Raises:
        ValueError: no such commit in this clone.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            why = archive.stderr.decode().strip().splitlines()
            raise ValueError(
                f"--against={commit} is no commit of the clone {ROOT}: {why[-1] if why else 'git failed'}."
            )
        subprocess.run(["tar", "-x"], input=archive.stdout, cwd=folder, check=True)
        yield Path(folder)


class Remote:
    """A train step in a process of its own; use it in a `with`, which ends the process."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Args: folder: of the checkout; settings: what its config changes of the defaults."""
        self.losses: list[float] = []
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
            | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._write(json.dumps(settings))

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def step(self) -> float:
        """Take one step, and return its loss.

        Raises:
            ValueError: the process ended; its own error is on standard error.
        """
        self._write("")
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the train step in {self._folder} failed; its error is above.")
        self.losses.append(float(line))
        return self.losses[-1]

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `step` finds that it ended
