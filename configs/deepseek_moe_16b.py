"""DeepSeekMoE 16B at full size: 28 layers, the first dense, 64 fine-grained experts, 6 per token, 2 shared.

16.4B parameters; a token uses 2.8B; multi-head attention (as many key-value heads as heads). The paper's
batch is 4.5K sequences; 4608 divides by the chips.
Source: DeepSeekMoE (arXiv 2401.06066), section 5.1, and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/deepseek_moe_16b.py --workdir=DIR --config.data.path=DIR
Plan: python -m moe_jax.plan --config=configs/deepseek_moe_16b.py --topology=v5p:4x8x8
Result: fits, 16.9 of 95 GiB per chip; 1.41 x the ideal FLOPs, with those of attention; bound on MFU 71.0 % (77.4 % with
causal attention in the ideal), by compute; scheduled 40.3 % (43.9 %); no weight travels while the core waits.
"""

from moe_jax.config import default
from moe_jax.config.xla_options import SPARSE_CORES


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=106_449,
        batch_size=4608,
        micro_batches=9,
        sequence_length=4096,
        log_every=10,
        eval_every=1000,
        save_every=500,
        model=dict(
            vocab_size=102400,
            num_layers=28,
            embed_dim=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
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
