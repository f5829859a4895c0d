"""Laws of the study's page: every claim once with its verdict, every number with its runs, at any stage of the runs."""

import json
import math
import re
from collections import Counter
from html import unescape
from pathlib import Path

import pytest
from studies import Arm, main_sweep, plain_table

from experiments.report import read_branched, read_sweep
from experiments.report.columns import Table
from experiments.statistics.power import needed
from experiments.study import words
from experiments.study.bias_claims import RATIO
from experiments.study.claims import LOSS, QUESTIONS, Claim, Published, above, all_claims, below, either, within
from experiments.study.claims_part import claims_section, unresolved_section
from experiments.study.excerpts import FILE as EXCERPTS
from experiments.study.measures import Found
from experiments.study.page import write_study
from experiments.study.parts import folders, markdown_table, plain
from experiments.study.verdicts import judge

ARMS = {
    "bias": Arm(0.0, 0.2),
    "aux_1e-2": Arm(0.001, 0.5, 0.05),
    "none": Arm(0.002, 1.5),
    "aux_1e-3": Arm(0.0015, 1.1, 0.002),
    "aux_1e-1": Arm(0.004, 0.25, 0.4),
    "sign": Arm(0.0001, 0.24),
    "proportional": Arm(0.0002, 0.21),
    "sequence_1e-1": Arm(0.009, 0.3, 0.5),
}
SECTIONS = (
    "Every claim",
    "Quality against balance",
    "Trunk by arm",
    "Interference by weight",
    "Single experts: biases and loads",
    "Experts by domain, and in text",
    "The scope of the auxiliary loss",
    "What imbalance would cost",
    "What was not resolved",
    "Finished runs",
    "Where the claims' numbers come from",
    "How it was run",
)


class Written:
    """A written page, and what it was written from."""

    def __init__(self, folder: Path, tables: dict):
        self.folder, self.tables = folder, tables
        self.judged = judge(all_claims(), tables)
        paths = write_study(tables, self.judged, folder / "out")
        self.html, self.markdown = (path.read_text(encoding="utf-8") for path in paths)

    def section(self, title: str) -> str:
        return self.html.partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Two blocks of some arms, and one plain table, of which an arm is missing."""
    folder = tmp_path_factory.mktemp("study")
    arms = main_sweep(folder, ARMS, noise=1e-5, data_seeds=(0, 1))
    text = {"licence": "public domain", "letters": ["a"], "experts": [[0]]}
    routed = {"step": 999, "num_experts": 16, "domains": {"milton": text}}
    (arms / "trunks/bias/seed0" / EXCERPTS).write_text(json.dumps(routed))
    by_domain = {"domains": ["milton", "kjv"], "relative_load": [[[1.5, 0.5]] * 16] * 2}
    (arms / "trunks/bias/seed0/specialisation.json").write_text(json.dumps(by_domain))
    gates = plain_table(folder, "gates", {"sigmoid_bias": Arm(), "softmax_bias": Arm(0.02, 0.3)})
    return Written(folder, {"arms": read_branched(arms), "gates": read_sweep(gates)})


def rows(html: str) -> list[list[str]]:
    cells = r"<t[hd][^>]*>(.*?)</t[hd]>"
    return [[_text(cell) for cell in re.findall(cells, row)] for row in re.findall(r"<tr.*?>(.*?)</tr>", html)[0:]]


def _text(cell: str) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", cell)).strip()


def test_every_claim_is_on_the_page_once_with_the_verdict_of_the_judge(study: Written) -> None:
    found = rows(study.section("Every claim"))[1:]
    assert [(row[0], row[-1]) for row in found] == [(one.claim.number, one.verdict) for one in study.judged]
    for row, one in zip(found, study.judged, strict=True):
        assert row[1].startswith(one.claim.text)
        assert row[2].startswith(one.claim.published.source) and one.claim.published.numbers in row[2]
    assert len({one.verdict for one in study.judged}) >= 4  # of which the page has examples


def test_the_markdown_has_the_same_table(study: Written) -> None:
    table = study.markdown.partition("## Every claim\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    found = [[cell.strip(" *") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    assert [(row[0], row[-1]) for row in found] == [(one.claim.number, one.verdict) for one in study.judged]


def test_every_claim_is_an_answer_to_one_question(study: Written) -> None:
    head = rows(study.html.partition("<h2>")[0])[1:]
    assert [row[:2] for row in head] == [[*pair] for pair in QUESTIONS.items()]
    found = [
        (number, verdict, int(count))
        for number, _, verdicts in head
        for count, verdict in (part.split(" ", 1) for part in verdicts.split(", "))
    ]
    expected = Counter((re.match(r"\d+", one.claim.number)[0], one.verdict) for one in study.judged)
    assert {(number, verdict): count for number, verdict, count in found} == dict(expected)


def test_what_is_contradicted_comes_before_everything_else(study: Written) -> None:
    against = [one.claim for one in study.judged if one.verdict == "contradicted"]
    assert against
    for text in (study.html.partition("<h2>")[0], study.markdown.partition("## ")[0]):
        assert re.findall(r"(?:<li>|- )(\d+[a-z]?): ", text) == [claim.number for claim in against]
        assert all(plain(claim.text) in unescape(text) for claim in against)


def expanded(line: str) -> list[str]:
    parent, brace, names = line.partition("{")
    return [parent + name for name in names.rstrip("}").split(",")] if brace else [line]


def test_the_runs_of_every_number_are_listed_relative_to_the_study(study: Written) -> None:
    html = study.section("Where the claims&#x27; numbers come from") or study.section(SECTIONS[-2])
    lists = dict(re.findall(r'<summary>(\S+): \d+ runs</summary><p class="folders">(.*?)</p>', html, re.DOTALL))
    measured = [one for one in study.judged if one.verdict != "not measured"]
    assert list(lists) == [one.claim.number for one in measured]
    for one in measured:
        listed = [run for line in lists[one.claim.number].split("<br>\n") for run in expanded(line)]
        assert sorted(listed) == sorted(run.relative_to(study.folder).as_posix() for run in one.found.runs)
        assert listed and all((study.folder / run / "metrics.jsonl").is_file() for run in listed)
    assert str(study.folder) not in study.html + study.markdown


@pytest.mark.parametrize("title", [SECTIONS[i] for i in range(1, 8)])
def test_pictures_and_tables_list_their_runs(study: Written, title: str) -> None:
    listed = re.findall(r'<p class="folders">(.*?)</p>', study.section(title), re.DOTALL)
    runs = [run for part in listed for line in part.split("<br>\n") for run in expanded(line)]
    assert runs and all((study.folder / run / "metrics.jsonl").is_file() for run in runs)


def test_the_page_opens_offline_and_is_well_formed(study: Written) -> None:
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]{1,40})""", study.html)
    assert links and all(link.startswith("data:image/") for link in links)
    assert "http://" not in study.html and "https://" not in study.html
    for tag in ("table", "tr", "td", "span", "small", "figure", "p", "div", "ul", "li", "details", "main"):
        assert len(re.findall(rf"<{tag}[ >]", study.html)) == study.html.count(f"</{tag}>"), tag
    assert re.findall("<h2>(.*?)</h2>", study.html) == [title.replace("'", "&#x27;") for title in SECTIONS]


