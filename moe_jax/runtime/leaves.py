"""The leaves of a state: their names, shapes and dtypes, and whether their numbers are finite."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def describe_leaves(state: Any) -> dict[str, list[Any]]:
    """path -> [shape, dtype] of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(_as_dict(state))
    return {path_name(path): [list(a.shape), str(a.dtype)] for path, a in leaves}


def compare_leaves(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], most: int = 8) -> None:
    """Refuse a checkpoint of another shape or kind, with the list of differences.

    Orbax would cast dtypes silently, and load 16 layers into 12.
    """
    names = [n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n)]
    names.sort(key=lambda n: (not n.startswith("params/"), n))  # moments differ wherever parameters do
    if not names:
        return
    lines = [f"  {n}: saved {_leaf(saved.get(n))}, wanted {_leaf(wanted.get(n))}" for n in names[:most]]
    more = f"\n  and {len(names) - most} more" if len(names) > most else ""
    raise ValueError(
        f"{path} holds another state than this config makes ({len(names)} leaves differ); "
        "use the config it was trained with, or another workdir:\n" + "\n".join(lines) + more
    )


def first_non_finite(state: Any) -> str | None:
    """The path of the first leaf with a NaN or an infinity, None if there is none: the same in all processes."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(_as_dict(state))}
    leaves = {name: leaf for name, leaf in leaves.items() if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)}
    if not leaves:
        return None
    sharding: Any = getattr(next(iter(leaves.values())), "sharding", None)
    on_mesh = isinstance(sharding, jax.sharding.NamedSharding)
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()) if on_mesh else None
    finite = jax.device_get(jax.jit(_are_finite, out_shardings=everywhere)(list(leaves.values())))
    return next((name for name, good in zip(leaves, finite, strict=True) if not good), None)


def _are_finite(leaves: list[jax.Array]) -> jax.Array:
    return jax.numpy.stack([jax.numpy.isfinite(leaf).all() for leaf in leaves])


def state_hash(state: Any) -> str:
    """sha256 over path, dtype, shape and bytes of every leaf: equal for equal states, bit by bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(_as_dict(state)):
        array = np.asarray(leaf)
        digest.update(f"{path_name(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _as_dict(state: Any) -> dict[str, Any]:
    return state._asdict() if hasattr(state, "_asdict") else dict(state)


def path_name(path: tuple[Any, ...]) -> str:
    """What a leaf is called: the keys that lead to it, with slashes."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(p) for p in parts)


def _leaf(described: Any) -> str:
    return "nothing" if described is None else f"{described[1]}{described[0]}"
