"""Tests have one common time limit, which only detects hangs, and no test reads a clock."""

import ast
from pathlib import Path

import pytest

from conftest import HANG_SECONDS

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
WAITS = {"wait", "join", "communicate", "acquire", "result", "wait_until"}
CLOCKS = {"time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns", "process_time"}
READS_CLOCK = {"drills/rig.py": 2}  # wait_until, used by all tests that wait for another process


def name_of(node: ast.expr) -> str:
    """The last word of a name, dotted or not."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_a_number(node: ast.expr) -> bool:
    """Whether an expression consists of numbers and constants other than the common limit."""
    if isinstance(node, ast.BinOp):
        return is_a_number(node.left) or is_a_number(node.right)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    return name_of(node).isupper() and name_of(node) != "HANG_SECONDS"


def limits(tree: ast.AST) -> list[int]:
    """The lines with a time limit other than the common one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = [k.value for k in node.keywords if k.arg == "timeout"]
            given += node.args if name_of(node.func) in WAITS and isinstance(node.func, ast.Attribute) else []
            found += [node.lineno for value in given if is_a_number(value)]
        if isinstance(node, ast.FunctionDef):
            last = node.args.args[len(node.args.args) - len(node.args.defaults) :]
            pairs = [*zip(last, node.args.defaults, strict=True)]
            pairs += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None]
            found += [d.lineno for a, d in pairs if ("timeout" in a.arg or "seconds" in a.arg) and is_a_number(d)]
    return found


def clocks(tree: ast.AST) -> list[int]:
    """The lines that read a clock."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if name_of(call.func) in CLOCKS and isinstance(call.func, ast.Attribute) and name_of(call.func.value) == "time"
    ]


def test_the_limit_is_long_enough_for_a_machine_five_times_slower():
    assert HANG_SECONDS >= 600


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(FOLDER)))
def test_no_test_has_a_limit_of_its_own_or_reads_a_clock(file):
    tree = ast.parse(file.read_text())
    assert limits(tree) == []
    assert len(clocks(tree)) == READS_CLOCK.get(str(file.relative_to(FOLDER)), 0)


@pytest.mark.parametrize(
    "text",
    [
        "process.wait(60)",
        "process.wait(2 * 60)",
        "process.communicate(timeout=60)",
        "subprocess.run(command, timeout=30)",
        "thread.join(5.0)",
        "event.wait(20 * TIMEOUT)",
        "future.result(timeout=3)",
        "lock.acquire(timeout=0.05)",
        "def wait(self, seconds: float = 120): pass",
        "def wait(self, *, timeout=120): pass",
    ],
)
def test_a_limit_is_seen(text):
    assert limits(ast.parse(text)) == [1]


@pytest.mark.parametrize(
    "text", ["process.wait()", "event.wait(HANG_SECONDS)", "','.join(str(i) for i in range(3))", "run(steps=3)"]
)
def test_other_calls_are_not_limits(text):
    assert limits(ast.parse(text)) == []
