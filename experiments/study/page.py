"""The study's page, as HTML that opens offline and as Markdown: contradictions first, then every claim, then evidence.

It can be written at any moment: what is not finished is named, and what needs it is left open.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..report.branched import Branched
from ..report.columns import Table
from ..report.drawing import STYLE
from ..report.page import DPI, document, facts_of, saved
from ..report.sweep import Run, Sweep
from .claims_part import claims_section, problems, sources_section, summary, unresolved_section
from .domains_part import domains_section
from .measures import Tables
from .parts import FIGURES, Part, Section, items, table, text, unfold
from .sections import (
    crossed_part,
    devices_section,
    experts_section,
    frontier_section,
    interference_section,
    scopes_section,
)
from .verdicts import Judged

TITLE = "A study of balancing"
PURPOSE = (
    "What was published about balancing the experts of a Mixture of Experts, and open questions, as claims that were "
    "written before the runs, with their measures and limits. Every verdict is computed from logs."
)


def write_study(tables: Tables, judged: Sequence[Judged], output_folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.md, with the pictures that the Markdown shows in figures/.

    Args:
        tables: the study's sweeps by name, finished or not, as `archive.tables` reads them.
        judged: the claims, as `judge` returns them for these tables.
        output_folder: created if it does not exist.

    Returns:
        The paths of the page and of the Markdown.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        top, sections = summary(judged), _sections(tables, judged)
        output_folder.mkdir(parents=True, exist_ok=True)
        page, markdown = output_folder / "report.html", output_folder / "report.md"
        page.write_text(_html(top, sections), encoding="utf-8", errors="backslashreplace")
        markdown.write_text(_markdown(top, sections), encoding="utf-8", errors="backslashreplace")
        for picture in (picture for section in sections for part in section.parts for picture in part.pictures):
            (output_folder / FIGURES).mkdir(exist_ok=True)
            (output_folder / FIGURES / f"{picture.name}.png").write_bytes(saved(picture.figure, "png", {"dpi": DPI}))
    return page, markdown


def _sections(tables: Tables, judged: Sequence[Judged]) -> list[Section]:
    return [
        claims_section(judged),
        frontier_section(tables),
        crossed_part(tables),
        interference_section(tables),
        experts_section(tables),
        domains_section(tables),
        scopes_section(tables),
        devices_section(tables),
        unresolved_section(judged),
        _progress(tables),
        sources_section(tables, judged),
        _provenance(tables),
    ]


def _html(top: Sequence[Part], sections: Sequence[Section]) -> str:
    head = f"<header><h1>{escape(TITLE)}</h1><p>{escape(PURPOSE)}</p></header>" + "".join(part.html for part in top)
    return document(
        TITLE, [head, *(f"<h2>{escape(s.title)}</h2>" + "".join(p.html for p in s.parts) for s in sections)]
    )


def _markdown(top: Sequence[Part], sections: Sequence[Section]) -> str:
    blocks = [f"# {TITLE}", PURPOSE, *(part.markdown for part in top)]
    for section in sections:
        blocks += [f"## {section.title}", *(part.markdown for part in section.parts)]
    return "\n\n".join(block for block in blocks if block) + "\n"


# --- the runs as a whole ----------------------------------------------------------------------------------


def _progress(tables: Tables) -> Section:
    """How much of every table is finished, and a sentence for each run that is not."""
    if not tables:
        return Section("Finished runs", [text("No table has been started.")])
    rows = [[name, _finished(sweep), _planned(sweep)] for name, sweep in tables.items()]
    parts = [table(Table(["table", "finished", "planned"], rows), "words")]
    parts += [
        unfold(f"{name}: {_unfinished(tables[name])} runs not finished, and remarks", lines)
        for name, lines in problems(tables).items()
    ]
    return Section("Finished runs", parts)


def _finished(sweep: Sweep | Branched) -> str:
    if isinstance(sweep, Branched):
        return f"{len(sweep.trunks.finished)} trunks, {len(sweep.runs)} branches"
    return f"{len(sweep.finished)} runs"


def _planned(sweep: Sweep | Branched) -> str:
    if isinstance(sweep, Branched):
        return f"{len(sweep.parts)} trunks, {sweep.num_planned} branches"
    return f"{len(sweep.arms) * len(sweep.seeds)} runs"


def _unfinished(sweep: Sweep | Branched) -> int:
    if isinstance(sweep, Branched):
        return len(sweep.parts) - len(sweep.trunks.finished) + sweep.num_planned - len(sweep.runs)
    return len(sweep.arms) * len(sweep.seeds) - len(sweep.finished)


def _provenance(tables: Tables) -> Section:
    runs: list[Run] = []
    for sweep in tables.values():
        runs += [*sweep.trunks.finished, *sweep.runs.values()] if isinstance(sweep, Branched) else sweep.finished
    facts = facts_of(runs)
    commands = [sweep.command for sweep in tables.values() if sweep.command]
    parts = [items(commands)] if commands else []
    parts += [table(Table(["what", "of the runs"], facts), "words")] if facts else []
    return Section("How it was run", parts or [text("Nothing was run.")])
