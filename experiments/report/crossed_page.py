"""The page of a branched sweep: the answer, the table of effects, the crossed table with a dot for every trunk seed.

Like the page of a plain sweep it is one file that opens offline. Every dot names its trunk, and every number can be
traced to the folder of its run in the list of runs.
"""

import json
from html import escape
from pathlib import Path

from ..statistics.blocks import trunks_of
from .branched import Branched
from .columns import BALANCE, QUALITY, Table, show
from .crossed import CROSSED_NOTE, branched_table, left_out, on_trunk, runs_table, sentences
from .page import document, facts_of, html_table, paragraphs
from .settings import settings_text
from .sweep import SweepError

WIDTH, HEIGHT, RADIUS, MARGIN = 150, 26, 4, 8  # of a strip of dots, in pixels
DOTS_NOTE = (
    "Rows: the method of the trunk; columns: the arm of its branches. Each cell has the mean held-out bits per byte of "
    "its runs, the difference to {baseline} on the same trunks with its 95 % t-interval over trunk seeds, and a dot "
    "for the difference on every trunk, mean over data seeds. All strips have one scale, from {low:+.4f} to "
    "{high:+.4f}; the line is 0, and left of it the arm is better. Arms on their own trunks are framed."
)


def write_branched(sweep: Branched, output: Path | None = None, reload: int = 0) -> Path:
    """Write the page, by default report.html in the sweep's folder, and return its path; `reload` as for `page.write`.

    Raises:
        SweepError: no branch is finished, in which case nothing is written.
    """
    if not sweep.runs:
        why = f" ({sweep.problems[0]})" if sweep.problems else ""
        raise SweepError(
            f"DIR={sweep.directory} must hold at least one finished branch; it has none of {sweep.num_planned}{why} "
            "Run or resume the sweep first."
        )
    output = output or sweep.directory / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render_branched(sweep, reload), encoding="utf-8", errors="backslashreplace")
    return output


def render_branched(sweep: Branched, reload: int = 0) -> str:
    """Render the page as one string of HTML without external references; at least one branch is finished."""
    numbers = html_table(branched_table(sweep), "numbers", sweep.baseline)
    balance = html_table(branched_table(sweep, BALANCE), "numbers", sweep.baseline)
    return document(
        sweep.name,
        [
            _header(sweep),
            _answer(sweep),
            f'<h2>Numbers</h2>{numbers}<p class="note">{escape(CROSSED_NOTE)}</p>{balance}',
            crossed_section(sweep),
            _settings(sweep),
            _runs(sweep),
            _provenance(sweep),
        ],
        reload,
    )


def crossed_section(sweep: Branched) -> str:
    """The crossed table, trunk method x arm, of held-out bits per byte, with the dots of every trunk seed, as HTML."""
    values = sweep.values(QUALITY)
    trunks = [trunk for trunk in sweep.trunks.arms if trunk in trunks_of(values)]
    cells = {(trunk, arm): on_trunk(sweep, values, trunk, arm) for trunk in trunks for arm in sweep.arms}
    every = [difference for *_, dots in cells.values() for difference in dots.values()]
    low, high = min([0.0, *every]), max([0.0, *every])
    head = "".join(f'<th scope="col">{escape(arm)}</th>' for arm in sweep.arms)
    body = ""
    for trunk in trunks:
        row = f'<th scope="row">{escape(trunk)}</th>'
        for arm in sweep.arms:
            mean, difference, dots = cells[trunk, arm]
            text = f"<span>{mean}"
            if difference.n:
                below = show(difference, QUALITY.digits, signed=True)
                sure = ' class="sure"' if below.endswith("*") else ""
                text += f"<br><small{sure}>{below}</small><br>{_strip(trunk, dots, low, high)}"
            row += f'<td data-column="{escape(arm)}"{" class=own" * (trunk == arm)}>{text}</span></td>'
        body += f"<tr>{row}</tr>\n"
    note = DOTS_NOTE.format(baseline=sweep.baseline, low=low, high=high)
    return (
        '<h2>Trunk by arm</h2><div class="scroll" tabindex="0"><table class="numbers crossed"><thead><tr>'
        f'<th scope="col">trunk</th>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
        f'<p class="note">{escape(note)}</p>'
    )


def _strip(trunk: str, dots: dict[int, float], low: float, high: float) -> str:
    """A drawing of the differences on a line, with the trunk's name and the number on each dot."""

    def place(value: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / ((high - low) or 1.0)

    marks = "".join(
        f'<circle cx="{place(value):.1f}" cy="{HEIGHT / 2}" r="{RADIUS}"><title>{escape(trunk)}, trunk seed {seed}: '
        f"{value:+.5f}</title></circle>"
        for seed, value in dots.items()
    )
    zero = f'<line x1="{place(0):.1f}" x2="{place(0):.1f}" y1="1" y2="{HEIGHT - 1}"/>'
    listed = ", ".join(f"{value:+.4f}" for value in dots.values())
    return (
        f'<svg class="dots" role="img" aria-label="differences by trunk seed: {listed}" width="{WIDTH}" '
        f'height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">{zero}{marks}</svg>'
    )


def _header(sweep: Branched) -> str:
    trunks = f"{len(sweep.trunks.finished)} of {len(sweep.parts)} trunks and "
    what = f"{trunks}{len(sweep.runs)} of {sweep.num_planned} branches finished, branched after {sweep.at} steps; "
    return (
        f"<header><h1>{escape(sweep.name)}</h1><p>{escape(sweep.description)}</p>"
        f'<p class="note">{escape(what)}baseline {escape(sweep.baseline)}.</p></header>'
    )


def _answer(sweep: Branched) -> str:
    box = f'<h2>The answer</h2><div class="answer">{paragraphs(sentences(sweep))}</div>'
    if found := sweep.problems + left_out(sweep):
        items = "".join(f"<li>{escape(problem)}</li>" for problem in found)
        box += f'<div class="warning"><b>Not everything went to plan</b><ul>{items}</ul></div>'
    return box


def _settings(sweep: Branched) -> str:
    rows = [[f"trunk {name}", settings_text(changed)] for name, changed in sweep.trunks_config.items()]
    rows += [[f"arm {name}", settings_text(changed)] for name, changed in sweep.arms_config.items()]
    rows = [[name, text or "the base config"] for name, text in rows]
    text = json.dumps(sweep.config, indent=2, ensure_ascii=False, default=str)
    return (
        f"<h2>Settings</h2>{html_table(Table(['of', 'settings'], rows), 'words')}"
        f"<details><summary>The base config</summary><pre>{escape(text)}</pre></details>"
    )


def _runs(sweep: Branched) -> str:
    table = html_table(runs_table(sweep), "numbers")
    return f"<h2>Every run</h2><details><summary>Numbers and folders of all branches</summary>{table}</details>"


def _provenance(sweep: Branched) -> str:
    rows = facts_of([*sweep.trunks.finished, *sweep.runs.values()])
    html = f"<pre>{escape(sweep.command)}</pre>" if sweep.command else ""
    html += html_table(Table(["what", "of the runs"], rows), "words") if rows else ""
    return f"<h2>Where it comes from</h2>{html}" if html else ""
