"""Text in, token ids out: the interface of a tokenizer, and the one for which a byte is a token.

A tokenizer is anything with what `Tokenizer` lists; nothing else in the package knows what a token is. The vocabulary
of a `tokenizer.json` is read in `trained`.

Legend: N tokens, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the package needs of a tokenizer.

    name: distinguishes tokenizers. vocab_size: V; every id is below it. separator: opens every document.
    ends: ids at which generated text ends. opens_text: whether a prompt begins with the separator.
    names: id -> name of the tokens that are no text. lead_bytes: the largest result of `lead`: 1 where the tokenizer
    puts a space before a text.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    @property
    def separator(self) -> int: ...  # noqa: D102

    @property
    def ends(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def opens_text(self) -> bool: ...  # noqa: D102

    @property
    def names(self) -> Mapping[int, str]: ...  # noqa: D102

    @property
    def lead_bytes(self) -> int: ...  # noqa: D102

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes of text in each token; 0 for the separator and other tokens that are no text."""

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """uint16[N] or uint32[N]; with `special`, names of special tokens in the text stand for them."""

    def encode_all(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """Each text's ids, as `encode` gives them."""

    def encode_later(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's ids where it continues another one: as `encode_all`, without what is put before a text."""

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for, concatenated; one token may be half a character."""

    def lead(self, ids: Iterable[int]) -> int:
        """How many of the first bytes of a text's ids do not belong to it; 2 * `lead_bytes` ids decide it."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without what `lead` counts; bytes that are not UTF-8 become U+FFFD."""

    def why_changed(self, text: str, ids: Iterable[int]) -> str:
        """Why the ids of a text stand for other bytes than the text has, where they do."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which ids are stored, little-endian: two bytes where they suffice, else four."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def checked_ids(ids: Iterable[int], tokenizer: Tokenizer) -> np.ndarray:
    """The ids as int64[N].

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    outside = array[(array < 0) | (array >= tokenizer.vocab_size)]
    if outside.size:
        raise ValueError(
            f"Token id {outside[0]} is outside the vocabulary of tokenizer '{tokenizer.name}'; "
            f"ids are 0 to {tokenizer.vocab_size - 1}."
        )
    return array


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255, and 256 as the separator that opens every document.

    It needs no training and can write every text, so numbers measured with it are reproducible without further files.
    """

    name: str = "bytes"
    vocab_size: int = 257
    separator: int = 256
    ends: tuple[int, ...] = (256,)
    opens_text: bool = True
    lead_bytes: int = 0

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Turns text into token ids, without a separator.

        Args:
            text: any text that UTF-8 can write (a lone surrogate cannot be, and raises UnicodeEncodeError).
            special: makes no difference, because no special token has a name here.

        Returns:
            uint16[N], values 0..255, N = number of UTF-8 bytes.
        """
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns token ids into text; separators have no text, and bytes that are not UTF-8 become U+FFFD.

        Such bytes are no error, because a window of a stream may begin or end in the middle of a character.

        Args:
            ids: integers 0..256, any length.

        Returns:
            The text.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def encode_all(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """Each text's ids."""
        return [self.encode(text) for text in texts]

    def encode_later(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's ids: nothing is put before any."""
        return self.encode_all(texts)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; a ValueError as in `decode`."""
        array = checked_ids(ids, self)
        return array[array != self.separator].astype(np.uint8).tobytes()

    @property
    def names(self) -> Mapping[int, str]:
        """None: the separator has no name."""
        return {}

    def lead(self, ids: Iterable[int]) -> int:
        """0: nothing is put before a text."""
        return 0

    def why_changed(self, text: str, ids: Iterable[int]) -> str:
        """No reason: the bytes are always those of the text."""
        return ""

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes of text in each token: 1, and 0 for the separator."""
        lengths = np.ones(self.vocab_size, np.int32)
        lengths[self.separator] = 0
        return lengths
