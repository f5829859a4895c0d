"""A ladder of models from 0.05M to 2.8B active parameters: one rule for each of width, depth, rate, batch and bias.

`configs/ladder.py:22m` has 64 experts, of which a token uses 7, and a shared one; `configs/ladder.py:22m,dense` is the
dense model with the same FLOPs for a token. Active parameters are counted without embedding and head; training takes 20
tokens for each. With C the FLOPs of a run, the learning rate is 0.3118 C^-0.125 and the batch 0.292 C^0.3271 tokens.
The bias moves by the peak's learning rate at every step, because scores move by about that; it is 1e-3 at about 1B, as
in Loss-Free Balancing. Initial weights have deviation 0.5 / sqrt(width): 0.02 at 640, 0.006 at DeepSeek-V3's 7168.
Source: tokens, Chinchilla (arXiv 2203.15556); rate and batch, DeepSeek LLM (2401.02954), section 3.1; experts in slices
of a third of the width, DeepSeekMoE (2401.06066). The other rules are this project's, and untuned.
Command: python -m moe_jax.train --config=configs/ladder.py:3m --workdir=DIR --config.data.path=corpus/bytes
`configs/ablation/ladder.py` trains the small ones, and `python -m experiments.ladder` predicts the next.
"""

from moe_jax.config import default

SIZES = {  # active parameters -> layers, width
    "0.05m": (2, 48),
    "0.1m": (2, 64),
    "0.2m": (2, 96),
    "0.4m": (2, 128),
    "0.8m": (3, 160),
    "1.5m": (4, 192),
    "3m": (4, 256),
    "10m": (6, 384),
    "22m": (8, 512),
    "75m": (12, 768),
    "180m": (16, 1024),
    "350m": (20, 1280),
    "600m": (24, 1536),
    "1.4b": (32, 2048),
    "2.8b": (40, 2560),
}
EXPERTS = dict(num_experts=64, top_k=7, num_shared_experts=1, first_dense=1)
TOKENS_PER_PARAMETER = 20


def read(arg):
    """The layers and width of a size, and whether it has experts."""
    size, _, kind = (arg or "0.1m").partition(",")
    if size not in SIZES or kind not in ("", "dense"):
        raise ValueError(f"configs/ladder.py:{arg} must end in one of {', '.join(SIZES)}, with ,dense or without it.")
    return (*SIZES[size], not kind)


def get_config(arg: str = ""):
    """The model and its schedule for `arg`, such as 22m or 22m,dense; empty: 0.1m."""
    layers, width, sparse = read(arg)
    heads = max(1, width // 64)
    kv_heads = max(1, heads // 4)
    expert = 8 * -(-width // 24)  # a third of the width, in eights; 8 of them are active
    parameters = layers * (2 * width**2 + 2 * width * kv_heads * width // heads + 3 * 8 * expert * width)
    tokens = TOKENS_PER_PARAMETER * parameters
    flops = 6 * parameters * tokens
    length = 256 if width <= 256 else 1024 if width <= 512 else 4096
    batch = 8 * max(1, round(0.292 * flops**0.3271 / length / 8))
    steps = round(tokens / (batch * length))
    rate = float(f"{0.3118 * flops**-0.125:.2g}")
    return default(
        num_steps=steps,
        batch_size=batch,
        sequence_length=length,
        log_every=10,
        eval_every=steps,
        save_every=0 if width <= 256 else 1000,
        model=dict(
            num_layers=layers,
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width // heads,
            ffw_dim=8 * expert,
            init_std=round(0.5 / width**0.5, 4),
            compute_dtype="float32" if width <= 512 else "bfloat16",
        )
        | (EXPERTS | dict(expert_ffw_dim=expert) if sparse else {}),
        balance=dict(bias_sign=dict(rate=rate)) if sparse else {},
        optimizer=dict(learning_rate=rate, warmup_steps=steps // 20),
        data=dict(eval_sequences=200),
    )
