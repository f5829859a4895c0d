"""Solar Open 100B at full size: 48 layers, 128 experts, 8 per token, 1 shared; YaRN over twice the length.

102.7B parameters; a token uses 12.1B with its embedding and 11.2B without (102.6B and 12B on its card).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: the card and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/solar_open_100b.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=196608,
            num_layers=48,
            embed_dim=4096,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=1000000.0,
            yarn={"factor": 2.0, "original_length": 65536},
            norm_eps=1e-05,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=128,
            top_k=8,
            num_shared_experts=1,
            expert_ffw_dim=1280,
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
