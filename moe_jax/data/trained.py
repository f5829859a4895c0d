"""A trained vocabulary: the `tokenizer.json` of a Hugging Face model, with the exact bytes of every token.

Two kinds are read: byte-level ones (GPT-2, DeepSeek, Qwen, OLMoE, Llama 3), in which every character of a token
stands for a byte, and those made by SentencePiece whose unknown characters fall back to bytes (Llama, Mixtral). In
both the bytes of a token are known without its neighbours, so a text's bits per byte are too.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.data.tokenizer import checked_ids, token_dtype

TOKENIZER_FILE = "tokenizer.json"
# in them stand the tokens that open and end a text, by name or by id; the first that says so is right
SETTINGS = ("tokenizer_config.json", "generation_config.json", "config.json")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedTokenizer:
    """A vocabulary read by the `tokenizers` library; see `read_tokenizer`.

    Args:
        name: made of the file's sha256 and the separator.
        separator: the id that opens every document.
        ends: ids at which generated text ends, the separator among them.
        opens_text: whether the model that this came with was given the separator before every text.
        pieces: the bytes that each id stands for, none for special tokens and for ids that no token has.
        lead_bytes: 1 where a space is put before every text, else 0.
    """

    name: str
    separator: int
    ends: tuple[int, ...]
    opens_text: bool
    pieces: tuple[bytes, ...]
    lead_bytes: int
    inner: Any  # tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        """V: the largest id and one."""
        return len(self.pieces)

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes of text in each token; 0 for special tokens."""
        return np.fromiter(map(len, self.pieces), np.int32, len(self.pieces))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """uint16[N] or uint32[N], without a separator; special tokens' names are plain text unless `special`."""
        self.inner.encode_special_tokens = not special
        return self._array(self.inner.encode(text, add_special_tokens=False))

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode` of each, on all cores."""
        self.inner.encode_special_tokens = True
        return [self._array(one) for one in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for, end to end; a ValueError where one is outside the vocabulary."""
        return b"".join(self.pieces[i] for i in checked_ids(ids, self))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without the space before it; bytes that are not UTF-8 become U+FFFD."""
        data = self.to_bytes(ids)
        lead = self.lead_bytes if data.startswith(b" ") else 0
        return data[lead:].decode("utf-8", errors="replace")

    def _array(self, encoding: Any) -> np.ndarray:
        return np.array(encoding.ids, token_dtype(self.vocab_size))


def read_tokenizer(path: pathlib.Path, separator: str | int = "") -> TrainedTokenizer:
    """Reads a vocabulary and what is said beside it about the tokens that open and end a text.

    Args:
        path: a `tokenizer.json`, or the folder that holds it.
        separator: the token, by name or id, that opens every document; "" takes the first of bos and eos that
            tokenizer_config.json, generation_config.json or config.json names: bos in any of them, then eos.

    Raises:
        ValueError: the file is missing or damaged, of a kind whose tokens have no bytes of their own, or no
            separator can be told.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    raw = read_settings(file)
    if not raw:
        raise ValueError(f"--tokenizer={path} has no {TOKENIZER_FILE}; give one, or the folder that holds it.")
    inner, settings = _parse(file, raw), [read_settings(file.parent / name) for name in SETTINGS]
    pieces = tuple(_pieces(file, raw, inner))
    opener = _separator(file, inner, settings, separator)
    ends = {opener, *(i for one in settings for i in _named(inner, one, "eos"))}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    name = f"tokenizer-{digest[:16]}-{opener}"
    opens = bool(settings[0].get("add_bos_token")) or opener in inner.encode("a").ids
    tokenizer = TrainedTokenizer(name, opener, tuple(sorted(ends)), opens, pieces, 0, inner)
    lead = len(tokenizer.to_bytes(tokenizer.encode("a"))) - len(b"a")
    return dataclasses.replace(tokenizer, lead_bytes=lead)


def tokenizer_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that `read_tokenizer` reads, those that are there."""
    file = path / TOKENIZER_FILE if path.is_dir() else path
    return [file, *(file.parent / name for name in SETTINGS if (file.parent / name).is_file())]


def read_settings(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        ValueError: the file is something else.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again from the model.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must be a JSON object; copy it again from the model.")
    return value


def _parse(file: pathlib.Path, raw: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        # a stored limit would cut documents, and stored padding lengthen them
        return Tokenizer.from_str(json.dumps(raw | {"truncation": None, "padding": None}))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no vocabulary that tokenizers can read ({error}); copy it again.") from None


def _pieces(file: pathlib.Path, raw: dict[str, Any], inner: Any) -> Iterator[bytes]:
    """The bytes of every id."""
    to_bytes = _reader_of(file, raw)
    vocabulary = {i: to_bytes(token) for token, i in inner.get_vocab(with_added_tokens=False).items()}
    for i, added in inner.get_added_tokens_decoder().items():
        vocabulary[i] = b"" if added.special else added.content.encode()
    yield from (vocabulary.get(i, b"") for i in range(max(vocabulary) + 1))


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
    """The types of a decoder and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.get("decoders", []):
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
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _separator(file: pathlib.Path, inner: Any, settings: Sequence[dict[str, Any]], asked: str | int) -> int:
    """The id that opens a document: the one asked for, else the first bos, else the first eos."""
    if asked != "":
        by_id = int(asked) if str(asked).isdecimal() else None
        found = [i for i in (_id(inner, asked), _id(inner, by_id)) if i is not None]
    else:
        found = [i for what in ("bos", "eos") for one in settings for i in _named(inner, one, what)]
    if not found:
        problem = f"has no token {asked!r}" if asked != "" else f"names no bos or eos in {', '.join(SETTINGS)}"
        raise ValueError(
            f"--tokenizer={file} {problem}, so nothing can open a document; give --separator=TOKEN (or its id)."
        )
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
