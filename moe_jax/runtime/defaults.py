"""JAX's default promotion and 32 bits around other libraries' code, so that a user's settings change no number here.

Our own code states its dtypes and ranks, so it is the same program under jax_enable_x64,
jax_numpy_dtype_promotion="strict" and jax_numpy_rank_promotion="raise"; optax, qwix and Pallas kernels do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def jax_defaults() -> Iterator[None]:
    """Trace the code in this block with the defaults of those three flags, for code that relies on them."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
