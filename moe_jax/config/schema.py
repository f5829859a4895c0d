"""Every key of a config: its type, its default, its range, and what changing it affects.

Imports no jax, so that a mistake is reported before jax is loaded.
"""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

from moe_jax.config.balance import BalanceEntry
from moe_jax.config.dispatchers import DISPATCHERS
from moe_jax.config.fields import DType, choice, number, section
from moe_jax.config.optimizer import EmaConfig, GuardConfig, OptimizerConfig, Part
from moe_jax.config.scaling import ScalingConfig

# what a block can keep for its backward pass: rows that came from other devices and their gates (of the first round),
# with a latent also its sum over a token's experts; attention's result, the residual stream after attention, and the
# experts' gate and up before the activation
Kept = Literal["rows", "attention", "residual", "hidden"]
REMAT_KEEP: tuple[Kept, ...] = ("rows", "attention", "residual")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN: RoPE for contexts `factor` times the `original_length` of training; 1 scales nothing.

    A pair of dimensions that rotates more than `beta_fast` times over the original length keeps its frequency; the
    frequency of a pair that rotates fewer than `beta_slow` times is divided by the factor. `mscale` and
    `mscale_all_dim` sharpen the softmax, as in DeepSeek's code (`model.rope.rope`). Source: arXiv 2309.00071.
    """

    factor: float = number(1.0, 1.0)
    original_length: int = number(4096, 1)
    beta_fast: float = number(32.0, 0.0)
    beta_slow: float = number(1.0, 0.0)
    mscale: float = number(1.0, 0.0)
    mscale_all_dim: float = number(0.0, 0.0)
    truncate: bool = True  # whether these two pairs are rounded, outwards; not in gpt-oss


@dataclass(frozen=True)
class LongRopeConfig:
    """LongRoPE: every pair of dimensions turns slower by a factor of its own; without factors RoPE is as it was.

    Sequences of at most `original_length` tokens have the `short_factor` of each pair, and rotated queries and keys are
    `short_mscale` times as long. A longer sequence is refused: of `long_factor` and `long_mscale`, which are for it,
    implementations differ in how they pass from the one to the other. They are kept for export. Source: arXiv
    2402.13753; the two lengths as in Phi-3.5-MoE's code.
    """

    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float = number(1.0, 0.0)
    long_mscale: float = number(1.0, 0.0)
    original_length: int = number(4096, 1)


@dataclass(frozen=True)
class LocalRopeConfig:
    """RoPE of windowed layers if it is not that of the others: its `theta`, without YaRN or LongRoPE; 0: the same."""

    theta: float = number(0.0, 0.0)
    partial_rotary_factor: float = number(1.0, 0.0, 1.0)  # as model.partial_rotary_factor


@dataclass(frozen=True)
class ModelConfig:
    """One transformer. With `num_experts=0` it is dense, and the keys about experts are unused."""

    vocab_size: int = number(264, 1)  # bytes + separator = 257, rounded up so that it divides by 8
    num_layers: int = number(4, 1)
    embed_dim: int = number(128, 1)
    attention: Literal["gqa", "mla"] = "gqa"  # grouped-query, or multi-head latent
    num_heads: int = number(4, 1)
    num_kv_heads: int = number(2, 1)  # gqa, like the next two keys
    head_dim: int = number(32, 2)
    qk_norm: Literal["none", "head", "projection"] = "none"  # RMSNorm of queries and keys: of each head, or of all
    qkv_bias: bool = False  # gqa: queries, keys and values have a bias
    out_bias: bool = False  # gqa: the projection of attention's result has a bias
    partial_rotary_factor: float = number(1.0, 0.0, 1.0)  # gqa: the share of a head, from its start, that RoPE rotates
    # how many tokens, itself included, a token of a local layer sees; 0: all layers are global, where it sees all
    window: int = number(0, 0)
    window_pattern: str = "L"  # which layers are local (L) and global (G), repeated; "LLLG" ends every 4 with a global
    rope_layers: Literal["all", "local"] = "all"  # gqa: which layers have RoPE; EXAONE 4 has none in global ones
    local_rope: LocalRopeConfig = field(default_factory=LocalRopeConfig)
    attention_sinks: bool = False  # gqa: every head's softmax has another term, a learned logit that belongs to no key
    # gqa: attention's result, before its projection, times a gate of each number ("element") or of each head
    attention_gate: Literal["none", "element", "head"] = "none"
    gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"  # of that gate: AFMoE's, Laguna's
    q_lora_rank: int = number(0, 0)  # mla: width of the queries' latent; 0: queries are projected directly
    kv_lora_rank: int = number(64, 1)  # mla: width of the latent of keys and values, which decoding caches
    qk_nope_head_dim: int = number(32, 1)  # mla: width of the part of a head's query and key without RoPE ...
    qk_rope_head_dim: int = number(16, 2)  # ... and of the part with RoPE, whose key all heads share
    v_head_dim: int = number(32, 1)  # mla
    # mla: how many tokens the sparse attention of a converted model picks (DeepSeek-V3.2, GLM-5); ours sees all, which
    # is the same up to this length, and longer sequences are refused; 0: no limit
    index_topk: int = number(0, 0)
    rope_theta: float = number(10000.0, 1.0)
    yarn: YarnConfig = field(default_factory=YarnConfig)
    longrope: LongRopeConfig = field(default_factory=LongRopeConfig)
    attention_multiplier: float = number(0.0, 0.0)  # gqa: the factor of query . key; 0: 1 / sqrt(head_dim)
    # Granite's factors: of embeddings, of what attention and feed-forward add, and what logits are divided by
    embedding_multiplier: float = number(1.0, 0.0)
    residual_multiplier: float = number(1.0, 0.0)
    logits_scaling: float = number(1.0, 1e-6)
    ffw_dim: int = number(512, 1)  # hidden width of a dense feed-forward layer
    # of all feed-forward layers, dense or of experts; the limit bounds gate and up before it (0: no limit), as in
    # DeepSeek-V4 (swiglu, 10) and gpt-oss (swiglu_oai, 7); with relu2 (Nemotron) layers have no gate
    activation: Literal["swiglu", "geglu", "swiglu_oai", "relu2"] = "swiglu"
    activation_limit: float = number(0.0, 0.0)
    # of the residual stream: RMSNorm, or LayerNorm with scale and shift (Phi-3.5-MoE); norms within attention and of
    # what the router reads are RMSNorm
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = number(1e-6, 0.0)
    norm_after: bool = False  # OLMo 2: norms of what attention and feed-forward return, not of what they read
    sandwich_norm: bool = False  # AFMoE: norms of both
    tied_embeddings: bool = False
    head_bias: bool = False  # Phi-3.5-MoE: logits have a bias
    init_std: float = number(0.02, 0.0, changes="numbers")
    # the small model whose hyperparameters this one takes over, by multipliers that follow from the sizes of both
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    param_dtype: DType = choice("float32", "numbers")
    compute_dtype: DType = choice("float32", "numbers")
    # what a layer keeps for the backward pass: all activations, the matrix products, only its input, or its input and
    # the tensors of remat_keep, of which those of remat_offload wait in the host's memory
    remat: Literal["none", "dots", "full", "names"] = choice("none", "speed")
    remat_keep: tuple[Kept, ...] = choice(REMAT_KEEP, "speed")
    remat_offload: tuple[Kept, ...] = choice((), "speed")
    # Mixture of experts
    num_experts: int = number(0, 0)
    top_k: int = number(2, 1)
    num_shared_experts: int = number(0, 0)
    expert_ffw_dim: int = number(128, 1)  # hidden width of one expert, routed or shared
    shared_ffw_dim: int = number(0, 0)  # hidden width of one shared expert; 0: expert_ffw_dim
    shared_gate: bool = False  # Qwen2-MoE: the output of the shared experts times sigmoid(w . x)
    # LatentMoE: the width that routed experts read and write, between two projections that they share; 0: embed_dim
    latent_dim: int = number(0, 0)
    expert_bias: bool = False  # gpt-oss: routed experts add a bias to gate, up and down
    first_dense: int = number(0, 0)  # how many layers, from the first, have a dense feed-forward
    moe_every: int = number(1, 1)  # after them, every n-th layer is MoE
    score: Literal["sigmoid", "softmax", "sqrt_softplus", "relu"] = "sigmoid"
    normalize_gates: bool = True
    gate_scale: float = number(1.0, 0.0)
    # SparseMixer's gates (Phi-3.5-MoE, 0.01): of experts chosen one after the other, each gate is a softmax over those
    # that are left and whose logits are no more than twice this share below the best of them; 0: gates of scores
    sparsemixer: float = number(0.0, 0.0)
    num_groups: int = number(1, 1)
    top_groups: int = number(1, 1)
    group_top: int = number(2, 1)  # how many experts' scores rank a group: 2 in DeepSeek-V3, 1 in V2
    # gpt-oss: a learned bias of the logits, which affects the choice and the gates
    router_bias: bool = False
    # RMSNorm of what the router reads, without or with a learned scale, and then a factor; Gemma 4: "scaled", and
    # embed_dim ** -0.5
    router_norm: Literal["none", "plain", "scaled"] = "none"
    router_scale: float = number(1.0, 1e-6)
    expert_scale: bool = False  # Gemma 4: a learned factor for each expert, on its gates
    select_by: Literal["scores", "logits"] = "scores"  # what the selection bias is added to: in Marin, logits
    gate_on: Literal["output", "input"] = "output"  # Llama 4: an expert reads gate x token, its output is not weighed
    router_jitter: float = number(0.0, 0.0, 0.99)  # Switch: router input times U(1-j, 1+j) in training
    random_second: bool = False  # GShard: the second expert is used with probability min(1, 2 x its gate)
    dispatch: str = choice("auto", "speed", among=DISPATCHERS)  # how copies reach their experts
    cpu_kernel: Literal["auto", "native", "xla"] = choice("auto", "speed")  # kernels of CPUs: in C++, or XLA
    quantization: Literal["none", "int8", "fp8"] = "none"  # the routed experts' products, forward and backward
    # over the balanced load: of an expert ("capacity", which drops the rest), or of a round
    capacity_factor: float = number(1.25, 0.01, changes="speed")
    # Zero-computation experts (LongCat-Flash): ids num_experts and up, which return gate x their input
    num_zero_experts: int = number(0, 0)
    zero_share: float = number(0.25, 0.0, 0.99)  # share of all copies that a method with a bias gives to them
    class_starts: tuple[int, ...] = ()  # token ids at which class 1, 2, ... begins, each with a bias of its own
    # compile every layer separately: the program is easier to read, but takes longer to compile
    unroll_layers: bool = choice(False, "speed")
    mtp_depth: int = number(0, 0)  # modules of multi-token prediction; the first predicts the token after the next


@dataclass(frozen=True)
class AnticipationConfig:
    """Anticipatory routing: the experts of a step are chosen by the parameters of `delay` steps before; 0: off.

    Always, or with `spike` > 0 for `hold` steps after a loss that is more than `spike` standard deviations above the
    running mean of the last `window` losses. Source: DeepSeek-V4 (arXiv 2606.19348) section 4.2.3.
    """

    delay: int = number(0, 0)
    spike: float = number(0.0, 0.0)
    hold: int = number(100, 1)
    window: int = number(100, 2)


Weights = Literal["last", "ema"]  # which weights of a checkpoint: those of its step, or their moving average


@dataclass(frozen=True)
class DataConfig:
    """`path=""` is the embedded corpus; otherwise a folder written by `python -m moe_jax.data.prepare`."""

    path: str = choice("", "nothing")  # the contents change numbers, and are identified by a fingerprint
    weights: dict[str, float] = field(default_factory=dict)  # domain -> share; empty: in proportion to size
    # a sequence is a window of the stream, or holds whole documents, packed by best fit and padded
    packing: Literal["stream", "best_fit"] = "stream"
    verify: Literal["auto", "full", "sizes"] = choice("auto", "nothing")  # auto: sha256 below 10 GB
    # held-out sequences per domain while training; 0: all of them
    eval_sequences: int = number(0, 0, changes="nothing")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; one of them may be -1, which takes all remaining devices.

    The sequences of a batch are split over replica, data and expert, and each is cut over sequence; experts are split
    over expert; widths and heads over tensor.
    """

    replica: int = number(1, -1)
    data: int = number(-1, -1)
    expert: int = number(1, -1)
    sequence: int = number(1, -1)
    tensor: int = number(1, -1)


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers of the log go besides (`runtime.sinks`); the services' own variables choose server and mode."""

    wandb: str = ""  # the project in Weights & Biases; "": none
    mlflow: str = ""  # the experiment in MLflow; "": none
    name: str = ""  # of the run there; "": the workdir's


