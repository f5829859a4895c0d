"""The weights of a trained model become those of one with experts, or with more experts.

Every feed-forward layer becomes copies x slices experts: a slice is a part of the hidden units, so that all slices
together are the layer. The layer is that of a dense model, or each expert of a model with experts. Where the config
has shared experts and the dense model none, these are its first hidden units, and the slices divide the rest.

`down` of the experts is multiplied so that a router whose logits are all equal leaves the size of the output as it was.
With normalised gates the model then computes what it did, if a token's experts are whole copies of the layer
(`changes`).

Source: sparse upcycling (arXiv 2212.05055); slices, routers grouped by copy, and weight scaling (2410.07524);
re-initialisation of hidden units (2502.19261); more experts from experts (2604.19835).

Legend: E experts, D embed, F hidden units of an expert.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np

from moe_jax.config import DISPATCHERS, Config, ModelConfig, as_dict, flatten, keys_that_change, shared_width
from moe_jax.config.multipliers import of_matrix
from moe_jax.kernels.weights import DIMS, ExpertWeights
from moe_jax.model.abstract import Read, abstract_weights
from moe_jax.model.block import Place, places
from moe_jax.runtime.leaves import path_name

# keys of the model that may change; every other key that changes what it computes must be the same
WITH_EXPERTS = {
    *("num_experts", "top_k", "expert_ffw_dim", "shared_ffw_dim", "normalize_gates", "gate_scale"),
    *("num_groups", "top_groups", "group_top", "router_jitter", "random_second", "dispatch", "quantization"),
    *("scaling.base_ffw_dim", "scaling.base_expert_ffw_dim", "scaling.base_shared_ffw_dim"),
}
FROM_DENSE = WITH_EXPERTS | {
    *("num_shared_experts", "first_dense", "moe_every", "score", "router_bias", "router_norm", "router_scale"),
    *("expert_scale", "expert_bias", "select_by", "class_starts", "sparsemixer"),
}
BY_EXPERT = ("router", "router_bias", "expert_scale", "bias")  # leaves with a number or a column for each expert
# the gate that a score gives to a logit of 0
AT_ZERO = {"sigmoid": 0.5, "sqrt_softplus": math.sqrt(math.log(2)), "relu": 0.0}


class Recipe(NamedTuple):
    """How experts begin to differ.

    router: "grouped" gives the slices of a copy the same column of the router, so that they are chosen together;
    "random" draws the router anew. noise: standard deviation, relative to the root mean square of the router, of what
    is added to columns that are copied from a router; equal columns would get equal gradients. reinit: share of every
    expert's hidden units that are drawn anew, with mean and deviation of the weights they replace. seed: of all draws.
    """

    router: Literal["grouped", "random"] = "grouped"
    noise: float = 0.01
    reinit: float = 0.0
    seed: int = 0


class Plan(NamedTuple):
    """How the experts are made; expert (copy x originals + original) x slices + slice is a slice of an original.

    originals: experts of the source, 1 for a dense layer. first: hidden units that shared experts take before the
    slices. scale: factor of `down`.
    """

    originals: int
    copies: int
    slices: int
    first: int
    scale: float


def check_recipe(recipe: Recipe) -> None:
    """Raise a ValueError if a number is out of range."""
    if not 0 <= recipe.reinit <= 1:
        raise ValueError(f"--reinit={recipe.reinit} must be a share from 0 to 1; Drop-Upcycling has 0.5.")
    if not 0 <= recipe.noise < math.inf:
        raise ValueError(f"--noise={recipe.noise} must be a finite number of at least 0; try 0.01.")
    if recipe.seed < 0:
        raise ValueError(f"--seed={recipe.seed} must be at least 0.")


def plan(source: ModelConfig, target: ModelConfig) -> Plan:
    """How the target's experts are made of the source's layers.

    Raises:
        ValueError: the models differ in more than their experts, or the numbers do not divide.
    """
    if not target.num_experts:
        raise ValueError("model.num_experts=0 must be above 0 in --config, which describes the model to make; set it.")
    _refuse_other_model(source, target)
    originals = source.num_experts or 1
    first = 0 if source.num_experts else shared_width(target)
    width = source.expert_ffw_dim if source.num_experts else source.ffw_dim
    slices, left = divmod(width - first, target.expert_ffw_dim)
    if left or slices < 1:
        taken = f" less {first} of the shared experts" if first else ""
        raise ValueError(
            f"model.expert_ffw_dim={target.expert_ffw_dim} must divide the width of the layer in --input, "
            f"{width}{taken}; set {max(1, width - first)}, or a divisor."
        )
    copies, left = divmod(target.num_experts, originals * slices)
    if left or copies < 1:
        one = f"{originals} experts" if source.num_experts else "a dense layer"
        raise ValueError(
            f"model.num_experts={target.num_experts} must be a multiple of {originals * slices}, which {one} in "
            f"{slices} slices make; set one, or another model.expert_ffw_dim."
        )
    before = _sum_of_gates(source) if source.num_experts else 1.0
    return Plan(originals, copies, slices, first, slices * before / _sum_of_gates(target))


def _refuse_other_model(source: ModelConfig, target: ModelConfig) -> None:
    there, here = (_plain(model) for model in (source, target))
    free = WITH_EXPERTS if source.num_experts else FROM_DENSE
    binding = {key.removeprefix("model.") for key in keys_that_change("model") if key.startswith("model.")} - free
    changed = [key for key in there if key in binding and there[key] != here[key]]
    if changed:
        said = ", ".join(f"model.{key}={here[key]!r} (there {there[key]!r})" for key in changed)
        raise ValueError(f"--config has another model than --input in {said}; set what it has there.")
    if source.num_experts and shared_width(source) != shared_width(target):
        raise ValueError(
            f"model.shared_ffw_dim={target.shared_ffw_dim} must leave the shared experts as wide as in --input; set "
            f"{source.shared_ffw_dim or source.expert_ffw_dim}."
        )
    if target.num_zero_experts or target.gate_on == "input":
        raise ValueError(
            f"model.num_zero_experts={target.num_zero_experts} and model.gate_on={target.gate_on!r} must be 0 and "
            "'output', because experts are multiplied by a factor of their output; a model with others is not upcycled."
        )
    if target.score == "relu" and not (target.normalize_gates and source.num_experts):
        raise ValueError("model.score='relu' gives a new router's gates of 0, so nothing can be scaled; use another.")


def _plain(model: ModelConfig) -> dict[str, object]:
    return flatten(as_dict(Config(model=model))["model"])


def _sum_of_gates(model: ModelConfig) -> float:
    """The sum of a token's gates if all logits are 0."""
    if model.normalize_gates:
        return model.gate_scale
    if model.sparsemixer:
        return model.gate_scale * sum(1 / (model.num_experts - place) for place in range(model.top_k))
    each = 1 / model.num_experts if model.score == "softmax" else AT_ZERO[model.score]
    return model.gate_scale * model.top_k * each


