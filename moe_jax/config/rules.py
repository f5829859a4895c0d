"""What must hold across the keys of a config, and on the devices that it runs on."""

import dataclasses
import math
from dataclasses import fields

from moe_jax.config.dispatchers import DISPATCHERS
from moe_jax.config.schema import Config, MeshConfig, ModelConfig, mesh_sizes, num_moe_layers

# --- rules across keys ----------------------------------------------------------------------------------------


def _check_batch(c: Config) -> None:
    if c.batch_size % c.micro_batches:
        raise ValueError(
            f"batch_size={c.batch_size} must be divisible by micro_batches={c.micro_batches}; "
            f"try {_nearby(c.batch_size, c.micro_batches)}."
        )


def _check_attention(c: Config) -> None:
    m = c.model
    if m.attention == "mla":
        _check_latent_attention(m)
        return
    if m.num_heads % m.num_kv_heads:
        raise ValueError(
            f"model.num_heads={m.num_heads} must be divisible by model.num_kv_heads={m.num_kv_heads}; "
            f"try {_nearby(m.num_heads, m.num_kv_heads)}."
        )
    if m.head_dim % 2:
        raise ValueError(f"model.head_dim={m.head_dim} must be even, for RoPE rotates pairs; try {m.head_dim + 1}.")


def _check_latent_attention(m: ModelConfig) -> None:
    if m.qk_rope_head_dim % 2:
        raise ValueError(
            f"model.qk_rope_head_dim={m.qk_rope_head_dim} must be even, for RoPE rotates pairs; "
            f"try {m.qk_rope_head_dim + 1}."
        )
    if m.qk_norm != "none":
        raise ValueError(
            f"model.qk_norm={m.qk_norm!r} is of grouped-query attention, but model.attention='mla' norms its latents; "
            "set model.qk_norm='none'."
        )


def _check_yarn(c: Config) -> None:
    y = c.model.yarn
    if y.beta_fast < y.beta_slow:  # equal in Kimi-K2: frequencies then jump
        raise ValueError(
            f"model.yarn.beta_fast={y.beta_fast} must be at least model.yarn.beta_slow={y.beta_slow}; try 32 and 1."
        )


def _check_prediction(c: Config) -> None:
    """Multi-token prediction."""
    if c.model.mtp_depth >= c.sequence_length:
        raise ValueError(
            f"model.mtp_depth={c.model.mtp_depth} must be below sequence_length={c.sequence_length}, or nothing is "
            "left to predict; lower it."
        )
    if len(c.mtp_weights) != len(c.mtp_milestones) + 1 or any(w < 0 for w in c.mtp_weights):
        raise ValueError(
            f"mtp_weights={c.mtp_weights} must be one weight >= 0 more than mtp_milestones={c.mtp_milestones}; "
            "write (0.3,) and (), or (0.3, 0.1) and (0.676,)."
        )
    if list(c.mtp_milestones) != sorted(set(c.mtp_milestones)) or any(not 0 < m < 1 for m in c.mtp_milestones):
        raise ValueError(
            f"mtp_milestones={c.mtp_milestones} must rise strictly between 0 and 1 (shares of num_steps); try (0.676,)."
        )


def _check_experts(c: Config) -> None:
    m = c.model
    if m.num_experts == 0:
        return
    if m.top_k > m.num_experts:
        raise ValueError(
            f"model.top_k={m.top_k} must be at most model.num_experts={m.num_experts}; "
            f"lower top_k or raise num_experts."
        )
    if m.first_dense + m.moe_every > m.num_layers:
        raise ValueError(
            f"model.first_dense={m.first_dense} and model.moe_every={m.moe_every} leave no MoE layer among "
            f"model.num_layers={m.num_layers}; lower them, or set model.num_experts=0 for a dense model."
        )
    if m.random_second and m.top_k != 2:
        raise ValueError(
            f"model.random_second=True is GShard's rule for a second expert and needs model.top_k=2, "
            f"which is {m.top_k}; set top_k=2 or random_second=False."
        )


