"""The cost of eight bits: a small DeepSeekMoE with its routed experts in bfloat16, in int8 and in fp8.

All three compute in bfloat16 outside the experts and keep float32 weights. The arm `float32` computes in float32
throughout, and shows the noise of such small runs.
Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3, which trains in FP8 within 0.25 % of the loss in BF16.
Command: python -m experiments.ablate --config=configs/ablation/quantization.py --workdir=runs/quantization
Result: held-out bits per byte over 3 seeds, and the difference to bfloat16 paired by seed with its 95 % interval:
    bfloat16  3.4388
    float32   3.4535  +0.0147 +- 0.0235
    int8      3.4496  +0.0107 +- 0.0093 (excludes 0)
    fp8       3.4471  +0.0083 +- 0.0357
So int8 costs 0.3 % of the loss here, and the cost of fp8 is indistinguishable from 0 with 3 seeds. The float32 arm,
which should be no worse than bfloat16, differs by as much: differences below 0.02 in these runs are not reliable.
Balance is the same (held-out max violation 0.12 to 0.16). On CPUs eight bits are slower, not faster.
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """The common part: 16 fine-grained experts, 4 per token, 1 shared, balanced by the bias; `arg` is unused."""
    return default(
        num_steps=200,
        batch_size=8,
        sequence_length=128,
        log_every=10,
        eval_every=100,
        save_every=0,
        model=dict(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            ffw_dim=256,
            compute_dtype="bfloat16",
            num_experts=16,
            top_k=4,
            num_shared_experts=1,
            expert_ffw_dim=48,
            first_dense=1,
        ),
        balance=dict(bias_sign=dict(rate=5e-3)),
        optimizer=dict(learning_rate=3e-3, warmup_steps=20),
        data=dict(eval_sequences=64),
    )


def get_hyper(h):
    """Four arms, three paired seeds."""
    arms = h.arms(
        bfloat16={},
        float32={"model.compute_dtype": "float32"},
        int8={"model.quantization": "int8"},
        fp8={"model.quantization": "fp8"},
    )
    return h.product(arms, h.sweep("seed", range(3)))
