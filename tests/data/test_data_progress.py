"""Laws of the bars: one display, in which the first bar counts what every other one counts."""

import io
from types import SimpleNamespace

import pytest
from rich.progress import Progress

from moe_jax.data import progress as module
from moe_jax.data.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def started(monkeypatch):
    """The displays that were started, on a terminal."""
    found = []
    start = Progress.start
    monkeypatch.setattr(Progress, "start", lambda self: found.append(self) or start(self))
    monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=Terminal()))
    return found


def test_bars_within_a_bar_share_its_display_and_are_counted_by_it(started):
    with progress("all", 100) as advance:
        advance(10)
        with progress("first", 20) as inner:
            inner(20)
            (display,) = started
            assert [(t.description, t.completed) for t in display.tasks] == [("all", 30), ("  first", 20)]
        with progress("second", 30) as inner:
            inner(7)
        assert [(t.description, t.completed) for t in display.tasks] == [("all", 37)]
    assert display.tasks[0].completed == 100 and display.finished


def test_a_bar_after_a_bar_that_failed_has_a_display_of_its_own(started):
    def fail():
        with progress("all", 100) as advance:
            advance(1)
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    with progress("again", 5) as advance:
        advance(2)
        assert started[1].tasks[0].completed == 2
    assert len(started) == 2 and started[0].tasks[0].completed == 1


def test_elsewhere_every_bar_is_a_line(capsys):
    with progress("all", 100), progress("first", 20) as advance:
        advance(20)
    assert capsys.readouterr().out == "all: 100 bytes\nfirst: 20 bytes\n"
