"""The main sweep of the study: every arm of `trade_off`, `rules` and `scopes` on the same trunks; 8 hours on 2 cores.

Source: see the tables, which can also be run one by one.
Command: python -m experiments.ablate --config=configs/ablation/study.py --workdir=runs/study/arms --discard_weights
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches, rules, scopes, trade_off

FIRST = (  # trained first, because the most claims need them; a sweep trains arm by arm, on all trunks
    "bias",
    "aux_1e-2",
    "none",
    "aux_1e-1",
    "aux_1e-3",
    "aux_as_bias",
    "bias_1e-1",
    "frozen",
    "sequence_1e-1",
    "sign",
    "quantile",
    "flipped",
    "forced",
    "multiplicative",
    "two_sequences_1e-1",
    "aux_1e-4",
    "proportional",
    "rms",
    "pi",
    "smebu",
    "bias_1e-4",
)
_ALL = trade_off.ARMS | rules.ARMS | scopes.ARMS
ARMS = {name: _ALL[name] for name in (*FIRST, *_ALL)}


def get_config(arg: str = ""):
    """The model and schedule of `branches`; `arg` is unused."""
    return branches.get_config(arg)


def get_hyper(h):
    """All arms; an arm that two tables have is the same in both."""
    return branches.branched(h, ARMS)
