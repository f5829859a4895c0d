"""The page: one HTML file that opens offline. The answer comes first, then its evidence, then everything else."""

import base64
import io
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answer import answer, limits, remarks
from .columns import COLUMNS, Column, Table, domain_table, main_table, time_table
from .drawing import STYLE, Picture
from .figures import pictures
from .settings import arm_settings, changed_settings, settings_text
from .sweep import Run, Sweep, SweepError, corpus_of
from .terminal import TABLE_NOTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144  # of PNG files, and of the heatmaps in SVG drawings
STYLESHEET = Path(__file__).with_name("page.css")
TIME_NOTE = (
    "Wall-clock time of all finished runs, including every attempt; the share of step is the goodput. compile: until "
    "the first step after a start is done; rolled_back: steps that a run went back from; lost: steps repeated after a "
    "crash, and all other time. Data wait: the share of the stepping time in which the devices had no batch. GFLOP/s: "
    "the model's own FLOPs, forward and backward, in the median logged step; MFU: their share of the devices' bf16 "
    "peak, where that is known."
)


def write(
    sweep: Sweep,
    output: Path | None = None,
    figures: bool = False,
    columns: Iterable[Column] = COLUMNS,
    reload: int = 0,
) -> Path:
    """Write the page and, with `figures`, the pictures as PNG files.

    Args:
        sweep: as `read_sweep` returns it.
        output: the page; None is report.html in the sweep's folder.
        figures: also write <sweep folder>/figures/<name>.png.
        columns: the columns of the tables.
        reload: seconds after which a browser that shows the page reads it again; 0 for never.

    Returns:
        The path of the page.

    Raises:
        SweepError: no run is finished, in which case nothing is written.
    """
    if not sweep.finished:
        raise SweepError(
            f"DIR={sweep.directory} must hold at least one finished run; it has none of "
            f"{len(sweep.arms) * len(sweep.seeds)} ({sweep.problems[0]}) Run or resume the sweep first."
        )
    shown = pictures(sweep)
    page = render(sweep, list(columns), shown, reload)
    output = output or sweep.directory / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8", errors="backslashreplace")  # a folder's name may not be valid text
    if figures:
        folder = sweep.directory / "figures"
        folder.mkdir(exist_ok=True)
        for picture in shown:
            (folder / f"{picture.name}.png").write_bytes(saved(picture.figure, "png", {"dpi": DPI}))
    return output


def render(sweep: Sweep, columns: list[Column], shown: list[Picture], reload: int = 0) -> str:
    """Render the whole page as one string of HTML without external references.

    Args:
        sweep: must have at least one finished run.
        columns: the columns of the tables.
        shown: pictures to embed.
        reload: as for `write`.
    """
    sections = [
        _header(sweep),
        _answer(sweep),
        '<div class="pair">' + "".join(figure_html(picture) for picture in shown if picture.leads) + "</div>",
        _numbers(sweep, columns),
        "<h2>Pictures</h2>" + "".join(figure_html(picture) for picture in shown if not picture.leads),
        _times(sweep, columns),
        _limits(sweep),
        _settings(sweep),
        _provenance(sweep),
    ]
    return document(sweep.name, sections, reload)


def document(title: str, sections: Iterable[str], reload: int = 0) -> str:
    """A whole page of HTML, without empty sections; with `reload` a browser reads it again after as many seconds."""
    again = f'<meta http-equiv="refresh" content="{reload}">' if reload else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{again}<title>{escape(title)}</title>\n<style>\n{STYLESHEET.read_text(encoding='utf-8')}</style></head>\n"
        "<body><main>\n" + "\n".join(filter(None, sections)) + "\n</main></body></html>\n"
    )


# --- sections -------------------------------------------------------------------------------------------


def _header(sweep: Sweep) -> str:
    finished = f"{len(sweep.finished)} of {len(sweep.arms) * len(sweep.seeds)} runs finished"
    what = f"{_count(sweep.arms, 'arm')}, {_count(sweep.seeds, 'seed')} each; {finished}; baseline {sweep.baseline}."
    return (
        f"<header><h1>{escape(sweep.name)}</h1><p>{escape(sweep.description)}</p>"
        f'<p class="note">{escape(what)}</p></header>'
    )


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _answer(sweep: Sweep) -> str:
    box = f'<h2>The answer</h2><div class="answer">{paragraphs(answer(sweep))}</div>'
    if found := remarks(sweep):
        items = "".join(f"<li>{escape(remark)}</li>" for remark in found)
        box += f'<div class="warning"><b>Not everything went to plan</b><ul>{items}</ul></div>'
    return box


def paragraphs(texts: Mapping[str, str]) -> str:
    """Subjects and texts as HTML, a paragraph each."""
    return "".join(f"<p><b>{escape(subject)}.</b> {escape(text)}</p>" for subject, text in texts.items())


def _numbers(sweep: Sweep, columns: list[Column]) -> str:
    html = "<h2>Numbers</h2>" + _table(sweep, main_table(sweep, columns, "page"))
    html += f'<p class="note">{escape(TABLE_NOTE)}</p>'
    domains = domain_table(sweep)
    if len(domains.headers) > 1:
        html += "<h3>Held-out bits per byte by domain</h3>" + _table(sweep, domains)
    return html