@dataclass(frozen=True)
class CheckpointConfig:
    """The newest `keep` checkpoints are kept; `fallback` restores an older one if the newest is damaged."""

    keep: int = number(2, 1)
    verify: Literal["auto", "full", "sizes"] = "auto"  # auto: sha256 below 10 GB
    fallback: bool = False


@dataclass(frozen=True)
class Config:
    """A training run. Hashable; equal configs make equal runs."""

    seed: int = number(0, 0, 2**31 - 1, changes="data")
    num_steps: int = number(1000, 1)
    batch_size: int = number(8, 1)  # sequences per optimizer step, over all devices
    micro_batches: int = number(1, 1, changes="speed")  # gradients, counts and losses are those of the whole step
    sequence_length: int = number(128, 1)
    log_every: int = number(10, 1, changes="nothing")
    eval_every: int = number(500, 0, changes="nothing")  # 0: only after the last step
    save_every: int = number(500, 0, changes="nothing")  # 0: only after the last step
    # also at the first logged step this long after the newest save; 0: never
    save_every_seconds: float = number(0.0, 0.0, changes="nothing")
    # interference, churn and more, on a step's first micro-batch; 0: never
    measure_every: int = number(0, 0, changes="nothing")
    # router logits of a step's first micro-batch, into scores/; 0: never
    record_scores_every: int = number(0, 0, changes="nothing")
    heartbeat_seconds: int = number(100, 1, changes="nothing")  # a process silent for this long counts as dead
    # a step that takes longer is stuck and ends the run; 0: never
    step_timeout_seconds: int = number(1800, 0, changes="nothing")
    mtp_weights: tuple[float, ...] = (0.3,)  # weights of the loss of multi-token prediction, one after the other ...
    mtp_milestones: tuple[float, ...] = ()  # ... the next one from each of these shares of the run on
    # a workdir: a new run starts with the parameters and the bias of its newest checkpoint
    init_from: str = choice("", "nothing")
    # "WORKDIR@STEP": a new run starts with the whole state of that checkpoint, and continues from its step
    branch_from: str = choice("", "nothing")
    model: ModelConfig = section(ModelConfig, "model")
    balance: tuple[BalanceEntry, ...] = ()
    anticipation: AnticipationConfig = section(AnticipationConfig, "numbers")
    optimizer: OptimizerConfig = section(OptimizerConfig, "numbers")
    ema: EmaConfig = section(EmaConfig, "numbers")
    guard: GuardConfig = section(GuardConfig, "numbers")
    data: DataConfig = section(DataConfig, "data")
    mesh: MeshConfig = section(MeshConfig, "speed")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "nothing")
    tracking: TrackingConfig = section(TrackingConfig, "nothing")
    # XLA's options for the train step; xla_tpu_..., xla_gpu_... and xla_cpu_... apply on that platform only
    compiler_options: dict[str, str] = section(dict, "speed")

    def __hash__(self) -> int:
        return hash(repr(self))


