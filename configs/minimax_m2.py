"""MiniMax-M2 at full size: 62 layers, 256 experts, 8 per token; RoPE of half of each head, norms of the projections.

228.7B parameters; a token uses 11.0B with its embedding and 10.4B without (230B and 10B on its card; its checkpoint has
229B).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: the card and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/minimax_m2.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=200064,
            num_layers=62,
            embed_dim=3072,
            num_heads=48,
            num_kv_heads=8,
            head_dim=128,
            qk_norm="projection",
            partial_rotary_factor=0.5,
            rope_theta=5000000.0,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=256,
            top_k=8,
            expert_ffw_dim=1536,
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