def test_the_pictures_of_the_markdown_are_beside_it_and_no_others(study: Written) -> None:
    named = re.findall(r"!\[[^]]+\]\(figures/(\w+\.png)\)", study.markdown)
    assert named == ["frontier.png", "interference.png", "scopes.png"]
    assert sorted(named) == sorted(path.name for path in (study.folder / "out/figures").iterdir())


def test_a_missing_arm_and_a_missing_table_are_named(study: Written) -> None:
    table = {row[0]: row for row in rows(study.section("Every claim"))}
    assert table["8b"][3] == "missing: gates: no finished run of softmax_aux"
    assert table["15a"][3] == "missing: systems: no finished run of hash and dense"
    assert table["5c"][3] == "missing: arms: no finished run of aux_1e-4"


def test_ratios_are_shown_as_ratios(study: Written) -> None:
    table = {row[0]: row for row in rows(study.section("Every claim"))}
    mean, low, high = map(float, re.match(r"(\S+) \((\S+) to (\S+)\)", table["2a"][3]).groups())
    one = next(one for one in study.judged if one.claim.number == "2a")
    ours = one.found.interval
    assert ours.mean == pytest.approx(math.log(0.2 / 1.1), abs=0.01)
    expected = [math.exp(value) for value in (ours.mean, ours.mean - ours.half, ours.mean + ours.half)]
    assert [mean, low, high] == pytest.approx(expected, rel=0.005)
    assert "ratio of max violations; 2 blocks" in table["2a"][3]
    assert "log" not in study.section("Every claim").replace("logs", "")


def test_the_chance_of_false_verdicts_counts_the_intervals(study: Written) -> None:
    n = sum(one.found.interval.half is not None for one in study.judged)
    words = f"Comparisons: {n} intervals with a limit, without correction."
    assert words in study.html and f"about {n / 20:.1f} of them" in study.html


def test_every_unresolved_claim_is_listed_as_such(study: Written) -> None:
    found = rows(study.section("What was not resolved"))[1:]
    unresolved = [one.claim.number for one in study.judged if one.verdict == "not resolved"]
    assert unresolved and [row[0].split(". ")[0] for row in found] == unresolved


@pytest.mark.parametrize(
    ("unit", "sd", "text"),
    [
        (LOSS, 0.003, f"{needed(0.001, 0.003)}"),
        (RATIO, 0.5, f"{needed(math.log(1.1), 0.5)}"),
        (LOSS, 5.0, "too many"),
        ("experts", 0.5, "no small difference is set for this unit"),
    ],
)
def test_the_blocks_that_would_resolve_a_small_difference(unit: str, sd: float, text: str) -> None:
    found = Found({0: -sd, 1: 0.0, 2: sd})  # of this standard deviation
    claim = Claim("1", "A claim.", Published("a paper"), lambda _: found, above(unit=unit))
    (row,) = rows(unresolved_section(judge([claim], {})).parts[0].html)[1:]
    assert row[3].split("  ")[0] == text
    assert needed(0.001, 0.003) > 50 and needed(math.log(1.1), 0.5) > 50  # so that these are no small numbers


