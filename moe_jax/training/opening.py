"""Open the corpus of a config, and check that it fits the config and is the same in every process."""

from moe_jax.config import Config
from moe_jax.data import Corpus, open_corpus
from moe_jax.data.mixture import check_weights
from moe_jax.runtime import processes


def open_data(config: Config) -> Corpus:
    """Open the corpus of the config; every process must call it.

    Raises:
        ValueError, FileNotFoundError: missing or damaged files, a vocabulary that is too small, wrong data.weights, or
            a `data.path` with other data in some process. What one process raises is raised in all.
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
    """Raise a ValueError unless the data of this process have the fingerprint of process 0's."""
    if corpus.fingerprint != first:
        raise ValueError(
            f"data.path={config.data.path!r} holds other data in process {processes.index()} (fingerprint "
            f"{corpus.fingerprint[:16]}) than in process 0 ({first[:16]}); give all hosts the same prepared folder."
        )
