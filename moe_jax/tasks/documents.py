"""What our tasks of the lm-evaluation-harness ask about: the held-out documents of a corpus, without a network."""

from collections.abc import Iterator
from typing import Any

from moe_jax.data import Corpus, documents, open_corpus

SHOWN, ASKED, EVERY = 80, 40, 1000  # characters before, characters to choose, characters from question to question


def held_out(data_path: str = "", **_: Any) -> dict[str, Any]:
    """Every held-out document: text and domain; `data_path` as in `open_corpus`."""
    corpus = open_corpus(data_path)
    return _as_test({"text": text, "domain": domain} for domain in corpus.domains for text in _texts(corpus, domain))


def continuation(data_path: str = "", **_: Any) -> dict[str, Any]:
    """Passages of the held-out documents, and four continuations each: its own and those of the next three."""
    corpus = open_corpus(data_path)
    return _as_test(question for domain in corpus.domains for question in questions(list(_texts(corpus, domain))))


def questions(texts: list[str]) -> Iterator[dict[str, Any]]:
    """Of one domain: context, choices, and which of them is right, each place as often as the others."""
    passages = [
        (text[at : at + SHOWN], text[at + SHOWN : at + SHOWN + ASKED])
        for text in texts
        for at in range(0, len(text) - SHOWN - ASKED + 1, EVERY)
    ]
    for number, (context, own) in enumerate(passages):
        others = [passages[(number + k) % len(passages)][1] for k in (1, 2, 3)]
        choices = [*others[: number % 4], own, *others[number % 4 :]]
        if len(set(choices)) == 4:  # of fewer passages, or equal ones, there is nothing to choose
            yield {"context": context, "choices": choices, "gold": number % 4}


def _texts(corpus: Corpus, domain: str) -> Iterator[str]:
    return documents(corpus, "validation", domain)


def _as_test(rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(list(rows))}
