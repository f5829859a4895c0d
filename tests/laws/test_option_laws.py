"""Laws of docs/options.md: its rows are the options of the schema, and its cells what a run of every path gives.

The slow test decides every cell: `python -m pytest -n 0 -m slow tests/laws/test_option_laws.py`; after a change of the
model UPDATE_GOLDEN=1 before it rewrites the table.
"""

import dataclasses
import datetime
import os
import random
from typing import Literal, get_args, get_origin

import pytest
from drills.rig import REPO
from laws.options import APART, BASE, ROWS
from laws.paths import COLUMNS, cell, forget

from moe_jax.config import ModelConfig
from moe_jax.kernels import native

PAGE = REPO / "docs" / "options.md"
UPDATE = "UPDATE_GOLDEN=1 python -m pytest -n 0 -m slow tests/laws/test_option_laws.py"
NAMES = [row.name for row in ROWS]
FIELDS = [field for field in dataclasses.fields(ModelConfig) if not field.metadata.get("changes")]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


HEAD = line("option", *COLUMNS) + line(*["---"] * (1 + len(COLUMNS)))


def table() -> dict[str, list[str]]:
    """The rows of the page: option -> cells."""
    _, _, body = PAGE.read_text().partition(HEAD)
    rows = [[c.strip() for c in text.strip("|").split("|")] for text in body.splitlines() if text.startswith("| `")]
    return {name.strip("`"): cells for name, *cells in rows}


def write(rows: dict[str, list[str]]) -> None:
    text, _, _ = PAGE.read_text().partition(HEAD)
    PAGE.write_text(text + HEAD + "".join(line(f"`{name}`", *rows[name]) for name in NAMES if name in rows))


def test_every_option_of_the_schema_has_a_row_and_every_row_is_in_the_table():
    assert {key for row in ROWS for key in row.keys} | set(APART) == {field.name for field in FIELDS}
    assert len(set(NAMES)) == len(NAMES)
    assert list(table()) == NAMES, f"run {UPDATE}"
    assert {c for cells in table().values() for c in cells} <= {"yes", "-", "refused"}


def test_every_word_that_an_option_may_be_has_a_row():
    choices = {f.name: get_args(f.type) for f in FIELDS if get_origin(f.type) is Literal and f.name not in APART}
    for key, allowed in choices.items():
        rows = [row.keys[key] for row in ROWS if key in row.keys]
        assert {*rows, BASE.get(key, getattr(ModelConfig(), key))} == set(allowed), key


@pytest.fixture(autouse=True)
def _few_programs():
    yield
    forget()


def assert_is_in_the_table(index: int, columns: list[str]) -> None:
    if "C++" in columns and (why := native.missing()):
        pytest.skip(why)
    cells = dict(zip(COLUMNS, table()[NAMES[index]], strict=True))
    for column in columns:
        assert cell(ROWS[index], column) == cells[column], f"{NAMES[index]}, {column}: run {UPDATE}"


def test_two_cells_a_day_are_what_a_run_gives():
    draw = random.Random(datetime.date.today().toordinal())
    quick = [column for column in COLUMNS if column != "sharded"]  # which takes as long as all others
    assert_is_in_the_table(draw.randrange(len(ROWS)), draw.sample(quick, 2))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(ROWS)), ids=NAMES)
def test_every_cell_is_what_a_run_gives(index):
    if os.environ.get("UPDATE_GOLDEN"):
        write(table() | {NAMES[index]: [cell(ROWS[index], column) for column in COLUMNS]})
    assert_is_in_the_table(index, list(COLUMNS))
