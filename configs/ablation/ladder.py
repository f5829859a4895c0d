"""Do experts pay, at equal FLOPs and at equal time? The small rungs of the ladder, with experts and dense.

Source: scaling laws of MoE (arXiv 2402.07871, 2507.17702) at far larger sizes; public reports that small MoE models
lose in wall-clock time.
Command: make corpus, then python -m experiments.ablate --config=configs/ablation/ladder.py --workdir=runs/ladder, and
  python -m experiments.ladder runs/ladder
Result: not run yet.
"""

from configs import ladder
from moe_jax.config import flatten

SIZES = ("0.05m", "0.1m", "0.2m", "0.4m")  # the last is predicted from the others
KINDS = {"moe": "", "dense": ",dense"}


def rung(arg):
    """A rung on the corpus of `make corpus`."""
    config = ladder.get_config(arg)
    config.data.path = "corpus/bytes"
    return config


def get_config(arg: str = ""):
    """The smallest rung; `arg` is unused."""
    return rung(SIZES[0])


def get_hyper(h):
    """Sizes x kinds, three paired seeds."""
    base = flatten(get_config().to_dict())
    arms = {}
    for size in SIZES:
        for kind, ending in KINDS.items():
            own = rung(size + ending).to_dict()
            keys = {"balance": own.pop("balance")} | flatten(own)
            arms[f"{kind}_{size}"] = {key: value for key, value in keys.items() if base.get(key) != value}
    return h.product(h.arms(**arms), h.sweep("seed", range(3)))
