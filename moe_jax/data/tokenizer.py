"""Text in, token ids out: one byte is one token, and one id more opens a document.

This is the seam for trained vocabularies. A tokenizer is anything with `name`, `vocab_size`,
`separator`, `encode`, `decode` and `bytes_per_token`; nothing else in the package knows what a token is.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255, and 256 as the separator that opens every document.

    There is nothing to train and no text it cannot write, so numbers measured with it need no further files
    to be reproduced.
    """

    name: str = "bytes"
    vocab_size: int = 257
    separator: int = 256

    def encode(self, text: str) -> np.ndarray:
        """Turns text into token ids, without a separator.

        Args:
            text: any text that UTF-8 can write (a lone surrogate cannot be, and raises UnicodeEncodeError).

        Returns:
            uint16[N], values 0..255, N = number of UTF-8 bytes.
        """
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns token ids into text; separators have no text, and bytes that are not UTF-8 become U+FFFD.

        A window of a stream may begin or end in the middle of a character, so that is no error.

        Args:
            ids: integers 0..256, any length.

        Returns:
            The text.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"Token id {outside[0]} is outside the vocabulary of tokenizer '{self.name}'; "
                f"ids are 0 to {self.vocab_size - 1}."
            )
        return array[array != self.separator].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes of text in each token: 1, and 0 for the separator."""
        lengths = np.ones(self.vocab_size, np.int32)
        lengths[self.separator] = 0
        return lengths


TOKENIZERS = {"bytes": ByteTokenizer}


def get_tokenizer(name: str) -> ByteTokenizer:
    """Finds a tokenizer by its name.

    Args:
        name: a key of `TOKENIZERS`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: no tokenizer has that name.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer={name!r} is not known; use one of: {', '.join(sorted(TOKENIZERS))}.")
    return TOKENIZERS[name]()
