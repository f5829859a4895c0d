"""DeepSeek-V2-Lite at full size: 27 layers, the first dense, 64 experts, 6 per token, 2 shared; latent attention.

15.7B parameters; a token uses 2.66B with its embedding and 2.45B without (the paper's 2.4B). YaRN came after
pre-training. Assumed: weights drawn with standard deviation 0.006, like those of DeepSeek-V2.
Source: DeepSeek-V2 (arXiv 2405.04434), appendix B, and the configuration published with the Lite weights.
Command: python -m moe_jax.train --config=configs/deepseek_v2_lite.py --workdir=DIR --config.data.path=DIR
Plan: python -m moe_jax.plan --config=configs/deepseek_v2_lite.py --topology=v5p:4x8x8
Result: fits, 16.5 of 95 GiB per chip; 1.45 x the ideal FLOPs, with those of attention; bound on MFU 68.8 % (76.8 % with
causal attention in the ideal), by compute; scheduled 38.8 % (43.3 %); no weight travels while the core waits.
"""

from moe_jax.config import default
from moe_jax.config.xla_options import SPARSE_CORES


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=302_000,
        batch_size=4608,
        micro_batches=9,
        sequence_length=4096,
        log_every=10,
        eval_every=1000,
        save_every=500,
        model=dict(
            vocab_size=102400,
            num_layers=27,
            embed_dim=2048,
            attention="mla",
            num_heads=16,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            ffw_dim=10944,
            init_std=0.006,
            compute_dtype="bfloat16",
            remat="names",
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            expert_ffw_dim=1408,
            first_dense=1,
            score="softmax",
            normalize_gates=False,
        ),
        balance=dict(aux_loss=dict(weight=1e-3, scope="sequence")),
        optimizer=dict(learning_rate=4.2e-4, schedule="multistep", warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
        compiler_options=SPARSE_CORES,
    )
