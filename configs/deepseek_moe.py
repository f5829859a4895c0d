"""DeepSeekMoE: 16 fine-grained experts, 4 per token, and 1 shared expert; softmax gate, not normalised; no drops.

Source: DeepSeekMoE (arXiv 2401.06066), equations 9-14, expert-level loss at the weight of its 2B model.
Weights are drawn with standard deviation 0.02, which suits this width; the papers' models have 0.006.
Command: python -m moe_jax.train --config=configs/deepseek_moe.py --workdir=/tmp/deepseek_moe
Result: 0.95M parameters, 0.45M active; after 200 steps, seed 0, 3.484 bits per byte held out, max violation 0.31.
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
            num_experts=16,
            top_k=4,
            num_shared_experts=1,
            expert_ffw_dim=48,
            first_dense=1,
            score="softmax",
            normalize_gates=False,
        ),
        balance=dict(aux_loss=dict(weight=1e-2, scope="sequence")),
        optimizer=dict(learning_rate=3e-3, warmup_steps=20),
        data=dict(eval_sequences=64),
    )
