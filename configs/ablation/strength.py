"""How strong should balancing be? The demo's model with several rates of the bias and weights of the auxiliary loss.

Source: Loss-Free Balancing (arXiv 2408.15664), figures 2 and 4, in miniature.
Command: python -m experiments.ablate --config=configs/ablation/strength.py --workdir=runs/strength
Result: held-out max violation 2.7 without balancing; 2.0, 0.1 and 0.4 at the rates 1e-3, 5e-3 and 3e-2; from 0.8 to 0.2
at weights from 1e-3 to 1e-1. The table is in experiments/LOG.md.
"""

from configs.ablation import demo


def get_config(arg: str = ""):
    """The demo's model; `arg` is unused."""
    return demo.get_config(arg)


def get_hyper(h):
    """Four rates, four weights, and no balancing; one seed, which shows only orders of magnitude."""
    bias = {f"bias_{rate:g}": {"balance": dict(bias_sign=dict(rate=rate))} for rate in (1e-3, 5e-3, 1e-2, 3e-2)}
    loss = {f"aux_{weight:g}": {"balance": dict(aux_loss=dict(weight=weight))} for weight in (1e-3, 1e-2, 3e-2, 1e-1)}
    return h.product(h.arms(none={"balance": {}}, **bias, **loss), h.sweep("seed", [0]))
