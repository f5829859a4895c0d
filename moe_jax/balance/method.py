"""What one method of balancing adds to a composition: the functions that it has, the others left out."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxtyping import Array, Bool, Float32, Int32


class Method(NamedTuple):
    """Each function sees one MoE layer, and only the method's own state and statistics (None where it has none).

    init: (num_experts, layer) -> own state, a pytree of arrays. E counts zero-computation experts too.
    observe: (Routing) -> own statistics, a pytree of arrays, ADDITIVE over micro-batches and shards.
    update_bias: (loads, own statistics, bias [E], own state, step) -> (bias, own state). The method owns the bias.
    update: (loads, own statistics, own state, step) -> own state, for methods that keep another state.
    initial_bias: where the bias starts. num_classes: how many biases there are, one for each class of tokens.
    combine: (scores, bias) -> biased scores; their sum if None.
    select: (scores, biased scores, *, top_k, tokens, key, train, state) -> int32 [T, S]; id == E is an empty slot.
    inference: how a method that selects does so in evaluation: the "same", or by biased "top_k".
    by_token: whether a token's experts in evaluation depend on that token alone, not on which others are with it.
    drop: (routing, key, train, own state) -> bool [T, S], the copies that travel.
    loss: (routing, loads of the step, own statistics of the step, own state, router_weight [D, E]) -> float32 [].
    factor: (own state) -> float32 [], times the loss labelled `controls`.
    """

    init: Callable[[int, Any], Any] = lambda num_experts, layer: None
    observe: Callable[..., Any] = lambda routing: None
    update_bias: Callable[..., tuple[Float32[Array, "..."], Any]] | None = None
    update: Callable[..., Any] | None = None
    initial_bias: float = 0.0
    num_classes: int = 1
    combine: Callable[[Array, Array], Array] | None = None
    select: Callable[..., Int32[Array, "tokens slots"]] | None = None
    inference: Literal["same", "top_k"] = "same"
    by_token: bool = True
    drop: Callable[..., Bool[Array, "tokens slots"]] | None = None
    loss: Callable[..., Float32[Array, ""]] | None = None
    factor: Callable[[Any], Float32[Array, ""]] | None = None
    controls: str = ""
