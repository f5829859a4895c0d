"""Does balancing survive anticipatory routing? Three methods, each with experts chosen 0, 1, 4 and 16 steps before.

Source: DeepSeek-V4 (arXiv 2606.19348) section 4.2.3, which uses it after spikes of the loss. No published comparison.
Command: python -m experiments.ablate --config=configs/ablation/anticipation.py --workdir=runs/anticipation
Result: not run yet.
"""

from configs.ablation import demo

DELAYS = (0, 1, 4, 16)
METHODS = {
    "sign": dict(bias_sign=dict(rate=5e-3)),
    "quantile": dict(quantile={}),
    "aux": dict(aux_loss=dict(weight=1e-2)),
}


def get_config(arg: str = ""):
    """The demo's model; `arg` is unused."""
    return demo.get_config(arg)


def get_hyper(h):
    """Methods x delays, three paired seeds."""
    arms = {
        f"{name}_{delay}": {"balance": balance, "anticipation": dict(delay=delay)}
        for name, balance in METHODS.items()
        for delay in DELAYS
    }
    return h.product(h.arms(**arms), h.sweep("seed", range(3)))
