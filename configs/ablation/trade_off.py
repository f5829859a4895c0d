"""Loss against balance: the auxiliary loss at weights and the bias at rates from 1e-4 to 1e-1, and controls.

`aux_as_bias` adjusts the weight of the auxiliary loss until its max violation in training is 0.22, as that of the bias
was in a trial run.
`frozen` no longer moves the bias of its trunk; on a trunk without a bias it must equal `none` bit for bit. `flipped`,
whose bias moves towards the load, must collapse. `forced` has the least possible max violation, whatever the loss.
Source: Loss-Free Balancing (arXiv 2408.15664), figures 2 and 4 and Table 2.
Command: python -m experiments.ablate --config=configs/ablation/trade_off.py --workdir=runs/trade_off
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches

ARMS = {
    **branches.METHODS,
    **{
        f"aux_{name}": {"balance": dict(aux_loss=dict(weight=weight))}
        for name, weight in {"1e-4": 1e-4, "1e-3": 1e-3, "1e-1": 1e-1}.items()
    },
    **{
        f"bias_{name}": {"balance": dict(bias_sign=dict(rate=rate))}
        for name, rate in {"1e-4": 1e-4, "1e-3": 1e-3, "3e-2": 3e-2, "1e-1": 1e-1}.items()
    },
    "aux_as_bias": {"balance": dict(aux_loss=dict(weight=1e-2), target_violation=dict(target=0.22))},
    "frozen": {"balance": dict(bias_sign=dict(rate=5e-3, freeze_step=branches.STEM))},
    "flipped": {"balance": dict(bias_sign=dict(rate=5e-3, flipped=True))},
    "forced": {"balance": dict(forced={})},
}


def get_config(arg: str = ""):
    """The model and schedule of `branches`; `arg` is unused."""
    return branches.get_config(arg)


def get_hyper(h):
    """Every arm on every trunk."""
    return branches.branched(h, ARMS)
