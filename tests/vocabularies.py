"""Tiny trained vocabularies, as Hugging Face models bring them: a tokenizer.json and what is said beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "the cat sat on the mat, the hat",
    " a leading space",
    "naïve café",
    "日本語の日本",
    "smile 🙂 and 🙂",
    "tab\tand\n\nlines",
]
WORDS = ["the cat sat on the mat", "a hat"]
BPE = dict(show_progress=False, min_frequency=1)


def byte_level(texts: Sequence[str] = TEXTS, size: int = 300) -> Tokenizer:
    """As GPT-2's, DeepSeek's and Qwen's, with two special tokens and one that is not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special, **BPE)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def with_fallback(texts: Sequence[str] = WORDS, size: int = 60) -> Tokenizer:
    """As Llama's and Mixtral's: a space before the text, ▁ for spaces, bytes for what the vocabulary lacks."""
    tokenizer = _falling_back(texts, size)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def with_metaspace(texts: Sequence[str] = WORDS, size: int = 60) -> Tokenizer:
    """As transformers 5 writes Llama's and Mistral's: a space before texts that begin with none."""
    tokenizer = _falling_back(texts, size)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    return tokenizer


def with_prefix() -> Tokenizer:
    """Byte-level, with a space before texts that begin with none, as RoBERTa's."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def without_spaces() -> Tokenizer:
    """With fallback and Metaspace, but without a token for ▁: every space is three bytes."""
    raw = json.loads(with_metaspace().to_str())
    raw["model"]["vocab"] = {token.replace("▁", "__"): i for token, i in raw["model"]["vocab"].items()}
    raw["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(raw))


def unigram() -> Tokenizer:
    """With fallback and ▁; its model, unlike BPE, makes the special token </s> of a text that has its name."""
    tokens = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("at", -3.0)]
    tokens += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(tokens, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(_SPACES)
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


_SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def _falling_back(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", split=True)  # learns words, as SentencePiece does
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], **BPE)
    tokenizer.train_from_iterator(texts, trainer)
    raw = json.loads(tokenizer.to_str())
    vocabulary = raw["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    raw["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(raw | {"pre_tokenizer": None}))
    tokenizer.decoder = decoders.Sequence(_SPACES)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **settings: dict) -> Path:
    """The folder, with tokenizer.json and `<name>.json` of each setting."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
