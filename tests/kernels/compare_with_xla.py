"""Compares every C++ kernel with XLA, values and gradients; a test runs it with the flags of other processors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.dispatch import ExpertWeights
from moe_jax.dispatch.experts import in_cpp, in_xla
from moe_jax.kernels import native
from moe_jax.kernels.activation import SWIGLU, Activation
from moe_jax.kernels.attention import attend
from moe_jax.kernels.head import summed_nats

draw = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)


def compare(ours, theirs, *arguments):
    """In float32, and ours in bfloat16 with theirs in float32."""

    def run(function, *arguments):
        def total(*arguments):
            return jnp.cos(function(*arguments).astype(jnp.float32)).sum()

        return jax.tree.leaves(jax.value_and_grad(total, tuple(range(len(arguments))))(*arguments))

    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arguments)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    for one, other in zip(run(ours, *arguments), run(theirs, *arguments), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(run(ours, *narrow), run(theirs, *rounded), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=2**-4 * float(jnp.abs(other).max()))


def main():
    assert native.missing() is None, native.missing()

    ids = jnp.asarray(draw.integers(0, 4, (70, 2)), jnp.int32)
    gates = jnp.asarray(draw.random((70, 2)), jnp.float32)
    weights = ExpertWeights(array(3, 19, 7) / 4, array(3, 19, 7) / 4, array(3, 7, 19) / 4)
    # with these numbers no value is so near to the limit that rounding moves it across, where the gradient jumps
    biased = weights._replace(gate_bias=array(3, 7) / 4, up_bias=array(3, 7) / 4, down_bias=array(3, 19) / 4)
    for activation, w in (
        (SWIGLU, weights),
        (Activation(alpha=1.5, beta=0.1, shift=1.0, limit=3.0), biased),
        (Activation(gated=0.0), weights._replace(gate=None, down_bias=biased.down_bias)),
    ):
        both = in_cpp(activation).routed, in_xla(activation).routed
        compare(*(lambda x, w, f=f: f(x, ids, gates, w) for f in both), array(70, 19), w)

    segments = jnp.asarray(np.repeat([[1, 2]], 50, 1), jnp.int32)
    attention = (functools.partial(attend, segment_ids=segments, cpu_kernel=kind) for kind in ("native", "xla"))
    compare(*attention, array(1, 100, 4, 19), array(1, 100, 2, 19), array(1, 100, 2, 7))

    targets = jnp.asarray(draw.integers(0, 37, (1, 70)), jnp.int32)
    heads = (lambda x, w, k=k: summed_nats(x, w, targets, targets > 3, k) / 70 for k in ("native", "xla"))
    compare(*heads, array(1, 70, 19) / 4, array(19, 37))


if __name__ == "__main__":
    main()
