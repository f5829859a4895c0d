"""The tree keeps to its layers, and each library to its place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# lowest first; a file imports from lower lines, or from its own package
LAYERS = """
options
config
defaults
files
command
cache
ledger
shards
prefetch
mesh
hlo
chips
distributed
signals
watchdog
workdir
routing
sampling
balance
metrics
grouped
quantize
native
attention
dispatch
layers
moe
model
loss
data
state
flops
step
measure
checkpoint
families
tensors
interop
convert
log
observer
profiling
surgery
specialisation
show
decoding
evaluate
generate
harness
tasks
train
describe
plan
streams
simulate
""".split()
ALLOWED = {
    "flax": {"layers", "moe", "model", "state", "step", "interop", "decoding"},
    "orbax": {"checkpoint"},
    "tensorstore": {"checkpoint"},
    "safetensors": {"shards"},
    "optax": {"loss", "state", "step"},
    "ml_collections": {"config", "command"},
    "grain": {"data"},
    "tokenizers": {"data"},
    "lm_eval": {"harness"},
    "qwix": {"quantize"},
}
WITHOUT_JAX = set("options config command files cache ledger shards prefetch hlo chips data log show".split())
FILES = sorted((ROOT / "moe_jax").rglob("*.py"))


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


def unit(file: Path) -> str:
    """The line of LAYERS a file belongs to."""
    return file.relative_to(ROOT / "moe_jax").parts[0].removesuffix(".py")


def internal(name: str) -> str | None:
    """The unit a dotted import of ours names, if it names one."""
    parts = name.split(".")
    return parts[1] if parts[0] == "moe_jax" and len(parts) > 1 and parts[1] in LAYERS else None


def test_every_file_has_a_layer():
    assert {unit(f) for f in FILES} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_imports_upward(file):
    if unit(file) == "__init__":
        assert imports(file) == {"sys", "typing", "typing.Any"}
        return
    rank = LAYERS.index(unit(file))
    upward = [n for n in imports(file) if (u := internal(n)) and LAYERS.index(u) > rank]
    assert upward == []


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_a_library_is_imported_only_at_its_place(library):
    users = {unit(f) for f in FILES if any(n.split(".")[0] == library for n in imports(f))}
    assert users <= ALLOWED[library]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_config_and_data_do_not_import_jax(file):
    if unit(file) in WITHOUT_JAX:
        assert not any(n.split(".")[0] in ("jax", "flax") for n in imports(file))


COMMANDS = ["train", "evaluate", "generate", "harness", "describe", "plan", "simulate", "convert"]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_import_jax_late(name):
    top = imports(ROOT / "moe_jax" / f"{name}.py", top_level_only=True)
    assert not any(n.split(".")[0] in ("jax", "flax", "optax", "orbax", "grain") for n in top)
    heavy = set("step state model checkpoint metrics surgery specialisation streams decoding interop".split())
    assert not any(internal(n) in heavy for n in top)


def test_check_vma_is_switched_off_around_kernels_only():
    # `per_shard(kernel=True)` and `around_kernel`, whose laws are in the tests of their users
    assert {unit(f) for f in FILES if "check_vma=" in f.read_text()} == {"mesh"}
