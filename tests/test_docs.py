"""README and docs/ are true: their blocks run, and the files, links, flags, keys and tests that they name exist.

A block is run unless a comment above it gives a reason, or the test that runs it:

    <!-- not run: needs a cluster -->      <!-- run by: test_contributing.py -->
"""

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_jax import balance
from moe_jax.config import DISPATCHERS, default, flatten

ROOT = next(folder for folder in Path(__file__).parents if (folder / "mkdocs.yml").is_file())
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
EXAMPLES = sorted(ROOT.glob("docs/examples/*.py"))
FENCE = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.M)
COMMAND = re.compile(r"-m ((?:moe_jax|experiments)\.[\w.]+)([^\n]*)")


class Block(NamedTuple):
    """A fenced block of a page, and the comment above it."""

    page: str
    note: str
    language: str
    text: str

    @property
    def is_run_here(self) -> bool:
        return not self.note.startswith(("not run: ", "run by: "))


def blocks_of(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text())
    return [Block(page.relative_to(ROOT).as_posix(), m["note"] or "", m["language"], m["text"]) for m in found]


def prose_of(page: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", page.read_text())


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def distinct(language: str) -> list[pytest.param]:
    """The blocks to run here; a block that is on two pages is run once."""
    kept = {block.text: block for block in BLOCKS if block.language == language and block.is_run_here}
    return [pytest.param(block, id=f"{block.page}:{block.text.split(maxsplit=3)[:3]}") for block in kept.values()]


# --- blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_has_a_language_and_a_note_says_why_it_is_not_run(page):
    assert page.read_text().count("```") == 2 * len(blocks_of(page))
    assert not re.search(r"^(    |\t)(python|make|pip|srun) ", page.read_text(), re.M), "fence the block"
    for block in blocks_of(page):
        assert block.language in ("python", "bash", "text", "yaml"), block
        if block.language in ("python", "bash") and block.note:
            assert re.fullmatch(r"not run: (is|needs|takes) \w.*|run by: test_\w+\.py", block.note), block
        if block.note.startswith("run by: "):
            (test,) = ROOT.glob(f"tests/**/{block.note.removeprefix('run by: ')}")
            assert block.page in test.read_text(), f"{test} does not read {block.page}"


@pytest.mark.parametrize("block", distinct("python"))
def test_python_runs(block):
    if "--8<--" in block.text:
        pytest.skip("an example in a file of its own, which is run as such")
    names = {}
    for statement in ast.parse(block.text).body:
        exec(compile(ast.Module([statement], []), block.page, "exec"), names)
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets) == "balance":
            balance.make(names["balance"])


@pytest.mark.usefixtures("own_dispatchers")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run_and_are_shown(example):
    assert f"--8<--\n{example.name}\n--8<--" in (ROOT / "docs/extending.md").read_text()
    if "# TODO" in example.read_text():
        pytest.skip("is to be written")
    exec(compile(example.read_text(), str(example), "exec"), {"__name__": example.stem})