def branch_point(config: Config) -> tuple[str, int]:
    """(WORKDIR, STEP) of `branch_from`, divided at its last @; ("", 0) for a run that begins at step 0.

    Raises:
        ValueError: `branch_from` has another form.
    """
    text = config.branch_from
    workdir, _, step = text.rpartition("@")
    if text and not (workdir and re.fullmatch(r"[0-9]{1,8}", step)):
        raise ValueError(
            f"branch_from={text!r} must be WORKDIR@STEP, a workdir and the steps done by one of its checkpoints; write "
            "it like 'runs/trunk@1000'."
        )
    return workdir, int(step or 0)


def num_moe_layers(m: ModelConfig) -> int:
    """L, the number of layers that route tokens to experts, including those of multi-token prediction."""
    if m.num_experts == 0:
        return 0
    return (m.num_layers - m.first_dense) // m.moe_every + m.mtp_depth


def parts(m: ModelConfig) -> tuple[Part, ...]:
    """The parts that the model has."""
    moe = m.num_experts > 0
    has: dict[Part, bool] = dict(
        embedding=True,
        head=not m.tied_embeddings or m.head_bias,
        attention=True,
        dense=num_moe_layers(m) < m.num_layers + m.mtp_depth,
        router=moe,
        experts=moe,
        shared=moe and m.num_shared_experts > 0,
        mtp=m.mtp_depth > 0,
        norms=True,
    )
    return tuple(part for part, present in has.items() if present)


