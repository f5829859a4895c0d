"""The options of a layer: the rows of docs/options.md, each with a small model that has the option and one without."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from conftest import mesh_sizes, tiny_config
from moe_jax.config import Config

BASE: dict[str, Any] = dict(vocab_size=64, num_layers=2, first_dense=0, embed_dim=16, ffw_dim=16, expert_ffw_dim=8)
BASE |= dict(num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, top_k=2, num_shared_experts=0)
LATENT = dict(attention="mla", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6)
KINDS = dict(window=3, window_pattern="LG")
SHARED = dict(num_shared_experts=1)


class Row(NamedTuple):
    """An option: the keys that it sets, on top of those that it needs `beside` it, and the methods that it needs."""

    keys: Mapping[str, Any]
    beside: Mapping[str, Any] = {}
    balance: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """As in a config, with the keys beside it that another row of the same option does not have."""

        return written(self.keys) + (f" with {written(self.beside)}" if self in ALSO else "")

    def config(self, chosen: bool = True, mesh: tuple[int, ...] = (1, 1, 1, 1), **path: Any) -> Config:
        """With the option, or without it; `path` are the model's keys of a path."""
        model = BASE | self.beside | (self.keys if chosen else {}) | path
        return tiny_config(model=model, balance=self.balance if chosen else {}, batch_size=4, mesh=mesh_sizes(mesh))


def written(keys: Mapping[str, Any]) -> str:
    def value(v: Any) -> str:
        return f"dict({written(v)})" if isinstance(v, Mapping) else f'"{v}"' if isinstance(v, str) else str(v)

    return ", ".join(f"{key}={value(v)}" for key, v in keys.items())


# options that other parts of a layer compute, too
ALSO = [
    Row(dict(window=3), dict(attention="mla")),
    Row(dict(activation_limit=3.0), dict(activation="swiglu_oai")),
]
ROWS = [
    # attention
    Row(dict(attention="mla"), {k: v for k, v in LATENT.items() if k != "attention"}),
    Row(dict(q_lora_rank=8), LATENT),
    Row(dict(index_topk=64), LATENT),
    Row(dict(qk_norm="head")),
    Row(dict(qk_norm="projection")),
    Row(dict(qkv_bias=True)),
    Row(dict(out_bias=True)),
    Row(dict(partial_rotary_factor=0.5)),
    Row(dict(rope_theta=100.0)),
    Row(dict(yarn=dict(factor=4.0, original_length=8))),
    Row(dict(longrope=dict(short_factor=(1.0, 1.5, 2.0, 4.0), short_mscale=1.25))),
    Row(dict(window=3)),
    ALSO[0],
    Row(dict(window_pattern="LG"), dict(window=3)),
    Row(dict(rope_layers="local"), KINDS),
    Row(dict(local_rope=dict(theta=100.0, partial_rotary_factor=0.5)), KINDS),
    Row(dict(attention_sinks=True)),
    Row(dict(attention_gate="element")),
    Row(dict(attention_gate="head")),
    Row(dict(gate_activation="softplus"), dict(attention_gate="head")),
    Row(dict(attention_multiplier=0.3)),
    # blocks
    Row(dict(residual_multiplier=0.5)),
    Row(dict(norm="layer")),
    Row(dict(norm_after=True)),
    Row(dict(sandwich_norm=True)),
    Row(dict(first_dense=1)),
    Row(dict(moe_every=2)),
    Row(dict(mtp_depth=1)),
    # experts
    Row(dict(activation="geglu")),
    Row(dict(activation="swiglu_oai")),
    Row(dict(activation="relu2")),
    Row(dict(activation_limit=3.0), dict(activation="swiglu")),
    ALSO[1],
    Row(dict(expert_bias=True)),
    Row(dict(latent_dim=8)),
    Row(dict(gate_on="input")),
    Row(dict(num_zero_experts=2)),
    Row(SHARED),
    Row(dict(shared_ffw_dim=12), SHARED),
    Row(dict(shared_gate=True), SHARED),
    # the router
    Row(dict(score="softmax")),
    Row(dict(score="sqrt_softplus")),
    Row(dict(score="relu"), dict(normalize_gates=False), dict(relu={})),
    Row(dict(normalize_gates=False)),
    Row(dict(gate_scale=2.0)),
    Row(dict(sparsemixer=0.25), dict(normalize_gates=False)),
    Row(dict(num_groups=2, top_groups=1)),
    Row(dict(group_top=1), dict(num_groups=2, top_groups=1)),
    Row(dict(router_bias=True)),
    Row(dict(router_norm="plain")),
    Row(dict(router_norm="scaled")),
    Row(dict(router_scale=0.5)),
    Row(dict(expert_scale=True)),
    Row(dict(select_by="logits")),
    Row(dict(class_starts=(30,)), balance=dict(bias_sign=dict(num_classes=2))),
    Row(dict(router_jitter=0.3)),
    Row(dict(random_second=True)),
]
# the model's other keys, besides those that change only numbers or speed: sizes, embedding and head, a column, a
# target, and scaling, whose factors tests/model/test_folding.py and tests/training/test_scaling.py look at
SIZES = "vocab_size num_layers embed_dim num_heads num_kv_heads head_dim ffw_dim num_experts top_k expert_ffw_dim"
SIZES += " kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim norm_eps"
SIZES += " embedding_multiplier"
APART = f"{SIZES} tied_embeddings head_bias logits_scaling quantization zero_share scaling".split()