@pytest.mark.parametrize("block", distinct("bash"))
def test_commands_run(block, tmp_path):
    text = block.text.replace("/tmp/", f"{tmp_path}/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def help_of(module: str) -> str:
    """The output of a command's `--help`."""
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def commands() -> dict[str, set[str]]:
    """module -> the flags with which pages use it, in blocks and in sentences."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for module, rest in COMMAND.findall(page.read_text().replace("\\\n", " ").replace("`", "\n")):
            rest = rest.partition(" #")[0].partition(" -- ")[0]
            found.setdefault(module.rstrip("."), set()).update(re.findall(r"(?<= --)[\w.]+", rest))
    return found


@pytest.mark.parametrize(("module", "given"), commands().items(), ids=commands())
def test_a_command_and_every_flag_of_it_exist(module, given):
    here = module.removeprefix("moe_jax.") if ".experiments." in module else module  # a wheel has them inside moe_jax
    assert importlib.util.find_spec(here) is not None
    keys = flatten(default().to_dict())
    for flag in given - {"help"}:
        if flag.startswith("config."):
            key = flag.removeprefix("config.")
            mistakes_on_purpose = {"optimizer.learning_rat"}
            assert key in keys or key in mistakes_on_purpose or key.startswith("balance."), flag
        else:
            assert re.search(rf"--(\[no\])?{flag}\b", help_of(module)), f"{module} has no --{flag}"


# --- names on the pages ---------------------------------------------------------------------------------------


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


def slug(heading: str) -> str:
    """The anchor of a heading, as computed by mkdocs and GitHub."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose_of(page), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@functools.cache
def every_file() -> frozenset[str]:
    folders = ("moe_jax", "configs", "experiments", "tests", "docs")
    return frozenset(file.name for folder in folders for file in (ROOT / folder).rglob("*.*"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(page):
    for name in re.findall(r"`([\w./-]+)`", prose_of(page)):
        ours = re.match(r"(moe_jax|configs|experiments|tests|docs)/", name)
        if ours or re.search(r"/.*\.(py|cc)$", name):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "moe_jax")), f"{page}: {name}"
        elif name.endswith((".py", ".cc")):
            assert name in every_file(), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_key_that_is_named_exists(page):
    keys = flatten(default().to_dict())
    for key in re.findall(r"`((?:model|optimizer|data|mesh|checkpoint)\.(?!py\b)\w+)", prose_of(page)):
        assert any(f"{known}.".startswith(f"{key}.") for known in keys), f"{page}: {key}"


def test_every_dispatcher_has_a_row_on_the_page_of_devices():
    table = (ROOT / "docs/devices.md").read_text().partition("| `model.dispatch` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(DISPATCHERS)


@functools.cache
def functions_by_name() -> dict[str, set[str]]:
    """Name of a test function -> the files that have one of that name."""
    found: dict[str, set[str]] = {}
    for file in ROOT.glob("tests/**/test_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, set()).add(file.name)
    return found


def test_every_test_that_is_named_exists():
    named = [pair for page in PAGES for pair in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text())]
    assert len(named) > 80
    wrong = [f"{file}::{test}" for file, test in named if file not in functions_by_name().get(test, ())]
    assert not wrong, (
        f"not there, or in another file: {[(w, functions_by_name().get(w.split('::')[1])) for w in wrong]}"
    )


def test_every_bug_has_a_test():
    rows = re.findall(r"^\| (?!rule|---)(.*) \| (.*) \| (.*) \|$", (ROOT / "docs/bugs.md").read_text(), re.M)
    assert len(rows) > 40
    for rule, thread, tests in rows:
        assert re.fullmatch(r"house rule|([\w.-]+/[\w.-]+#\d+(, )?)+", thread), rule
        assert re.fullmatch(r"(`test_\w+\.py::test_\w+`(, )?)+", tests), rule


# --- the tree -------------------------------------------------------------------------------------------------


def named_in(note: str) -> list[str]:
    """The first word of every line of the block of docs/reading.md below a comment that begins with the note."""
    (block,) = (b for b in blocks_of(ROOT / "docs/reading.md") if b.note.startswith(note))
    return [line.split()[0] for line in block.text.splitlines()]


def test_every_folder_and_file_has_a_line_and_every_line_a_file():
    package = ROOT / "moe_jax"
    tops = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert sorted(named_in("layers: ")) == sorted(path.stem for path in tops if path.stem != "__init__")
    files = [file.relative_to(package).as_posix() for file in package.glob("*/**/*.py") if file.stem != "__init__"]
    assert sorted(named_in("files: ")) == sorted(files)


def test_every_folder_has_a_page_of_reference():
    pages = {page.stem for page in ROOT.glob("docs/api/*.md")}
    assert {path.parent.name for path in ROOT.glob("moe_jax/*/__init__.py")} <= pages
    nav = (ROOT / "mkdocs.yml").read_text()
    assert all(f"api/{page}.md" in nav for page in pages)


def test_the_site_needs_no_network():
    text = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  font: false\b", text, re.M)
    assert not re.search(r"https?://|^repo_url|analytics|extra_javascript|extra_css", text, re.M)
