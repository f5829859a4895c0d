"""The section with held-out text in the colours of its experts, of one trunk of each method."""

from collections.abc import Iterator

from moe_jax.text.colours import NOBODY, palette

from ..report.branched import Branched
from ..report.sweep import Run
from .arms import main_sweep
from .excerpts import Excerpts, read_excerpts
from .measures import Tables
from .parts import Part, Section, coloured, items, sources, text

TITLE = "Text by expert"
WORDS = (
    "The beginning of the held-out text of some domains. A token has the colour of the expert with the largest gate in "
    "one MoE layer. The same colour is the same expert in all texts below one heading; between layers and trunks it "
    "means nothing. Shown are the domains whose text may be published with the logs; their licences:"
)


def excerpts_section(tables: Tables) -> Section:
    """Held-out text by domain, each token in the colour of its top expert."""
    sweep = main_sweep(tables)
    found = _of_trunks(sweep) if sweep else {}
    if not found:
        return Section(TITLE, [text("No finished trunk has had its text routed yet.")])
    licences = {name: one.licence for _, excerpts in found.values() for name, one in excerpts.domains.items()}
    parts = [text(WORDS), items(f"{name}: {licence}" for name, licence in licences.items())]
    for method, (run, excerpts) in found.items():
        parts += _of_trunk(f"Trunk {method}, seed {run.seed}", excerpts)
    return Section(TITLE, [*parts, sources(tables, [run for run, _ in found.values()])])


def _of_trunks(sweep: Branched) -> dict[str, tuple[Run, Excerpts]]:
    """Method -> the finished trunk with the lowest seed that has excerpts, and these."""
    found: dict[str, tuple[Run, Excerpts]] = {}
    for method, runs in sweep.trunks.runs.items():
        for _, run in sorted(runs.items()):
            excerpts = read_excerpts(run.directory)
            if excerpts is not None and excerpts.domains:
                found.setdefault(method, (run, excerpts))
    return found


def _of_trunk(name: str, excerpts: Excerpts) -> Iterator[Part]:
    """The texts by the middle MoE layer, and by every other to unfold."""
    colors = [*palette(excerpts.num_experts), NOBODY]  # the last is that of -1
    num_layers = min(len(one.experts) for one in excerpts.domains.values())
    middle = num_layers // 2
    for layer in sorted(range(num_layers), key=lambda layer: layer != middle):
        texts = {
            domain: zip(one.letters, (colors[expert] for expert in one.experts[layer]), strict=True)
            for domain, one in excerpts.domains.items()
        }
        yield coloured(f"{name}, MoE layer {layer} (from 0) of {num_layers}", texts, is_open=layer == middle)
