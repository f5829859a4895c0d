"""The cost of balancing: two unrolled MoE layers with 64 experts, compiled with each method and compared.

Source: the shape of Loss-Free Balancing's routed experts (arXiv 2408.15664, Table 5: 64, 6 per token, 2 shared).
Command: python -m experiments.cost --config=configs/balance_cost.py
Result: on CPU with jax 0.10.2, over the step without balancing (32.6 GFLOP, 5.4 GB): bias_sign +0.00001 % of FLOPs and
+0.0001 % of bytes, quantile +0.05 % and +0.44 %, aux_loss +0.04 % and +0.43 %.
"""

from moe_jax.config import default


def get_config(arg: str = ""):
    """2 layers of width 256, 4096 tokens per step; `arg` is unused."""
    return default(
        num_steps=100,
        batch_size=16,
        sequence_length=256,
        model=dict(
            num_layers=2,
            embed_dim=256,
            num_heads=4,
            num_kv_heads=4,
            head_dim=64,
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            expert_ffw_dim=128,
            unroll_layers=True,
        ),
        mesh=dict(data=1),
    )
