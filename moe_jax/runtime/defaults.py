"""JAX's own rules of promotion and 32 bits, around code of others: what a user sets for theirs changes no number here.

Our own code names its dtypes and ranks, so that it is the same program under jax_enable_x64,
jax_numpy_dtype_promotion="strict" and jax_numpy_rank_promotion="raise"; optax, qwix and Pallas kernels are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def jax_defaults() -> Iterator[None]:
    """Trace what is called in here as without those three flags; for code that relies on them, and only for that."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
