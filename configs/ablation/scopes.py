"""The scope of the auxiliary loss: a sequence or two, against the batch of 8 sequences of the other tables.

Source: DeepSeek-V3 (arXiv 2412.19437) section 4.5.3, and Qwen's global-batch loss (2501.11873).
Command: python -m experiments.ablate --config=configs/ablation/scopes.py --workdir=runs/scopes
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches

ARMS = {
    "bias": branches.METHODS["bias"],
    "aux_1e-2": branches.METHODS["aux_1e-2"],
    "aux_1e-1": {"balance": dict(aux_loss=dict(weight=1e-1))},
    "sequence_1e-2": {"balance": dict(aux_loss=dict(weight=1e-2, scope="sequence"))},
    "sequence_1e-1": {"balance": dict(aux_loss=dict(weight=1e-1, scope="sequence"))},
    "two_sequences_1e-1": {"balance": dict(aux_loss=dict(weight=1e-1)), "micro_batches": 4},
}


def get_config(arg: str = ""):
    """The model and schedule of `branches`; `arg` is unused."""
    return branches.get_config(arg)


def get_hyper(h):
    """Every scope on every trunk."""
    return branches.branched(h, ARMS)
