"""DeepSeek-V3 at full size: 61 layers, 256 experts, 8 per token from the best 4 of 8 groups, 1 shared; 2048 chips.

671B parameters; a token uses 37.6B with its embedding and 36.6B without (37B in the paper), and 11.6B more for
multi-token prediction, one token ahead, which shares embedding and head. YaRN came after pre-training. The paper's
batch grows from 3072 to 15360 sequences; here it is one sequence per chip. The paper's learning rate falls along a
cosine over the last third, here linearly.
Source: DeepSeek-V3 (arXiv 2412.19437), section 4.2, and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/deepseek_v3.py --workdir=DIR --config.data.path=DIR
Plan: python -m moe_jax.plan --config=configs/deepseek_v3.py --topology=v5p:8x16x16
Result: fits, 75.4 of 95 GiB per chip; 1.49 x the ideal FLOPs, with those of attention; bound on MFU 67.1 % (76.2 % with
causal attention in the ideal), by compute; scheduled 33.7 % (38.3 %); the core waits for the whole of 2 % of the bytes
that gathers and scatters send.
"""

from moe_jax.config import default
from moe_jax.config.xla_options import SPARSE_CORES


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=1_760_000,
        batch_size=2048,
        sequence_length=4096,
        log_every=10,
        eval_every=1000,
        save_every=500,
        model=dict(
            vocab_size=129280,
            num_layers=61,
            embed_dim=7168,
            attention="mla",
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            ffw_dim=18432,
            init_std=0.006,
            compute_dtype="bfloat16",
            remat="names",
            num_experts=256,
            top_k=8,
            num_shared_experts=1,
            expert_ffw_dim=2048,
            first_dense=3,
            num_groups=8,
            top_groups=4,
            group_top=2,
            gate_scale=2.5,
            mtp_depth=1,
        ),
        mtp_weights=(0.3, 0.1),
        mtp_milestones=(0.676,),  # 10T of 14.8T tokens
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(
            learning_rate=2.2e-4,
            schedule="wsd",
            warmup_steps=2000,
            end_ratio=0.1,
            decay_fraction=0.32,
            moment_dtype="bfloat16",
        ),
        mesh=dict(data=-1, expert=32),
        compiler_options=SPARSE_CORES,
    )
