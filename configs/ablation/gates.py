"""The gate's score, sigmoid or softmax, under the auxiliary loss and under the bias: whole runs.

Source: Loss-Free Balancing (arXiv 2408.15664), Tables 5 and 6: softmax does as well as sigmoid.
Command: python -m experiments.ablate --config=configs/ablation/gates.py --workdir=runs/gates
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches

# softmax scores of 16 experts are about 8 times smaller, and so is the rate; the paper's rule for them is proportional
BIASES = {"sigmoid": dict(bias_sign=dict(rate=5e-3)), "softmax": dict(bias_proportional=dict(rate=4e-3))}


def get_config(arg: str = ""):
    """The model of `branches` and a schedule of its own; `arg` is unused."""
    return branches.whole()


def get_hyper(h):
    """Two scores x two methods, three paired seeds."""
    arms = {}
    for score, bias in BIASES.items():
        arms[f"{score}_bias"] = {"model.score": score, "balance": bias}
        arms[f"{score}_aux"] = {"model.score": score, "balance": dict(aux_loss=dict(weight=1e-2))}
    return h.product(h.arms(**arms), h.sweep("seed", range(3)))