def test_the_crossed_table_is_of_the_core_methods(study: Written) -> None:
    html = study.section("Trunk by arm")
    assert re.findall(r'<th scope="col">(.*?)</th>', html) == [
        "trunk",
        "bias",
        "aux_1e-2",
        "none",
        "aux_1e-1",
        "sequence_1e-1",
    ]
    assert html.count("<circle") == 2 * 4 * 2  # trunk methods x arms but the baseline x trunk seeds


# --- at any stage -----------------------------------------------------------------------------------------


def test_without_any_run_every_section_is_there_and_says_so(tmp_path: Path) -> None:
    page = Written(tmp_path, {})
    assert page.section("Quality against balance").startswith("<p>No block is complete yet")
    assert Counter(row[-1] for row in rows(page.section("Every claim"))[1:]) == {"not measured": len(page.judged)}
    assert "No claim is contradicted, of the 0 that are measured so far." in page.html
    assert not (tmp_path / "out/figures").exists()


def test_with_trunks_alone_their_pictures_are_there(tmp_path: Path) -> None:
    every = [(trunk, seed, arm) for trunk in ("bias", "aux_1e-2") for seed in (0, 1) for arm in ARMS]
    page = Written(tmp_path, {"arms": read_branched(main_sweep(tmp_path, ARMS, missing=every))})
    assert "4 trunks, 0 branches" in page.html and "32 runs not finished" in page.html
    assert page.section("Single experts: biases and loads").count("<img") == 2
    assert page.section("Interference by weight").count("<img") == 1
    assert "No block is complete yet" in page.section("What imbalance would cost")


def test_one_block_has_no_interval_and_no_verdict(tmp_path: Path) -> None:
    lacking = [("aux_1e-2", 1, arm) for arm in ARMS]
    judged = judge(all_claims(), {"arms": read_branched(main_sweep(tmp_path, ARMS, missing=lacking))})
    table = {row[0]: row for row in rows(claims_section(judged).parts[0].html)}
    assert table["3a"][3].startswith("+0.00250 (no interval)")
    assert "1 of 2 blocks" in table["3a"][3] and table["3a"][-1] == "not resolved" and table["3a"][4] == "-"
    assert "one block has no spread" in unresolved_section(judged).parts[0].html


# --- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "unit", "text"),
    [
        ((0.001, 0.002, 0.003), LOSS, "+0.0020 ± 0.0025"),  # sd 0.001 x 4.303 / sqrt(3)
        ((0.5,), LOSS, "+0.500 (no interval)"),
        ((), LOSS, "-"),
        ((2.0, 2.0), "max violation", "2 ± 0"),
        ((math.log(2), math.log(2)), RATIO, "2.00 (2.00 to 2.00)"),
        ((math.log(0.5),), RATIO, "0.500 (no interval)"),
        ((1.0, 2.0, 3.0), "experts", "2.0 ± 2.5"),
    ],
)
def test_measured_numbers_have_the_digits_that_their_interval_allows(
    blocks: tuple[float, ...], unit: str, text: str
) -> None:
    assert words.measured(Found(dict(enumerate(blocks))).interval, unit) == text


@pytest.mark.parametrize(
    ("relation", "text"),
    [
        (above(), "above 0"),
        (below(math.log(0.5), RATIO), "below 0.5"),
        (within(), "between -0.001 and 0.001"),
        (within(math.log(4 / 3), RATIO), "between 0.75 and 1.33"),
        (within(0.0, "unequal runs"), "0"),
        (either(unit=RATIO), "either side of 1"),
    ],
)
def test_relations_are_worded_in_the_unit_that_readers_see(relation: object, text: str) -> None:
    assert words.claimed(relation) == text


def test_differences_of_logarithms_are_factors() -> None:
    assert words.difference(math.log(1.5), RATIO) == "a factor of 1.50"
    assert words.difference(0.00123, LOSS) == "0.0012"
    assert words.difference(math.nan, LOSS) == "-" and words.difference(0.0, LOSS) == "any"


def test_signs_of_markdown_are_escaped() -> None:
    assert plain("a|b * <c> [d]") == r"a\|b \* &lt;c> \[d\]"
    assert markdown_table(Table(["x", "y"], [["1|2", "a\nb"]])) == "| x | y |\n| --- | --- |\n| 1\\|2 | a<br>b |"


def test_a_run_outside_every_table_is_refused(study: Written) -> None:
    with pytest.raises(ValueError, match="must be in the folder of a table; the tables are arms, gates"):
        folders(study.tables, [Path("/elsewhere/seed0")])
