"""How fast should experts and router learn? Factors on the learning rate of each, and a router that never learns.

Source: no published table; whether experts, which see a share of the tokens, need another rate is an open question.
Command: python -m experiments.ablate --config=configs/ablation/expert_rate.py --workdir=runs/expert_rate
Result: held-out max violation 0.125 (plain), 0.168, 0.149, 0.168 (experts at 1/2, 2, 4 times the rate), 0.26 (router
at a tenth), 0.36 (frozen); a frozen router costs no loss that 3 seeds resolve. More in experiments/LOG.md.
"""

from configs.ablation import demo

GROUPS = {
    "plain": {},
    "experts_half": {"experts.learning_rate": 0.5},
    "experts_double": {"experts.learning_rate": 2.0},
    "experts_quadruple": {"experts.learning_rate": 4.0},
    "router_tenth": {"router.learning_rate": 0.1},
    "router_frozen": {"router.frozen": True},
}


def get_config(arg: str = ""):
    """The demo's model; `arg` is unused."""
    return demo.get_config(arg)


def get_hyper(h):
    """Groups, all under the sign rule, three paired seeds."""
    sign = dict(bias_sign=dict(rate=5e-3))
    arms = {
        name: {"balance": sign} | {f"optimizer.groups.{key}": value for key, value in groups.items()}
        for name, groups in GROUPS.items()
    }
    return h.product(h.arms(**arms), h.sweep("seed", range(3)))
