"""The tokenizer that a workdir keeps, for generating text and for export."""

from contextlib import nullcontext
from pathlib import Path

from moe_jax.config import Config, branch_point
from moe_jax.config.paths import workdir_of
from moe_jax.data import ByteTokenizer, Corpus, publish_tokenizer
from moe_jax.runtime.files import copy_tree, is_remote, new_folder, sha256_of
from moe_jax.runtime.workdir import TOKENIZER


def has_another_tokenizer(workdir: Path, corpus: Corpus) -> bool:
    """Whether the workdir has a tokenizer of its own, and the corpus was made with another."""
    own = workdir / TOKENIZER / "tokenizer.json"
    return own.is_file() and sha256_of(own)[:16] not in corpus.tokenizer.name


def carry_tokenizer(config: Config, workdir: Path, corpus: Corpus) -> list[str]:
    """Copy the tokenizer of `init_from`, `branch_from` or the corpus into the workdir; a line if the corpus differs."""
    target = workdir / TOKENIZER
    source = workdir
    if config.init_from:
        source = workdir_of(config.init_from, "init_from")
    elif config.branch_from:
        source = workdir_of(branch_point(config)[0], "branch_from")
    if target.exists():
        return []
    differs = has_another_tokenizer(source, corpus)
    from_source = (source / TOKENIZER).is_dir() and not differs
    if from_source or not isinstance(corpus.tokenizer, ByteTokenizer):
        with nullcontext(target) if is_remote(target) else new_folder(target) as partial:
            if from_source:
                copy_tree(source / TOKENIZER, partial)
            else:
                publish_tokenizer(config.data.path, corpus.tokenizer, partial)
    name = corpus.tokenizer.name
    if differs:
        return [f"the weights came with another tokenizer than {name!r}, that of the corpus, which is used now"]
    return []
