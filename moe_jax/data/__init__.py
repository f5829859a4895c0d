"""Text becomes batches: a corpus of labelled domains, a tokenizer, and `batch_at(step)`."""

from moe_jax.data.batches import Batch, BatchAt, EvaluationBatches, count_windows, evaluation_batches, training_batches
from moe_jax.data.corpus import (
    Corpus,
    Stream,
    Summary,
    check_corpus,
    documents,
    make_corpus,
    open_corpus,
    publish_tokenizer,
    token_frequencies,
)
from moe_jax.data.manifest import SPLITS
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer
from moe_jax.data.vocabularies import get_tokenizer

__all__ = [
    "SPLITS",
    "Batch",
    "BatchAt",
    "ByteTokenizer",
    "Corpus",
    "EvaluationBatches",
    "Stream",
    "Summary",
    "Tokenizer",
    "check_corpus",
    "count_windows",
    "documents",
    "evaluation_batches",
    "get_tokenizer",
    "make_corpus",
    "open_corpus",
    "publish_tokenizer",
    "token_frequencies",
    "training_batches",
]
