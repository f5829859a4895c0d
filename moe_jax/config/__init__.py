"""The configuration: one frozen, typed schema; `ConfigDict` in, `Config` or one clear sentence out.

Imports no jax: a typo is told before jax could be loaded. Every error is a ValueError whose sentence names the
key, its value, the rule and a fix.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from moe_jax.config.balance import (
    BALANCE_METHODS,
    BIAS_METHODS,
    SELECTORS,
    WITH_QUANTILES,
    BalanceEntry,
    Effect,
    check_options,
    check_together,
    choice,
    number,
    section,
)

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN: RoPE for contexts `factor` times the `original_length` of training; 1 scales nothing.

    A pair that turns more than `beta_fast` times over the original length keeps its frequency, one that turns less
    than `beta_slow` times has it divided by the factor. `mscale` and `mscale_all_dim` sharpen the softmax, as in
    DeepSeek's code (`layers.Rope`). Source: arXiv 2309.00071.
    """

    factor: float = number(1.0, 1.0)
    original_length: int = number(4096, 1)
    beta_fast: float = number(32.0, 0.0)
    beta_slow: float = number(1.0, 0.0)
    mscale: float = number(1.0, 0.0)
    mscale_all_dim: float = number(0.0, 0.0)


@dataclass(frozen=True)
class ModelConfig:
    """One transformer. `num_experts=0` is a dense one; what is said of experts is then unused."""

    vocab_size: int = number(264, 1)  # bytes + separator = 257, rounded up so that it divides by 8
    num_layers: int = number(4, 1)
    embed_dim: int = number(128, 1)
    attention: Literal["gqa", "mla"] = "gqa"  # grouped-query, or multi-head latent
    num_heads: int = number(4, 1)
    num_kv_heads: int = number(2, 1)  # gqa, as are the next two
    head_dim: int = number(32, 2)
    qk_norm: Literal["none", "head", "projection"] = "none"  # RMSNorm of queries and keys: of each head, or of all
    q_lora_rank: int = number(0, 0)  # mla: width of the queries' latent; 0: queries are projected at once
    kv_lora_rank: int = number(64, 1)  # mla: width of the latent of keys and values, which decoding caches
    qk_nope_head_dim: int = number(32, 1)  # mla: of a head's query and key, the part without RoPE ...
    qk_rope_head_dim: int = number(16, 2)  # ... and the part with it, whose key all heads share
    v_head_dim: int = number(32, 1)  # mla
    rope_theta: float = number(10000.0, 1.0)
    yarn: YarnConfig = field(default_factory=YarnConfig)
    ffw_dim: int = number(512, 1)  # hidden width of a dense feed-forward layer
    norm_eps: float = number(1e-6, 0.0)
    tied_embeddings: bool = False
    init_std: float = number(0.02, 0.0, changes="numbers")
    param_dtype: DType = choice("float32", "numbers")
    compute_dtype: DType = choice("float32", "numbers")
    # what a layer keeps for backward: all, matmuls, input
    remat: Literal["none", "dots", "full"] = choice("none", "speed")
    # Mixture of experts
    num_experts: int = number(0, 0)
    top_k: int = number(2, 1)
    num_shared_experts: int = number(0, 0)
    expert_ffw_dim: int = number(128, 1)  # hidden width of one expert, routed or shared
    first_dense: int = number(0, 0)  # the first layers keep a dense feed-forward
    moe_every: int = number(1, 1)  # after them, every n-th layer is MoE
    score: Literal["sigmoid", "softmax", "sqrt_softplus"] = "sigmoid"
    normalize_gates: bool = True
    gate_scale: float = number(1.0, 0.0)
    num_groups: int = number(1, 1)
    top_groups: int = number(1, 1)
    group_top: int = number(2, 1)  # how many experts' scores rank a group: 2 in DeepSeek-V3, 1 in V2
    router_jitter: float = number(0.0, 0.0, 0.99)  # Switch: router input times U(1-j, 1+j) in training
    random_second: bool = False  # GShard: the second expert is used with probability min(1, 2 x its gate)
    dispatch: Literal["auto", "local", "rounds", "ragged", "dense", "capacity"] = choice("auto", "speed")
    cpu_kernel: Literal["auto", "native", "xla"] = choice("auto", "speed")  # on CPUs experts multiply in C++, or in XLA
    quantization: Literal["none", "int8", "fp8"] = "none"  # the routed experts' products, forward and backward
    # room over the balanced load: of an expert ("capacity", which drops the rest), of a round ("rounds", "ragged")
    capacity_factor: float = number(1.25, 0.01, changes="speed")
    # Zero-computation experts (LongCat-Flash): ids num_experts and up, which return gate x their input
    num_zero_experts: int = number(0, 0)
    zero_share: float = number(0.25, 0.0, 0.99)  # share of all copies that a method with a bias gives to them
    class_starts: tuple[int, ...] = ()  # token ids at which class 1, 2, ... begins, each with a bias of its own
    # compile every layer apart: for reading the program, for it costs compile time
    unroll_layers: bool = choice(False, "speed")
    mtp_depth: int = number(0, 0)  # multi-token prediction: modules that predict the token after the next, and so on


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW behind gradient clipping; `schedule` shapes the learning rate over `num_steps`."""

    learning_rate: float = number(1e-3, 0.0)
    schedule: Literal["constant", "cosine", "wsd", "multistep"] = "cosine"
    warmup_steps: int = number(0, 0)
    end_ratio: float = number(0.1, 0.0, 1.0)  # last learning rate over the peak (cosine, wsd)
    decay_fraction: float = number(0.2, 0.0, 1.0)  # wsd: the last share of the run, decaying
    milestones: tuple[float, ...] = (0.8, 0.9)  # multistep: shares of the run at which the rate drops ...
    milestone_ratio: float = number(0.316, 0.0, 1.0)  # ... by this factor
    b1: float = number(0.9, 0.0, 1.0)
    b2: float = number(0.95, 0.0, 1.0)
    eps: float = number(1e-8, 0.0)
    weight_decay: float = number(0.1, 0.0)
    clip_norm: float = number(1.0, 0.0)  # 0 clips nothing
    moment_dtype: DType = "float32"
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of parameters and moments that are kept in bfloat16


@dataclass(frozen=True)
class DataConfig:
    """`path=""` is the embedded corpus; otherwise a folder written by `python -m moe_jax.data.prepare`."""

    path: str = choice("", "nothing")  # what is there changes numbers, and is known by its fingerprint
    weights: dict[str, float] = field(default_factory=dict)  # domain -> share; empty: as large as it is
    verify: Literal["auto", "full", "sizes"] = choice("auto", "nothing")  # auto: sha256 below 10 GB
    # held-out sequences per domain while training; 0: all of them
    eval_sequences: int = number(0, 0, changes="nothing")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; one of them may be -1, which takes the devices that the others leave.

    The batch is split over replica, data and expert, experts over expert, widths and heads over tensor.
    """

    replica: int = number(1, -1)
    data: int = number(-1, -1)
    expert: int = number(1, -1)
    tensor: int = number(1, -1)


