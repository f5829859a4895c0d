"""The model without values: shape, dtype and named dimensions of every parameter."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig, Multipliers, Part
from moe_jax.mesh import is_expert_weight
from moe_jax.model.moe import RouterBias
from moe_jax.model.transformer import Transformer
from moe_jax.runtime.leaves import path_name

Tree = Any  # a nested dict of arrays
Read = Callable[[str, tuple[int, ...]], np.ndarray]  # (path of a leaf, index of its first axes) -> that slice
Write = Callable[[str, tuple[int, ...], np.ndarray], None]  # the same, and the slice's value


class AbstractModel(NamedTuple):
    """The model without values: its graph, and the shape, dtype and logical dimensions of each leaf."""

    graphdef: nnx.GraphDef
    params: Tree
    bias: Tree
    dims: Tree


@functools.lru_cache(maxsize=64)
def abstract_model(config: ModelConfig) -> AbstractModel:
    """The structure of a model; no array is allocated."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)  # type: ignore[misc]
    dims = jax.tree.map(_dims_of, params, is_leaf=_is_variable)
    return AbstractModel(graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(bias), nnx.to_pure_dict(dims))


def abstract_weights(config: ModelConfig) -> dict[str, Tree]:
    """Shapes and dtypes of parameters and bias, as checkpoints have them."""
    model = abstract_model(config)
    return {"params": model.params, "bias": model.bias}


def index_axes(config: ModelConfig) -> Callable[[str], int]:
    """leaf -> number of leading axes that index its slices: layer, and expert."""
    leaves = jax.tree_util.tree_leaves_with_path({"params": abstract_model(config).dims})
    dims = {path_name(path): dim.names for path, dim in leaves}

    def axes(leaf: str) -> int:
        if not leaf.startswith(("params/stacks/", "params/mtp/", "bias/")):
            return 0
        return 2 if is_expert_weight(dims.get(leaf, ())) else 1

    return axes


class Dims:
    """A leaf's logical dimensions, its part of the model and its multipliers, wrapped so that trees see one leaf."""

    def __init__(self, names: tuple[str, ...], part: Part, multipliers: Multipliers = Multipliers()) -> None:
        self.names = names
        self.part = part
        self.multipliers = multipliers

    def __repr__(self) -> str:
        return f"Dims({', '.join(self.names)}; {self.part})"


def _dims_of(variable: nnx.Variable) -> Dims:
    metadata = variable.get_metadata()
    return Dims(metadata["dims"], metadata["part"], metadata["multipliers"])


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)
