"""The corpus that a config names, checked against it, and the same in every process."""

from moe_jax.config import Config
from moe_jax.data import Corpus, open_corpus
from moe_jax.data.batches import check_weights
from moe_jax.runtime import processes


def open_data(config: Config) -> Corpus:
    """The corpus of the config; every process must call it.

    Raises:
        ValueError, FileNotFoundError: missing or damaged files, a vocabulary too small, wrong data.weights; in every
            process what is wrong in one, or that `data.path` leads some of them to other data.
    """
    corpus = processes.by_all(lambda: _open(config))
    first = processes.by_first(lambda: corpus.fingerprint)
    processes.by_all(lambda: _refuse_other_data(config, corpus, first))
    return corpus


def _open(config: Config) -> Corpus:
    corpus = open_corpus(config.data.path, config.data.verify)
    needed = corpus.tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least the {needed} tokens of the "
            f"{corpus.tokenizer.name!r} tokenizer of data.path={config.data.path!r}; set it to {needed} or more."
        )
    if config.data.weights:
        check_weights(corpus.domains, config.data.weights)  # before the workdir is claimed
    return corpus


def _refuse_other_data(config: Config, corpus: Corpus, first: str) -> None:
    """Raise a ValueError unless this process found the data with the fingerprint of process 0's."""
    if corpus.fingerprint != first:
        raise ValueError(
            f"data.path={config.data.path!r} leads process {processes.index()} to other data (fingerprint "
            f"{corpus.fingerprint[:16]}) than process 0 ({first[:16]}); give all hosts the same prepared folder."
        )
