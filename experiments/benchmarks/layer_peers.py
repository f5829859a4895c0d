"""The MoE layers of other projects as contestants of `layer`, with our weights in their layout."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.peers import Absent, need, quiet, torch_here
from experiments.benchmarks.problem import Contestant, DType, Outcome, Problem, Shape


class Task(NamedTuple):
    """The problem and the setting for a peer; the platform is "cpu" or "gpu"."""

    shape: Shape
    problem: Problem
    dtype: DType
    platform: str


class _Layer(NamedTuple):
    """A layer in torch: its forward pass, its parameters, and a function that turns their gradients into our layout."""

    forward: Callable[[Any], Any]
    parameters: list[Any]
    read: Callable[..., tuple]


PEERS = ("transformers_deepseek_v3", "transformers_qwen3_moe", "torchtitan", "maxtext")
EAGER = "transformers_deepseek_v3_eager"


def builders(task: Task) -> dict[str, Callable[[], Contestant]]:
    """Every peer by name; building one raises Absent if it cannot take part."""
    return {
        "transformers_deepseek_v3": lambda: transformers_deepseek_v3(task, "grouped_mm"),
        "transformers_qwen3_moe": lambda: transformers_qwen3_moe(task, "grouped_mm"),
        "torchtitan": lambda: torchtitan(task),
        "maxtext": lambda: maxtext(task),
        EAGER: lambda: transformers_deepseek_v3(task, "eager"),
    }


def transformers_deepseek_v3(task: Task, implementation: str) -> Contestant:
    """transformers' DeepseekV3MoE, with sigmoid scores: its router and its experts, without the shared expert."""
    torch = torch_here(task.platform)
    _transformers()
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    t, d, e, h, k = task.shape
    config = theirs.DeepseekV3Config(
        hidden_size=d,
        moe_intermediate_size=h,
        n_routed_experts=e,
        num_experts_per_tok=k,
        n_shared_experts=1,  # not run, but the class requires one
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = theirs.DeepseekV3MoE(config)
    _fill(torch, task, block.gate, weight=task.problem.router.T, e_score_correction_bias=np.zeros(e, np.float32))
    _fill_experts(torch, task, block.experts)

    def forward(x: Any) -> Any:
        _, gates, ids = block.gate(x)
        return block.experts(x.view(t, d), ids, gates).view(x.shape)

    return _in_torch(torch, task, _hugging_face(task, forward, block))


def transformers_qwen3_moe(task: Task, implementation: str) -> Contestant:
    """transformers' Qwen3MoeSparseMoeBlock, with softmax scores and normalised gates."""
    torch = torch_here(task.platform)
    _transformers()
    from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs

    _, d, e, h, k = task.shape
    config = theirs.Qwen3MoeConfig(
        hidden_size=d, moe_intermediate_size=h, num_experts=e, num_experts_per_tok=k, norm_topk_prob=True
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = theirs.Qwen3MoeSparseMoeBlock(config)
    _fill(torch, task, block.gate, weight=task.problem.router.T)
    _fill_experts(torch, task, block.experts)
    return _in_torch(torch, task, _hugging_face(task, block, block))


def torchtitan(task: Task) -> Contestant:
    """torchtitan's MoE, with sigmoid scores. It multiplies in bfloat16; in float32 it runs without the casts."""
    torch = torch_here(task.platform)
    need("torchtitan")
    warnings.filterwarnings("ignore", "In CPU autocast")  # its router casts to float32, which changes nothing here
    try:
        from torchtitan.models.common import moe as theirs
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    except Exception as error:  # its modules import parts that only some builds of torch have
        raise Absent(f"torchtitan's MoE does not import here: {type(error).__name__}: {error}") from error
    _, d, e, h, k = task.shape
    config = theirs.MoE.Config(
        num_experts=e,
        routed_experts=theirs.RoutedExperts.Config(
            inner_experts=theirs.GroupedExperts.Config(dim=d, hidden_dim=h, num_experts=e),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=e, top_k=k),
        ),
        router=theirs.TokenChoiceTopKRouter.Config(
            num_experts=e, top_k=k, route_norm=True, gate=Linear.Config(in_features=d, out_features=e)
        ),
    )
    with torch.device("meta"):
        block = config.build()
    zeros = np.zeros(e, np.float32)
    _fill(torch, task, block, expert_bias_E=zeros, tokens_per_expert_E=zeros)
    _fill(torch, task, block.router.gate, weight=task.problem.router.T)
    experts = block.routed_experts.inner_experts
    p = task.problem
    _fill(torch, task, experts, w1_EFD=_transposed(p.gate), w3_EFD=_transposed(p.up), w2_EDF=_transposed(p.down))
    parameters = [block.router.gate.weight, experts.w1_EFD, experts.w3_EFD, experts.w2_EDF]
    forward = block if task.dtype == "bfloat16" else _without_casts(torch, block)
    return _in_torch(torch, task, _Layer(forward, parameters, lambda r, *experts: (r.T, *map(_transposed, experts))))


def _without_casts(torch: ModuleType, block: Callable) -> Callable[[Any], Any]:
    """The block, with `.bfloat16()` replaced by the identity."""
    from torch.overrides import TorchFunctionMode

    class KeepDtype(TorchFunctionMode):
        def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            return args[0] if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))

    def forward(x: Any) -> Any:
        with KeepDtype():
            return block(x)

    return forward


