"""The settings of a simulation, and router logits that a run recorded."""

import dataclasses
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import BalanceEntry, Config, validate

# the synthetic streams, each with the settings that only some streams read, in the order of its function's arguments
STREAMS = {
    "skewed": ("skew",),
    "drifting": ("skew", "drift"),
    "bursty": ("skew", "burst", "period"),
    "domains": ("skew", "domains", "period"),
    "shift": ("skew", "shift_step"),
    "adversarial": ("skew", "drift", "bound"),
}

VOCAB_SIZE = 4096  # of synthetic token ids


def setting(default: Any, help_text: str, low: float = 1) -> Any:
    """A field of `Settings`, which is also a flag; `low` is its minimum."""
    return field(default=default, metadata={"help": help_text, "low": low})


@dataclass(frozen=True)
class Settings:
    """One simulation. Every field is a flag of its name."""

    experts: int = setting(256, "E, experts in the layer.", 2)
    top_k: int = setting(8, "Experts per token.")
    tokens: int = setting(4096, "T, tokens per step.")
    sequences: int = setting(8, "Number of sequences into which the tokens of a step are split.")
    steps: int = setting(2000, "Steps to simulate.", 10)
    seed: int = setting(0, "Seed of the first run; --seeds=N runs this one and the next N - 1.", 0)
    score: str = setting("sigmoid", "Affinity: sigmoid, softmax, sqrt_softplus or relu.", 0)
    stream: str = setting("skewed", "How experts' popularity changes: " + ", ".join(STREAMS) + ".", 0)
    noise: float = setting(1.0, "Standard deviation of a logit over tokens; scales the logits.", 1e-9)
    skew: float = setting(0.5, "Standard deviation of popularity over experts, in units of --noise.", 0)
    drift: float = setting(
        0.01, "Standard deviation of a step of popularity, in units of --noise; alone it sets --stream=drifting.", 0
    )
    burst: float = setting(2.0, "How much more popular an expert is in a burst, in units of --noise.", 0)
    period: int = setting(100, "How many steps a burst or a domain lasts.")
    domains: int = setting(4, "How many domains there are.", 2)
    bound: float = setting(2.0, "Largest popularity under --stream=adversarial, in units of --noise.", 0)
    router_rate: float = setting(10.0, "How fast losses move the router.", 0)
    within: float = setting(
        0.1, "A run counts as settled if a moving mean of max violation is at most this above the floor.", 0
    )
    window: int = setting(20, "Number of steps of that moving mean.")

    @property
    def shift_step(self) -> int:
        """The step at which the stream `shift` changes."""
        return self.steps // 2


class Recording(NamedTuple):
    """Router logits of one MoE layer: float [N, T, E], bool [N, T], int32 [N, T]; num_layers: of the whole model."""

    logits: np.ndarray
    mask: np.ndarray
    ids: np.ndarray
    num_layers: int


def check(s: Settings) -> None:
    """Raise a ValueError for a setting that is out of range or does not fit another."""
    for f in fields(Settings):
        value = getattr(s, f.name)
        low = f.metadata["low"]
        if not isinstance(value, str) and not value >= low:
            raise ValueError(f"--{f.name}={value} must be at least {low:g}; raise it.")
    if s.top_k > s.experts:
        raise ValueError(f"--top_k={s.top_k} must be at most --experts={s.experts}; lower it.")
    if s.tokens % s.sequences:
        raise ValueError(f"--tokens={s.tokens} must be divisible by --sequences={s.sequences}; change one.")
    if s.stream not in STREAMS:
        raise ValueError(f"--stream={s.stream} must be one of {', '.join(STREAMS)}; choose one.")
    if s.window > s.shift_step:
        raise ValueError(f"--window={s.window} must be at most half of --steps={s.steps}; lower it.")


def config_of(s: Settings, entries: tuple[BalanceEntry, ...], num_layers: int = 1, vocab_size: int = 0) -> Config:
    """The settings as a config, whose rules check what a method needs of its model.

    Raises:
        ValueError: a rule of the config is broken.
    """
    model = dict(
        num_experts=s.experts,
        top_k=s.top_k,
        score=s.score,
        normalize_gates=s.top_k > 1,
        num_layers=num_layers,
        vocab_size=vocab_size or VOCAB_SIZE,
    )
    plain = dict(model=model, batch_size=s.sequences, sequence_length=s.tokens // s.sequences)
    mapping = {e.label: {"method": e.method} | dataclasses.asdict(e.options) for e in entries}
    return validate({**plain, "balance": mapping})


def read_scores(folder: Path, layer: int) -> Recording:
    """The recorded logits of one layer, in the order of their steps.

    Args:
        folder: with <step>.npz, each with logits [L, T, E], mask [T] and ids [T].
        layer: 0 <= layer < L.

    Raises:
        ValueError: there are no files, or one has another form.
    """
    files = sorted((f for f in folder.glob("*.npz") if f.stem.isdigit()), key=lambda f: int(f.stem))
    if not files:
        raise ValueError(
            f"--scores={folder} must be a folder with files <step>.npz, but has none; "
            "set config.record_scores_every in a training run, which writes WORKDIR/scores."
        )
    steps = [_read_step(file) for file in files]
    shape = steps[0]["logits"].shape
    for file, step in zip(files, steps, strict=True):
        if step["logits"].shape != shape:
            raise ValueError(
                f"{file} has logits of shape {step['logits'].shape}, but {files[0]} of {shape}; "
                "give a folder with the scores of one run."
            )
    if not 0 <= layer < shape[0]:
        raise ValueError(f"--layer={layer} must be from 0 to {shape[0] - 1}, the layers in {files[0]}; change it.")
    logits = np.stack([step["logits"][layer] for step in steps])
    mask, ids = (np.stack([step[key] for step in steps]) for key in ("mask", "ids"))
    return Recording(logits, mask, ids.astype(np.int32), shape[0])


def _read_step(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as arrays:
            step = {key: arrays[key] for key in ("logits", "mask", "ids")}
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ValueError(f"{file} must hold logits, mask and ids; it could not be read: {error}.") from None
    logits = step["logits"]
    mask = step["mask"]
    ids = step["ids"]
    kinds = logits.dtype.kind, mask.dtype.kind, ids.dtype.kind
    if kinds != ("f", "b", "i") or logits.ndim != 3 or not mask.shape == ids.shape == logits.shape[1:2]:
        raise ValueError(
            f"{file} has logits {logits.dtype}{list(logits.shape)}, mask {mask.dtype}{list(mask.shape)} and ids "
            f"{ids.dtype}{list(ids.shape)}, but they must be float [L, T, E], bool [T] and int [T]; record it again."
        )
    return step
