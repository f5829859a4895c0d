"""Language models of transformers trained by torch's fused AdamW, as contestants of `step`.

They have as many parameters and FLOPs as our model in the same setting, and clip the norm of the gradient and decay the
same weights as our step.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.benchmarks.peers import need, quiet, torch_here
from moe_jax.config import Config, ModelConfig

# float32; bfloat16 weights, gradients and moments; float32 weights whose products torch's autocast narrows
Precision = Literal["float32", "bfloat16", "autocast"]
IMPLEMENTATIONS = dict(attn_implementation="sdpa", experts_implementation="grouped_mm")


class Peer(NamedTuple):
    """A model in training: a step on the batch, which returns its loss, and its number of parameters."""

    step: Callable[[], float]
    num_params: int


def deepseek_v3(
    config: Config, tokens: np.ndarray, targets: np.ndarray, platform: str, precision: Precision = "float32"
) -> Peer:
    """transformers' DeepseekV3ForCausalLM with its own random weights."""
    torch, theirs = _torch_and(platform, "deepseek_v3")
    m = config.model
    settings = theirs.DeepseekV3Config(
        **_common(m),
        **latent_sizes(m),
        intermediate_size=m.ffw_dim,
        n_shared_experts=m.num_shared_experts,
        n_routed_experts=m.num_experts,
        num_key_value_heads=m.num_heads,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=m.gate_scale,
    )
    model = theirs.DeepseekV3ForCausalLM._from_config(settings, **IMPLEMENTATIONS)
    return _trained(torch, model, config, tokens, targets, platform, precision)


def latent_sizes(m: ModelConfig) -> dict[str, int | None]:
    """Sizes of multi-head latent attention with our head width, and with as many parameters as our attention."""
    nope = m.head_dim - m.head_dim // 2
    rope = m.head_dim // 2
    ours = 2 * m.embed_dim * m.num_kv_heads * m.head_dim
    latent = (ours - m.embed_dim * rope) / (m.embed_dim + m.num_heads * (nope + m.head_dim))
    sizes = dict(qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=m.head_dim, kv_lora_rank=round(latent))
    return sizes | {"q_lora_rank": None}


def qwen3_moe(
    config: Config,
    params: Mapping[str, Any],
    tokens: np.ndarray,
    targets: np.ndarray,
    platform: str,
    precision: Precision = "float32",
) -> Peer:
    """transformers' Qwen3MoeForCausalLM with our weights."""
    torch, theirs = _torch_and(platform, "qwen3_moe")
    m = config.model
    settings = theirs.Qwen3MoeConfig(
        **_common(m),
        intermediate_size=m.ffw_dim,
        num_experts=m.num_experts,
        num_key_value_heads=m.num_kv_heads,
        head_dim=m.head_dim,
    )
    model = theirs.Qwen3MoeForCausalLM._from_config(settings, **IMPLEMENTATIONS)
    weights = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in as_qwen3_moe(params).items()}
    model.load_state_dict(weights, strict=True)
    return _trained(torch, model, config, tokens, targets, platform, precision)


def as_qwen3_moe(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters, with layers stacked [L, ...], under Qwen3-MoE's names and in its layout."""
    stacked = params["stacks"][0]["blocks"][0]
    layers = len(np.asarray(stacked["attention_norm"]["scale"]))
    named = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": np.asarray(params["head"]).T,
    }
    for i in range(layers):
        block = _slice(stacked, i)
        named |= {f"model.layers.{i}.{name}": value for name, value in _as_qwen3_layer(block).items()}
    return {name: np.asarray(value) for name, value in named.items()}


def _slice(tree: Any, i: int) -> Any:
    if isinstance(tree, Mapping):
        return {key: _slice(value, i) for key, value in tree.items()}
    return np.asarray(tree)[i]


def _as_qwen3_layer(block: Mapping[str, Any]) -> dict[str, np.ndarray]:
    attention = block["attention"]
    experts = block["ffw"]
    width = block["attention_norm"]["scale"].shape[0]
    gate_up = np.concatenate([experts["gate"], experts["up"]], -1)  # [E, d, 2 h]
    return {
        "input_layernorm.weight": block["attention_norm"]["scale"],
        "post_attention_layernorm.weight": block["ffw_norm"]["scale"],
        "self_attn.q_norm.weight": attention["query_norm"]["scale"],
        "self_attn.k_norm.weight": attention["key_norm"]["scale"],
        "self_attn.q_proj.weight": attention["query"].reshape(width, -1).T,
        "self_attn.k_proj.weight": attention["key"].reshape(width, -1).T,
        "self_attn.v_proj.weight": attention["value"].reshape(width, -1).T,
        "self_attn.o_proj.weight": attention["out"].reshape(-1, width).T,
        "mlp.gate.weight": experts["router"].T,
        "mlp.experts.gate_up_proj": gate_up.swapaxes(1, 2),
        "mlp.experts.down_proj": experts["down"].swapaxes(1, 2),
    }


def _common(m: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=m.vocab_size,
        hidden_size=m.embed_dim,
        moe_intermediate_size=m.expert_ffw_dim,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_experts_per_tok=m.top_k,
        norm_topk_prob=m.normalize_gates,
        rms_norm_eps=m.norm_eps,
        initializer_range=m.init_std,
        rope_parameters=dict(rope_type="default", rope_theta=m.rope_theta),
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )


def _torch_and(platform: str, family: str) -> tuple[ModuleType, ModuleType]:
    torch = torch_here(platform)
    quiet()
    need("transformers")
    import importlib

    return torch, importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _trained(
    torch: ModuleType,
    model: Any,
    config: Config,
    tokens: np.ndarray,
    targets: np.ndarray,
    platform: str,
    precision: Precision,
) -> Peer:
    """A model whose step is like that of `moe_jax.training.step`: clipping, AdamW with decay, and reading the loss."""
    device = "cuda" if platform == "gpu" else "cpu"
    model = model.to(device, torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    inputs, labels = (torch.tensor(a, dtype=torch.long, device=device) for a in (tokens, targets))
    optimizer = _adamw(torch, model, config)
    o = config.optimizer

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        if o.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm, foreach=True)
        optimizer.step()
        return loss.item()

    return Peer(step, sum(p.numel() for p in model.parameters()))


def _adamw(torch: ModuleType, model: Any, config: Config) -> Any:
    o = config.optimizer
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=o.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, fused=True)
