"""Rules that move the bias, each at a rate chosen by the simulator.

A branch of a trunk with the bias recorded its router's scores (`record_scores_every=5`), and `moe_jax.simulate
--scores` replayed them under every rule at rates a factor of 2 to 3 apart. The rate is the largest whose final max
violation, the mean over the layers, is within 2 % of the rule's best: balance as good, reached the fastest.
Source: Loss-Free Balancing (arXiv 2408.15664, Tables 3 and 4): sign and proportional, added and multiplied;
bias_rms (Su, kexue.fm/archives/10757), bias_pi (LongCat-Flash, 2509.01322), bias_smebu (Trinity, 2602.17004) and
quantile (Su, kexue.fm/archives/11619).
Command: python -m experiments.ablate --config=configs/ablation/rules.py --workdir=runs/rules
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches

RULES = {
    "sign": dict(bias_sign=dict(rate=2e-3)),
    "proportional": dict(bias_proportional=dict(rate=3e-2)),
    "rms": dict(bias_rms=dict(rate=2e-3)),
    "pi": dict(bias_pi=dict(rate=3e-1)),
    "smebu": dict(bias_smebu=dict(rate=1e-2)),
    "quantile": dict(quantile=dict(damping=0.3)),
    "multiplicative": dict(bias_multiplicative=dict(rate=3e-2)),
}
ARMS = {"bias": branches.METHODS["bias"]} | {name: {"balance": balance} for name, balance in RULES.items()}


def get_config(arg: str = ""):
    """The model and schedule of `branches`; `arg` is unused."""
    return branches.get_config(arg)


def get_hyper(h):
    """Every rule on every trunk."""
    return branches.branched(h, ARMS)
