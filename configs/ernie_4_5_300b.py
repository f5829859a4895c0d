"""ERNIE-4.5-300B-A47B at full size: 54 layers, 3 of them dense, 64 experts, 8 per token; softmax scores and a bias.

299.5B parameters; a token uses 47.9B with its embedding and 47.1B without (300B and 47B on its card).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: ERNIE 4.5 technical report (2025), and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/ernie_4_5_300b.py --workdir=DIR --config.data.path=DIR
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=240_000,
        batch_size=1024,
        sequence_length=4096,
        log_every=10,
        eval_every=1000,
        save_every=500,
        model=dict(
            vocab_size=103424,
            num_layers=54,
            embed_dim=8192,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=500000.0,
            ffw_dim=28672,
            norm_eps=1e-05,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=64,
            top_k=8,
            expert_ffw_dim=3584,
            first_dense=3,
            score="softmax",
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
