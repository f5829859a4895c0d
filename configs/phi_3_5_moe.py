"""Phi-3.5-MoE at full size: 32 layers of 16 experts, 2 per token, with SparseMixer's gates and LayerNorm.

41.9B parameters; a token uses 6.6B (41.9B and 6.6B in its model card).
Left out: LongRoPE's factors, which were found after training, and a window as long as its context; both come with its
weights. Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan
was made.
Source: the report (arXiv 2404.14219), GRIN (arXiv 2409.12136) and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/phi_3_5_moe.py --workdir=DIR --config.data.path=DIR
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=300_000,
        batch_size=4096,
        sequence_length=4096,
        log_every=10,
        eval_every=1000,
        save_every=500,
        model=dict(
            vocab_size=32064,
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            qkv_bias=True,
            out_bias=True,
            head_bias=True,
            norm="layer",
            norm_eps=1e-5,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=16,
            top_k=2,
            expert_ffw_dim=6400,
            score="softmax",
            normalize_gates=False,
            sparsemixer=0.01,
        ),
        balance=dict(aux_loss=dict(weight=1e-3)),
        optimizer=dict(learning_rate=4e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
