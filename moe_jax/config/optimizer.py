"""The keys of the optimizer, of the average of weights and of the guard, and the parts of a model that they name."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.fields import DType, number

# the parts of a model, one for each parameter: `head` without tied embeddings; `dense` feed-forward layers; routed
# `experts` with their projections to a latent and back; `mtp` is what multi-token prediction has besides its block;
# `norms` are the scales of all norms
Part = Literal["embedding", "head", "attention", "dense", "router", "experts", "shared", "mtp", "norms"]


@dataclass(frozen=True)
class GroupConfig:
    """What the optimizer does differently to one part of the model.

    A frozen part keeps its values and has no moments. That does not stop the selection bias, which is no parameter:
    it moves as long as `balance` has a method that moves it.
    """

    learning_rate: float = number(1.0, 0.0)  # times optimizer.learning_rate
    weight_decay: float = number(1.0, 0.0)  # times optimizer.weight_decay
    frozen: bool = False


@dataclass(frozen=True)
class GroupsConfig:
    """One group for every `Part`."""

    embedding: GroupConfig = field(default_factory=GroupConfig)
    head: GroupConfig = field(default_factory=GroupConfig)
    attention: GroupConfig = field(default_factory=GroupConfig)
    dense: GroupConfig = field(default_factory=GroupConfig)
    router: GroupConfig = field(default_factory=GroupConfig)
    experts: GroupConfig = field(default_factory=GroupConfig)
    shared: GroupConfig = field(default_factory=GroupConfig)
    mtp: GroupConfig = field(default_factory=GroupConfig)
    norms: GroupConfig = field(default_factory=GroupConfig)


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices of `parts`; AdamW moves the rest (`training.muon`).

    An update has the root mean square `rms`; 0.2 is that of AdamW, whose learning rate then serves both.
    Source: Jordan (2024), arXiv 2502.16982.
    """

    parts: tuple[Part, ...] = ("attention", "dense", "experts", "shared", "mtp")
    momentum: float = number(0.95, 0.0)
    iterations: int = number(5, 1, 20)  # of Newton-Schulz
    rms: float = number(0.2, 0.0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon, behind gradient clipping; `schedule` shapes the learning rate over `num_steps`."""

    method: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = number(1e-3, 0.0)
    schedule: Literal["constant", "cosine", "wsd", "multistep"] = "cosine"
    warmup_steps: int = number(0, 0)
    end_ratio: float = number(0.1, 0.0, 1.0)  # cosine, wsd: the last learning rate, as a share of the peak
    decay_fraction: float = number(0.2, 0.0, 1.0)  # wsd: the share of the run, at its end, in which the rate decays
    milestones: tuple[float, ...] = (0.8, 0.9)  # multistep: shares of the run at which the rate drops ...
    milestone_ratio: float = number(0.316, 0.0, 1.0)  # ... by this factor
    b1: float = number(0.9, 0.0, 1.0)
    b2: float = number(0.95, 0.0, 1.0)
    eps: float = number(1e-8, 0.0)
    weight_decay: float = number(0.1, 0.0)
    clip_norm: float = number(1.0, 0.0)  # 0: no clipping
    moment_dtype: DType = "float32"
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of parameters and moments in bfloat16
    # the largest logit of a head of attention, above which its queries and keys are shrunk after a step
    # (`training.qk_clip`); 0: no limit, Kimi K2: 100
    qk_clip: float = number(0.0, 0.0)
    muon: MuonConfig = field(default_factory=MuonConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of parameters and bias, which keeps the share `decay` of itself a step; 0: none."""

    decay: float = number(0.0, 0.0)


@dataclass(frozen=True)
class GuardConfig:
    """Skips a step whose loss or gradient norm is an outlier; threshold 0: none (`training.guard`).

    An outlier is more than `threshold` robust deviations above the median of the last `window` kept steps. After `most`
    in a row the next step is kept. 6 deviations skip what is rare beyond doubt.

    After `rollback` steps in a row that were outliers or not finite, the run goes back to its newest checkpoint from
    before them and continues with the batches after them (`training.rollback`); 0: never.
    """

    threshold: float = number(0.0, 0.0)
    window: int = number(128, 8)
    most: int = number(5, 1)
    rollback: int = number(0, 0)
    rollbacks: int = number(3, 1, changes="nothing")  # how often; then the run ends
