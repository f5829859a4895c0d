"""A line of JSON or a row of a table becomes a document: its text, in spans that count differently as targets.

What a span weighs is how much each of its tokens counts in the training loss: 1 in plain text, 0 in a prompt, the
document's weight in an answer. A document's end weighs what its last span does.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.chat import read_chat, special_names
from moe_jax.data.corpus import tokenize_documents
from moe_jax.data.manifest import WEIGHT_DTYPE
from moe_jax.data.sources import Options
from moe_jax.data.tokenizer import Tokenizer, token_dtype

LEAST_WEIGHT, MOST_WEIGHT = 2.0**-14, 65504.0  # what float16 holds with all of its precision
KINDS: dict[str, tuple[str, Any]] = {
    "text_key": ("a string", str),
    "prompt_key": ("a string", str),
    "answer_key": ("a string", str),
    "messages_key": ("a list of messages", list),
    "weight_key": ("a number", int | float),
}


class Span(NamedTuple):
    """A part of a document's text, and how much each of its tokens counts as a target."""

    text: str
    weight: float = 1.0


class Piece(NamedTuple):
    """A document as found: where ("folder/file", or "folder/file:line" or row), and its text or what is wrong.

    spans: end to end they are the text; empty where all of it counts once.
    """

    where: str
    text: str
    problem: str = ""
    spans: tuple[Span, ...] = ()


def keys_of(options: Options) -> dict[str, str]:
    """flag -> key of the fields that make up a document."""
    flags: tuple[str, ...] = ("messages_key",) if options.messages_key else ("prompt_key", "answer_key")
    flags = flags if getattr(options, flags[0]) else ("text_key",)
    flags += ("weight_key",) if options.weight_key else ()
    return {flag: getattr(options, flag) for flag in flags}


def check_keys(options: Options) -> None:
    """Raises a ValueError for flags of keys that contradict each other or lack one."""
    given = {flag: key for flag in KINDS if (key := getattr(options, flag)) != getattr(Options, flag)}
    pair = [flag for flag in ("prompt_key", "answer_key") if flag in given]
    if len(pair) == 1:
        raise ValueError(f"--{pair[0]}={given[pair[0]]} is one half of a pair; give --prompt_key and --answer_key.")
    whole = [flag for flag in ("messages_key", "prompt_key", "text_key") if flag in given]
    if len(whole) > 1:
        named = " and ".join(f"--{flag}={given[flag]}" for flag in whole)
        raise ValueError(f"{named} both say where the text is; give one of them.")
    keys = keys_of(options)
    if len(set(keys.values())) < len(keys):
        named = " and ".join(f"--{flag}={key}" for flag, key in keys.items())
        raise ValueError(f"{named} must name different fields; give each its own.")
    if options.messages_key and not options.tokenizer:
        raise ValueError(
            f"--messages_key={options.messages_key} needs the chat template of a --tokenizer, which is missing; give "
            "both."
        )


def chat_digest(options: Options) -> str:
    """What identifies the chat template; "" without one."""
    return read_chat(options.tokenizer, options.separator).digest if options.messages_key else ""


# --- from a row to its spans ------------------------------------------------------------------------------------


def read_row(where: str, row: Any, options: Options, needs: str = "must be") -> Piece:
    """The document in a row, which is a mapping; needs: how the sentence begins that says what is missing."""
    for flag, key in keys_of(options).items():
        name, kind = KINDS[flag]
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            return Piece(where, "", f"{needs} {name} under '{key}' (see --{flag})")
    try:
        spans = tuple(span for span in _spans(row, options) if span.text)
    except ValueError as error:
        return Piece(where, "", str(error))
    text = "".join(span.text for span in spans)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Piece(where, "", f"has half a surrogate pair (character {error.start} of its text)")
    piece = check_text(where, data, text, "")
    return piece if piece.problem or all(span.weight == 1 for span in spans) else piece._replace(spans=spans)