@dataclass(frozen=True)
class CheckpointConfig:
    """`keep` newest checkpoints stay; `fallback` may restore an older one when the newest is damaged."""

    keep: int = number(2, 1)
    verify: Literal["auto", "full", "sizes"] = "auto"  # auto: sha256 below 10 GB
    fallback: bool = False


DROPLESS = ("auto", "local", "rounds", "ragged")  # choices of `model.dispatch` that give the same output


@dataclass(frozen=True)
class Config:
    """A run. Hashable, and equal configs make equal runs."""

    seed: int = number(0, 0, 2**31 - 1)
    num_steps: int = number(1000, 1)
    batch_size: int = number(8, 1)  # sequences per optimizer step, over all devices
    micro_batches: int = number(1, 1, changes="speed")  # gradients, counts and losses are those of the whole step
    sequence_length: int = number(128, 1)
    log_every: int = number(10, 1, changes="nothing")
    eval_every: int = number(500, 0, changes="nothing")  # 0: only after the last step
    save_every: int = number(500, 0, changes="nothing")  # 0: only after the last step
    # interference, churn and more, on a step's first micro-batch; 0: never
    measure_every: int = number(0, 0, changes="nothing")
    # router logits of a step's first micro-batch, into scores/; 0: never
    record_scores_every: int = number(0, 0, changes="nothing")
    heartbeat_seconds: int = number(100, 1, changes="nothing")  # a process of the run not heard of for so long is dead
    # a step that takes longer is stuck and ends the run; 0: never
    step_timeout_seconds: int = number(1800, 0, changes="nothing")
    mtp_weights: tuple[float, ...] = (0.3,)  # of the loss of multi-token prediction, one after the other ...
    mtp_milestones: tuple[float, ...] = ()  # ... from these shares of the run on
    # a workdir whose newest checkpoint gives a new run its parameters and its bias
    init_from: str = choice("", "nothing")
    model: ModelConfig = section(ModelConfig, "model")
    balance: tuple[BalanceEntry, ...] = ()
    optimizer: OptimizerConfig = section(OptimizerConfig, "numbers")
    data: DataConfig = section(DataConfig, "numbers")
    mesh: MeshConfig = section(MeshConfig, "speed")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "nothing")
    # XLA's, for the train step; those named xla_tpu_... (gpu, cpu) are read on that platform only
    compiler_options: dict[str, str] = section(dict, "speed")

    def __hash__(self) -> int:
        return hash(repr(self))


