"""The MoE layers of other projects as contestants of `layer`, with our weights in their layout."""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.peers import Absent, need, quiet, torch_here
from experiments.benchmarks.problem import Contestant, DType, Outcome, Problem, Shape


class Task(NamedTuple):
    """What a peer is asked for; platform "cpu" or "gpu"."""

    shape: Shape
    problem: Problem
    dtype: DType
    platform: str


class _Layer(NamedTuple):
    """A layer in torch: its parameters' gradients, in order, with x's first, and how they are laid out for us."""

    forward: Callable[[Any], Any]
    parameters: list[Any]
    read: Callable[..., tuple]


def builders(task: Task, *, eager: bool = False) -> dict[str, Callable[[], Contestant]]:
    """Every peer by name; building one raises Absent where it cannot take part."""
    several = {
        "transformers_deepseek_v3": lambda: transformers_deepseek_v3(task, "grouped_mm"),
        "transformers_qwen3_moe": lambda: transformers_qwen3_moe(task, "grouped_mm"),
        "torchtitan": lambda: torchtitan(task),
        "maxtext": lambda: maxtext(task),
    }
    if eager:
        several["transformers_deepseek_v3_eager"] = lambda: transformers_deepseek_v3(task, "eager")
    return several


def transformers_deepseek_v3(task: Task, implementation: str) -> Contestant:
    """transformers' DeepseekV3MoE, sigmoid scores: its router and its experts, without the shared expert."""
    torch, _ = torch_here(task.platform), _transformers()
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    t, d, e, h, k = task.shape
    config = theirs.DeepseekV3Config(
        hidden_size=d,
        moe_intermediate_size=h,
        n_routed_experts=e,
        num_experts_per_tok=k,
        n_shared_experts=1,  # not run: there may be none in the class
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
    """transformers' Qwen3MoeSparseMoeBlock: softmax scores, gates normalised."""
    torch, _ = torch_here(task.platform), _transformers()
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
    """torchtitan's MoE, sigmoid scores. It casts to bfloat16 to multiply; equal work in float32 is without the cast."""
    torch = torch_here(task.platform)
    need("torchtitan")
    warnings.filterwarnings("ignore", "In CPU autocast")  # its router asks for float32, which float32 is already
    try:
        from torchtitan.models.common import moe as theirs
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    except Exception as error:  # its modules import what only some builds of torch have
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
    experts, p = block.routed_experts.inner_experts, task.problem
    _fill(torch, task, experts, w1_EFD=_turned(p.gate), w3_EFD=_turned(p.up), w2_EDF=_turned(p.down))
    parameters = [block.router.gate.weight, experts.w1_EFD, experts.w3_EFD, experts.w2_EDF]
    forward = block if task.dtype == "bfloat16" else _without_casts(torch, block)
    return _in_torch(torch, task, _Layer(forward, parameters, lambda r, *experts: (r.T, *map(_turned, experts))))


def _without_casts(torch: ModuleType, block: Callable) -> Callable[[Any], Any]:
    """The block, where `.bfloat16()` gives the tensor itself."""
    from torch.overrides import TorchFunctionMode

    class KeepDtype(TorchFunctionMode):
        def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            return args[0] if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))

    def forward(x: Any) -> Any:
        with KeepDtype():
            return block(x)

    return forward


def maxtext(task: Task) -> Contestant:
    """MaxText's layer is built from the config of a whole model, for accelerators: it is not run here.

    Raises:
        Absent: always.
    """
    raise Absent("maxtext's MoE layer takes the configuration of a whole run and a mesh; it is not timed here.")


def _transformers() -> ModuleType:
    quiet()
    return need("transformers")


def _hugging_face(task: Task, forward: Callable, block: Any) -> _Layer:
    """A layer whose experts have gate and up in one array [E, 2 h, d], as both of transformers' have."""
    h, experts = task.shape.ffw, block.experts

    def read(router: Any, gate_up: Any, down: Any) -> tuple:
        return router.T, _turned(gate_up[:, :h]), _turned(gate_up[:, h:]), _turned(down)

    return _Layer(forward, [block.gate.weight, experts.gate_up_proj, experts.down_proj], read)


def _fill_experts(torch: ModuleType, task: Task, experts: Any) -> None:
    p = task.problem
    gate_up = np.concatenate([_turned(p.gate), _turned(p.up)], 1)
    _fill(torch, task, experts, gate_up_proj=gate_up, down_proj=_turned(p.down))


def _fill(torch: ModuleType, task: Task, module: Any, **values: np.ndarray) -> None:
    """Give a module made without memory its parameters, in the dtype of the task, and buffers, in float32."""
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


def _turned(weights: Any) -> Any:
    """[E, in, out] to [E, out, in] and back."""
    return weights.swapaxes(1, 2)


def _in_torch(torch: ModuleType, task: Task, layer: _Layer) -> Contestant:
    """Forward + backward by autograd, of y and the gradients of x and all weights by dy."""
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
    """Bytes on the card at most while the layer runs, without what the others hold; None on a CPU."""
    if task.platform != "gpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before + held
