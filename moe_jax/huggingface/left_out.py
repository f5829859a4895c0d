"""The tensors of a folder that are not read: modules that transformers does not read either, and indexers."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moe_jax.huggingface.family import Family, whole

INDEXER = ".self_attn.indexer."  # in the names of its tensors


class LeftOut(NamedTuple):
    """Names of tensors: of multi-token prediction, and of the indexers of attention to `index_topk` tokens."""

    ahead: frozenset[str] = frozenset()
    indexer: frozenset[str] = frozenset()
    index_topk: int = 0

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return self.ahead | self.indexer

    def sentences(self) -> Iterator[str]:
        """What is left out, and what follows; each behind "left out"."""
        if self.ahead:
            yield f"{len(self.ahead)} tensors of multi-token prediction, as in transformers"
        if self.indexer:
            yield (
                f"{len(self.indexer)} tensors of attention's indexer, which picks every token up to "
                f"index_topk={self.index_topk}; longer sequences are refused"
            )


def left_out(family: Family, hf: Mapping[str, Any], names: Mapping[str, Any]) -> LeftOut:
    """What of these tensors is left out, of a config.json that has been read."""
    depths = whole(hf, "num_nextn_predict_layers", 0) if family.leaves_out else 0
    first = hf["num_hidden_layers"]
    prefixes = tuple(family.leaves_out.format(first + depth) for depth in range(depths))
    ahead = frozenset(name for name in names if name.startswith(prefixes)) if depths else frozenset()
    indexer = frozenset(name for name in names if INDEXER in name) - ahead if family.has_indexer else frozenset()
    return LeftOut(ahead, indexer, hf["index_topk"] if family.has_indexer else 0)
