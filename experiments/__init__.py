"""Experiments: sweeps of runs, and the report that turns them into a claim with intervals and pictures."""
