"""Claims 8 to 16: gates, batches, scopes, leaks, controls, frozen biases, shared experts, systems and quantiles."""

import math
from typing import Any

from ..report.numbers import last, tail
from . import measures as m
from .bias_claims import LFB, RATIO, VIOLATION, loss, violation
from .claims import SMALL, Claim, Published, above, below, either, within
from .measures import BALANCE, QUALITY, SEQUENCE, Measure, effect, level, log

V3 = "DeepSeek-V3 (2412.19437)"
MOE = "DeepSeekMoE (2401.06066)"
WHOLE_RUNS = 0.01  # bits per byte: what whole runs count as no difference
TRAINING = "bits_per_byte"
SYSTEMS = ("dense", "hash", "switch", "gshard", "deepseek_moe")
PILE = dict(zip(SYSTEMS, (2.060, 1.932, 1.881, 1.867, 1.808), strict=True))  # loss in nats, of the paper
QUANTILE_TABLES = ("quantile_16x2048", "quantile_16x8192", "quantile_64x2048", "quantile_64x8192")


def whole(table: str, arm: str, baseline: str) -> Measure:
    """The difference in loss of whole runs, paired by seed."""
    return effect(table, arm, baseline, last(QUALITY))


def leak(scope: str) -> Measure:
    """Loss in training minus on held-out text, against that of the bias: what selection by the future saves."""
    arm = f"expert_choice_{scope}"
    return m.minus(effect("leak", arm, "bias", tail(TRAINING)), effect("leak", arm, "bias", last(QUALITY)))


def removed(variant: str) -> Measure:
    """What the loss of the trunks with the bias rises by if experts are removed at evaluation."""

    def number(found: Any) -> float:
        return found[variant]["bits_per_byte"] - found["as it is"]["bits_per_byte"]

    return m.from_file("arms", "bias", "ablation.json", number)


def in_order(number: str, better: str, worse: str) -> Claim:
    """The claim that one system has a lower loss than another at equal active parameters."""
    text = f"At equal active parameters, {better} has a lower loss than {worse}."
    published = f"{PILE[better]} against {PILE[worse]} nats"
    return Claim(
        number,
        text,
        Published(f"{MOE}, Table 1", published),
        whole("systems", better, worse),
        below(),
    )


def quantile(number: str, table: str) -> tuple[Claim, Claim]:
    """Quantile balancing against the sign rule with a sequence loss, in one setting: the loss and max violation."""
    experts, tokens = table.removeprefix("quantile_").split("x")
    where = f"{experts} experts and {tokens} tokens a step"
    source = "open in public since March 2026"
    pair = (table, "quantile", "sign_sequence")
    return (
        Claim(
            f"{number}a",
            f"{where}: the loss of quantile balancing against sign with a sequence loss.",
            Published(source),
            effect(*pair, last(QUALITY)),
            either(),
        ),
        Claim(
            f"{number}b",
            f"{where}: the max violation of the same two.",
            Published(source),
            effect(*pair, log(last(BALANCE))),
            either(unit=RATIO),
        ),
    )