def changes(source: ModelConfig, target: ModelConfig, recipe: Recipe) -> list[str]:
    """Why the target computes something else than the source, apart from rounding; empty if it does not."""
    how = plan(source, target)
    found = []
    if recipe.reinit:
        found.append(f"--reinit={recipe.reinit} draws hidden units anew")
    if recipe.router == "random" and (source.num_experts or how.slices > 1):
        found.append("--router=random chooses other experts")
    if source.num_experts:
        whole = how.slices * how.copies * source.top_k
        if target.top_k != whole:
            found.append(f"model.top_k={target.top_k} is not {whole}, all copies and slices of {source.top_k} experts")
        if how.copies > 1 and recipe.noise:
            found.append(f"--noise={recipe.noise} changes the router")
        if target.sparsemixer and how.copies * how.slices > 1:
            found.append(f"model.sparsemixer={target.sparsemixer} has gates that an expert's copies share")
        if source.normalize_gates != target.normalize_gates:
            found.append("model.normalize_gates changes the gates")
    else:
        if target.top_k % how.slices:
            found.append(f"model.top_k={target.top_k} is no multiple of the {how.slices} slices of a layer")
        if not target.normalize_gates:
            found.append("model.normalize_gates=False leaves gates that sum to anything")
    sizes = sorted((how.slices, target.num_experts // target.num_groups))
    if target.num_groups > 1 and (source.num_experts or sizes[1] % sizes[0]):
        found.append(f"model.num_groups={target.num_groups} limits the choice")
    if not DISPATCHERS[target.dispatch].dropless:
        found.append(f"model.dispatch={target.dispatch!r} drops tokens")
    return found


# --- the weights ----------------------------------------------------------------------------------------------

Slices = Iterator[tuple[str, tuple[int, ...], np.ndarray]]  # (path of a leaf, index of its first axes, value)


def upcycled(source: ModelConfig, target: ModelConfig, read: Read, recipe: Recipe) -> Slices:
    """Every leaf of the target, slice by slice.

    Args:
        source: the trained model.
        target: the model with more experts.
        read: reads a slice of the source's weights.
        recipe: how experts begin to differ.

    Raises:
        ValueError: as `plan` and `check_recipe`.
    """
    check_recipe(recipe)
    how = plan(source, target)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_weights(target))
    dtypes = {path_name(path): leaf.dtype for path, leaf in leaves}
    layers = list(zip(places(source), places(target), strict=True))
    inside = tuple({f"{tree}/{here.path}" for _, here in layers for tree in ("params", "bias")})
    for leaf in (leaf for leaf in dtypes if not leaf.startswith(inside)):
        yield leaf, (), read(leaf, ()).astype(dtypes[leaf])
    for number, (there, here) in enumerate(layers):
        made = _Layer(target, how, recipe, there, number, read)
        for tree in ("params", "bias"):
            prefix = f"{tree}/{here.path}"
            for leaf in (leaf for leaf in dtypes if leaf.startswith(prefix)):
                for index, value in made.slices(tree, leaf.removeprefix(prefix), here.kind):
                    yield leaf, (here.repeat, *index), value.astype(dtypes[leaf])


class _Layer(NamedTuple):
    """One layer of the target, number `number`, made of that at `there` in the source."""

    target: ModelConfig
    how: Plan
    recipe: Recipe
    there: Place
    number: int
    read: Read

    def slices(self, tree: str, name: str, kind: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """The slices of a leaf, by its name within the layer: the index of the expert, if any, and the value."""
        own = name.removeprefix("ffw/")
        from_dense = self.there.kind == "dense"
        if kind == "dense" or own == name:
            yield (), self._there(tree, name)
        elif own in ExpertWeights._fields:
            yield from self._experts(own)
        elif own in BY_EXPERT:
            yield (), self._by_expert(tree, own)
        elif own.startswith("shared/") and from_dense:
            matrix = own.removeprefix("shared/")
            whole = self._there(tree, f"ffw/{matrix}")
            yield (), np.take(whole, range(self.how.first), DIMS[matrix].index("ffw") - 1)
        elif from_dense:
            yield (), np.ones(self.target.embed_dim)  # the scale of the router's norm
        else:
            yield (), self._there(tree, name)

    def _there(self, tree: str, name: str, *index: int) -> np.ndarray:
        """A leaf of the source's layer, float32."""
        return self.read(f"{tree}/{self.there.path}{name}", (self.there.repeat, *index)).astype(np.float32)

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng((self.recipe.seed, self.number, *what))

    def _experts(self, name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """A matrix or a bias of every expert; each original is read once."""
        how, width = self.how, self.target.expert_ffw_dim
        from_dense = self.there.kind == "dense"
        for original in range(how.originals):
            if from_dense and name.endswith("_bias"):
                whole = np.zeros(self.target.embed_dim if name == "down_bias" else how.first + how.slices * width)
            else:
                whole = self._there("params", f"ffw/{name}", *(() if from_dense else (original,)))
            for copy, part in itertools.product(range(how.copies), range(how.slices)):
                expert = (copy * how.originals + original) * how.slices + part
                yield (expert,), self._expert(name, whole, expert, part)

    def _expert(self, name: str, whole: np.ndarray, expert: int, part: int) -> np.ndarray:
        """A matrix or a bias of one expert, a slice of the original's."""
        how, width = self.how, self.target.expert_ffw_dim
        if name == "down_bias":
            return whole * (how.scale / how.slices)  # every slice adds it
        axis = DIMS[name].index("ffw") - 1  # without the axis of experts
        start = how.first + part * width
        value = np.take(whole, range(start, start + width), axis)
        value = self._with_new_units(value, name, axis, expert)
        return value * how.scale if name == "down" else value

    def _with_new_units(self, value: np.ndarray, name: str, axis: int, expert: int) -> np.ndarray:
        """The value with a share of the expert's hidden units drawn anew: the same ones in each of its matrices."""
        count = round(self.recipe.reinit * value.shape[axis])
        if not count:
            return value
        units = self._rng(expert).permutation(value.shape[axis])[:count]
        value = np.moveaxis(value, axis, 0)
        old = value[units]
        value[units] = self._rng(expert, 1 + ExpertWeights._fields.index(name)).normal(old.mean(), old.std(), old.shape)
        return np.moveaxis(value, 0, axis)

    def _by_expert(self, tree: str, name: str) -> np.ndarray:
        """A leaf whose last axis is that of the experts: the router's weight and bias, scales, and selection bias."""
        how, target, rng = self.how, self.target, self._rng(0, 0)
        if name == "router" and (self.there.kind == "dense" or self.recipe.router == "random"):
            count = target.num_experts // (how.slices if self.recipe.router == "grouped" else 1)
            dims = dict(embed=target.embed_dim, experts=target.num_experts)
            std = target.init_std * of_matrix(target, "router", dims).std
            columns = rng.normal(0, std, (target.embed_dim, count))
            return np.repeat(columns, target.num_experts // count, 1)
        if self.there.kind == "dense":
            classes = () if tree == "params" or not target.class_starts else (len(target.class_starts) + 1,)
            return np.full((*classes, target.num_experts), 1.0 if name == "expert_scale" else 0.0)
        value = np.concatenate([self._there(tree, f"ffw/{name}")] * how.copies, -1)
        if name == "router" and how.copies > 1 and self.recipe.noise:
            value += rng.normal(0, self.recipe.noise * np.sqrt((value**2).mean()), value.shape)
        if tree == "bias" and target.score == "softmax" and target.select_by == "scores":
            value = value / (how.copies * how.slices)  # as the scores that it is added to
        return np.repeat(value, how.slices, -1)
