"""The systems of DeepSeekMoE's Table 1 with equal active parameters, dense to DeepSeekMoE, in whole runs.

An expert of Switch is as wide as a dense feed-forward layer, of GShard half as wide, and of DeepSeekMoE, with 4 of 16
routed and 1 shared, a fifth; the last three layers have experts. `loss_free` is DeepSeekMoE with the bias, and
`unbalanced` without balancing.
Source: DeepSeekMoE (arXiv 2401.06066), Table 1.
Command: python -m experiments.ablate --config=configs/ablation/systems.py --workdir=runs/systems
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches

AUX = {"aux_loss": dict(weight=1e-2)}
ONE_WIDE = {
    "model.num_experts": 8,
    "model.top_k": 1,
    "model.num_shared_experts": 0,
    "model.expert_ffw_dim": 240,
    "model.score": "softmax",
    "model.normalize_gates": False,
}
TWO_WIDE = ONE_WIDE | {"model.top_k": 2, "model.expert_ffw_dim": 120, "model.normalize_gates": True}


def get_config(arg: str = ""):
    """The model of `branches` and a schedule of its own; `arg` is unused."""
    return branches.whole()


def get_hyper(h):
    """Seven systems, three paired seeds."""
    arms = h.arms(
        dense={
            "measure_every": 0,
            "model.num_experts": 0,
            "model.num_shared_experts": 0,
            "model.ffw_dim": 244,
            "balance": {},
        },
        hash={**ONE_WIDE, "balance": dict(hash={})},
        switch={**ONE_WIDE, "balance": AUX},
        gshard={**TWO_WIDE, "balance": AUX},
        deepseek_moe={"balance": AUX},
        loss_free=branches.METHODS["bias"],
        unbalanced=branches.METHODS["none"],
    )
    return h.product(arms, h.sweep("seed", range(3)))
