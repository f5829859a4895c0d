"""Hy3 at full size: 80 layers, the first dense, 192 experts, 8 per token, 1 shared; queries and keys normed per head.

295.0B parameters, without its module of prediction ahead; a token uses 20.7B with its embedding and 20.2B without (295B
and 21B on its card).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: the card and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/hy3.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=120832,
            num_layers=80,
            embed_dim=4096,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            qk_norm="head",
            rope_theta=11158840.0,
            ffw_dim=13312,
            norm_eps=1e-05,
            init_std=0.006,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=192,
            top_k=8,
            num_shared_experts=1,
            expert_ffw_dim=1536,
            first_dense=1,
            gate_scale=2.826,
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
