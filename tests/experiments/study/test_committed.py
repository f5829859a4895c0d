"""The committed results of the study: the page is made of the archives beside it, and of nothing else."""

import re

import pytest

from experiments.study.archive import tables, unpacked
from experiments.study.claims import QUESTIONS, all_claims
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


@pytest.mark.parametrize("file", ["README.md", "docs/study.md"])
def test_the_verdicts_by_question_are_those_of_the_page(repo, file):
    page = (repo / "experiments/results/study/report.md").read_text()
    questions = re.search(r"\n\|  \| question .*?\n\n", page, re.DOTALL)[0]
    assert questions.count("\n| ") == 2 + len(QUESTIONS)
    assert questions in (repo / file).read_text(), f"the table of {file} must be{questions}"
