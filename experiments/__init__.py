"""Experiments: sweeps of runs, and the report that turns them into a claim with intervals and pictures."""

# a command of this package, too, answers Ctrl-C in one line from its first import on
import moe_jax  # noqa: F401
