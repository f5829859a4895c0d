"""The section on what experts specialise in: their load by domain, and held-out text in their colours.

Shown is the first trunk of each method.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.runtime.files import read_json
from moe_jax.text.colours import NOBODY, palette

from ..report.sweep import Run
from . import pictures
from .archive import SPECIALISATION
from .arms import main_sweep
from .excerpts import Excerpts, read_excerpts
from .measures import Tables
from .parts import Part, Section, coloured, items, sources, text
from .parts import pictures as shown

TITLE = "Experts by domain, and in text"
TEXT_WORDS = (
    "The beginning of the held-out text of some domains. A token has the colour of the expert with the largest gate in "
    "one MoE layer. The same colour is the same expert in all texts below one heading; between layers and trunks it "
    "means nothing. Shown are the domains whose text may be published with the logs; their licences:"
)


def domains_section(tables: Tables) -> Section:
    """A heat map of experts by domain, and held-out text by domain, each token in the colour of its top expert."""
    sweep = main_sweep(tables)
    runs = [run for found in sweep.trunks.runs.values() if (run := _first(found))] if sweep else []
    loads = {f"{run.arm}, seed {run.seed}": measured for run in runs if (measured := _loads(run))}
    texts = [(run, found) for run in runs if (found := read_excerpts(run.directory)) and found.domains]
    parts = [shown([pictures.domains(loads)])] if loads else []
    if texts:
        licences = {name: one.licence for _, found in texts for name, one in found.domains.items()}
        parts += [text(TEXT_WORDS), items(f"{name}: {licence}" for name, licence in licences.items())]
    for run, found in texts:
        parts += _of_trunk(f"Trunk {run.arm}, seed {run.seed}", found)
    if not parts:
        return Section(TITLE, [text("This has not been measured on a finished trunk yet.")])
    return Section(TITLE, [*parts, sources(tables, runs)])


def _first(runs: Mapping[int, Run]) -> Run | None:
    """The finished run with the lowest seed."""
    return runs[min(runs)] if runs else None


def _loads(run: Run) -> pictures.DomainLoads | None:
    """What the evaluate command measured of a trunk, if it did."""
    found = read_json(run.directory / SPECIALISATION, "delete it and run the study again.")
    return (found["domains"], np.asarray(found["relative_load"])) if found else None


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
