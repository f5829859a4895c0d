"""Quantile balancing against the sign rule, with and without a sequence loss, at 2 numbers of experts x 2 batch sizes.

`--config=configs/ablation/quantile.py:64x8192` has 64 experts and 8192 tokens a step; the numbers of experts are 16 and
64, of tokens 2048 and 8192. All see the same number of tokens: with 8192 a step, there are a quarter of the steps.
Source: quantile balancing (Su, kexue.fm/archives/11619); Kimi K3 (arXiv 2607.24653); sign with a sequence loss as in
DeepSeek-V3 (2412.19437). No published comparison.
Command: python -m experiments.ablate --config=configs/ablation/quantile.py:64x8192 --workdir=runs/quantile_64x8192
Result: in the study's report, experiments/results/study.
"""

from configs.ablation import branches

SETTINGS = ("16x2048", "16x8192", "64x2048", "64x8192")
SEQUENCE = dict(weight=1e-4, scope="sequence")


def read(arg):
    """The number of experts, and by how much a step has more tokens than 2048."""
    if (arg or SETTINGS[0]) not in SETTINGS:
        raise ValueError(f"configs/ablation/quantile.py:{arg} must end in one of {', '.join(SETTINGS)}.")
    experts, tokens = map(int, (arg or SETTINGS[0]).split("x"))
    return experts, tokens // 2048


def get_config(arg: str = ""):
    """The model of `branches` with `arg`'s number of experts and tokens per step, such as 64x8192; empty: 16x2048."""
    experts, longer = read(arg)
    config = branches.get_config()
    config.batch_size *= longer
    config.num_steps //= longer
    config.eval_every = config.num_steps
    config.log_every = 5
    config.measure_every = 0
    config.model.num_experts = experts
    return config


def get_hyper(h, arg: str = ""):
    """Three arms on trunks of two of them: 3 trunk seeds x 3 data seeds."""
    at = branches.STEM // read(arg)[1]
    arms = {
        "sign": {"balance": dict(bias_sign=dict(rate=5e-3))},
        "sign_sequence": {"balance": dict(bias_sign=dict(rate=5e-3), aux_loss=SEQUENCE)},
        "quantile": {"balance": dict(quantile={})},
    }
    trunk = {"num_steps": at, "eval_every": at, **branches.STEADY}
    methods = {name: arms[name] | trunk for name in ("sign_sequence", "quantile")}
    trunks = h.product(h.sweep("seed", range(3)), h.arms(**methods))
    return h.branches(trunks, h.product(h.arms(**arms), h.sweep("seed", range(3))), at=at)
