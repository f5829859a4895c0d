"""Expert choice sees the future: its loss in training against held-out text, where every token is routed alone.

Source: Loss-Free Balancing (arXiv 2408.15664), section 5.2 and appendix D, on Expert Choice (2202.09368).
Command: python -m experiments.ablate --config=configs/ablation/leak.py --workdir=runs/leak
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches


def get_config(arg: str = ""):
    """The model of `branches` and a schedule of its own; `arg` is unused."""
    return branches.whole()


def get_hyper(h):
    """The bias, and expert choice among the tokens of a sequence and of a batch; three paired seeds."""
    arms = h.arms(
        bias=branches.METHODS["bias"],
        expert_choice_sequence={"balance": dict(expert_choice=dict(scope="sequence"))},
        expert_choice_batch={"balance": dict(expert_choice=dict(scope="microbatch"))},
    )
    return h.product(arms, h.sweep("seed", range(3)))
