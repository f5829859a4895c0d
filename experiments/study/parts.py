"""What a section consists of, each as HTML and as Markdown: text, lists, tables, pictures, lists to unfold."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from ..report.columns import Table
from ..report.drawing import Picture
from ..report.page import figure_html, html_table
from ..report.sweep import Run
from .measures import Tables

FIGURES = "figures"  # folder of the pictures beside the Markdown


class Part(NamedTuple):
    """A part of the page; `pictures` are the files that its Markdown shows."""

    html: str
    markdown: str
    pictures: Sequence[Picture] = ()


class Section(NamedTuple):
    """A heading and what is below it."""

    title: str
    parts: Sequence[Part]


def text(words: str, note: bool = False) -> Part:
    """A paragraph; a note is small and grey."""
    return Part(f'<p class="note">{escape(words)}</p>' if note else f"<p>{escape(words)}</p>", plain(words))


def items(lines: Iterable[str]) -> Part:
    """A list of sentences."""
    lines = list(lines)
    return Part(
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>",
        "\n".join(f"- {plain(line)}" for line in lines),
    )


def box(title: str, lines: Sequence[str]) -> Part:
    """A coloured box with a title and a list, for what must not be overlooked."""
    listed = items(lines)
    html = f'<div class="warning"><b>{escape(title)}</b>{listed.html}</div>'
    return Part(html, f"**{plain(title)}**\n\n{listed.markdown}")


def table(content: Table, kind: str = "numbers", baseline: str = "") -> Part:
    """A table; in a cell only the first line break counts, what follows it is small."""
    return Part(html_table(content, kind, baseline), markdown_table(content))


def pictures(shown: Iterable[Picture | None], in_markdown: bool = False) -> Part:
    """Pictures, those that lead side by side; None is one without data.

    Args:
        shown: the pictures.
        in_markdown: also write them as files that the Markdown shows; otherwise it has their captions.
    """
    there = [picture for picture in shown if picture is not None]
    pair = "".join(figure_html(picture) for picture in there if picture.leads)
    html = f'<div class="pair">{pair}</div>' if pair else ""
    html += "".join(figure_html(picture) for picture in there if not picture.leads)
    if in_markdown:
        lines = [f"![{plain(p.alt)}]({FIGURES}/{p.name}.png)\n\n*{plain(p.title)}.* {plain(p.caption)}" for p in there]
    else:
        lines = [f"*{plain(p.title)}*: a picture in report.html." for p in there]
    return Part(html, "\n\n".join(lines), there if in_markdown else ())


def unfold(title: str, lines: Iterable[str]) -> Part:
    """A list of lines that readers unfold."""
    lines = list(lines)
    body = "<br>\n".join(escape(line) for line in lines)
    html = f'<details><summary>{escape(title)}</summary><p class="folders">{body}</p></details>'
    listed = "\n".join(f"- {plain(line)}" for line in lines)
    return Part(html, f"<details><summary>{escape(title)}</summary>\n\n{listed}\n\n</details>")


def coloured(title: str, texts: Mapping[str, Iterable[tuple[str, str]]], is_open: bool) -> Part:
    """Texts whose tokens have colours, to unfold; the Markdown has no colours and refers to the page.

    Args:
        title: of all of them.
        texts: name -> what each token shows, and its colour "#rrggbb".
        is_open: whether they are unfolded at first.
    """
    html = ""
    for name, tokens in texts.items():
        html += f'<h3>{escape(name)}</h3><div class="coloured">'
        for color, alike in itertools.groupby(tokens, key=lambda token: token[1]):
            html += f'<span style="background:{color}">{escape("".join(word for word, _ in alike))}</span>'
        html += "</div>"
    html = f"<details{' open' * is_open}><summary>{escape(title)}</summary>{html}</details>"
    return Part(html, f"*{plain(title)}*: coloured text in report.html.")


def together(title: str, parts: Sequence[Part]) -> Part:
    """Parts that readers unfold together."""
    html = "".join(part.html for part in parts)
    below = "\n\n".join(part.markdown for part in parts)
    return Part(
        f"<details><summary>{escape(title)}</summary>{html}</details>",
        f"<details><summary>{escape(title)}</summary>\n\n{below}\n\n</details>",
    )


# --- Markdown ---------------------------------------------------------------------------------------------


def plain(words: str) -> str:
    """Text whose signs Markdown does not read."""
    for sign in "\\*`|[]":
        words = words.replace(sign, f"\\{sign}")
    return words.replace("&", "&amp;").replace("<", "&lt;")


def markdown_table(content: Table) -> str:
    """A table in GitHub's Markdown."""
    rows = [content.headers, ["---"] * len(content.headers)]
    rows += [[plain(cell).replace("\n", "<br>") for cell in row] for row in content.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# --- where numbers come from ------------------------------------------------------------------------------


def folders(tables: Tables, runs: Iterable[Path]) -> list[str]:
    """Folders of runs below the study's, a line for each arm of a trunk: `arms/branches/bias/seed0/none/seed{0,1}`."""
    seeds: dict[str, list[str]] = {}
    for run in dict.fromkeys(runs):
        place = _place(tables, run)
        seeds.setdefault(place.parent.as_posix(), []).append(place.name)
    return [f"{parent}/{_braces(names)}" for parent, names in seeds.items()]


def sources(tables: Tables, runs: Iterable[Path | Run], title: str = "The runs of these numbers") -> Part:
    """The folders of runs, to unfold."""
    listed = folders(tables, (run.directory if isinstance(run, Run) else run for run in runs))
    return unfold(title, listed or ["none yet"])


def _place(tables: Mapping, run: Path) -> Path:
    """A run's folder with the name of its table in place of the table's folder."""
    for name, sweep in tables.items():
        if run.is_relative_to(sweep.directory):
            return Path(name) / run.relative_to(sweep.directory)
    raise ValueError(f"{run} must be in the folder of a table; the tables are {', '.join(tables)}.")


def _braces(names: Sequence[str]) -> str:
    """`seed0` alone, or `seed{0,1,2}` of several."""
    if len(names) == 1:
        return names[0]
    return "seed{" + ",".join(name.removeprefix("seed") for name in names) + "}"
