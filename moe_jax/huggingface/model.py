"""A published model as an object: `load_hf`, `save_hf`, and logits from token ids."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from moe_jax import balance
from moe_jax.config import ModelConfig, check_length
from moe_jax.huggingface.weights import export, fill, open_hf
from moe_jax.model.abstract import Tree, abstract_model, abstract_weights
from moe_jax.model.forward import Inputs, Pass, PerLayer
from moe_jax.runtime.files import new_folder
from moe_jax.runtime.leaves import path_name


@dataclass(frozen=True)
class LanguageModel:
    """A model with its weights, to be called on tokens. `folder` has its tokenizer files, if there are any."""

    config: ModelConfig
    params: Tree
    bias: Tree
    folder: Path | None = None

    def __call__(
        self,
        tokens: Int32[Array, "batch seq"],
        segment_ids: Int32[Array, "batch seq"] | None = None,
        positions: Int32[Array, "batch seq"] | None = None,
    ) -> Float32[Array, "batch seq vocab"]:
        """Next-token logits. Dropless.

        Args:
            tokens: int32 [B, S].
            segment_ids: int32 [B, S], the document of each token, whose tokens are contiguous; 0 is padding. None:
                every row is one document.
            positions: int32 [B, S], place in the document; None: counted from each document's first token.
        """
        return self._run(tokens, segment_ids, positions)[0]

    def ahead(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """Logits float32 [K, B, S, V] of multi-token prediction: depth k at place i predicts token i + k + 1."""
        found = self._run(tokens, segment_ids, positions)[1]
        if found is None:
            raise ValueError("model.mtp_depth=0: this model has no multi-token prediction; load one that has.")
        return found

    def expert_ids(self, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None) -> Array:
        """The experts of every token, int32 [L, B, S, K]; E where there is none."""
        ids = self._run(tokens, segment_ids, positions)[2]
        return ids.reshape(ids.shape[0], *jnp.shape(tokens), -1)

    def _run(self, tokens: Array, segment_ids: Array | None, positions: Array | None) -> tuple[Array, Any, Any]:
        tokens = jnp.asarray(tokens, jnp.int32)
        check_length(self.config, tokens.shape[1], "tokens of a row")
        segments = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        places = positions_in(segments) if positions is None else jnp.asarray(positions, jnp.int32)
        return _forward(self.config)(self.params, self.bias, Inputs(tokens, places, segments))


def positions_in(segment_ids: Int32[Array, "batch seq"]) -> Int32[Array, "batch seq"]:
    """Each token's place in its document, from 0."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


@functools.lru_cache(maxsize=16)
def _forward(config: ModelConfig) -> Callable[..., tuple[Array, Any, Any]]:
    graphdef, balancer = abstract_model(config).graphdef, balance.make({}, config)

    def forward(params: Tree, bias: Tree, inputs: Inputs) -> tuple[Array, Any, Any]:
        model = nnx.merge(graphdef, params, bias)
        x, ahead, report, _ = model.before_head(Pass(inputs, balancer, PerLayer({}), jax.random.key(0)))
        ids = None if report is None else report.details.routing.expert_ids
        return model.logits(x), None if ahead is None else model.logits(ahead), ids

    return jax.jit(forward)


def load_hf(folder: str | Path, dtype: str | None = None) -> LanguageModel:
    """Load a model from a folder with config.json and *.safetensors.

    Args:
        folder: as transformers writes and reads it; no code in it is run. Hy3's module of multi-token prediction, which
            transformers does not read, is left out.
        dtype: "float32" or "bfloat16" for parameters and computation; None: as stored (float16 as float32, because only
            that loses nothing; DeepSeek's float8 as bfloat16). Router and bias are always float32.

    Raises:
        ValueError: a config, a file or a tensor is not as it must be; the first one is named.
    """
    source = open_hf(Path(folder), dtype)
    abstract = abstract_weights(source.config)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    values = {path_name(path): np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves}

    def write(leaf: str, index: tuple[int, ...], value: np.ndarray) -> None:
        values[leaf][index] = value

    for _ in fill(source, write):
        pass
    tree = jax.tree.unflatten(structure, [jnp.asarray(values.pop(path_name(path))) for path, _ in leaves])
    return LanguageModel(source.config, tree["params"], tree["bias"], Path(folder))


def save_hf(
    model: LanguageModel,
    folder: str | Path,
    *,
    architecture: str = "",
    dtype: str | None = None,
    max_length: int = 4096,
) -> None:
    """Write a model as a folder for transformers and vLLM; the inverse of `load_hf`.

    What affects training only (router jitter, quantised training, remat) is not written.

    Args:
        model: from `load_hf`, or built from a config, parameters and bias.
        folder: new or empty; appears whole or not at all.
        architecture: "DeepseekV3ForCausalLM", for example; "": the family that the model came from, or else the only
            one that holds such a model.
        dtype: "float32" or "bfloat16" for all tensors but the bias; None: that of the parameters, and for routers the
            narrowest that loses nothing.
        max_length: written as max_position_embeddings if the original model had none.

    Raises:
        ValueError: no family, or not the named one, holds such a model, or several do; or the folder is not empty.
    """
    leaves = jax.tree_util.tree_leaves_with_path({"params": model.params, "bias": model.bias})
    values = {path_name(path): leaf for path, leaf in leaves}
    with new_folder(Path(folder)) as partial:
        for _ in export(
            model.config,
            lambda leaf, index: np.asarray(values[leaf][index]),
            partial,
            architecture=architecture,
            dtype=dtype,
            carried=model.folder,
            max_length=max_length,
        ):
            pass
