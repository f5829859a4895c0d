"""Does balance differ after upcycling? Experts made of a trained dense model, under three ways of balancing.

`copies` are 8 whole copies of every dense layer, of which a token uses 2; `reinit` are the same with half of the hidden
units drawn anew; `slices` are 8 copies in 4 slices, of which a token uses 8. `scratch` is the model of `copies` with
random weights. All use the same number of parameters for a token, and begin a new schedule.
Source: sparse upcycling (arXiv 2212.05055), Drop-Upcycling (2502.19261), slices (2410.07524); none reports balance.
Command:
  run() { python -m moe_jax.$1 --config=configs/ablation/upcycling.py:$2 ${@:3}; }
  run train dense --workdir=runs/upcycling/dense
  run upcycle copies --input=runs/upcycling/dense --output=runs/upcycling/copies
  run upcycle copies --input=runs/upcycling/dense --output=runs/upcycling/reinit --reinit=0.5
  run upcycle slices --input=runs/upcycling/dense --output=runs/upcycling/slices
  python -m experiments.ablate --config=configs/ablation/upcycling.py --workdir=runs/upcycling/sweep
Result: under the sign rule held-out max violation 0.08 (copies), 0.10 (reinit), 0.14 (slices), 0.10 (scratch), without
balancing 2.3 to 2.5 for all; bits per byte 3.086, 3.084, 3.086, 3.452. More in experiments/LOG.md.
"""

from configs.ablation import demo

MODELS = {
    "dense": dict(num_experts=0),
    "copies": dict(num_experts=8, top_k=2, expert_ffw_dim=256),
    "slices": dict(num_experts=32, top_k=8, expert_ffw_dim=64),
}
STARTS = {  # arm -> its model, and the workdir of its weights
    "copies": ("copies", "runs/upcycling/copies"),
    "reinit": ("copies", "runs/upcycling/reinit"),
    "slices": ("slices", "runs/upcycling/slices"),
    "scratch": ("copies", ""),
}
METHODS = {
    "none": {},
    "sign": dict(bias_sign=dict(rate=5e-3)),
    "aux": dict(aux_loss=dict(weight=1e-2)),
}


def get_config(arg: str = "copies"):
    """The demo's schedule, and the model `arg`: dense, copies or slices."""
    if arg not in MODELS:
        raise ValueError(f"configs/ablation/upcycling.py:{arg} must end in one of {', '.join(MODELS)}.")
    config = demo.get_config()
    config.model.num_shared_experts = 0
    config.model.update(MODELS[arg])
    return config


def get_hyper(h):
    """Starts x methods, three paired seeds."""
    arms = {
        f"{start}_{method}": {"init_from": workdir, "balance": balance}
        | {f"model.{key}": value for key, value in MODELS[model].items()}
        for start, (model, workdir) in STARTS.items()
        for method, balance in METHODS.items()
    }
    return h.product(h.arms(**arms), h.sweep("seed", range(3)))
