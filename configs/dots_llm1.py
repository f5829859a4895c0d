"""dots.llm1 at full size: 62 layers, the first dense, 128 experts, 6 per token, 2 shared; q and k normed per head.

142.8B parameters; a token uses 14.0B with its embedding and 13.4B without (142B and 14B in the report, which rounds
down).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: dots.llm1 (arXiv 2506.05767), section 2, and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/dots_llm1.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=152064,
            num_layers=62,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            qk_norm="head",
            rope_theta=10000000.0,
            ffw_dim=10944,
            norm_eps=1e-05,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=128,
            top_k=6,
            num_shared_experts=2,
            expert_ffw_dim=1408,
            first_dense=1,
            gate_scale=2.5,
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