def _check_gates(c: Config) -> None:
    m = c.model
    if m.num_experts > 1 and m.top_k == 1 and m.normalize_gates:
        raise ValueError(
            "model.normalize_gates=True with model.top_k=1 makes every gate the constant gate_scale, and the "
            "router would learn nothing from the language model; set model.normalize_gates=False."
        )


def _check_groups(c: Config) -> None:
    m = c.model
    if m.num_experts == 0:
        return
    if m.num_experts % m.num_groups:
        raise ValueError(
            f"model.num_experts={m.num_experts} must be divisible by model.num_groups={m.num_groups}; "
            f"try {_nearby(m.num_experts, m.num_groups)}."
        )
    if m.top_groups > m.num_groups:
        raise ValueError(
            f"model.top_groups={m.top_groups} must be at most model.num_groups={m.num_groups}; lower top_groups."
        )
    size = m.num_experts // m.num_groups
    if m.top_k > m.top_groups * size:
        raise ValueError(
            f"model.top_k={m.top_k} must be at most the {m.top_groups * size} experts of "
            f"model.top_groups={m.top_groups} groups of {size}; raise top_groups or lower top_k."
        )
    if m.num_groups > 1 and m.group_top > size:
        raise ValueError(
            f"model.group_top={m.group_top} must be at most the {size} experts of a group; "
            f"set model.group_top={size} or fewer groups."
        )


def _check_quantization(c: Config) -> None:
    m = c.model
    if m.quantization == "none":
        return
    if m.num_experts == 0:
        raise ValueError(
            f"model.quantization={m.quantization!r} narrows the products of routed experts, but model.num_experts=0 "
            "has none; set model.quantization='none'."
        )
    if m.cpu_kernel == "native":
        raise ValueError(
            f"model.cpu_kernel='native' computes in float32 and bfloat16, not model.quantization={m.quantization!r}; "
            "set model.cpu_kernel='auto', or model.quantization='none'."
        )


def _check_balance_use(c: Config) -> None:
    if c.balance and c.model.num_experts == 0:
        raise ValueError(
            f"balance has {', '.join(e.label for e in c.balance)}, but model.num_experts=0 has no experts to "
            "balance; set balance={} or model.num_experts."
        )


def _check_balance_fits(c: Config) -> None:
    """What a balancing method asks of the model."""
    m, layers = c.model, num_moe_layers(c.model)
    for e in c.balance:
        path, o = f"balance.{e.label}", e.options
        if o.layers and o.layers[1] > layers:
            raise ValueError(
                f"{path}.layers={o.layers} must end within the {layers} MoE layers of the model; lower its stop."
            )
        classes = getattr(o, "num_classes", 1)
        if o.moves_bias and classes != len(m.class_starts) + 1:
            raise ValueError(
                f"{path} has num_classes={classes}, which must be the number of classes that model.class_starts="
                f"{m.class_starts} makes, {len(m.class_starts) + 1} (expert_threshold knows one only); change one."
            )
        if o.bounded_scores and m.score == "sqrt_softplus":
            raise ValueError(
                f"{path} counts scores between 0 and 1, but those of model.score='sqrt_softplus' are unbounded; "
                "set model.score='sigmoid' or 'softmax'."
            )
        if o.all_alike and m.num_groups > 1 and m.top_groups < m.num_groups:
            raise ValueError(
                f"{path} knows no group limit, but model.top_groups={m.top_groups} of model.num_groups="
                f"{m.num_groups}; set model.top_groups={m.num_groups}, or another method."
            )
        if o.selects and m.random_second:
            raise ValueError(
                f"{path} does not rank a token's experts, so that model.random_second=True has no second to drop; "
                "set model.random_second=False."
            )
        if o.by_device:
            _check_logical_devices(path, o.num_devices or m.num_groups, m)