T = TypeVar("T")


class SourceGone(ValueError):
    """What a config file reads its values from is gone. `source` is the workdir that the run starts from.

    A run that started from it has a config of its own by now, and resumes with that.
    """

    def __init__(self, source: str, sentence: str) -> None:
        super().__init__(sentence)
        self.source = source


def default(**overrides: Any) -> Any:
    """A complete `ConfigDict`: every key with its default, then `overrides`, nested dicts merged.

    What a config file returns. Being complete, every key of it can be overridden from the command line,
    the options of the named balancing methods included.

    Args:
        **overrides: top-level keys; `model=dict(num_layers=2)` changes that one key of `model`.

    Returns:
        `ml_collections.ConfigDict`.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    from ml_collections import ConfigDict

    balance = overrides.pop("balance", {})
    config = _build(Config, {**overrides, "balance": {}}, "")
    plain = {f.name: _plain(getattr(config, f.name)) for f in fields(Config) if f.name != "balance"}
    plain["balance"] = {e.label: _entry_as_dict(e) for e in balance_entries(balance)}
    plain["data"]["weights"] = named(config.data.weights)
    return ConfigDict({k: _with_placeholders(v) for k, v in plain.items()})


def named(values: Mapping[str, Any]) -> Any:
    """A `ConfigDict` of the values, whose names may have dots in them, as those of domains: `{"wiki.en": 2.0}`."""
    from ml_collections import ConfigDict

    return ConfigDict(dict(values), allow_dotted_keys=True)


def validate(config: Any) -> Config:
    """Turn a ConfigDict (or nested dict) into a frozen `Config`, or raise one sentence.

    Args:
        config: `ml_collections.ConfigDict` or mapping; absent keys take their default.

    Raises:
        ValueError: the first broken rule, with key, value, rule and fix.
    """
    if isinstance(config, Config):
        return config
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ValueError(f"the config is {config!r} and must be a dict of keys; return moe_jax.config.default(...).")
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    entries = balance_entries(plain.pop("balance", {}))
    result = dataclasses.replace(_build(Config, plain, ""), balance=entries)
    for check in RULES:
        check(result)
    return result


def as_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON values, the inverse of `validate`."""
    plain = {f.name: _plain(getattr(config, f.name)) for f in fields(Config) if f.name != "balance"}
    plain["balance"] = {e.label: _entry_as_dict(e) for e in config.balance}
    return plain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys: how a difference is shown. An empty dict has no keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every dotted key whose value differs."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def keys_that_change(*effects: Effect) -> set[str]:
    """The dotted keys of `Config` whose other value has one of the effects; those of `balance` change numbers.

    What a key says is about itself alone: `free_keys` knows where it depends on another.
    """
    return set(_keys_that_change(effects, Config, "", "numbers"))


def _keys_that_change(effects: tuple[Effect, ...], cls: type, path: str, inherited: Effect) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        effect = f.metadata.get("changes") or inherited
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _keys_that_change(effects, hints[f.name], f"{path}{f.name}.", effect)
        elif effect in effects:
            yield path + f.name


def free_keys(config: Config) -> set[str]:
    """The dotted keys that may change while a run is under way: no number of its training depends on them.

    The number of micro-batches is not free where routing or a loss is computed by micro-batch, or draws by it.
    """
    free = keys_that_change("speed", "nothing")
    m = config.model
    if m.dispatch == "capacity":
        free -= {"model.dispatch", "model.capacity_factor"}
    draws = m.router_jitter > 0 or m.random_second
    if draws or any(e.options.by_micro_batch for e in config.balance):
        free -= {"micro_batches"}
    return free


def changed_numbers(there: Config, here: Config) -> list[str]:
    """Lines `key: there -> here` for every key by which two configs train other numbers; empty for one run's."""
    free = free_keys(there) & free_keys(here)
    lines = differences(*(json.loads(json.dumps(as_dict(c))) for c in (there, here)))
    keys = (line.partition(":")[0] for line in lines)
    return [line for line, key in zip(lines, keys, strict=True) if not any(f"{key}.".startswith(f"{f}.") for f in free)]


