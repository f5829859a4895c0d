"""Does Muon change balance? AdamW, Muon, and Muon that also moves the router, under three ways of balancing.

Source: Moonlight (arXiv 2502.16982) trains a MoE with Muon and leaves the router to AdamW; it reports no balance.
Command: python -m experiments.ablate --config=configs/ablation/muon.py --workdir=runs/muon
Result: held-out max violation with AdamW, Muon, Muon with router: 2.75, 2.74, 2.13 (none), 0.13, 0.20, 0.20 (sign),
0.21, 0.24, 0.30 (aux). Resolved: only the router without balancing, -0.62 +- 0.42. More in experiments/LOG.md.
"""

from configs.ablation import demo

METHODS = {
    "none": {},
    "sign": dict(bias_sign=dict(rate=5e-3)),
    "aux": dict(aux_loss=dict(weight=1e-2)),
}
MATRICES = ("attention", "dense", "experts", "shared", "mtp")
OPTIMIZERS = {
    "adamw": {},
    "muon": {"optimizer.method": "muon"},
    "muon_router": {"optimizer.method": "muon", "optimizer.muon.parts": (*MATRICES, "router")},
}


def get_config(arg: str = ""):
    """The demo's model; `arg` is unused."""
    return demo.get_config(arg)


def get_hyper(h):
    """Methods x optimizers, three paired seeds."""
    arms = {
        f"{name}_{optimizer}": {"balance": balance} | options
        for name, balance in METHODS.items()
        for optimizer, options in OPTIMIZERS.items()
    }
    return h.product(h.arms(**arms), h.sweep("seed", range(3)))
