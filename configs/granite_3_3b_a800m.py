"""Granite 3.0 3B-A800M at full size: 32 layers, 40 experts, 8 per token, with factors on embeddings and more; tied.

3.30B parameters; a token uses 0.88B with its embedding and 0.81B without (3.3B and 800M on its card).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: Granite 3.0 Language Models (2024), table 2, and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/granite_3_3b_a800m.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=49155,
            num_layers=32,
            embed_dim=1536,
            num_heads=24,
            num_kv_heads=8,
            head_dim=64,
            attention_multiplier=0.015625,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            logits_scaling=6.0,
            tied_embeddings=True,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=40,
            top_k=8,
            expert_ffw_dim=512,
            score="softmax",
        ),
        balance=dict(aux_loss=dict(weight=1e-3, scope="global")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