def maxtext(task: Task) -> Contestant:
    """MaxText's RoutedMoE with softmax scores, without drops (`sparse_matmul`) and without Pallas kernels."""
    need("maxtext")
    try:
        from flax import nnx
        from maxtext.layers.initializers import nd_dense_init
        from maxtext.layers.moe import RoutedMoE
    except Exception as error:  # its wheel does not list the packages that it imports as dependencies
        raise Absent(f"maxtext's MoE does not import here: {type(error).__name__}: {error}") from error
    config, mesh = _maxtext_config(task)
    _, _, e, h, k = task.shape
    layer = RoutedMoE(
        config=config,
        num_experts=e,
        num_experts_per_tok=k,
        mesh=mesh,
        kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"),
        kernel_axes=("embed", "mlp"),
        rngs=nnx.Rngs(0),
        intermediate_dim=h,
        dtype=task.dtype,
        weight_dtype=task.dtype,
    )
    return _maxtext_contestant(task, layer, mesh)


def _maxtext_config(task: Task) -> tuple[Any, Any]:
    """MaxText's configuration of a run with this layer, and a mesh of one device."""
    import jax
    import maxtext as package
    from jax.sharding import Mesh
    from maxtext.configs import pyconfig

    base = str(Path(package.__path__[0]) / "configs" / "base.yml")
    t, d, e, h, k = task.shape
    config = pyconfig.initialize(
        ["", base],
        run_name="benchmark",
        base_output_directory=tempfile.gettempdir(),  # nothing is written there
        hardware="cpu" if task.platform == "cpu" else "gpu",
        skip_jax_distributed_system=True,
        enable_checkpointing=False,
        override_model_config=True,
        decoder_block="mixtral",
        base_emb_dim=d,
        base_mlp_dim=h,
        base_moe_mlp_dim=h,
        num_experts=e,
        num_experts_per_tok=k,
        sparse_matmul=True,
        megablox=False,
        capacity_factor=-1.0,
        dtype=task.dtype,
        weight_dtype=task.dtype,
        float32_gate_logits=True,
        per_device_batch_size=1,
        max_target_length=t,
    )
    grid = np.asarray(jax.devices()[:1]).reshape([1] * len(config.mesh_axes))
    return config, Mesh(grid, config.mesh_axes)