def _check_logical_devices(path: str, devices: int, m: ModelConfig) -> None:
    if devices < 2 or m.num_experts % devices:
        raise ValueError(
            f"{path}.num_devices={devices} logical devices (0 takes model.num_groups={m.num_groups}) must be at least "
            f"2 and divide model.num_experts={m.num_experts}; set {path}.num_devices."
        )
    if m.num_zero_experts:
        raise ValueError(
            f"{path} needs every expert on a device, but model.num_zero_experts={m.num_zero_experts} are on none; "
            "set model.num_zero_experts=0, or another method."
        )


def _check_classes(c: Config) -> None:
    m = c.model
    if list(m.class_starts) != sorted(set(m.class_starts)) or any(not 0 < s < m.vocab_size for s in m.class_starts):
        raise ValueError(
            f"model.class_starts={m.class_starts} must rise strictly between 0 and model.vocab_size={m.vocab_size}; "
            "write (), or the first token id of each further class."
        )
    if m.class_starts and not any(e.options.moves_bias for e in c.balance):
        raise ValueError(
            f"model.class_starts={m.class_starts} gives each class of tokens a bias of its own, but balance has no "
            "method that moves a bias; set model.class_starts=(), or add bias_sign=dict(num_classes=...)."
        )


def _check_zero_experts(c: Config) -> None:
    m = c.model
    if not m.num_zero_experts or m.num_experts == 0:
        return
    if m.num_groups > 1:
        raise ValueError(
            f"model.num_zero_experts={m.num_zero_experts} belong to no group, but model.num_groups={m.num_groups}; "
            "set one of them to its default."
        )
    for e in c.balance:
        if e.options.all_alike:
            raise ValueError(
                f"balance.{e.label} treats all experts alike, but model.num_zero_experts={m.num_zero_experts} are to "
                f"get model.zero_share={m.zero_share} of the copies; set model.num_zero_experts=0, or another method."
            )


def _check_measures(c: Config) -> None:
    for name in ("measure_every", "record_scores_every"):
        every = getattr(c, name)
        if every and c.model.num_experts == 0:
            raise ValueError(f"{name}={every} measures routing, but model.num_experts=0 has none; set {name}=0.")
    if c.measure_every % c.log_every:
        raise ValueError(
            f"measure_every={c.measure_every} must be a multiple of log_every={c.log_every}, for it is logged with it; "
            f"try {_nearby(c.measure_every, c.log_every)}."
        )


def _check_optimizer(c: Config) -> None:
    o = c.optimizer
    if o.warmup_steps > c.num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={o.warmup_steps} must be at most num_steps={c.num_steps}; "
            f"try {max(1, c.num_steps // 10)}."
        )
    if o.schedule == "multistep" and (
        list(o.milestones) != sorted(set(o.milestones)) or any(not 0 < m < 1 for m in o.milestones)
    ):
        raise ValueError(
            f"optimizer.milestones={o.milestones} must rise strictly between 0 and 1 (shares of num_steps); "
            "try (0.8, 0.9)."
        )
    decay = round(o.decay_fraction * c.num_steps)
    if o.schedule == "wsd" and o.warmup_steps + decay > c.num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={o.warmup_steps} and the {decay} steps of optimizer.decay_fraction="
            f"{o.decay_fraction} must fit into num_steps={c.num_steps}; lower one of them."
        )
    if o.eps < 2**-126:
        raise ValueError(
            f"optimizer.eps={o.eps} must be above 0 in float32 (at least 2^-126), for Adam divides 0 by it where a "
            "parameter has no gradient; try 1e-8."
        )
    if o.rounding == "stochastic" and "bfloat16" not in (c.model.param_dtype, o.moment_dtype):
        raise ValueError(
            "optimizer.rounding='stochastic' is of parameters or moments in bfloat16, but model.param_dtype and "
            "optimizer.moment_dtype are float32; set one of them to 'bfloat16', or optimizer.rounding='nearest'."
        )
    for name in ("b1", "b2"):
        if getattr(o, name) >= 1:
            raise ValueError(f"optimizer.{name}={getattr(o, name)} must be below 1; try 0.95.")


