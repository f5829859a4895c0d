"""The committed results of the study: the page is made of the archives beside it, and of nothing else."""

from experiments.study.archive import tables, unpacked
from experiments.study.claims import all_claims
from experiments.study.page import write_study
from experiments.study.verdicts import judge


def test_the_committed_page_is_made_of_the_committed_archives(repo, tmp_path):
    results = repo / "experiments" / "results" / "study"
    with unpacked(results) as runs:
        found = tables(runs)
        page, markdown = write_study(found, judge(all_claims(), found), tmp_path)
    assert markdown.read_text() == (results / "report.md").read_text(), f"run python -m experiments.report {results}"
    assert {p.name for p in tmp_path.glob("figures/*")} == {p.name for p in results.glob("figures/*")}
    assert page.stat().st_size > 100_000
