"""Experiments: sweeps of runs, the report on a sweep, the table of balancing methods, and benchmarks."""

# imported first, so that the commands of this package also end on Ctrl-C with one line, even during their imports
import moe_jax  # noqa: F401
