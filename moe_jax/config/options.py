"""The options that every balancing method has, and what holds of a method whatever its options."""

from dataclasses import dataclass
from typing import ClassVar, Literal

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Options:
    """Options of every method. `layers=(start, stop)` are the MoE layers it acts in, counted from 0; () means all.

    The class variables hold whatever the options: whether the method moves the bias (`moves_bias`); selects experts
    itself (`selects`); gives every token exactly `top_k` of them (`fixed_slots`); treats all experts alike, without
    groups or zero-computation experts (`all_alike`); needs scores between 0 and 1 (`bounded_scores`).
    """

    layers: tuple[int, ...] = ()

    moves_bias: ClassVar[bool] = False
    selects: ClassVar[bool] = False
    fixed_slots: ClassVar[bool] = True
    all_alike: ClassVar[bool] = False
    bounded_scores: ClassVar[bool] = False

    @property
    def beside(self) -> tuple[str, ...]:
        """The labels of other methods that this one requires."""
        return ()

    @property
    def by_device(self) -> bool:
        """Whether the method needs logical devices, which are `num_devices` groups of consecutive experts."""
        return False

    @property
    def reads_top_k(self) -> bool:
        """Whether the method uses each token's top k experts without the bias."""
        return False

    @property
    def by_micro_batch(self) -> bool:
        """Whether the numbers depend on the split of a step into micro-batches, because they are not additive."""
        return False
