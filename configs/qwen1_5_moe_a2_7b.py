"""Qwen1.5-MoE-A2.7B at full size: 24 layers, 60 experts, 4 per token, a wide shared one behind a gate; biased q, k, v.

14.3B parameters; a token uses 2.69B with its embedding and 2.38B without (2.7B on its card). The published model was
upcycled from a dense one, which is not repeated here.
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: the configuration published with its weights; Qwen2 technical report (arXiv 2407.10671), section 2.2.2.
Command: python -m moe_jax.train --config=configs/qwen1_5_moe_a2_7b.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=151936,
            num_layers=24,
            embed_dim=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            qkv_bias=True,
            rope_theta=1000000.0,
            ffw_dim=5632,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=60,
            top_k=4,
            num_shared_experts=1,
            expert_ffw_dim=1408,
            shared_ffw_dim=5632,
            shared_gate=True,
            score="softmax",
            normalize_gates=False,
        ),
        balance=dict(aux_loss=dict(weight=1e-3, scope="global")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=4),
    )