CLAIMS = (
    Claim(
        "8a",
        "Under the bias, a softmax gate has the loss of a sigmoid gate.",
        Published(f"{LFB}, Tables 2 and 6", "perplexity 9.599 against 9.50"),
        whole("gates", "softmax_bias", "sigmoid_bias"),
        within(WHOLE_RUNS),
    ),
    Claim(
        "8b",
        "With a softmax gate too, the bias has a smaller max violation than the auxiliary loss.",
        Published(f"{LFB}, Table 6", "0.027 against 0.937"),
        effect("gates", "softmax_bias", "softmax_aux", log(last(BALANCE))),
        below(unit=RATIO),
    ),
    Claim(
        "9",
        "From one sequence to all held-out text, max violation falls by a larger factor with the bias.",
        Published(f"{LFB}, Figure 5"),
        m.minus(violation("bias", "aux_1e-2"), effect("arms", "bias", "aux_1e-2", log(last(SEQUENCE)))),
        below(unit=RATIO),
    ),
    Claim(
        "10a",
        "A sequence-wise loss has a higher loss than a batch-wise one, at 1e-1.",
        Published(f"{V3}, section 4.5.3", "2.258 against 2.253 nats"),
        loss("sequence_1e-1", "aux_1e-1"),
        above(),
    ),
    Claim(
        "10b",
        "A batch-wise loss has the loss of the bias, at 1e-1.",
        Published(f"{V3}, section 4.5.3", "2.253 and 2.253 nats"),
        loss("aux_1e-1", "bias"),
        within(SMALL),
    ),
    Claim(
        "10c",
        "A sequence-wise loss has a smaller max violation within sequences.",
        Published(f"{V3}, section 4.5.3"),
        effect("arms", "sequence_1e-1", "aux_1e-1", log(last(SEQUENCE))),
        below(unit=RATIO),
    ),
    Claim(
        "10d",
        "Under a sequence-wise loss, experts know less of the domain than under the bias.",
        Published(f"{V3}, section 4.5.3"),
        effect("arms", "sequence_1e-1", "bias", last("eval/domain_information")),
        below(unit="bits per copy"),
    ),
    Claim(
        "10e",
        "Two sequences as the scope have a higher loss than eight, at 1e-1.",
        Published("Qwen (2501.11873)"),
        loss("two_sequences_1e-1", "aux_1e-1"),
        above(),
    ),
    Claim(
        "11a",
        "Expert choice in a sequence leaks: against the bias, its loss in training is lower than on held-out"
        " text, where tokens are routed alone.",
        Published(f"{LFB}, section 5.2", "about 10 % of the loss, in chunks of 512 tokens"),
        leak("sequence"),
        below(),
    ),
    Claim(
        "11b",
        "Expert choice in a batch of sequences leaks too.",
        Published(f"{LFB}, section 5.2", "not visible in chunks of 2048 tokens and more"),
        leak("batch"),
        below(),
    ),
    Claim(
        "12a",
        "With its sign flipped, the bias collapses: an expert has nearly every token.",
        Published("a control"),
        level("arms", "flipped", last(BALANCE)),
        above(2.5, unit=VIOLATION),
    ),
    Claim(
        "12b",
        "On a trunk without a bias, a bias that does not move is no balancing, in every digit.",
        Published("a control", "0"),
        m.unequal("arms", "frozen", "none", ["aux_1e-2"]),
        within(0.0, unit="unequal runs"),
    ),
    Claim(
        "12c",
        "Forced routing is even.",
        Published("a control", "0"),
        level("arms", "forced", last(BALANCE)),
        within(0.01, unit=VIOLATION),
    ),
    Claim(
        "13",
        "A bias that no longer moves keeps the balance of its trunk, within a half.",
        Published(f"{V3}, section 4.2", "rate 0 for the last 500B tokens"),
        effect("arms", "frozen", "bias", log(last(BALANCE)), "bias"),
        below(math.log(1.5), unit=RATIO),
    ),
    Claim(
        "14",
        "Without the shared expert the loss rises more than without each token's best routed expert.",
        Published(f"{MOE}, section 4.5", "1.808 to 2.414 nats without shared experts"),
        m.minus(removed("without shared"), removed("without the best 1")),
        above(),
    ),
    in_order("15a", "hash", "dense"),
    in_order("15b", "switch", "hash"),
    in_order("15c", "gshard", "switch"),
    in_order("15d", "deepseek_moe", "gshard"),
    Claim(
        "15e",
        "DeepSeekMoE has the same loss with the bias and with the auxiliary loss, in whole runs.",
        Published("this project, a pilot"),
        whole("systems", "loss_free", "deepseek_moe"),
        within(WHOLE_RUNS),
    ),
    *(claim for n, table in enumerate(QUANTILE_TABLES, 1) for claim in quantile(f"16.{n}", table)),
)
