"""The design of the study's branched sweeps: one model, trunks under two methods, and the schedule of the branches.

A trunk is trained for 1000 steps at a constant learning rate; a branch trains on for 400 steps, in which the rate
decays to 0. Trunk and branch together have one `wsd` schedule. Every arm is measured on the trunks of both methods, so
that a trunk that suits its own method favours no one. `trade_off`, `rules` and `scopes` add arms.
Source: the comparison of Loss-Free Balancing (arXiv 2408.15664, Table 2), with branches in place of whole runs.
Command: python -m experiments.ablate --config=configs/ablation/branches.py --workdir=runs/branches
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import demo
from moe_jax.config import default

STEM = 1000  # steps of a trunk
STEPS = 1400  # of trunk and branch

STEADY = {"optimizer.schedule": "constant"}  # of a trunk

METHODS = {
    "bias": {"balance": dict(bias_sign=dict(rate=5e-3))},
    "aux_1e-2": {"balance": dict(aux_loss=dict(weight=1e-2))},
    "none": {"balance": {}},
}
TRUNKS = ("bias", "aux_1e-2")


def get_config(arg: str = ""):
    """The demo's model on the corpus of `make corpus`; `arg` is unused."""
    return default(
        num_steps=STEPS,
        batch_size=8,
        sequence_length=256,
        log_every=20,
        eval_every=STEPS,
        save_every=0,
        measure_every=100,
        model=demo.get_config().model.to_dict(),
        optimizer=dict(
            learning_rate=3e-3,
            schedule="wsd",
            warmup_steps=20,
            decay_fraction=(STEPS - STEM) / STEPS,
            end_ratio=0.0,
        ),
        data=dict(path="corpus/bytes", eval_sequences=200),
    )


def whole():
    """The same model and data in a run of its own, as long as a trunk, with its decay in the last 300 steps."""
    config = get_config()
    config.num_steps = config.eval_every = STEM
    config.optimizer.decay_fraction = 0.3
    return config


def branched(h, arms):
    """The arms x 3 data seeds, on the trunks of 2 methods x 4 seeds."""
    trunk = {"num_steps": STEM, "eval_every": STEM, **STEADY}
    methods = {name: METHODS[name] | trunk for name in TRUNKS}
    trunks = h.product(h.sweep("seed", range(4)), h.arms(**methods))
    return h.branches(trunks, h.product(h.arms(**arms), h.sweep("seed", range(3))), at=STEM)


def get_hyper(h):
    """The methods of the trunks, and none."""
    return branched(h, METHODS)
