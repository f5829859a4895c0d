"""One hash of a whole state."""

import hashlib
from typing import Any

import jax
import numpy as np

from moe_jax.runtime.leaves import fields_of, path_name


def state_hash(state: Any) -> str:
    """sha256 over path, dtype, shape and bytes of every leaf: equal for equal states, bit by bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(fields_of(state)):
        array = np.asarray(leaf)
        digest.update(f"{path_name(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
