"""moe_jax: train Mixture-of-Experts transformers in JAX, and find out which way of balancing experts is best.

This file imports nothing, so that a mistake in a config is told in well under a second (jax takes two).
"""

__version__ = "0.1.0"
