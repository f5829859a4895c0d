"""A trained vocabulary: the `tokenizer.json` of a Hugging Face model, with the exact bytes of every token.

Two kinds are read: byte-level ones (GPT-2, DeepSeek, Qwen, OLMoE, Llama 3), in which every character of a token
stands for a byte, and those made by SentencePiece whose unknown characters fall back to bytes (Llama, Mixtral). In
both the bytes of a token are known without its neighbours, so a text's bits per byte are too.

Legend: N tokens, V vocabulary.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.tokenizer import checked_ids, token_dtype
from moe_jax.runtime.files import read_json

TOKENIZER_FILE = "tokenizer.json"
# these name the tokens that open and end a text, by name or by id; the first one that does so counts
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
BLOCK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, eq=False)
class TrainedTokenizer:
    """A vocabulary read by the `tokenizers` library; see `read_tokenizer`.

    Args:
        name: derived from the file's sha256 and the separator.
        separator: the id that opens every document.
        ends: ids at which generated text ends, the separator among them.
        opens_text: whether the original model expects the separator before every text.
        pieces: the bytes that each id stands for; empty for tokens that are no text and for ids without a token.
        names: id -> name of each token that is no text: the separator, the ends, and all special tokens.
        spelled: id -> ids of the bytes of its name, for those whose bytes the vocabulary all has.
        before: bytes that the tokenizer puts before a text.
        always: whether it does so even before a text that begins with a space.
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
        """V: the largest id plus one."""
        return len(self.pieces)

    @property
    def lead_bytes(self) -> int:
        """The largest result of `lead`."""
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

    def encode_all(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """Encodes each text, as `encode`, on all cores."""
        self.inner.encode_special_tokens = not special
        found = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [(self._array if special else self._as_text)(encoding.ids) for encoding in found]

    def encode_later(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes each text as plain text that continues another one: nothing is put before it."""
        return self._without_lead.encode_all(texts)

    @functools.cached_property
    def _without_lead(self) -> "TrainedTokenizer":
        from tokenizers import Tokenizer

        raw = json.loads(self.inner.to_str())
        parts = {name: _without_lead(raw[name]) for name in ("normalizer", "pre_tokenizer")}
        return dataclasses.replace(self, inner=Tokenizer.from_str(json.dumps(raw | parts)), before=b"")

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for, concatenated; a ValueError for an id outside the vocabulary."""
        return b"".join(self.pieces[i] for i in checked_ids(ids, self))

    def lead(self, ids: Iterable[int]) -> int:
        """How many of the first bytes of a text's ids do not belong to the text.

        Where a space is put only before texts that begin with none, two leading spaces are the text's own. A text with
        one leading space has the same ids as a text with none.
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
        normalizer = self.inner.normalizer
        plain = text.replace(BLOCK, " ")
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
        """Ids of plain text: those of special tokens, which a text may contain by name, become those of their bytes."""
        array = self._array(ids)
        if not self._is_no_text[array].any():
            return array
        return self._array([i for token in ids for i in self.spelled.get(token, (token,))])

    @functools.cached_property
    def _is_no_text(self) -> np.ndarray:
        found = np.zeros(self.vocab_size, bool)
        found[list(self.names)] = True
        return found


def read_tokenizer(path: Path, separator: str | int = "", eos: str = "", flag: str = "separator") -> TrainedTokenizer:
    """Reads a vocabulary and, from the files beside it, which tokens open and end a text.

    The separator, the ends and all special tokens are no text: they have no bytes, and their names in a text are plain
    characters. An end whose name is a single character stays text, because no other token could write that character;
    it ends generated text only.

    Args:
        path: a `tokenizer.json`, or the folder that holds it.
        separator: the token, by name or id, that opens every document; "" takes the first bos that one of `SETTINGS`
            names, or else the first eos.
        eos: a token, by name or id, that ends texts, in addition to those that `SETTINGS` name.
        flag: the caller's flag for such a token, for errors.

    Raises:
        ValueError: the file is missing, damaged, or of a kind whose tokens have no bytes of their own; or no separator
            is named, or it is a character of ordinary text.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    raw = read_settings(file)
    if not raw:
        raise ValueError(f"--tokenizer={path} has no {TOKENIZER_FILE}; give one, or the folder that holds it.")
    inner = _parse(file, raw)
    settings = [read_settings(file.parent / name) for name in SETTINGS]
    pieces = _pieces(file, raw, inner)
    given = [_token_of_flag(file, inner, eos, flag)] if eos else []
    named = {what: [i for one in settings for i in _named(inner, one, what)] for what in ("bos", "eos")}
    openers = (
        [_token_of_flag(file, inner, separator, flag)] if separator != "" else [*named["bos"], *named["eos"], *given]
    )
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
            f"--tokenizer={file} would open documents with {inner.id_to_token(opener)!r}, a character that texts "
            f"have, too; give --{flag}=TOKEN (or its id) that they do not have."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    opens = bool(settings[0].get("add_bos_token")) or opener in inner.encode("a").ids
    silent = tuple(b"" if i in names else piece for i, piece in enumerate(pieces))
    about = opener, tuple(sorted(ends)), opens, silent, names, spelled
    tokenizer = TrainedTokenizer(f"tokenizer-{digest[:16]}-{opener}", *about, b"", True, inner)
    before = tokenizer.to_bytes(tokenizer.encode("a"))[:-1]
    always = tokenizer.to_bytes(tokenizer.encode("  a")).startswith(before * 3)
    return dataclasses.replace(tokenizer, before=before, always=always)


def tokenizer_files(path: Path) -> list[Path]:
    """The files that `read_tokenizer` reads, as far as they exist."""
    file = path / TOKENIZER_FILE if path.is_dir() else path
    return [file, *(file.parent / name for name in SETTINGS if (file.parent / name).is_file())]


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    return read_json(file, "copy it again from the model.")


def _parse(file: Path, raw: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        # a stored limit would truncate documents, and stored padding would lengthen them
        return Tokenizer.from_str(json.dumps(raw | {"truncation": None, "padding": None}))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no vocabulary that tokenizers can read ({error}); copy it again.") from None


def _pieces(file: Path, raw: dict[str, Any], inner: Any) -> list[bytes]:
    """The bytes of every id; those of an added token are its name's."""
    to_bytes = _reader_of(file, raw)
    vocabulary = {i: to_bytes(token) for token, i in inner.get_vocab(with_added_tokens=False).items()}
    vocabulary |= {i: added.content.encode() for i, added in inner.get_added_tokens_decoder().items()}
    return [vocabulary.get(i, b"") for i in range(max(vocabulary) + 1)]


def _no_text(
    inner: Any, pieces: Sequence[bytes], ends: Iterable[int], model: dict[str, Any]
) -> tuple[dict[int, str], dict[int, tuple[int, ...]]]:
    """`names` and `spelled` of `TrainedTokenizer`; also registers these tokens as special with the library."""
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


def _reader_of(file: Path, raw: dict[str, Any]) -> Any:
    """The function token -> bytes of this kind of vocabulary."""
    kinds = set(_kinds(raw.get("decoder")))
    model = raw.get("model")
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        return lambda token: _byte_level(token, alphabet)
    if "ByteFallback" in kinds or (isinstance(model, dict) and model.get("byte_fallback")):
        return _with_fallback
    raise ValueError(
        f"{file} is neither byte-level nor falls back to bytes (its decoder: {', '.join(sorted(kinds)) or 'none'}), "
        "so the bytes of its tokens are not known; use another tokenizer."
    )


def _kinds(part: Any) -> Iterator[str]:
    """The types of a decoder or normalizer and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in [*part.get("decoders", []), *part.get("normalizers", [])]:
            yield from _kinds(inner)


def _without_lead(part: Any) -> Any:
    """A normalizer or pre-tokenizer, with those inside it, without what puts a space before a text."""
    if not isinstance(part, dict):
        return part
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    part = part | {key: value for key, value in never.items() if key in part}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part[name] = [_without_lead(one) for one in part[name] if one["type"] != "Prepend"]
    return None if part["type"] == "Prepend" else part


def byte_alphabet() -> dict[str, int]:
    """character -> byte: a printable byte of Latin-1 is itself, the others are numbered from 256 on. Source: GPT-2."""
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


def _token_of_flag(file: Path, inner: Any, token: str | int, flag: str) -> int:
    """The id of the token that a flag names, by name or by id."""
    by_id = int(token) if str(token).isdecimal() else None
    found = [i for i in (_id(inner, token), _id(inner, by_id)) if i is not None]
    if not found:
        raise ValueError(f"--tokenizer={file} has no token {token!r}; give --{flag}=TOKEN (or its id) that it has.")
    return found[0]


def _named(inner: Any, settings: dict[str, Any], what: str) -> list[int]:
    """The ids under `<what>_token` (a name, or an object with one) and `<what>_token_id` (one or several)."""
    token = settings.get(f"{what}_token")
    ids = settings.get(f"{what}_token_id")
    token = token.get("content") if isinstance(token, dict) else token
    candidates = [token, *(ids if isinstance(ids, list) else [ids])]
    return [i for i in (_id(inner, one) for one in candidates) if i is not None]


def _id(inner: Any, token: Any) -> int | None:
    """The id of a token given by name or id, if the vocabulary has it."""
    if isinstance(token, str):
        return inner.token_to_id(token)
    return token if isinstance(token, int) and inner.id_to_token(token) is not None else None
