"""Imports follow the reading order of docs/reading.md, and each library is imported only at its place."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.config.axes import AXES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reading.md").read_text()
FILES = sorted((ROOT / "moe_jax").rglob("*.py"))


def block(marker: str) -> list[str]:
    """The first words of the lines of the block below a marker of the page."""
    lines = PAGE.partition(f"<!-- {marker}:")[2].partition("```text\n")[2].partition("```")[0]
    return [line.split()[0] for line in lines.splitlines() if line.strip()]


LAYERS = block("layers")  # folders and single files, lowest first
IN_FOLDERS = block("files")  # lowest first within a folder

# who may import a library: a folder, or a file of it
ALLOWED = {
    "flax": {"model", "training", "text", "huggingface"},
    "orbax": {"runtime/checkpoint", "runtime/slices", "runtime/stored"},
    "tensorstore": {"runtime/slices", "runtime/stored"},
    "safetensors": {"huggingface/shards"},
    "optax": {"kernels/head", "training"},
    "ml_collections": {"config"},
    "grain": {"data"},
    "tokenizers": {"data"},
    "jinja2": {"data/chat"},
    "lm_eval": {"text", "harness"},
    "qwix": {"kernels/quantize"},
}
# files and folders that do not import jax, so that a mistake is reported before it is loaded
WITHOUT_JAX = {"config", "data", "runtime/files", "runtime/cache", "runtime/ledger", "runtime/prefetch", "runtime/log"}
WITHOUT_JAX |= {"runtime/chips", "runtime/workdir", "huggingface/shards", "planning/hlo", "planning/cost"}
WITHOUT_JAX |= {"planning/loops", "planning/products", "planning/traffic", "planning/collectives"}
WITHOUT_JAX |= {"planning/kernels", "planning/topology", "planning/timeline", "planning/tables"}
WITHOUT_JAX |= {"planning/baseline", "text/colours", "runtime/display"}


def name(file: Path) -> str:
    """The name of a file on the page, without its extension."""
    return str(file.relative_to(ROOT / "moe_jax")).removesuffix(".py")


def unit(file: Path) -> str:
    """The layer a file belongs to."""
    return name(file).partition("/")[0]


def is_in(file: Path, places: set[str]) -> bool:
    """Whether a file is one of the places, or in one."""
    return bool(places & {name(file), unit(file)})


def rank(dotted: str) -> tuple[int, int] | None:
    """The position of our module in the reading order, as its layer and its place in the folder; None for others."""
    first, _, rest = dotted.removeprefix("moe_jax.").partition(".")
    if not dotted.startswith("moe_jax.") or first not in LAYERS:
        return None
    parts = rest.split(".")
    files = [f"{first}/{'/'.join(parts[:end])}.py" for end in range(len(parts), 0, -1)]
    places = [IN_FOLDERS.index(file) for file in files if file in IN_FOLDERS]
    return LAYERS.index(first), places[0] if places else -1  # a package: what it exports is checked at its importers


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    """The dotted names a file imports, anywhere in it or at its top level outside `if TYPE_CHECKING`."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_file_has_a_layer():
    assert {unit(f) for f in FILES} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_file_imports_upward_not_even_within_its_folder(file):
    if file.name == "__init__.py":
        return  # a package exports names of its files
    own = rank(f"moe_jax.{name(file).replace('/', '.')}")
    assert own is not None
    upward = [n for n in imports(file) if (there := rank(n)) and there > own]
    assert upward == []


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_a_library_is_imported_only_at_its_place(library):
    users = [f for f in FILES if any(n.split(".")[0] == library for n in imports(f))]
    assert [name(f) for f in users if not is_in(f, ALLOWED[library])] == []


@pytest.mark.parametrize("file", [f for f in FILES if is_in(f, WITHOUT_JAX)], ids=name)
def test_files_that_run_before_jax_is_loaded_do_not_import_it(file):
    assert not any(n.split(".")[0] in ("jax", "flax") for n in imports(file))


COMMANDS = ["train", "evaluate", "generate", "harness", "describe", "plan", "simulate", "convert", "upcycle"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_import_jax_late(command):
    script = (
        f"import sys, moe_jax.{command}; sys.exit(any(n in sys.modules for n in ('jax', 'flax', 'optax', 'grain')))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "package", sorted(p.parent for p in (ROOT / "moe_jax").glob("*/__init__.py")), ids=lambda p: p.name
)
def test_no_module_hides_a_name_that_its_package_exports(package):
    """The import of a module sets it as an attribute of its package, in place of a function of that name."""
    exported = importlib.import_module(f"moe_jax.{package.name}")
    modules = {file.stem for file in package.glob("*.py")} | {p.parent.name for p in package.glob("*/__init__.py")}
    hidden = [n for n in modules & set(getattr(exported, "__all__", ())) if not inspect.ismodule(getattr(exported, n))]
    assert hidden == []


SPECS_BY_HAND = {"mesh"}  # where an axis may be named in a PartitionSpec


def test_no_partition_spec_names_an_axis_outside_the_mesh():
    # others name dims, `spec("pieces")`, so that only the table determines what an axis splits
    def names_an_axis(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return called in ("P", "PartitionSpec") and bool(node.args)

    users = {name(f) for f in FILES if any(names_an_axis(node) for node in ast.walk(ast.parse(f.read_text())))}
    assert users <= SPECS_BY_HAND


COLLECTIVES = {"psum", "pmax", "pmin", "pmean", "psum_scatter", "ppermute", "pcast", "axis_index", "axis_size"}
COLLECTIVES |= {"all_gather", "all_to_all", "ragged_all_to_all"}


def test_no_collective_names_an_axis():
    # they look axes up by dim, `axes("experts")`, so that another axis is an entry of the table
    def names_an_axis(node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript):  # mesh.shape["expert"]
            value = node.value
            return isinstance(value, ast.Attribute) and value.attr == "shape" and is_text(node.slice)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return False
        given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg != "to")]
        return node.func.attr in COLLECTIVES and any(is_text(part) for value in given for part in ast.walk(value))

    def is_text(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value in AXES

    assert [name(f) for f in FILES if any(names_an_axis(node) for node in ast.walk(ast.parse(f.read_text())))] == []


def test_check_vma_is_switched_off_around_kernels_only():
    # in `per_shard(kernel=True)` and `around_kernel`, whose laws are in the tests of their users
    assert {name(f) for f in FILES if "check_vma=" in f.read_text()} == {"mesh"}
