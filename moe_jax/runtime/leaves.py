"""The leaves of a state: their names, shapes and dtypes, and whether their numbers are finite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax


def describe_leaves(state: Any) -> dict[str, list[Any]]:
    """path -> [shape, dtype] of every leaf of a state."""
    leaves = jax.tree_util.tree_leaves_with_path(fields_of(state))
    return {path_name(path): [list(a.shape), str(a.dtype)] for path, a in leaves}


def compare_leaves(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], most: int = 8) -> None:
    """Raise a ValueError with the differences if the leaves of a checkpoint are not those that are wanted.

    Orbax would cast dtypes silently, and load 16 layers into 12.
    """
    names = [n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n)]
    names.sort(key=lambda n: (not n.startswith("params/"), n))  # moments differ wherever parameters do
    if not names:
        return
    lines = [f"  {n}: saved {leaf_text(saved.get(n))}, wanted {leaf_text(wanted.get(n))}" for n in names[:most]]
    more = f"\n  and {len(names) - most} more" if len(names) > most else ""
    raise ValueError(
        f"{path} holds another state than this config creates ({len(names)} leaves differ); "
        "use the config it was trained with, or another workdir:\n" + "\n".join(lines) + more
    )


def first_non_finite(state: Any) -> str | None:
    """The path of the first leaf with a NaN or an infinity; None if all are finite. The same in all processes."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fields_of(state))}
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


def fields_of(state: Any) -> dict[str, Any]:
    """A state's fields by name, whether it is a NamedTuple or a mapping, without those that are None."""
    fields = state._asdict() if hasattr(state, "_asdict") else dict(state)
    return {name: value for name, value in fields.items() if value is not None}


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: the keys that lead to it, joined by slashes."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(p) for p in parts)


def leaf_text(described: Any) -> str:
    """A leaf in a message, as "float32[2, 4]"; "nothing" where there is none."""
    return "nothing" if described is None else f"{described[1]}{described[0]}"
