"""Benchmarks of our speed against the limit of the machine and against other projects on the same machine.

    python -m experiments.benchmarks.layer      one MoE layer, forward + backward, against peers and the limit
    python -m experiments.benchmarks.step       a whole train step against transformers on torch
    python -m experiments.benchmarks.scaling    cost against experts, skew, depth and devices
    python -m experiments.benchmarks.start      from the start of the process to the first step, cold and warm

Peers are optional and pinned; the output lists those that are absent:

    pip install torch==2.13.0 transformers==5.23.0 torchtitan==0.3.0 triton==3.9.0

Without a GPU, torch's build for CPU, `torch==2.13.0+cpu`, is a tenth of the size. `peers.INSTALL` has the command for
each peer, including MaxText. Contestants run in interleaved rounds after one uncounted round; a ratio is the median
over rounds, with the extremes. `--json=FILE` writes every time to a file.
"""
