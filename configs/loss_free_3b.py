"""Loss-Free Balancing, the 3B model: 11 MoE layers after a dense one, 64 experts, 6 per token, 2 shared.

Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), Table 5 and appendix; rate 1e-3 as for 1B. The paper
gives the granularity d_ff / d_expert = 4 and no widths. Assumed: d_ff = 8/3 x 1280 as in DeepSeekMoE, whose 16B model
rounds experts up to a multiple of 128: d_expert = 896 and 2.67B parameters in all. Also assumed: untied embeddings,
weight decay 0.1, betas 0.9 and 0.95, clipping at 1. Text: the corpus inside the package unless data.path is given;
its bytes use 257 of the paper's vocabulary of 32,064.
Batch 1792 is 7 sequences per chip of a v5e:16x16; the paper's 1728 does not divide by 256 chips.
Command: python -m moe_jax.train --config=configs/loss_free_3b.py --workdir=/tmp/loss_free_3b --config.data.path=DIR
Plan: python -m moe_jax.plan --config=configs/loss_free_3b.py --topology=v5e:16x16
Result of an earlier plan, with model.remat="full", without attention and with exchanges one after another: fits, 5.2 of
16 GiB per chip; 1.45 x the ideal FLOPs; bound on MFU 27 %, by the interconnect. The names that are kept now add 3.7 GiB
by arithmetic.
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=56514,
        batch_size=1792,
        sequence_length=2048,
        log_every=10,
        eval_every=1000,
        save_every=1000,
        model=dict(
            vocab_size=32064,
            num_layers=12,
            embed_dim=1280,
            num_heads=10,
            num_kv_heads=10,
            head_dim=128,
            ffw_dim=3456,
            init_std=0.006,
            compute_dtype="bfloat16",
            remat="names",
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            expert_ffw_dim=896,
            first_dense=1,
            normalize_gates=False,
        ),
        balance=dict(bias_sign=dict(rate=1e-3)),
        optimizer=dict(
            learning_rate=7.8e-4,
            schedule="multistep",
            warmup_steps=2000,
            milestones=(45211 / 56514, 50862 / 56514),
            milestone_ratio=0.3162,
        ),
        mesh=dict(data=-1, expert=16),
    )
