"""Do the layer's options change balance? One option at a time beside the demo's layer, all under the sign rule.

Source: no published table; docs/models.md names the models that have each option.
Command: python -m experiments.ablate --config=configs/ablation/options.py --workdir=runs/options
Result: held-out max violation 0.11 to 0.17 for all but the selection by logits, which has 1.80: its scores are larger,
and a rate of 5e-3 is too small for them. More in experiments/LOG.md.
"""

from configs.ablation import demo

OPTIONS = {
    "plain": {},
    "geglu": dict(activation="geglu"),
    "relu2": dict(activation="relu2"),
    "gpt_oss": dict(activation="swiglu_oai", activation_limit=7.0, expert_bias=True, router_bias=True),
    "latent": dict(latent_dim=32),
    "router_norm": dict(router_norm="scaled", expert_scale=True),
    "by_logits": dict(select_by="logits"),
    "windows": dict(window=32, window_pattern="LG", attention_sinks=True),
}


def get_config(arg: str = ""):
    """The demo's model; `arg` is unused."""
    return demo.get_config(arg)


def get_hyper(h):
    """Options, three paired seeds."""
    sign = dict(bias_sign=dict(rate=5e-3))
    arms = {
        name: {"balance": sign} | {f"model.{key}": value for key, value in options.items()}
        for name, options in OPTIONS.items()
    }
    return h.product(h.arms(**arms), h.sweep("seed", range(3)))
