"""GLM-4.7-Flash at full size: DeepSeek-V3's layer with 47 layers, the first dense, 64 experts, 4 per token, 1 shared.

29.9B parameters, and 0.64B of prediction ahead; a token uses 3.90B with its embedding and 3.58B without (30B-A3B on its
card).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/glm_4_7_flash.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=154880,
            num_layers=47,
            embed_dim=2048,
            attention="mla",
            num_heads=20,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            v_head_dim=256,
            rope_theta=1000000.0,
            ffw_dim=10240,
            norm_eps=1e-05,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=64,
            top_k=4,
            num_shared_experts=1,
            expert_ffw_dim=1536,
            first_dense=1,
            gate_scale=1.8,
            mtp_depth=1,
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