def balance_entries(mapping: Mapping[str, Any] | None) -> tuple[BalanceEntry, ...]:
    """Check `config.balance` and give its entries, sorted by label, so that order never matters.

    Args:
        mapping: label -> options; the label is the method's name unless `method=` names another.

    Raises:
        ValueError: unknown method or option, wrong type, or methods that contradict each other.
    """
    if mapping is not None and not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        raise ValueError(
            f"balance={mapping!r} must be a mapping from method to options; "
            "write balance=dict(bias_sign=dict(rate=1e-3)), or balance={} for none."
        )
    entries = tuple(_balance_entry(label, options) for label, options in sorted((mapping or {}).items()))
    check_together(entries)
    return entries


def _balance_entry(label: str, options: Any) -> BalanceEntry:
    path = f"balance.{label}"
    if not isinstance(options, Mapping) and not hasattr(options, "items"):
        raise ValueError(f"{path}={options!r} must be a dict of options; write {label}=dict() for its defaults.")
    options = dict(options.items())
    method = options.pop("method", label)
    if not isinstance(method, str) or method not in BALANCE_METHODS:
        hint = did_you_mean(str(method), BALANCE_METHODS)
        raise ValueError(
            f"{path} names the balancing method {method!r}, which does not exist{hint}; "
            f"the methods are {', '.join(sorted(BALANCE_METHODS))}."
        )
    if label in SHARED or not re.fullmatch(r"\w+", label):
        raise ValueError(
            f"{path}: a label is one word, not 'bias' or 'loads' or 'direction', which all methods share; "
            "choose another."
        )
    entry = BalanceEntry(label, method, _build(BALANCE_METHODS[method], options, path + "."))
    check_options(path, entry.options)
    return entry


SHARED = ("bias", "direction", "loads")  # names in a balancer's state and statistics that no label may take


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
        if e.method in BIAS_METHODS and classes != len(m.class_starts) + 1:
            raise ValueError(
                f"{path} has num_classes={classes}, which must be the number of classes that model.class_starts="
                f"{m.class_starts} makes, {len(m.class_starts) + 1} (expert_threshold knows one only); change one."
            )
        if e.method in WITH_QUANTILES and m.score == "sqrt_softplus":
            raise ValueError(
                f"{path} counts scores between 0 and 1, but those of model.score='sqrt_softplus' are unbounded; "
                "set model.score='sigmoid' or 'softmax'."
            )
        if e.method in SELECTORS | {"quantile"} and m.num_groups > 1 and m.top_groups < m.num_groups:
            raise ValueError(
                f"{path} knows no group limit, but model.top_groups={m.top_groups} of model.num_groups="
                f"{m.num_groups}; set model.top_groups={m.num_groups}, or another method."
            )
        if e.method in SELECTORS and m.random_second:
            raise ValueError(
                f"{path} does not rank a token's experts, so that model.random_second=True has no second to drop; "
                "set model.random_second=False."
            )
        if getattr(o, "level", "expert") != "expert" or e.method == "device_capacity":
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
    if m.class_starts and not any(e.method in BIAS_METHODS for e in c.balance):
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
        if e.method in SELECTORS | {"quantile"}:
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


