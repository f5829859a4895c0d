"""Runs become a claim: one self-contained page with the answer first, then tables, pictures and their limits.

    python -m experiments.report DIR [--output=DIR/report.html] [--baseline=ARM] [--figures]

Reads what a sweep has written so far (see `experiments.statistics`), prints the main table, and writes a page
that opens offline. Every sentence of the answer is made from an interval and says no more than it.
"""

import argparse
import base64
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.config import flatten
from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of
from moe_jax.runtime.ledger import KINDS

from .figures import STYLE, Picture, pictures
from .statistics import (
    ArmSummary,
    Interval,
    Run,
    Sweep,
    SweepError,
    arm_settings,
    corpus_of,
    curve,
    planned_steps,
    read_sweep,
    summarise,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["answer", "main", "print_table", "read_sweep", "render", "summarise", "write"]

DPI = 144  # of pixels, and of the heatmaps inside drawings
TERMINAL_WIDTH = 110  # characters when the output is a file or a pipe, where rich would assume 80
TERMINAL_COLUMNS = (0, 2, 3, 4, 7, 10)  # of the main table: a terminal has room for these
TABLE_NOTE = (
    "Mean over seeds ± half-width of the 95 % t-interval; differences are paired by seed; "
    "* the interval excludes 0; - not logged or not comparable."
)
TIME_NOTE = (
    "Wall-clock time of all finished runs, every attempt counted; the share of step is the goodput. compile: until the "
    "first step of a start is done; lost: steps done again after a crash, and all else. Data wait: the share of the "
    "time of steps in which no device had a batch. GFLOP/s: the model's own FLOPs, forward and backward, of the median "
    "logged step; MFU: their share of the devices' bf16 peak, where that is known."
)
CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.2rem 4rem; color: #1d2126; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #dde1e6; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .4rem; }
p, li { max-width: 50rem; overflow-wrap: anywhere; }
code, pre { font: .86em/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { background: #f2f4f6; padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: #f2f4f6; padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
.answer, .warning { padding: .8rem 1.2rem; border-left: 4px solid; border-radius: 0 6px 6px 0; }
.answer { background: #f1f6fb; border-color: #0072b2; }
.answer p { margin: .35rem 0; }
.warning { background: #fff6e5; border-color: #e69f00; margin-top: 1rem; }
.warning ul { margin: .3rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .65rem; text-align: right; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 4.6rem; font-weight: 600; color: #444c55; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td:first-child { font-weight: 600; white-space: normal; min-width: 6rem; max-width: 16rem; }
td { overflow-wrap: anywhere; }
table.settings td { text-align: left; white-space: normal; font-weight: 400; }
tr.baseline td { background: #f7f8fa; }
.note { color: #59616b; font-size: .86rem; }
figure { margin: 0 0 1.4rem; }
figure img { width: 100%; min-width: 42rem; display: block; }
figcaption { color: #3b424a; font-size: .92rem; margin-top: .35rem; max-width: 50rem; }
summary { cursor: pointer; font-weight: 600; }
"""


# --- numbers as text ------------------------------------------------------------------------------------


def show(value: Interval, digits: int, signed: bool = False) -> str:
    """An interval as text: `1.2345 ± 0.0021`, `± n/a` for one seed, `-` for none.

    Args:
        value: the interval.
        digits: decimals of both numbers.
        signed: write + for a positive mean, and mark an interval that excludes 0 with `*`.
    """
    if value.n == 0:
        return "-"
    text = f"{value.mean:+,.{digits}f}" if signed else f"{value.mean:,.{digits}f}"
    if value.half is None:
        return f"{text} ± n/a"
    return f"{text} ± {value.half:,.{digits}f}" + (" *" if signed and value.excludes_zero else "")


def main_table(sweep: Sweep, summaries: Iterable[ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """The main table as text.

    Returns:
        (headers, rows), a row an arm, the arm's name first.
    """
    headers = [
        "arm",
        "seeds",
        "bits per byte, held out",
        f"difference to {sweep.baseline}",
        "max violation, held out",
        "max violation, training",
        "worst layer, held out",
        "dead experts, end of training",
        "dead experts, held out",
        "aux loss (1 = even)",
        "tokens/s",
    ]
    return headers, [_main_row(summary) for summary in summaries]


def _main_row(summary: ArmSummary) -> list[str]:
    speed = summary.tokens_per_second
    return [
        summary.arm,
        str(len(summary.seeds)),
        show(summary.bits_per_byte, 4),
        show(summary.difference, 4, signed=True),
        show(summary.max_violation, 3),
        show(summary.train_max_violation, 3),
        show(summary.worst_layer, 3),
        show(summary.dead_experts, 1),
        show(summary.eval_dead_experts, 1),
        show(summary.aux_loss, 3),
        f"{speed:,.0f}" if math.isfinite(speed) else "-",
    ]


def domain_table(sweep: Sweep, summaries: Iterable[ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """Held-out bits per byte by domain as text, with the paired difference under each value.

    Returns:
        (headers, rows), a row an arm, the arm's name first; a line break separates value and difference.
    """
    summaries = list(summaries)
    domains = list(summaries[0].domains) if summaries else []
    rows = []
    for summary in summaries:
        cells = [
            show(summary.domains[name], 4) + _under(show(summary.domain_differences[name], 4, signed=True))
            for name in domains
        ]
        rows.append([summary.arm, *cells])
    return ["arm", *domains], rows


def time_table(summaries: Iterable[ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """Where each arm's wall-clock time went, and what its steps achieved, as text.

    Returns:
        (headers, rows), a row an arm that has kept account, the arm's name first.
    """
    headers = ["arm", "minutes", *KINDS, "data wait", "GFLOP/s", "MFU"]
    return headers, [_time_row(summary) for summary in summaries if sum(summary.seconds.values())]


def _time_row(summary: ArmSummary) -> list[str]:
    seconds = {kind: summary.seconds.get(kind, 0.0) for kind in KINDS}
    total, stepping = sum(seconds.values()), seconds["data"] + seconds["step"]
    return [
        summary.arm,
        f"{total / 60:,.1f}",
        *(f"{spent / total:.1%}" for spent in seconds.values()),
        f"{seconds['data'] / stepping:.2%}" if stepping else "-",
        f"{summary.gflops_per_second:,.1f}" if math.isfinite(summary.gflops_per_second) else "-",
        f"{summary.mfu:.1%}" if math.isfinite(summary.mfu) else "-",
    ]


def _under(text: str) -> str:
    return "" if text == "-" else f"\n{text}"


# --- the answer -----------------------------------------------------------------------------------------


def answer(sweep: Sweep, summaries: list[ArmSummary]) -> list[str]:
    """The sweep's result in a few sentences, none saying more than its interval.

    Args:
        sweep: with at least one finished run.
        summaries: of the same sweep.

    Returns:
        Plain text: balance, quality, and how sure one can be.
    """
    return [_balance(sweep, summaries), _quality(sweep, summaries), _certainty(sweep, summaries)]


def _balance(sweep: Sweep, summaries: list[ArmSummary]) -> str:
    measured = [(one.arm, one.max_violation, one.max_violation_difference) for one in summaries]
    return "Balance (held-out max violation; 0 is perfectly even): " + _comparison(sweep, measured, 3)


def _quality(sweep: Sweep, summaries: list[ArmSummary]) -> str:
    measured = [(one.arm, one.bits_per_byte, one.difference) for one in summaries]
    text = "Quality (held-out bits per byte; lower is better): " + _comparison(sweep, measured, 4)
    intervals = [summary.difference for summary in summaries if summary.difference.half is not None]
    if intervals and not any(value.excludes_zero and value.mean < 0 for value in intervals):
        text += f" No arm is shown to be better than {sweep.baseline}."
    return text


def _comparison(sweep: Sweep, measured: list[tuple[str, Interval, Interval]], digits: int) -> str:
    """One sentence that sorts the arms by what their paired interval allows to say."""
    groups: dict[str, list[str]] = {}
    for arm, value, difference in measured:
        if arm != sweep.baseline:
            text = f"{arm} ({_numbers(value, difference, digits)})" if value.n else arm
            groups.setdefault(_verdict(sweep.baseline, value, difference), []).append(text)
    base = next(value for arm, value, _ in measured if arm == sweep.baseline)
    parts = [f"{sweep.baseline} has {show(base, digits)}" if base.n else f"{sweep.baseline} has no value"]
    parts += [f"{verdict} {_listed(arms)}" for verdict, arms in groups.items()]
    return "; ".join(parts) + "."


def _verdict(baseline: str, value: Interval, difference: Interval) -> str:
    if value.n == 0:
        return "no value for"
    if difference.n == 0:
        return f"no seed in common with {baseline} for"
    if difference.half is None:
        return "one seed, so no interval, for"
    if not difference.excludes_zero:
        return f"not distinguishable from {baseline}:"
    return f"lower than {baseline}:" if difference.mean < 0 else f"higher than {baseline}:"


def _numbers(value: Interval, difference: Interval, digits: int) -> str:
    if difference.n == 0:
        return show(value, digits)
    return f"{value.mean:,.{digits}f}, difference {show(difference, digits, signed=True).removesuffix(' *')}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _certainty(sweep: Sweep, summaries: list[ArmSummary]) -> str:
    pairs = {summary.arm: summary.difference.n for summary in summaries if summary.arm != sweep.baseline}
    counts = set(pairs.values())
    if not pairs:
        n = len(sweep.runs[sweep.baseline])
        return f"There is one arm with {_seeds(n)}, so nothing is compared." + (_ONE_SEED if n == 1 else "")
    if counts == {0}:
        return f"No arm has a finished seed in common with {sweep.baseline}, so no difference is given."
    number = _listed([f"{_seeds(n)} ({arm})" for arm, n in pairs.items()])
    if len(counts) == 1:
        number = _seeds(counts.pop())
    text = f"Differences are arm minus {sweep.baseline}, paired by seed over {number}."
    if max(pairs.values()) > 1:
        text += " ± is the half-width of the 95 % t-interval over seeds."
    return text + (_ONE_SEED if 1 in pairs.values() else "")


_ONE_SEED = " One seed has no interval (n/a): its difference is a single observation, not a result."


def _seeds(n: int) -> str:
    return f"{n} seed" if n == 1 else f"{n} seeds"


def remarks(sweep: Sweep) -> list[str]:
    """Sentences about what stands apart: runs not counted, unequal lengths, skipped steps, dropped tokens."""
    found = list(sweep.problems) + _unequal_lengths(sweep)
    for run in (run for runs in sweep.runs.values() for run in runs.values()):
        name, skipped = f"{run.arm}, seed {run.seed}", _largest(run, "skipped")
        if skipped > 0:
            found.append(f"{name}: {skipped:g} steps skipped, loss or gradient not finite.")
        if _largest(run, "moe/dropped") > 0:
            found.append(f"{name}: tokens were dropped (moe/dropped is above 0).")
    return found


def _unequal_lengths(sweep: Sweep) -> list[str]:
    """A sentence where arms were trained for different numbers of steps."""
    planned = {arm: {planned_steps(run.config) for run in runs.values()} for arm, runs in sweep.runs.items() if runs}
    if len(set().union(*planned.values())) < 2:
        return []
    lengths = ", ".join(f"{arm} {' or '.join(map(str, sorted(map(str, steps))))}" for arm, steps in planned.items())
    return [f"The arms plan different numbers of steps ({lengths}); each is compared at its own end."]


def _largest(run: Run, key: str) -> float:
    _, values = curve(run, key)
    return max((float(value) for value in values if math.isfinite(value)), default=0.0)


# --- the terminal ---------------------------------------------------------------------------------------


def print_table(sweep: Sweep | str | Path, console: "Console | None" = None) -> None:
    """Prints the columns of the main table that fit, and a line for each run that is not counted.

    Args:
        sweep: a sweep that was read, or its folder.
        console: where to print; None is standard output.

    Raises:
        SweepError: the folder holds no readable sweep.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not isinstance(sweep, Sweep):
        sweep = read_sweep(sweep)
    console = console or Console(width=None if sys.stdout.isatty() else TERMINAL_WIDTH)
    headers, rows = main_table(sweep, summarise(sweep))
    table = Table(title=Text(sweep.name), caption=Text(TABLE_NOTE))
    for header in (headers[i] for i in TERMINAL_COLUMNS):
        table.add_column(Text(header), justify="left" if header == "arm" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in TERMINAL_COLUMNS))
    console.print(table)
    for remark in remarks(sweep):
        console.print(Text(f"! {remark}"))


# --- the page -------------------------------------------------------------------------------------------


def render(sweep: Sweep, summaries: list[ArmSummary], shown: list[Picture]) -> str:
    """The whole page as one string of HTML that refers to nothing outside itself.

    Args:
        sweep: with at least one finished run.
        summaries: of the same sweep.
        shown: pictures to embed.
    """
    sections = [
        _header(sweep),
        _answer_box(sweep, summaries),
        _tables(sweep, summaries),
        "<h2>Pictures</h2>" + "".join(_figure(picture) for picture in shown),
        _limits(sweep, summaries),
        _appendix(sweep),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(sweep.name)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _header(sweep: Sweep) -> str:
    facts = {
        "Arms": ", ".join(f"{arm} (baseline)" if arm == sweep.baseline else arm for arm in sweep.arms),
        "Seeds": ", ".join(map(str, sweep.seeds)),
        "Model": _settings_text(flatten(_mapping(sweep.config.get("model")))),
        "Training": _settings_text({k: v for k, v in sweep.config.items() if _is_plain(v)}),
        **_provenance(sweep),
    }
    rows = "".join(f"<tr><td><b>{escape(k)}</b></td><td>{escape(v)}</td></tr>" for k, v in facts.items() if v)
    command = f"<pre>{escape(sweep.command)}</pre>" if sweep.command else ""
    return (
        f"<h1>{escape(sweep.name)}</h1><p>{escape(sweep.description)}</p>{command}"
        f'<div class="scroll"><table class="settings">{rows}</table></div>'
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) and value != ""


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_literal(value)}" for key, value in settings.items())


def _literal(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)


def _provenance(sweep: Sweep) -> dict[str, str]:
    """What the runs say about themselves; several values are all named, for then arms may not compare."""
    infos = [run.info for runs in sweep.runs.values() for run in runs.values()]
    seconds = [float(info["seconds"]) for info in infos if isinstance(info.get("seconds"), (int, float))]
    return {
        "Versions": _distinct(_settings_text(_mapping(info.get("versions"))) for info in infos),
        "Machine": _distinct(str(info.get("machine") or "") for info in infos),
        "Revision": _distinct(str(info.get("git") or "") for info in infos),
        "Data": _distinct(corpus_of(info)[:16] for info in infos),
        "Time": f"{sum(seconds) / 3600:.2f} hours over {len(seconds)} runs" if seconds else "",
    }


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join(sorted({text for text in texts if text}))


def _answer_box(sweep: Sweep, summaries: list[ArmSummary]) -> str:
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in answer(sweep, summaries))
    box = f'<h2>The answer</h2><div class="answer">{sentences}</div>'
    found = remarks(sweep)
    if found:
        items = "".join(f"<li>{escape(remark)}</li>" for remark in found)
        box += f'<div class="warning"><b>Not everything went to plan</b><ul>{items}</ul></div>'
    return box


def _tables(sweep: Sweep, summaries: list[ArmSummary]) -> str:
    html = "<h2>Numbers</h2>" + _html_table(sweep, *main_table(sweep, summaries))
    html += f'<p class="note">{escape(TABLE_NOTE)}</p>'
    headers, rows = domain_table(sweep, summaries)
    if len(headers) > 1:
        html += "<h3>Held-out bits per byte by domain</h3>" + _html_table(sweep, headers, rows)
        html += f'<p class="note">Second line: paired difference to {escape(sweep.baseline)}.</p>'
    headers, rows = time_table(summaries)
    if rows:
        html += "<h3>Where the time went</h3>" + _html_table(sweep, headers, rows)
        html += f'<p class="note">{escape(TIME_NOTE)}</p>'
    rows = [[arm, _settings_text(arm_settings(sweep, arm)) or "the base config"] for arm in sweep.arms]
    return html + "<h3>What the arms change</h3>" + _html_table(sweep, ["arm", "settings"], rows, "settings")


def _html_table(sweep: Sweep, headers: list[str], rows: list[list[str]], kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = ""
    for row in rows:
        cells = "".join("<td>" + escape(cell).replace("\n", "<br>") + "</td>" for cell in row)
        mark = ' class="baseline"' if row[0] == sweep.baseline else ""
        body += f"<tr{mark}>{cells}</tr>\n"
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>\n{body}</table></div>'


def _figure(picture: Picture) -> str:
    return (
        f"<h3>{escape(picture.title)}</h3><figure>"
        f'<div class="scroll"><img alt="{escape(picture.alt)}" src="{embedded(picture.figure)}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def embedded(figure: "Figure") -> str:
    """A figure as a data address: drawing or pixels, whichever is smaller.

    Args:
        figure: a matplotlib figure.
    """
    kinds: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
        ("svg", "image/svg+xml", {"dpi": DPI, "metadata": {"Date": None}}),
        ("png", "image/png", {"dpi": DPI, "metadata": {"Software": None}}),
    )
    addresses = []
    for suffix, kind, options in kinds:
        content = base64.b64encode(_saved(figure, suffix, options)).decode("ascii")
        addresses.append(f"data:{kind};base64,{content}")
    return min(addresses, key=len)


def _saved(figure: "Figure", suffix: str, options: Mapping[str, Any]) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=suffix, **options)
    return buffer.getvalue()


def _limits(sweep: Sweep, summaries: list[ArmSummary]) -> str:
    pairs = [summary.difference.n for summary in summaries if summary.difference.n]
    finished = max(len(summary.seeds) for summary in summaries)
    items = [
        (
            "Scale: this is one model, one data set and one length of training, as given above. An order of "
            "arms at this size may change with more experts, more steps or more data."
        ),
        (
            f"Seeds: at most {_seeds(finished)} an arm. With few seeds the t-interval is wide, and an effect "
            "smaller than its half-width cannot be seen here: not distinguishable does not mean equal."
        ),
        (
            "Spread: the intervals hold for other seeds of this setting only; they say nothing about other "
            "settings, nor about arms whose own options were not tuned equally well."
        ),
        "Speed: tokens per second belongs to the machine and to what else ran on it; it is not paired.",
        (
            "Noise: even a perfectly uniform random router has some max violation in a finite batch (dashed "
            "in the picture) and on a finite held-out set; differences near that mean little."
        ),
    ]
    if len(pairs) > 1:
        items.insert(
            3,
            f"Many looks: {len(pairs)} arms are compared with one baseline on several measures, without "
            "correction. Of intervals with no effect behind them about 1 in 20 excludes 0 by chance.",
        )
    return "<h2>What this does not show</h2><ul>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>"


def _appendix(sweep: Sweep) -> str:
    text = json.dumps(sweep.config, indent=2, ensure_ascii=False, default=str)
    return (
        "<h2>Appendix</h2><details><summary>Full base config, before the arms' changes</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


# --- the command ----------------------------------------------------------------------------------------


def write(sweep: Sweep | str | Path, output: Path | None = None, figures: bool = False) -> Path:
    """Writes the page, and the pictures as PNG files when asked.

    Args:
        sweep: a sweep that was read, or its folder.
        output: the page; None is report.html in the sweep's folder.
        figures: also write <sweep folder>/figures/<name>.png.

    Returns:
        Where the page is.

    Raises:
        SweepError: no readable sweep, or one without a finished run; nothing is written then.
    """
    if not isinstance(sweep, Sweep):
        sweep = read_sweep(sweep)
    if not any(sweep.runs.values()):
        raise SweepError(
            f"DIR={sweep.directory} must hold at least one finished run; it has none of "
            f"{len(sweep.arms) * len(sweep.seeds)} ({sweep.problems[0]}) Run or resume the sweep first."
        )
    summaries = summarise(sweep)
    shown = pictures(sweep, summaries)
    page = render(sweep, summaries, shown)
    output = output or sweep.directory / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8", errors="backslashreplace")  # a folder's name may be no text
    if figures:
        _write_figures(shown, sweep.directory / "figures")
    return output


def _write_figures(shown: Iterable[Picture], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for picture in shown:
        (folder / f"{picture.name}.png").write_bytes(_saved(picture.figure, "png", {"dpi": DPI}))


def main(argv: list[str] | None = None) -> None:
    """The command; bad input ends it with a sentence on standard error and status 2."""
    options = _parser().parse_args(argv)
    print_any_name()
    try:
        sweep = read_sweep(path_of(options.directory, "DIR"), options.baseline)
        output = path_of(options.output, "--output") if options.output else None
    except (ValueError, OSError) as error:
        fail(str(error))
    try:
        output = write(sweep, output, options.figures)
    except ValueError as error:
        fail(str(error))
    except OSError as error:  # a colleague's sweep, say
        print_table(sweep)
        fail(f"{error.filename} cannot be written ({error.strerror}); --output=FILE names another file.")
    print_table(sweep)
    print(f"Wrote {output}")


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=about)
    parser.add_argument("directory", metavar="DIR", help="folder with sweep.json and the runs")
    parser.add_argument("--output", help="the page to write (DIR/report.html)")
    parser.add_argument("--baseline", help="arm to compare with (the one in sweep.json)")
    parser.add_argument("--figures", action="store_true", help="also write the pictures to DIR/figures/*.png")
    return parser


if __name__ == "__main__":
    main()
