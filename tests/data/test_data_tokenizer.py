"""Laws of the tokenizer."""

import numpy as np
import pytest

from moe_jax.data import ByteTokenizer, get_tokenizer

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("text", ["", "abc", "\n\0", "naïve café", "日本語 🙂"])
def test_decode_undoes_encode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_tokens_are_utf8_bytes():
    ids = TOKENIZER.encode("aé")  # é is C3 A9
    assert ids.dtype == np.uint16
    assert ids.tolist() == [0x61, 0xC3, 0xA9]


def test_separators_count_no_bytes_and_every_other_token_counts_one():
    lengths = TOKENIZER.bytes_per_token
    assert lengths.dtype == np.int32
    assert lengths.shape == (TOKENIZER.vocab_size,)
    assert lengths[TOKENIZER.separator] == 0
    assert lengths.sum() == 256


def test_decode_leaves_out_separators_and_marks_half_characters():
    assert TOKENIZER.decode([256, 97, 256, 98]) == "ab"
    assert TOKENIZER.decode([0xC3, 97]) == "\ufffda"


@pytest.mark.parametrize("bad", [-1, 257])
def test_decode_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match=f"Token id {bad} is outside the vocabulary.*0 to 256"):
        TOKENIZER.decode([97, bad])


def test_an_unknown_name_is_refused_with_the_known_ones():
    assert get_tokenizer("bytes") == TOKENIZER
    with pytest.raises(ValueError, match="tokenizer='bpe' is not known; use one of: bytes"):
        get_tokenizer("bpe")
