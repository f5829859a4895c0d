"""A byte-level vocabulary trained on samples of all domains; held-out documents are not among them."""

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_jax.data.progress import progress
from moe_jax.data.readers import read_documents
from moe_jax.data.scan import DomainPlan, document_rank
from moe_jax.data.sources import Options
from moe_jax.runtime.files import read_json, write_json, write_whole

SIZE = 8192  # tokens: 256 bytes, the separator, and merges
SEPARATOR = "<|endoftext|>"
SAMPLE_BYTES = 2_000_000  # of every domain, so that none rules the merges by its size
SETTINGS = {"bos_token": SEPARATOR, "eos_token": SEPARATOR}
FILES = ("tokenizer.json", "tokenizer_config.json")


def finished(folder: Path, inputs: str) -> bool:
    """Whether a vocabulary from the same documents is in the folder, whole."""
    note = read_json(folder / "note.json", "delete it.")
    return note.get("inputs") == inputs and all(sha256_of_file(folder / name) == note[name] for name in FILES)


def sha256_of_file(path: Path) -> str:
    """The sha256 of a small file, in hex; "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def write(folder: Path, options: Options, plans: Sequence[DomainPlan], inputs: str) -> None:
    """Trains the vocabulary and writes it as a Hugging Face model brings it, the note last.

    Args:
        folder: to write into.
        options: of `prepare`, which say where the documents are.
        plans: as `scan` returned them; they say which documents are held out.
        inputs: a hash of what the documents are.
    """
    folder.mkdir(exist_ok=True)
    with progress("training the vocabulary", SAMPLE_BYTES * len(plans)) as advance:
        text = train(_counted(samples(options, plans), advance))
    for name, content in zip(FILES, (text, json.dumps(SETTINGS, indent=1) + "\n"), strict=True):
        write_whole(folder / name, content, durable=True)
    write_json(folder / "note.json", {"inputs": inputs} | {n: sha256_of_file(folder / n) for n in FILES}, durable=True)


def train(texts: Iterator[str], size: int = SIZE) -> str:
    """The `tokenizer.json` of a byte-level BPE; the same texts give the same one.

    Args:
        texts: to be split into words as GPT-2 does.
        size: of the vocabulary, above 256.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def samples(options: Options, plans: Sequence[DomainPlan]) -> Iterator[str]:
    """SAMPLE_BYTES of every domain's training documents, in the order of the hashes that decide what is held out."""
    for plan in plans:
        ranked: list[tuple[int, str]] = []
        for source in plan.sources:
            for piece in read_documents(options, source.name, hashlib.sha256()):
                rank = document_rank(piece.where)
                if rank >= plan.threshold:
                    ranked.append((rank, piece.text))
        heapq.heapify(ranked)
        left = SAMPLE_BYTES
        while ranked and left > 0:
            text = heapq.heappop(ranked)[1].encode()[:left].decode(errors="ignore")
            left -= max(1, len(text.encode()))
            yield text


def _counted(texts: Iterator[str], advance: Any) -> Iterator[str]:
    for text in texts:
        advance(len(text.encode()))
        yield text
