"""The documents of our tasks for the lm-evaluation-harness: the held-out ones of a corpus, without a network."""

import bisect
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from moe_jax.data import Corpus, documents, open_corpus

CONTEXT = 80  # characters before the continuation
CONTINUATION = 40  # characters of a continuation
EVERY = 1000  # characters from passage to passage
CHOICES = 4
SEAM = re.compile(r"(?<=\S) (?=\S)")  # one space between words, before which tokens end


def held_out(data_path: str = "", **_: Any) -> dict[str, Any]:
    """Every held-out document: text and domain; `data_path` as in `open_corpus`."""
    corpus = open_corpus(data_path)
    return _as_test({"text": text, "domain": domain} for domain in corpus.domains for text in _texts(corpus, domain))


def continuation(data_path: str = "", **_: Any) -> dict[str, Any]:
    """Passages of the held-out documents with four continuations each: its own and those of three others.

    Raises:
        ValueError: no domain has four passages.
    """
    corpus = open_corpus(data_path)
    rows = [question for domain in corpus.domains for question in questions(_texts(corpus, domain))]
    if not rows:
        raise ValueError(
            f"the task continuation needs {CHOICES} passages of {CONTEXT + CONTINUATION} characters in words, {EVERY} "
            f"apart, in the held-out documents of a domain, and data.path={data_path!r} has fewer; leave it out."
        )
    return _as_test(iter(rows))


def questions(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The questions of one domain: context, choices, and the number of the right one.

    Four passages share their four choices, in one order. So if a model ignores the context and judges the choices by
    their lengths, tokens or words, its favourite is right for one of the four passages. Chance is exactly 1/4, with
    sums and with means of log-probabilities, under every vocabulary whose tokens end before a space.
    """
    found = [passage for text in texts for passage in passages(text)]
    for start in range(0, len(found) - CHOICES + 1, CHOICES):
        contexts, choices = zip(*found[start : start + CHOICES], strict=True)
        if len(set(choices)) == CHOICES:  # of equal choices none is right alone
            for gold, context in enumerate(contexts):
                yield {"context": context, "choices": list(choices), "gold": gold}


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Context and continuation, both whole words, the continuation with the space before it, about EVERY characters."""
    seams = [seam.start() for seam in SEAM.finditer(text)]
    for at in range(0, len(text), EVERY):
        start = _first(seams, at) + 1 if at else 0
        cut = _first(seams, start + CONTEXT)
        end = _first(seams, cut + CONTINUATION)
        if end < len(text):
            yield text[start:cut], text[cut:end]


def _first(seams: list[int], place: int) -> int:
    """The first seam at or after a place; beyond all text if there is none."""
    number = bisect.bisect_left(seams, place)
    return seams[number] if number < len(seams) else sys.maxsize


def _texts(corpus: Corpus, domain: str) -> Iterator[str]:
    return documents(corpus, "validation", domain)


def _as_test(rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(list(rows))}