def num_moe_layers(m: ModelConfig) -> int:
    """L: how many layers route tokens to experts, those of multi-token prediction last."""
    return (m.num_layers - m.first_dense) // m.moe_every + m.mtp_depth if m.num_experts else 0


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
    if m.num_experts and sizes["expert"] > 1 and m.dispatch == "local":
        raise ValueError(
            f"model.dispatch='local' needs every expert on every device, but mesh.expert={sizes['expert']} splits "
            "them; set model.dispatch='auto'."
        )


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """(replica, data, expert, tensor) on so many devices, with -1 filled in; without -1 some may be left over.

    Raises:
        ValueError: there are too few devices, or their number does not divide.
    """
    sizes = tuple(getattr(mesh, f.name) for f in fields(MeshConfig))
    known = math.prod(s for s in sizes if s != -1)
    written = ", ".join(f"{f.name}={s}" for f, s in zip(fields(MeshConfig), sizes, strict=True))
    if -1 in sizes and num_devices % known == 0:
        return tuple(num_devices // known if s == -1 else s for s in sizes)
    if -1 in sizes:
        raise ValueError(
            f"mesh ({written}) needs a multiple of {known} devices, but there are {num_devices}; change the sizes."
        )
    if known > num_devices:
        raise ValueError(
            f"mesh ({written}) needs {known} devices, but there are {num_devices}; "
            "change the sizes, or set one to -1, which takes all that are left."
        )
    return sizes


def resolve(config: Config, num_devices: int, platform: str = "") -> Config:
    """The config with the mesh's sizes on so many devices ("cpu", "gpu", "tpu"), every rule on them checked.

    Raises:
        ValueError: the sizes do not fit the devices, the model or the batch; the platform lacks a collective.
    """
    sizes = mesh_sizes(config.mesh, num_devices)
    if platform == "cpu" and config.model.num_experts and config.model.dispatch == "ragged":
        raise ValueError(
            "model.dispatch='ragged' needs ragged_all_to_all, which exists on TPU and GPU but not on CPU; "
            "set model.dispatch='auto' or 'rounds'."
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


# --- building typed sections from mappings ------------------------------------------------------------------


def _build(cls: type[T], mapping: Mapping[str, Any], path: str) -> T:
    """An instance of the dataclass `cls` from a mapping: unknown keys, wrong types and ranges are sentences."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in known:
            raise ValueError(
                f"{path}{key} is not a configuration key{did_you_mean(key, known)}; "
                f"the keys {'of ' + path[:-1] if path else 'at the top'} are {', '.join(known)}."
            )
        if cls is Config and key == "balance":
            continue
        values[key] = _typed(hints[key], value, path + key)
        _check_range(known[key].metadata, values[key], path + key)
    return cls(**values)


def _typed(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type, or a sentence."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ValueError(f"{path}={value!r} must be a dict of keys; write {path}=dict(...).")
        return _build(hint, dict(value.items()), path + ".")  # type: ignore[arg-type]
    if origin is types.UnionType:
        return None if value is None else _typed(typing.get_args(hint)[0], value, path)
    if origin is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, bool):
            value = FORMER.get(path, {}).get(value, value)
        if value not in choices:
            raise ValueError(
                f"{path}={value!r} must be one of {', '.join(map(repr, choices))}{did_you_mean(str(value), choices)}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{path}={value!r} must be a tuple; write ({value!r},).")
        return tuple(_typed(typing.get_args(hint)[0], v, path) for v in value)
    if origin is dict:
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ValueError(f"{path}={value!r} must be a dict; write {path}=dict(name=number).")
        return {str(k): _typed(typing.get_args(hint)[1], v, f"{path}.{k}") for k, v in value.items()}
    return _scalar(hint, value, path)


FORMER = {"model.qk_norm": {False: "none", True: "head"}}  # values of keys that once were booleans, in old workdirs


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(
            f"{path}={value!r} must be {article(hint)}, not {type(value).__name__}; write it as {hint.__name__}."
        )
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{path}={value!r} must be a finite number; give one.")
    return value


def article(hint: type) -> str:
    """What a value of the type is called in a sentence."""
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
    return names.get(hint, hint.__name__)


def _check_range(limits: Mapping[str, Any], value: Any, path: str) -> None:
    low, high = limits.get("low"), limits.get("high")
    if value is None:
        return
    if low is not None and value < low:
        raise ValueError(f"{path}={value} must be at least {low}; raise it.")
    if high is not None and value > high:
        raise ValueError(f"{path}={value} must be at most {high}; lower it.")


def did_you_mean(word: str, known: Any) -> str:
    """A hint at the closest known word, or nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples kept: what ConfigDict holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _entry_as_dict(entry: BalanceEntry) -> dict[str, Any]:
    options = _plain(entry.options)
    return options if entry.label == entry.method else {"method": entry.method, **options}


def _with_placeholders(value: Any) -> Any:
    """None becomes a typed placeholder, for ConfigDict could not override it otherwise."""
    from ml_collections import config_dict

    if isinstance(value, dict):
        return {k: _with_placeholders(v) for k, v in value.items()}
    return config_dict.placeholder(int) if value is None else value


def complete(config: Any) -> Any:
    """The ConfigDict (or dict) of a config file with every key; what is no mapping is left for `validate`."""
    from ml_collections import ConfigDict, FrozenConfigDict

    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        return config
    if isinstance(config, FrozenConfigDict) or not isinstance(config, ConfigDict):
        config = ConfigDict(config.to_dict() if hasattr(config, "to_dict") else config)
    entries = config.get("balance") or {}
    with config.unlocked():
        _fill(config, default(balance=entries.to_dict() if hasattr(entries, "to_dict") else entries))
    return config


def _fill(config: Any, full: Any) -> None:
    """Add what `config` lacks of `full`, in place, so that references between keys stay."""
    for key in full:
        if key not in config:
            config[key] = full.get_ref(key) if full.get(key) is None else full[key]
        elif hasattr(full[key], "to_dict") and hasattr(config[key], "to_dict"):
            _fill(config[key], full[key])
