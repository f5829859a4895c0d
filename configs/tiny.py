"""A miniature DeepSeek-V3, to check that everything works: 20 steps on the embedded text.

Source: the layer of DeepSeek-V3 (arXiv 2412.19437), balanced by its bias and its small sequence-wise loss.
Command: python -m moe_jax.train --config=configs/tiny.py --workdir=/tmp/tiny
Result: 0.22M parameters, 0.15M active; after 20 steps, seed 0, 5.023 bits per byte held out, max violation 2.72.
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=20,
        batch_size=8,
        sequence_length=64,
        log_every=1,
        eval_every=20,
        save_every=10,
        model=dict(
            num_layers=3,
            embed_dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            ffw_dim=192,
            num_experts=8,
            top_k=2,
            num_shared_experts=1,
            expert_ffw_dim=32,
            first_dense=1,
            num_groups=4,
            top_groups=2,
        ),
        balance=dict(bias_sign=dict(rate=1e-2), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-3, warmup_steps=2),
        data=dict(eval_sequences=64),
    )
