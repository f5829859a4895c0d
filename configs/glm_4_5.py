"""GLM-4.5 at full size: 92 layers, 3 of them dense, 160 experts, 8 per token, 1 shared; RoPE of half of each head.

352.8B parameters, and 4.0B of prediction ahead; a token uses 33.6B with its embedding and 32.9B without. The report
counts prediction ahead, but neither embedding nor head: 355B, 32B.
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: GLM-4.5 (arXiv 2508.06471), section 2.1, and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/glm_4_5.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=151552,
            num_layers=92,
            embed_dim=5120,
            num_heads=96,
            num_kv_heads=8,
            head_dim=128,
            qk_norm="head",
            qkv_bias=True,
            partial_rotary_factor=0.5,
            rope_theta=1000000.0,
            ffw_dim=12288,
            norm_eps=1e-05,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=160,
            top_k=8,
            num_shared_experts=1,
            expert_ffw_dim=1536,
            first_dense=3,
            gate_scale=2.5,
            mtp_depth=1,
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