def _check_mesh(c: Config) -> None:
    """What must hold on the mesh, as far as its sizes are known; `resolve` knows them all."""
    m, mesh = c.model, c.mesh
    sizes = {f.name: getattr(mesh, f.name) for f in fields(MeshConfig)}
    for axis, size in sizes.items():
        if size == 0:
            raise ValueError(f"mesh.{axis}=0 must be at least 1, or -1 for all devices left; set mesh.{axis}=1.")
    if (unknown := [axis for axis, size in sizes.items() if size == -1])[1:]:
        raise ValueError(f"mesh.{' and mesh.'.join(unknown)} are -1, but only one axis can be; give the others.")
    divides = [("num_heads", "tensor")] + [("num_kv_heads", "tensor")] * (m.attention == "gqa")
    if m.num_experts == 0 or m.first_dense or m.moe_every > 1:  # some layer is dense
        divides += [("ffw_dim", "tensor")]
    if m.num_experts:
        divides += [("embed_dim", "data"), ("num_experts", "expert"), ("expert_ffw_dim", "tensor")]
    for key, axis in divides:
        value = getattr(m, key)
        if value % sizes[axis]:  # of -1 the remainder is 0
            raise ValueError(
                f"model.{key}={value} must be divisible by mesh.{axis}={sizes[axis]}; "
                f"try model.{key}={_nearby(value, sizes[axis])}, or another mesh.{axis}."
            )
    shards = math.prod(max(1, sizes[axis]) for axis in ("replica", "data", "expert"))
    rows = c.batch_size // c.micro_batches
    if rows % shards:
        raise ValueError(
            f"batch_size={c.batch_size} in micro_batches={c.micro_batches} is {rows} rows at a time, which must be "
            f"divisible by mesh.replica x data x expert = {shards}; "
            f"try batch_size={_nearby(c.batch_size, shards * c.micro_batches)}, "
            f"{'fewer micro_batches, ' if c.micro_batches > 1 else ''}or a mesh of at most {rows} of these "
            "(mesh.data=1 is one)."
        )
    if m.num_experts and sizes["expert"] > 1 and not DISPATCHERS[m.dispatch].splits_experts:
        raise ValueError(
            f"model.dispatch={m.dispatch!r} needs every expert on every device, but mesh.expert={sizes['expert']} "
            "splits them; set model.dispatch='auto'."
        )


def resolve(config: Config, num_devices: int, platform: str = "") -> Config:
    """The config with the mesh's sizes on so many devices ("cpu", "gpu", "tpu"), every rule on them checked.

    Raises:
        ValueError: the sizes do not fit the devices, the model or the batch; the platform lacks a collective.
    """
    sizes = mesh_sizes(config.mesh, num_devices)
    dispatcher = DISPATCHERS[config.model.dispatch]
    if config.model.num_experts and platform in dispatcher.not_on:
        raise ValueError(
            f"model.dispatch={config.model.dispatch!r} needs {dispatcher.needs}, which {platform.upper()}s do not "
            "have; set model.dispatch='auto' or 'rounds'."
        )
    config = dataclasses.replace(config, mesh=MeshConfig(*sizes))
    _check_mesh(config)
    return config


RULES = (
    _check_batch,
    _check_attention,
    _check_yarn,
    _check_prediction,
    _check_experts,
    _check_gates,
    _check_groups,
    _check_quantization,
    _check_balance_use,
    _check_balance_fits,
    _check_classes,
    _check_zero_experts,
    _check_measures,
    _check_optimizer,
    _check_mesh,
)


def _nearby(value: int, divisor: int) -> str:
    """The multiples of `divisor` on either side of `value`, as advice."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
