"""The model without values: shape, dtype and named dimensions of every parameter."""

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_jax.config import ModelConfig, Part
from moe_jax.model.moe import RouterBias
from moe_jax.model.transformer import Transformer

Tree = Any  # a nested dict of arrays


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


class Dims:
    """A leaf's logical dimensions and its part of the model, wrapped so that trees treat them as one leaf."""

    def __init__(self, names: tuple[str, ...], part: Part) -> None:
        self.names = names
        self.part = part

    def __repr__(self) -> str:
        return f"Dims({', '.join(self.names)}; {self.part})"


def _dims_of(variable: nnx.Variable) -> Dims:
    metadata = variable.get_metadata()
    return Dims(metadata["dims"], metadata["part"])


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)
