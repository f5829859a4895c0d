"""The page of a sweep that is under way."""

from pathlib import Path

import pytest
from sweeps import tiny_layers, tiny_metrics, tiny_sweep, write_run

from experiments.report import watch as watching
from experiments.report.command import main

REFRESH = '<meta http-equiv="refresh" content="7">'


@pytest.fixture
def later(monkeypatch):
    """What happens while the command sleeps: calls in order, one each time; then it is interrupted."""
    todo = []

    def sleep(seconds):
        assert seconds == 7
        if not todo:  # the command should have ended
            raise KeyboardInterrupt
        todo.pop(0)()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    return todo


def finish(sweep: Path, arm: str) -> None:
    """The run of an arm's only seed, which is finished."""
    write_run(sweep / arm / "seed0", tiny_metrics(1.0, 0.5), tiny_layers())


def test_the_page_follows_the_runs_and_the_command_ends_with_the_last(tmp_path: Path, later, capsys) -> None:
    sweep = tiny_sweep(tmp_path, {"none": [1.0], "bias": []})
    page = sweep / "report.html"
    pages = []
    later.append(lambda: pages.append(page.read_text()))
    later.append(page.unlink)  # nothing has changed, so nothing is written
    later.append(lambda: pages.append(page.exists()))
    later.append(lambda: finish(sweep, "bias"))
    main([str(sweep), "--watch=7"])
    assert REFRESH in pages[0]
    assert "1 of 2 runs finished" in pages[0]
    assert pages[1] is False
    assert "2 of 2 runs finished" in page.read_text()
    assert "refresh" not in page.read_text()
    assert capsys.readouterr().out.count("Wrote ") == 2


def test_a_sweep_without_a_finished_run_is_waited_for(tmp_path: Path, later, capsys) -> None:
    sweep = tiny_sweep(tmp_path, {"none": []}, seeds=[0])
    later.append(lambda: finish(sweep, "none"))
    main([str(sweep), "--watch=7"])
    assert "must hold at least one finished run" in capsys.readouterr().out
    assert (sweep / "report.html").exists()


def test_a_wrong_interval_and_a_folder_without_a_sweep_are_refused(tmp_path: Path, capsys) -> None:
    for argv, words in (
        ([str(tmp_path), "--watch=0"], "--watch=0 must be at least 1 second"),
        ([str(tmp_path), "--watch"], "must hold sweep.json"),
        ([str(tmp_path / "gone"), "--watch"], "it does not exist"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert words in capsys.readouterr().err
