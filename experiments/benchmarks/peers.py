"""Optional peers: the command that installs each, and a sentence if one is absent. Importing this imports no torch."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TypeVar

from experiments.benchmarks.timing import num_threads

# a bare `torch` is a build for CUDA; the CPU build is `torch==2.13.0+cpu` where the index has it
INSTALL = {
    "torch": "pip install torch==2.13.0",
    "transformers": "pip install torch==2.13.0 transformers==5.23.0",
    "torchtitan": "pip install torch==2.13.0 torchtitan==0.3.0 triton==3.9.0",
    # its wheel needs Python 3.12, and lists none of the packages that the layer imports as dependencies
    "maxtext": "pip install maxtext==0.2.5 aqtp qwix tokamax drjax transformers pathwaysutils tensorboardX gcsfs "
    "google-cloud-storage google-cloud-mldiagnostics jinja2 omegaconf psutil pydantic",
}

T = TypeVar("T")
MOST_CHARACTERS = 200  # of another project's error


class Absent(Exception):
    """A peer cannot take part; the message is a sentence with the reason."""


def need(package: str) -> ModuleType:
    """Import a package.

    Raises:
        Absent: it is not installed, or its import fails.
    """
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed; {INSTALL[package]}.")
    try:
        return importlib.import_module(package)
    except Exception as error:  # another project's import may raise anything
        raise Absent(f"{package} does not import here: {type(error).__name__}: {_line(error)}") from error


def torch_here(platform: str) -> ModuleType:
    """Import torch, with as many threads as jax, for the platform that jax uses ("cpu" or "gpu").

    Raises:
        Absent: it is not installed, or built for another platform.
    """
    torch = need("torch")
    if platform not in ("cpu", "gpu"):
        raise Absent(f"torch does not run on {platform}.")
    if platform == "gpu" and not torch.cuda.is_available():
        raise Absent(f"torch {torch.__version__} cannot use this GPU; install a build for its CUDA.")
    if torch.get_num_threads() != num_threads():
        torch.set_num_threads(num_threads())
    return torch


def gather(builders: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """Build the peers that are installed, by name; also return why each of the others is absent."""
    here = {}
    absent = {}
    for name, build in builders.items():
        try:
            here[name] = build()
        except Absent as error:
            absent[name] = str(error)
    return here, absent


def quiet() -> None:
    """Switch off look-ups on the Hugging Face Hub and telemetry."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:MOST_CHARACTERS]
