"""A trained vocabulary: the `tokenizer.json` of a Hugging Face model, with the exact bytes of every token.

Two kinds are read: byte-level ones (GPT-2, DeepSeek, Qwen, OLMoE, Llama 3), in which every character of a token
stands for a byte, and those made by SentencePiece whose unknown characters fall back to bytes (Llama, Mixtral). In
both the bytes of a token are known without its neighbours, so a text's bits per byte are too.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.data.tokenizer import checked_ids, token_dtype
from moe_jax.runtime.files import read_json

TOKENIZER_FILE = "tokenizer.json"
# in them stand the tokens that open and end a text, by name or by id; the first that says so is right
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
BLOCK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedTokenizer:
    """A vocabulary read by the `tokenizers` library; see `read_tokenizer`.

    Args:
        name: made of the file's sha256 and the separator.
        separator: the id that opens every document.
        ends: ids at which generated text ends, the separator among them.
        opens_text: whether the model that this came with was given the separator before every text.
        pieces: the bytes that each id stands for, none for tokens that are no text and for ids that no token has.
        names: of each token that is no text its name: the separator, the ends, and all special tokens.
        spelled: of each of these the ids of its name's bytes, one by one, where the vocabulary has them all.
        before: what is put before a text.
        always: whether it is, even before a text that begins with a space.
        inner: the `tokenizers.Tokenizer`.
    """

    name: str
    separator: int
    ends: tuple[int, ...]
    opens_text: bool
    pieces: tuple[bytes, ...]
    names: Mapping[int, str]
    spelled: Mapping[int, tuple[int, ...]]
    before: bytes
    always: bool
    inner: Any

    @property
    def vocab_size(self) -> int:
        """V: the largest id and one."""
        return len(self.pieces)

    @property
    def lead_bytes(self) -> int:
        """Most bytes that `lead` finds."""
        return len(self.before)

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes of text in each token; 0 for tokens that are no text."""
        return np.fromiter(map(len, self.pieces), np.int32, len(self.pieces))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """uint16[N] or uint32[N], without a separator; special tokens' names are plain text unless `special`."""
        self.inner.encode_special_tokens = not special
        encoding = self.inner.encode(text, add_special_tokens=False)
        return self._array(encoding.ids) if special else self._as_text(encoding.ids)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode` of each, on all cores."""
        self.inner.encode_special_tokens = True
        found = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._as_text(encoding.ids) for encoding in found]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for, end to end; a ValueError where one is outside the vocabulary."""
        return b"".join(self.pieces[i] for i in checked_ids(ids, self))

    def lead(self, ids: Iterable[int]) -> int:
        """How many of the first bytes of a text's ids are none of the text's.

        Where a space is put only before texts that have none, two of them are the text's own; a text with one has the
        ids of a text with none.
        """
        data = self.to_bytes(ids)
        own = not self.always and data.startswith(self.before * 2)
        return len(self.before) if data.startswith(self.before) and not own else 0

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without what `lead` counts; bytes that are not UTF-8 become U+FFFD."""
        ids = checked_ids(ids, self)
        return self.to_bytes(ids)[self.lead(ids) :].decode("utf-8", errors="replace")

    def why_changed(self, text: str, ids: Iterable[int]) -> str:
        """Why the ids of a text stand for other bytes than the text has."""
        found = self.to_bytes(ids)[self.lead(ids) :]
        normalizer, plain = self.inner.normalizer, text.replace(BLOCK, " ")
        normal = plain if normalizer is None else normalizer.normalize_str(text).replace(BLOCK, " ")
        if normal not in (plain, f" {plain}"):
            kinds = [kind for kind in _kinds(json.loads(normalizer.__getstate__())) if kind != "Sequence"]
            return f"the tokenizer's normalizer ({', '.join(kinds)}) changes text"
        if f" {found.decode(errors='replace')}" == text:
            return "the tokenizer does not distinguish a text that begins with one space from one that begins with none"
        if more := found.count(BLOCK.encode()) - text.count(BLOCK):
            how = "and that as three bytes" if more > 0 else "and that character, too"
            return f"the tokenizer writes a space as {BLOCK}, {how}"
        if not {bytes([byte]) for byte in text.encode()} <= set(self.pieces):
            return "the vocabulary lacks some bytes"
        return "the tokenizer drops or replaces characters"

    def _array(self, ids: Sequence[int]) -> np.ndarray:
        return np.array(ids, token_dtype(self.vocab_size))

    def _as_text(self, ids: Sequence[int]) -> np.ndarray:
        """Ids of plain text: a vocabulary may make even its separator of a text that has its name."""
        array = self._array(ids)
        if not self._is_no_text[array].any():
            return array
        return self._array([i for token in ids for i in self.spelled.get(token, (token,))])

    @functools.cached_property
    def _is_no_text(self) -> np.ndarray:
        found = np.zeros(self.vocab_size, bool)
        found[list(self.names)] = True
        return found


def read_tokenizer(
    path: pathlib.Path, separator: str | int = "", eos: str = "", flag: str = "separator"
) -> TrainedTokenizer:
    """Reads a vocabulary and what is said beside it about the tokens that open and end a text.

    The separator, the ends and all special tokens are no text: they have no bytes, and in a text their names are
    plain characters. An end that is a single character, which nothing else could write, ends generated text only.

    Args:
        path: a `tokenizer.json`, or the folder that holds it.
        separator: the token, by name or id, that opens every document; "" takes the first of bos and eos that one of
            `SETTINGS` names: bos in any of them, then eos.
        eos: a token, by name or id, that ends texts, besides those that are named.
        flag: by which the caller takes a token, for errors.

    Raises:
        ValueError: the file is missing or damaged, of a kind whose tokens have no bytes of their own, no separator is
            named, or it is a character of ordinary text.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    raw = read_settings(file)
    if not raw:
        raise ValueError(f"--tokenizer={path} has no {TOKENIZER_FILE}; give one, or the folder that holds it.")
    inner, settings = _parse(file, raw), [read_settings(file.parent / name) for name in SETTINGS]
    pieces = _pieces(file, raw, inner)
    given = [_given(file, inner, eos, flag)] if eos else []
    named = {what: [i for one in settings for i in _named(inner, one, what)] for what in ("bos", "eos")}
    openers = [_given(file, inner, separator, flag)] if separator != "" else [*named["bos"], *named["eos"], *given]
    if not openers:
        raise ValueError(
            f"--tokenizer={file} names no bos or eos in {', '.join(SETTINGS)}, so nothing can open a document; "
            f"give --{flag}=TOKEN (or its id)."
        )
    opener = openers[0]
    ends = {opener, *named["eos"], *given}
    names, spelled = _no_text(inner, pieces, ends, raw["model"])
    if opener not in names:
        raise ValueError(
            f"--tokenizer={file} would open documents with {inner.id_to_token(opener)!r}, a character that texts have, "
            f"too; give --{flag}=TOKEN (or its id) of one that they do not have."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    opens = bool(settings[0].get("add_bos_token")) or opener in inner.encode("a").ids
    silent = tuple(b"" if i in names else piece for i, piece in enumerate(pieces))
    about = opener, tuple(sorted(ends)), opens, silent, names, spelled
    tokenizer = TrainedTokenizer(f"tokenizer-{digest[:16]}-{opener}", *about, b"", True, inner)
    before = tokenizer.to_bytes(tokenizer.encode("a"))[:-1]
    always = tokenizer.to_bytes(tokenizer.encode("  a")).startswith(before * 3)
    return dataclasses.replace(tokenizer, before=before, always=always)


def tokenizer_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that `read_tokenizer` reads, those that are there."""
    file = path / TOKENIZER_FILE if path.is_dir() else path
    return [file, *(file.parent / name for name in SETTINGS if (file.parent / name).is_file())]


def read_settings(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        ValueError: the file is something else.
    """
    return read_json(file, "copy it again from the model.")


def _parse(file: pathlib.Path, raw: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        # a stored limit would cut documents, and stored padding lengthen them
        return Tokenizer.from_str(json.dumps(raw | {"truncation": None, "padding": None}))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no vocabulary that tokenizers can read ({error}); copy it again.") from None


def _pieces(file: pathlib.Path, raw: dict[str, Any], inner: Any) -> list[bytes]:
    """The bytes of every id, those of the name where it is an added token."""
    to_bytes = _reader_of(file, raw)
    vocabulary = {i: to_bytes(token) for token, i in inner.get_vocab(with_added_tokens=False).items()}
    vocabulary |= {i: added.content.encode() for i, added in inner.get_added_tokens_decoder().items()}
    return [vocabulary.get(i, b"") for i in range(max(vocabulary) + 1)]


def _no_text(
    inner: Any, pieces: Sequence[bytes], ends: Iterable[int], model: dict[str, Any]
) -> tuple[dict[int, str], dict[int, tuple[int, ...]]]:
    """Name and spelling of each token that is no text, of which the library then knows, too."""
    from tokenizers import AddedToken

    added = inner.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    silent = special.union(ends)
    single = {piece: i for i, piece in enumerate(pieces) if len(piece) == 1 and i not in silent}
    spellings = {i: tuple(single.get(bytes([byte]), i) for byte in pieces[i]) for i in silent}
    unknown = _id(inner, model.get("unk_token", model.get("unk_id")))  # stands for what has no token, not for its name
    spelled = {i: ids for i, ids in spellings.items() if i not in ids and i != unknown}
    names = {i: inner.id_to_token(i) for i in spellings if i in added or i in spelled}
    ordinary = [name for i, name in names.items() if i not in special]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ordinary])
    return names, spelled


def _reader_of(file: pathlib.Path, raw: dict[str, Any]) -> Any:
    """The function token -> bytes of this kind of vocabulary."""
    kinds, model = set(_kinds(raw.get("decoder"))), raw.get("model")
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        return lambda token: _byte_level(token, alphabet)
    if "ByteFallback" in kinds or (isinstance(model, dict) and model.get("byte_fallback")):
        return _with_fallback
    raise ValueError(
        f"{file} is neither byte-level nor falls back to bytes (its decoder: {', '.join(sorted(kinds)) or 'none'}), "
        "so the bytes of its tokens cannot be told; use another tokenizer."
    )


def _kinds(part: Any) -> Iterator[str]:
    """The types of a decoder or normalizer and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in [*part.get("decoders", []), *part.get("normalizers", [])]:
            yield from _kinds(inner)


def byte_alphabet() -> dict[str, int]:
    """character -> byte: a printable one of Latin-1 is itself, the others are numbered from 256 on. Source: GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _with_fallback(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace(BLOCK, " ").encode()


def _given(file: pathlib.Path, inner: Any, token: str | int, flag: str) -> int:
    """The id of the token that a flag names, by name or by id."""
    by_id = int(token) if str(token).isdecimal() else None
    found = [i for i in (_id(inner, token), _id(inner, by_id)) if i is not None]
    if not found:
        raise ValueError(f"--tokenizer={file} has no token {token!r}; give --{flag}=TOKEN (or its id) that it has.")
    return found[0]


def _named(inner: Any, settings: dict[str, Any], what: str) -> list[int]:
    """The ids under `<what>_token` (a name, or an object with one) and `<what>_token_id` (one or several)."""
    token, ids = settings.get(f"{what}_token"), settings.get(f"{what}_token_id")
    token = token.get("content") if isinstance(token, dict) else token
    candidates = [token, *(ids if isinstance(ids, list) else [ids])]
    return [i for i in (_id(inner, one) for one in candidates) if i is not None]


def _id(inner: Any, token: Any) -> int | None:
    """The id of a token given by name or id, if the vocabulary has it."""
    if isinstance(token, str):
        return inner.token_to_id(token)
    return token if isinstance(token, int) and inner.id_to_token(token) is not None else None
