"""A DeepSeek-style model small enough to keep: what the legacy workdir and the legacy sweep were made from."""

from moe_jax.config import default


def get_config(arg=""):
    return default(
        num_steps=4,
        batch_size=8,
        sequence_length=16,
        log_every=1,
        eval_every=0,
        save_every=0,
        model=dict(
            num_layers=2,
            embed_dim=8,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            ffw_dim=16,
            num_experts=4,
            top_k=2,
            num_shared_experts=1,
            expert_ffw_dim=8,
            first_dense=1,
        ),
        balance=dict(bias_sign=dict(rate=1e-2)),
        data=dict(eval_sequences=4),
        mesh=dict(data=1),
        checkpoint=dict(keep=1),
    )


def get_hyper(h):
    """Two arms, one seed."""
    return h.arms(none={"balance": {}}, bias={})
