"""GShard: every second feed-forward layer has 8 experts, a softmax gate picks 2, capacity drops the overflow.

The second expert is used at random, in proportion to its gate; capacity is per sequence.
Source: GShard (arXiv 2006.16668), Algorithm 1, with SwiGLU experts.
Command: python -m moe_jax.train --config=configs/gshard.py --workdir=/tmp/gshard
Result: 0.90M parameters, 0.46M active; after 200 steps, seed 0, 3.465 bits per byte held out, max violation 0.26,
5 % of the token copies dropped in the last steps.
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """`arg` is unused."""
    return default(
        num_steps=200,
        batch_size=8,
        sequence_length=128,
        log_every=10,
        eval_every=100,
        save_every=100,
        model=dict(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            ffw_dim=256,
            num_experts=8,
            top_k=2,
            expert_ffw_dim=128,
            moe_every=2,
            score="softmax",
            normalize_gates=True,
            random_second=True,
            dispatch="capacity",
            capacity_factor=1.0,
        ),
        balance=dict(aux_loss=dict(weight=1e-2, scope="sequence")),
        optimizer=dict(learning_rate=3e-3, warmup_steps=20),
        data=dict(eval_sequences=64),
    )
