"""The claims of the study, written before its runs: what was published, how it is measured, what would contradict it.

Verdicts are computed by `verdicts`. Tables are the sweeps of configs/ablation: `arms` is `study.py`, and the others are
named like their files. Losses are held-out bits per byte.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .measures import Measure

LOSS = "bits per byte"
SMALL = 0.001  # bits per byte: a difference in loss below this counts as none
QUESTIONS = {  # group of claims -> what its claims answer together
    "1": "Does the load become uneven without balancing?",
    "2": "Does the bias balance better than the auxiliary loss at its published weights?",
    "3": "What do larger weights and rates cost in loss, and gain in balance?",
    "4": "At the same balance, does the bias have the lower loss?",
    "5": "Does the balancing gradient grow with the weight, and explain the loss?",
    "6": "Do other update rules balance better than the sign?",
    "7": "Is a multiplicative bias as good as an additive one?",
    "8": "Do sigmoid and softmax gates give the same answer?",
    "9": "Is the bias the more even, the more tokens are counted together?",
    "10": "What does the scope of the auxiliary loss change?",
    "11": "Does expert choice leak the future?",
    "12": "Do the controls behave?",
    "13": "Does a frozen bias keep the balance?",
    "14": "Is the shared expert missed more than a routed one?",
    "15": "Is the order of architectures that of DeepSeekMoE's Table 1?",
    "16": "Quantile balancing, or the sign with a sequence loss?",
}


class Published(NamedTuple):
    """Where a claim was published, or "this project", and the published numbers, if any."""

    source: str
    numbers: str = ""


class Relation(NamedTuple):
    """What is claimed of the measured number: see `verdicts.decide`."""

    kind: Literal["above", "below", "within", "either"]
    threshold: float
    unit: str


def above(threshold: float = 0.0, unit: str = LOSS) -> Relation:
    """The number is above the threshold."""
    return Relation("above", threshold, unit)


def below(threshold: float = 0.0, unit: str = LOSS) -> Relation:
    """The number is below the threshold."""
    return Relation("below", threshold, unit)


def within(threshold: float = SMALL, unit: str = LOSS) -> Relation:
    """The number is between minus and plus the threshold."""
    return Relation("within", threshold, unit)


def either(threshold: float = 0.0, unit: str = LOSS) -> Relation:
    """Nothing was published: the side of the threshold on which the number is, is the answer."""
    return Relation("either", threshold, unit)


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        number: of the group, with a letter, as in "3a".
        text: what is claimed, as a sentence.
        published: by whom, and with which numbers.
        measure: how it is measured here.
        relation: the claim in terms of the measure.
    """

    number: str
    text: str
    published: Published
    measure: Measure
    relation: Relation

    @property
    def group(self) -> str:
        """The key of its question in `QUESTIONS`: "16" of "16.2b"."""
        found = re.match(r"\d+", self.number)
        assert found is not None
        return found[0]


def all_claims() -> list[Claim]:
    """Every claim, in order."""
    from . import bias_claims, model_claims

    return [*bias_claims.CLAIMS, *model_claims.CLAIMS]