def _spans(row: Mapping[str, Any], options: Options) -> list[Span]:
    weight = _weight(row, options.weight_key) if options.weight_key else 1.0
    if options.messages_key:
        chat = read_chat(options.tokenizer, options.separator)
        return [Span(text, weight if trained else 0.0) for text, trained in chat.spans(row[options.messages_key])]
    if not options.prompt_key:
        return [Span(row[options.text_key], weight)]
    if not row[options.answer_key].strip():
        raise ValueError(f"has an empty string under '{options.answer_key}' (see --answer_key)")
    return [Span(row[options.prompt_key], 0.0), Span(row[options.answer_key], weight)]


def _weight(row: Mapping[str, Any], key: str) -> float:
    weight = row[key]
    if not (math.isfinite(weight) and LEAST_WEIGHT <= weight <= MOST_WEIGHT):
        raise ValueError(
            f"has {weight} under '{key}' and must have a weight from {LEAST_WEIGHT:.1e} to {MOST_WEIGHT:g} there (a "
            "document that is not to count is left out)"
        )
    return float(np.asarray(weight, WEIGHT_DTYPE))


def decode(data: bytes) -> tuple[str, str]:
    """The text, and what is wrong with it."""
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 (byte {error.start}, line {_line_number(data, error.start)})"


def check_text(where: str, data: bytes, text: str, problem: str) -> Piece:
    """The document of a text that is one, or what is wrong with it."""
    if b"\0" in data:
        problem = f"has a NUL byte (line {_line_number(data, data.index(0))}): it is not text"
    if not problem and not text.strip():
        problem = "is empty"
    return Piece(where, "" if problem else text, problem)


def _line_number(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


# --- from spans to tokens -----------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A document's separator and tokens [n+1], and their weights as targets.

    weights: float16[n+1], or None if all are 1. The first is that of the document's end: the separator behind it.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None


def tokenize(pieces: Sequence[Piece], tokenizer: Tokenizer, special: bool = False) -> list[Tokens]:
    """Tokenizes documents, each span by itself, so that no token is in two.

    Args:
        pieces: without problems.
        tokenizer: of their corpus.
        special: whether names of special tokens in the text stand for them, as in what a chat template writes. A
            separator that opens the text is then the document's own.
    """
    if not special and not any(piece.spans for piece in pieces):
        return [Tokens(ids) for ids in tokenize_documents([piece.text for piece in pieces], tokenizer)]
    spans = [piece.spans or (Span(piece.text),) for piece in pieces]
    first = tokenizer.encode_all([own[0].text for own in spans], special)
    pairs = [pair for own in spans for pair in itertools.pairwise(span.text for span in own)]
    later = iter(_encode_later(pairs, tokenizer, special))
    found = []
    for own, opening in zip(spans, first, strict=True):
        if special and len(opening) and opening[0] == tokenizer.separator:
            opening = opening[1:]
        parts = [opening, *itertools.islice(later, len(own) - 1)]
        separator = np.array([tokenizer.separator], token_dtype(tokenizer.vocab_size))
        lengths = [1, *map(len, parts)]
        weights = np.repeat(np.array([own[-1].weight, *(span.weight for span in own)], WEIGHT_DTYPE), lengths)
        found.append(Tokens(np.concatenate([separator, *parts]), None if (weights == 1).all() else weights))
    return found


def _encode_later(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, special: bool) -> list[np.ndarray]:
    """The ids of the second text of each pair, which continues the first: the tokenizer puts nothing before it."""
    texts = [text for _, text in pairs]
    if not tokenizer.lead_bytes:
        return tokenizer.encode_all(texts, special)
    if not special:
        return tokenizer.encode_later(texts)
    # behind a special token a text begins anew, as it does where the whole text is tokenized at once
    names = tuple(tokenizer.names.values())
    search = special_names(names).search
    starts = [
        0 if before.endswith(names) else found.start() if (found := search(text)) else len(text)
        for before, text in pairs
    ]
    heads = tokenizer.encode_later([text[:start] for text, start in zip(texts, starts, strict=True)])
    tails = tokenizer.encode_all([text[start:] for text, start in zip(texts, starts, strict=True)], special)
    return [np.concatenate(both) for both in zip(heads, tails, strict=True)]