def num_choices(m: ModelConfig) -> int:
    """The number of experts that a router chooses from, with zero-computation experts, which come last."""
    return m.num_experts + m.num_zero_experts


def shared_width(m: ModelConfig) -> int:
    """The hidden width of the shared experts together."""
    return m.num_shared_experts * (m.shared_ffw_dim or m.expert_ffw_dim)


def is_gated(m: ModelConfig) -> bool:
    """Whether feed-forward layers have a gate beside up and down."""
    return m.activation != "relu2"


def rotated_width(m: ModelConfig) -> int:
    """How many dimensions of a head of grouped-query attention, the first ones, RoPE rotates."""
    return int(m.head_dim * m.partial_rotary_factor)  # rounded as transformers does


def local_rotated_width(m: ModelConfig) -> int:
    """As `rotated_width`, in local layers that have a RoPE of their own."""
    return int(m.head_dim * m.local_rope.partial_rotary_factor)


def local_layers(m: ModelConfig) -> tuple[bool, ...]:
    """For each layer whether it sees a window only."""
    return tuple(m.window > 0 and m.window_pattern[i % len(m.window_pattern)] == "L" for i in range(m.num_layers))


def routed_width(m: ModelConfig) -> int:
    """The width of what a routed expert reads and writes, and of the rows that travel to it."""
    return m.latent_dim or m.embed_dim


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """The sizes of all axes on `num_devices`, with -1 filled in; without -1 some devices may be unused.

    Raises:
        ValueError: there are too few devices, or the other sizes do not divide their number.
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
            "change the sizes, or set one to -1, which takes all remaining devices."
        )
    return sizes
