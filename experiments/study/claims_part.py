"""The claims on the page: what is contradicted, the table of all, what was not resolved, and the runs of each."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ..report.columns import Table
from ..statistics.components import spread
from ..statistics.power import needed
from . import words
from .bias_claims import RATIO
from .claims import LOSS, QUESTIONS, SMALL
from .measures import Tables
from .parts import Part, Section, box, folders, items, table, text, together, unfold
from .verdicts import Judged, Verdict

SMALL_OF = {LOSS: SMALL, RATIO: math.log(1.1)}  # unit -> a difference that counts as small
CHANCE = 0.05  # of a 95 % interval to exclude the true value
ORDER: tuple[Verdict, ...] = ("contradicted", "reproduced", "not resolved", "lower", "higher", "not measured")
TABLE_NOTE = (
    "Ours: mean over blocks ± half-width of the 95 % t-interval; ratios have their mean and interval's ends. Blocks are"
    " trunk seeds, or seeds of whole runs. Resolves: the true distance from the claimed limit that as many blocks with "
    "this spread find in 4 of 5 studies. Verdicts are computed: reproduced if the whole interval satisfies the claim, "
    "contradicted if no point of it does, lower or higher where nothing was published."
)


def summary(judged: Sequence[Judged]) -> list[Part]:
    """What stands at the top: every contradicted claim, the number of each verdict, and the verdicts by question."""
    against = [one for one in judged if one.verdict == "contradicted"]
    counts = Counter(one.verdict for one in judged)
    total = text(f"{len(judged)} claims, written before the runs: {_counted(counts)}.")
    questions = table(questions_table(judged), "words")
    if not against:
        measured = len(judged) - counts["not measured"]
        return [text(f"No claim is contradicted, of the {measured} that are measured so far."), total, questions]
    return [box("Contradicted", [_against(one) for one in against]), total, questions]


def questions_table(judged: Sequence[Judged]) -> Table:
    """A row for every question: how many of its claims got which verdict."""
    rows = []
    for number, question in QUESTIONS.items():
        counts = Counter(one.verdict for one in judged if one.claim.group == number)
        rows.append([number, question, _counted(counts)])
    return Table(["", "question", "verdicts on its claims"], rows)


def _counted(counts: Counter[Verdict]) -> str:
    """`2 reproduced, 1 not resolved`."""
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])


def _against(one: Judged) -> str:
    claim = one.claim
    source = ", ".join(filter(None, claim.published))
    value = words.ours(one).replace("\n", " ")
    return f"{claim.number}: {claim.text} ({source}) Claimed: {words.claimed(claim.relation)}. Ours: {value}."


def claims_section(judged: Sequence[Judged]) -> Section:
    """The table of all claims, in their order."""
    headers = ["no.", "claim", "published", "ours", "resolves", "verdict"]
    rows = [
        [
            one.claim.number,
            f"{one.claim.text}\nclaimed: {_relation(one)}",
            words.published(one),
            words.ours(one),
            words.difference(one.resolution, one.claim.relation.unit),
            one.verdict,
        ]
        for one in judged
    ]
    content = table(Table(headers, rows), "words claims")
    return Section("Every claim", [_marked(content, judged), text(TABLE_NOTE, note=True)])


def _relation(one: Judged) -> str:
    """The claim in terms of its measure, with the unit."""
    if one.claim.relation.kind == "either":
        return "no direction; the question is open"
    return f"{words.claimed(one.claim.relation)} ({words.quantity(one.claim.relation.unit).name})"


def _marked(content: Part, judged: Sequence[Judged]) -> Part:
    """The verdicts in colour on the page, in bold in Markdown where the claim is contradicted."""
    html, markdown = content.html, content.markdown
    for verdict in {one.verdict for one in judged}:
        cell = f"<span>{verdict}</span>"
        html = html.replace(cell, f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>')
    return Part(html, markdown.replace("| contradicted |", "| **contradicted** |"))


def sources_section(tables: Tables, judged: Sequence[Judged]) -> Section:
    """For every claim that has a number the folders of its runs."""
    parts = [
        unfold(f"{one.claim.number}: {len(one.found.runs)} runs", folders(tables, one.found.runs))
        for one in judged
        if one.verdict != "not measured"
    ]
    note = text("Folders below the study's; the runs of pictures and other tables are listed below these.", note=True)
    if not parts:
        return Section("Where the claims' numbers come from", [text("No claim has a number yet.")])
    return Section("Where the claims' numbers come from", [note, together("The runs of every claim", parts)])


# --- what was not resolved --------------------------------------------------------------------------------


def unresolved_section(judged: Sequence[Judged]) -> Section:
    """What the study does not show: unresolved claims and what would resolve them, chance, and its limits."""
    open_ones = [one for one in judged if one.verdict == "not resolved"]
    parts = []
    if open_ones:
        headers = ["claim", "ours", "resolves", "blocks for a small difference"]
        content = table(Table(headers, [_open_row(one) for one in open_ones]), "words")
        parts += [content, text(_needed_note(), note=True)]
    parts.append(items(_limits(judged)))
    return Section("What was not resolved", parts)


def _open_row(one: Judged) -> list[str]:
    unit = one.claim.relation.unit
    name = f"{one.claim.number}. {one.claim.text}"
    return [name, words.ours(one), words.difference(one.resolution, unit), _blocks_needed(one)]


def _blocks_needed(one: Judged) -> str:
    """The blocks that resolve a small difference, and their number at the ends of the spread's interval."""
    small = SMALL_OF.get(one.claim.relation.unit)
    if small is None:
        return "no small difference is set for this unit"
    found = spread(one.found.blocks.values())
    if found.n < 2:
        return "one block has no spread"
    counts = [needed(small, sd) for sd in (found.sd, found.low, found.high)]
    number, low, high = ("too many" if count is None else f"{count:,}" for count in counts)
    return f"{number}\nat the ends of the spread's interval {low} and {high}"


def _needed_note() -> str:
    limits = {"bits per byte": f"{SMALL:g}", "a ratio of max violations": "a factor of 1.1"}
    small = " and ".join(f"{size} for {what}" for what, size in limits.items())
    return (
        f"Small: {small}. So many blocks find a true difference of this size in 4 of 5 studies; to show that a "
        "difference is smaller than this takes more. The spread is itself an estimate from few blocks."
    )


def _limits(judged: Sequence[Judged]) -> list[str]:
    compared = [one for one in judged if one.found.interval.half is not None]
    expected = CHANCE * len(compared)
    chance = (
        f"Comparisons: {len(compared)} intervals with a limit, without correction. If every true value were exactly at "
        f"its limit, about {expected:.1f} of them would exclude it by chance, half of these on either side."
    )
    return [
        *([chance] if compared else []),
        "Claims share arms, so they are not independent: one unusual arm or block moves several verdicts.",
        "Not resolved does not mean equal: only an interval within the limits of a claim of equality shows that.",
        "One small model, one corpus of English text and code, and short training: an order of arms may change with "
        "size, length or data. Branches measure what a method does after it replaces another, in the decay of the "
        "learning rate, and not what it does from the start.",
        "Options were chosen once, by a simulator or a paper, and not tuned for every arm.",
    ]


def problems(tables: Tables) -> Mapping[str, list[str]]:
    """Table -> a sentence for every run of it that is not finished or was left out."""
    return {name: sweep.problems for name, sweep in tables.items() if sweep.problems}
