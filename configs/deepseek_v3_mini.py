"""A small DeepSeek-V3: latent attention, biased selection within the best 2 of 4 groups, prediction one token ahead.

The first layer is dense; gates are normalised sigmoids. The bias balances, with a small sequence-wise loss on the
unbiased top-k. Multi-token prediction has the weight 0.3, and 0.1 in the last third.
Source: DeepSeek-V3 (arXiv 2412.19437), equations 1-25; rate 5e-3 for a run of 200 steps (the paper's is 1e-3).
Weights are drawn with standard deviation 0.02, which suits this width; the papers' models have 0.006.
Command: python -m moe_jax.train --config=configs/deepseek_v3_mini.py --workdir=/tmp/deepseek_v3_mini
Result: 0.96M parameters, 0.46M active, and 0.29M for prediction ahead; after 200 steps, seed 0, 3.453 bits per byte
held out, max violation 0.23.
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
            attention="mla",
            num_heads=4,
            q_lora_rank=48,
            kv_lora_rank=32,
            qk_nope_head_dim=24,
            qk_rope_head_dim=12,
            v_head_dim=24,
            ffw_dim=256,
            num_experts=16,
            top_k=4,
            num_shared_experts=1,
            expert_ffw_dim=48,
            first_dense=1,
            num_groups=4,
            top_groups=2,
            gate_scale=2.5,
            mtp_depth=1,
        ),
        mtp_weights=(0.3, 0.1),
        mtp_milestones=(0.676,),
        balance=dict(bias_sign=dict(rate=5e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-3, warmup_steps=20),
        data=dict(eval_sequences=64),
    )
