"""Laws of claims: one process has a run, a dead one loses it, and a living one never does."""

import json
import platform
import threading

import pytest

from experiments.claims import Claims

DEAD = 100.0


@pytest.fixture
def seen_by(tmp_path, clock):
    """name -> the claims as a process of that name sees them; `lost` has the messages of those that lost a claim."""
    lost = []

    def make(name="one", dead_after=DEAD):
        return Claims(tmp_path, dead_after, clock, superseded=lambda message: lost.append((name, message)))

    make.lost = lost
    return make


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def test_one_process_gets_a_run_and_the_next_one_when_it_lets_go(seen_by, tmp_path):
    one, two = seen_by(), seen_by()
    with one.taken("arm/seed0") as first:
        with two.taken("arm/seed0") as second, two.taken("arm/seed1") as other:
            assert (first, second, other) == (True, False, True)
        assert two.owner("arm/seed0").startswith(f"{platform.node()}, process ")
    with two.taken("arm/seed0") as again:
        assert again
    assert files(tmp_path / "arm" / "seed0") == ["1.json", "2.json"]
    assert two.owner("arm/seed0") == ""


def test_of_many_that_try_at_once_one_gets_the_run(seen_by):
    start, end, got = threading.Barrier(8), threading.Barrier(8), []

    def attempt():
        claims = seen_by()
        start.wait()
        with claims.taken("run") as mine:
            got.append(mine)
            end.wait()  # nobody lets go before all have tried

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def abandon(tmp_path, text='{"state": "running", "host": "gone", "pid": 1}'):
    """The claim of a process that was killed."""
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "1.json").write_text(text)


@pytest.mark.parametrize("text", ['{"state": "running", "host": "gone", "pid": 1}', "", "[]"])
def test_a_claim_that_does_not_change_for_long_enough_is_taken_over(seen_by, tmp_path, clock, text):
    abandon(tmp_path, text)
    claims = seen_by()
    for seconds, expected in ((0, False), (DEAD - 1, False), (1, True)):
        clock.time += seconds
        with claims.taken("run") as mine:
            assert mine == expected


def test_a_claim_that_changes_is_not_taken_over_however_long_it_is_held(seen_by, tmp_path, clock):
    claims = seen_by()
    for beats in range(3):
        abandon(tmp_path, json.dumps({"state": "running", "beats": beats}))
        clock.time += DEAD
        with claims.taken("run") as mine:
            assert not mine


def test_of_two_that_find_an_owner_dead_one_takes_its_run(seen_by, tmp_path, clock):
    abandon(tmp_path)
    one, two = seen_by(), seen_by()
    for claims in (one, two):
        with claims.taken("run") as mine:
            assert not mine
    clock.time += DEAD
    with one.taken("run") as first, two.taken("run") as second:
        assert (first, second) == (True, False)


def test_a_process_that_was_taken_for_dead_is_ended_and_does_not_release_the_other_claim(seen_by, tmp_path):
    late = threading.Event()
    claims = Claims(tmp_path, 1e-3, superseded=lambda message: (seen_by.lost.append(message), late.set()))
    with claims.taken("run") as mine:
        assert mine
        (tmp_path / "run" / "2.json").write_text('{"state": "running", "host": "other", "pid": 2}')
        late.wait()
    assert seen_by.lost[0].startswith(f"{tmp_path / 'run' / '2.json'} is another process's claim")
    assert "released" not in (tmp_path / "run" / "1.json").read_text()
    assert seen_by().owner("run") == "other, process 2"


def test_a_claim_shows_that_its_owner_lives(tmp_path):
    claims = Claims(tmp_path, 1e-3)
    with claims.taken("run"):
        path = tmp_path / "run" / "1.json"
        while not path.read_text() or json.loads(path.read_text())["beats"] < 3:
            pass
    assert json.loads(path.read_text())["state"] == "released"


def test_a_run_whose_block_fails_is_released(seen_by, tmp_path):
    with pytest.raises(OSError, match="full"), seen_by().taken("run"):
        raise OSError("disk full")
    assert json.loads((tmp_path / "run" / "1.json").read_text())["state"] == "released"
