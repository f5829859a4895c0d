"""Local layers, which see a window, and global ones in one scan: each runs the program of its kind."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Bool

T = TypeVar("T")
Local = bool | Bool[Array, ""]  # whether a layer is local: an array where both kinds are in one scan
BY_KIND = "by_kind_of_layer"  # in the op_name of the conditionals, by which `planning` finds them


def by_kind(local: Local, compute: Callable[..., T], *arrays: Any) -> T:
    """`compute(local, *arrays)` with local as a bool; in a scan of both kinds a layer runs one of two programs."""
    if isinstance(local, bool):
        return compute(local, *arrays)
    with jax.named_scope(BY_KIND):
        return jax.lax.cond(local, functools.partial(compute, True), functools.partial(compute, False), *arrays)