def _maxtext_contestant(task: Task, layer: Any, mesh: Any) -> Contestant:
    """The layer with our weights as a contestant: a jitted function of the weights, x and dy."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    p = task.problem
    weights = (layer.gate.kernel, layer.wi_0, layer.wi_1, layer.wo)
    for weight, value in zip(weights, (p.router, p.gate, p.up, p.down), strict=True):
        weight.set_value(jnp.asarray(value, task.dtype))
    split: Any = nnx.split(layer, nnx.Param, ...)
    graph, params, rest = split

    def run(params: Any, rest: Any, x: Any, dy: Any) -> tuple:
        y, backward = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x)[0], params, x)
        d, dx = backward(dy)
        return y, dx, d["gate"]["kernel"][...], d["wi_0"][...], d["wi_1"][...], d["wo"][...]

    x, dy = (jnp.asarray(a, task.dtype)[None] for a in (p.x, p.dy))
    with jax.set_mesh(mesh):
        return in_jax(run, (params, rest, x, dy), task.dtype)


def in_jax(run: Callable[..., tuple], arguments: tuple, dtype: DType) -> Contestant:
    """A contestant that compiles and runs `run`, which returns y and the gradients of x, router, gate, up and down."""
    import jax

    compiled = jax.jit(run).lower(*arguments).compile()
    memory = compiled.memory_analysis()

    def read(result: tuple) -> Outcome:
        y, dx, *weights = (np.asarray(a, np.float32) for a in result)
        return Outcome(y[0], dx[0], *weights)

    def peak() -> int | None:
        if memory is None:
            return None
        return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes

    return Contestant(lambda: jax.block_until_ready(compiled(*arguments)), read, peak, dtype)


def _transformers() -> ModuleType:
    quiet()
    return need("transformers")


def _hugging_face(task: Task, forward: Callable, block: Any) -> _Layer:
    """A layer whose experts have gate and up in one array [E, 2 h, d], like both layers of transformers."""
    h = task.shape.ffw
    experts = block.experts

    def read(router: Any, gate_up: Any, down: Any) -> tuple:
        return router.T, _transposed(gate_up[:, :h]), _transposed(gate_up[:, h:]), _transposed(down)

    return _Layer(forward, [block.gate.weight, experts.gate_up_proj, experts.down_proj], read)


def _fill_experts(torch: ModuleType, task: Task, experts: Any) -> None:
    p = task.problem
    gate_up = np.concatenate([_transposed(p.gate), _transposed(p.up)], 1)
    _fill(torch, task, experts, gate_up_proj=gate_up, down_proj=_transposed(p.down))


def _fill(torch: ModuleType, task: Task, module: Any, **values: np.ndarray) -> None:
    """Set the parameters of a module on torch's meta device, in the dtype of the task, and its buffers, in float32."""
    for name, value in values.items():
        if name in dict(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(_tensor(torch, task, value)))
        else:
            setattr(module, name, torch.tensor(value, device=_device(task)))


def _tensor(torch: ModuleType, task: Task, value: np.ndarray) -> Any:
    value = np.ascontiguousarray(value)
    return torch.tensor(value, dtype=getattr(torch, task.dtype), device=_device(task))


def _device(task: Task) -> str:
    return "cuda" if task.platform == "gpu" else "cpu"


def _transposed(weights: Any) -> Any:
    """[E, in, out] as [E, out, in], or the reverse."""
    return weights.swapaxes(1, 2)


def _in_torch(torch: ModuleType, task: Task, layer: _Layer) -> Contestant:
    """A contestant that computes y, and by autograd the gradients of x and all weights for dy."""
    x = _tensor(torch, task, task.problem.x)[None].requires_grad_()
    dy = _tensor(torch, task, task.problem.dy)[None]
    inputs = [x, *layer.parameters]
    held = sum(a.nbytes for a in [dy, *inputs])

    def run() -> tuple:
        y = layer.forward(x)
        gradients = torch.autograd.grad(y, inputs, dy)
        if task.platform == "gpu":
            torch.cuda.synchronize()
        return y.detach(), *gradients

    def read(result: tuple) -> Outcome:
        y, dx, *weights = (a.float().cpu().numpy() for a in result)
        return Outcome(y[0], dx[0], *layer.read(*weights))

    return Contestant(run, read, lambda: _peak(torch, task, run, held), task.dtype)


def _peak(torch: ModuleType, task: Task, run: Callable[[], tuple], held: int) -> int | None:
    """The peak of GPU memory in bytes while the layer runs, without that of other contestants; None on a CPU."""
    if task.platform != "gpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before + held
