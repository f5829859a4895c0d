"""Excerpts of held-out text with the top expert of every token: written beside a trunk, shown on the page in colours.

    DIR/trunks/<method>/seed<k>/excerpts.json

The file is committed with the logs, so it has only text that may be: the public domain's and Python's.
"""

from pathlib import Path
from typing import NamedTuple

from moe_jax.runtime.files import read_json, write_json
from moe_jax.text.colours import letters, top_experts

from ..corpus.domains import DOMAINS

FILE = "excerpts.json"
QUOTED = ("shakespeare", "milton", "austen", "python_docs", "python_code", "factbook")  # domains that may be committed
NUM_TOKENS = 256  # of an excerpt, at most; less than the window of every run of the study, so all have the same text


class Excerpt(NamedTuple):
    """The beginning of a domain's held-out text, and its routing.

    Attributes:
        licence: of the text.
        letters: N texts, what each token shows.
        experts: L lists of N, the expert with the largest gate in each MoE layer; -1 where no expert took the token.
    """

    licence: str
    letters: list[str]
    experts: list[list[int]]


class Excerpts(NamedTuple):
    """The excerpts of a model, by domain; E is the number of experts to choose from."""

    num_experts: int
    domains: dict[str, Excerpt]


def write_excerpts(workdir: Path) -> None:
    """Route the beginning of every quoted domain's held-out text by the newest checkpoint; write excerpts.json.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
        OSError: a file cannot be read or written.
    """
    from moe_jax.config import num_choices
    from moe_jax.data import open_corpus
    from moe_jax.text.decoding import trace
    from moe_jax.text.model import restore

    model, step = restore(workdir)
    corpus = open_corpus(model.config.data.path, "sizes")
    names = [name for name in QUOTED if name in corpus.domains]
    if not names:
        print(f"the corpus of {workdir} has none of the domains that may be quoted: {', '.join(QUOTED)}", flush=True)
    sequences = [corpus.stream("validation", name).tokens[:NUM_TOKENS].tolist() for name in names]
    routed = trace(model, sequences, [0] * len(names), corpus.tokenizer) if names else []
    num_experts = num_choices(model.config.model)
    found = {}
    for name, traced in zip(names, routed, strict=True):
        shown = [n for n, piece in enumerate(traced.pieces) if piece]  # the separator has no letters
        experts = top_experts(traced, num_experts)[:, shown].tolist()
        texts = letters(traced.pieces[n] for n in shown)
        found[name] = Excerpt(DOMAINS[name].licence, texts, experts)._asdict()
    write_json(workdir / FILE, {"step": step, "num_experts": num_experts, "domains": found})


def read_excerpts(workdir: Path) -> Excerpts | None:
    """The excerpts beside a run, or None if it has none.

    Raises:
        ValueError: the file is damaged.
    """
    if not (workdir / FILE).is_file():
        return None
    value = read_json(workdir / FILE, "delete it and run the study again.")
    return Excerpts(value["num_experts"], {name: Excerpt(**one) for name, one in value["domains"].items()})
