"""From the runs of the study to its verdicts and page."""

from pathlib import Path

from .archive import opened, tables
from .claims import all_claims
from .terminal import print_verdicts
from .verdicts import judge


def report_study(folder: Path, output: Path | None = None, writes: bool = True) -> None:
    """Print the verdicts on all claims, and write the page.

    Args:
        folder: the archives of the study, or its workdir.
        output: the folder of report.html and report.md; None is `folder`.
        writes: whether to write them.

    Raises:
        SweepError: an archive is damaged, or a table cannot be read.
        OSError: the page cannot be written.
    """
    from .page import write_study

    with opened(folder) as runs:
        found = tables(runs)
        judged = judge(all_claims(), found)
        print_verdicts(judged)
        if writes:
            page, _ = write_study(found, judged, output or folder)
            print(f"Wrote {page}")
