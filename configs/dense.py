"""The dense transformer: attention and SwiGLU feed-forward layers. The reference for every MoE model.

Source: Vaswani et al. (arXiv 1706.03762) with RMSNorm, RoPE, grouped-query attention and SwiGLU.
Command: python -m moe_jax.train --config=configs/dense.py --workdir=/tmp/dense
Result: 0.46M parameters, 0.46M active; after 200 steps, seed 0, 3.410 bits per byte held out.
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=200,
        batch_size=8,
        sequence_length=128,
        log_every=10,
        eval_every=100,
        save_every=100,
        model=dict(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            ffw_dim=256,
        ),
        optimizer=dict(learning_rate=3e-3, warmup_steps=20),
        data=dict(eval_sequences=64),
    )
