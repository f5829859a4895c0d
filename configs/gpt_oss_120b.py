"""gpt-oss-120b at full size: 36 layers, every other one with a window of 128, sinks, 128 experts, 4 per token.

116.8B parameters; a token uses 5.7B with its embedding and 5.1B without (116.8B and 5.1B in its model card).
Assumed: everything that is not the architecture (batch, steps, learning rate, schedule, balancing); no plan was made.
Source: the model card (arXiv 2508.10925) and the configuration published with its weights.
Command: python -m moe_jax.train --config=configs/gpt_oss_120b.py --workdir=DIR --config.data.path=DIR
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
            vocab_size=201088,
            num_layers=36,
            embed_dim=2880,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            qkv_bias=True,
            out_bias=True,
            attention_sinks=True,
            window=128,
            window_pattern="LG",
            rope_theta=150000.0,
            yarn=dict(factor=32.0, original_length=4096, truncate=False),
            norm_eps=1e-5,
            compute_dtype="bfloat16",
            remat="full",
            num_experts=128,
            top_k=4,
            expert_ffw_dim=2880,
            activation="swiglu_oai",
            activation_limit=7.0,
            score="softmax",
            router_bias=True,
            expert_bias=True,
        ),
        balance=dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased")),
        optimizer=dict(learning_rate=3e-4, warmup_steps=2000, moment_dtype="bfloat16"),
        mesh=dict(data=-1, expert=8),
    )