def _times(sweep: Sweep, columns: list[Column]) -> str:
    table = time_table(sweep, columns)
    if not table.rows:
        return ""
    return f'<h2>Where the time went</h2>{_table(sweep, table)}<p class="note">{escape(TIME_NOTE)}</p>'


def _limits(sweep: Sweep) -> str:
    items = "".join(f"<li><b>{escape(what)}:</b> {escape(text)}</li>" for what, text in limits(sweep).items())
    return f"<h2>What this does not show</h2><ul>{items}</ul>"


def _settings(sweep: Sweep) -> str:
    """The keys that the arms change, those that the sweep changes from the defaults, and, collapsed, every key."""
    rows = [[arm, settings_text(arm_settings(sweep, arm)) or "the base config"] for arm in sweep.arms]
    html = "<h2>Settings</h2><h3>What the arms change</h3>" + _table(sweep, Table(["arm", "settings"], rows), "words")
    changed = [list(row) for row in changed_settings(sweep)]
    if changed:
        html += "<h3>Settings common to all arms that are not defaults</h3>"
        html += _table(sweep, Table(["setting", "value", "default"], changed), "words")
    everything = {"config": sweep.config, "arms": sweep.arms_config}
    text = json.dumps(everything, indent=2, ensure_ascii=False, default=str)
    return html + f"<details><summary>Every setting</summary><pre>{escape(text)}</pre></details>"


def _provenance(sweep: Sweep) -> str:
    rows = facts_of(sweep.finished)
    html = f"<pre>{escape(sweep.command)}</pre>" if sweep.command else ""
    html += _table(sweep, Table(["what", "of the runs"], rows), "words") if rows else ""
    return f"<h2>Where it comes from</h2>{html}" if html else ""


def facts_of(runs: list[Run]) -> list[list[str]]:
    """Rows of facts from runs; different values are all listed, because the arms may then not be comparable."""
    infos = [run.info for run in runs]
    facts = {
        "versions": _distinct(settings_text(_mapping(info.get("versions"))) for info in infos),
        "machine": _distinct(str(info.get("machine") or "") for info in infos),
        "revision": _distinct(str(info.get("git") or "") for info in infos),
        "data": _distinct(corpus_of(info)[:16] for info in infos),
        "time": _time(runs),
    }
    return [[fact, text] for fact, text in facts.items() if text]


def _time(runs: list[Run]) -> str:
    seconds = [float(run.info["seconds"]) for run in runs if isinstance(run.info.get("seconds"), (int, float))]
    return f"{sum(seconds) / 3600:.2f} hours over {len(seconds)} runs" if seconds else ""


# --- parts ----------------------------------------------------------------------------------------------


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join(sorted({text for text in texts if text}))


def _table(sweep: Sweep, table: Table, kind: str = "numbers") -> str:
    return html_table(table, kind, sweep.baseline)


def html_table(table: Table, kind: str = "numbers", baseline: str = "") -> str:
    """A table as HTML; on a narrow screen each row is a card, and every cell names its column.

    Args:
        table: its rows start with a name.
        kind: "numbers" or "words".
        baseline: the name of the row to mark.
    """
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in table.headers)
    body = ""
    for first, *others in table.rows:
        cells = f'<th scope="row">{escape(first)}</th>'
        for header, cell in zip(table.headers[1:], others, strict=True):
            cells += f'<td data-column="{escape(header)}">{_lines(cell)}</td>'
        mark = ' class="baseline"' if first == baseline else ""
        body += f"<tr{mark}>{cells}</tr>\n"
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _lines(cell: str) -> str:
    """The HTML of a cell: its value and, below it, the difference."""
    value, line_break, below = cell.partition("\n")
    text = f"<span>{escape(value)}"
    if line_break:
        sure = ' class="sure"' if below.endswith("*") else ""
        text += f"<br><small{sure}>{escape(below)}</small>"
    return text + "</span>"


def figure_html(picture: Picture) -> str:
    """A picture with its title and caption as HTML."""
    kind = "leading" if picture.leads else "wide"
    return (
        f'<figure class="{kind}"><h3>{escape(picture.title)}</h3>'
        f'<div class="scroll" tabindex="0"><img alt="{escape(picture.alt)}" src="{embedded(picture.figure)}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def embedded(figure: "Figure") -> str:
    """A matplotlib figure as a data URL, as SVG or PNG, whichever is smaller."""
    kinds: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
        ("svg", "image/svg+xml", {"dpi": DPI, "metadata": {"Date": None}}),
        ("png", "image/png", {"dpi": DPI, "metadata": {"Software": None}}),
    )
    addresses = []
    for suffix, kind, options in kinds:
        content = base64.b64encode(saved(figure, suffix, options)).decode("ascii")
        addresses.append(f"data:{kind};base64,{content}")
    return min(addresses, key=len)


def saved(figure: "Figure", suffix: str, options: Mapping[str, Any]) -> bytes:
    """A matplotlib figure as a file of the format `suffix`, in the style of all pictures."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=suffix, **options)
    return buffer.getvalue()
