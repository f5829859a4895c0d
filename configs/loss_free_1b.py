"""Loss-Free Balancing, the 1B model: 9 MoE layers after a dense one, 64 experts, 6 per token, 2 shared.

Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), Table 5 and appendix; rate 1e-3. The paper gives the
granularity d_ff / d_expert = 16/3 and no widths. Assumed: d_ff = 8/3 x 1024 as in DeepSeekMoE, whose 16B model rounds
experts up to a multiple of 128: d_expert = 512 and 1.05B parameters in all. Also assumed: untied embeddings, weight
decay 0.1, betas 0.9 and 0.95, clipping at 1. Text: the corpus inside the package unless data.path is given; its
bytes use 257 of the paper's vocabulary of 32,064.
Batch 1152 is 9 sequences per chip of a v5e:8x16.
Command: python -m moe_jax.train --config=configs/loss_free_1b.py --workdir=/tmp/loss_free_1b --config.data.path=DIR
Plan: python -m moe_jax.plan --config=configs/loss_free_1b.py --topology=v5e:8x16
Result of an earlier plan, with model.remat="full", without attention and with exchanges one after another: fits, 3.4 of
16 GiB per chip; 1.40 x the ideal FLOPs; bound on MFU 19 %, by the interconnect. The names that are kept now add 3.1 GiB
by arithmetic.
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=40000,
        batch_size=1152,
        sequence_length=2048,
        log_every=10,
        eval_every=1000,
        save_every=1000,
        model=dict(
            vocab_size=32064,
            num_layers=10,
            embed_dim=1024,
            num_heads=8,
            num_kv_heads=8,
            head_dim=128,
            ffw_dim=2816,
            init_std=0.006,
            compute_dtype="bfloat16",
            remat="names",
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            expert_ffw_dim=512,
            first_dense=1,
            normalize_gates=False,
        ),
        balance=dict(bias_sign=dict(rate=1e-3)),
        optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup_steps=1000, end_ratio=0.1),
        mesh=dict(data=-1, expert=8),
    )
