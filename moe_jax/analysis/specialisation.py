"""Which experts take which tokens: by domain, together with which other experts, and from which step on.

D domains, L MoE layers, T tokens, S slots, B sequences, E experts that compute (zero-computation ones are left out).
"""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from moe_jax import balance
from moe_jax.analysis import counts
from moe_jax.balance import measures
from moe_jax.config import Config
from moe_jax.data.batches import Batch
from moe_jax.mesh import replicated
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.runtime.files import write_whole
from moe_jax.training.compile import compiled_by
from moe_jax.training.losses import model_row_nats
from moe_jax.training.state import TrainState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_PANELS = 12  # layers in the picture


class Choices(NamedTuple):
    """The routing of one held-out batch: the experts of every token, and counts of them."""

    expert_ids: Int32[Array, "layers tokens slots"]
    domain: Int32[Array, "batch"]
    row_loads: Int32[Array, "batch layers experts"]
    pairs: Int32[Array, "layers experts experts"]


def make_choices_step(config: Config, mesh: Mesh | None = None) -> Callable[[TrainState, Batch], Choices]:
    """A jitted (state, batch) -> Choices, whole on every device; the state is not changed."""
    return _choices_step(compiled_by(config), mesh)


@functools.lru_cache(maxsize=4)
def _choices_step(config: Config, mesh: Mesh | None) -> Callable[[TrainState, Batch], Choices]:
    balancer = balance.make(config.balance, config.model)
    num_experts = config.model.num_experts

    def choices(state: TrainState, batch: Batch) -> Choices:
        fwd = Pass(inputs_of(batch), balancer, PerLayer(state.balance), jax.random.key(0), mesh=mesh)
        _, report = model_row_nats(config, state.params, state.bias, fwd, batch)
        assert report is not None  # callers refuse dense models
        ids = report.details.routing.expert_ids
        row_loads = report.details.row_loads[..., :num_experts]
        pairs = jax.lax.map(lambda one: counts.pair_counts(one, num_experts), ids)  # a layer at a time: [T, E] is big
        return Choices(ids, jnp.asarray(batch.domain), row_loads.swapaxes(0, 1), pairs)

    return jax.jit(choices, out_shardings=None if mesh is None else replicated(mesh))


# --- by domain, and together ----------------------------------------------------------------------------------


class Survey(NamedTuple):
    """Counts over the held-out set, int64: loads [D, L, E] by domain, and pairs of experts [L, E, E]."""

    domains: Sequence[str]
    loads: np.ndarray
    pairs: np.ndarray


def as_json(survey: Survey) -> dict[str, Any]:
    """A survey as written to specialisation.json: lists with layers first.

    Returns:
        domains; relative_load [L][E][D], 1 for a balanced load; domain_information [L], bits; coactivation [L][E][E],
        the share of the row's tokens that also chose the column.
    """
    loads = survey.loads.swapaxes(0, 1)
    return {
        "domains": list(survey.domains),
        "relative_load": counts.domain_matrix(loads).tolist(),
        "domain_information": measures.mutual_information(loads).tolist(),
        "coactivation": counts.coactivation(survey.pairs).tolist(),
    }


def draw(survey: Survey) -> "Figure":
    """A heat map with experts across, domains down and a panel a layer: the first, the last and some in between."""
    from matplotlib.figure import Figure

    loads = survey.loads.swapaxes(0, 1)
    layers = np.unique(np.linspace(0, len(loads) - 1, min(MAX_PANELS, len(loads))).round().astype(int))
    num_domains, num_experts = loads.shape[1:]
    width = min(14.0, max(6.0, 2.5 + 0.25 * num_experts))
    height = max(2.8, 1.3 + len(layers) * (0.45 + 0.22 * num_domains))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
    for axis, layer in zip(axes, layers, strict=True):
        image = _panel(axis, survey.domains, loads[layer], f"MoE layer {layer}")
    axes[-1].set_xlabel("expert")
    bar = figure.colorbar(image, ax=list(axes), extend="max", shrink=min(1.0, 3.5 / height), aspect=15)
    bar.set_label("load over the balanced load")
    figure.suptitle("Which experts each domain uses", x=0.01, ha="left", fontsize=11)
    return figure


def _panel(axis: Any, domains: Sequence[str], loads: np.ndarray, title: str) -> Any:
    matrix = counts.domain_matrix(loads).T
    information = measures.mutual_information(loads)
    image = axis.imshow(matrix, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0, interpolation="nearest")
    axis.set_yticks(range(len(domains)), domains, fontsize=8)
    axis.set_xticks(range(0, loads.shape[1], max(1, loads.shape[1] // 16)))
    axis.set_title(f"{title}: {information:.3f} bits about the domain", fontsize=9, loc="left")
    return image


# --- saturation -----------------------------------------------------------------------------------------------


def store_ids(workdir: Path, step: int, expert_ids: np.ndarray, tokens: str) -> None:
    """Write the expert ids [L, T, S] to workdir/routing/<step>.npy, uint16, whole or not at all.

    Earlier files of other tokens, which saturation cannot compare with these, are moved into a subfolder.

    Args:
        workdir: of the run.
        step: the steps it has done.
        expert_ids: int [L, T, S].
        tokens: a fingerprint of the tokens that were routed.
    """
    folder = workdir / "routing"
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = folder / "tokens.txt"
    former = fingerprint.read_text() if fingerprint.is_file() else tokens
    if former != tokens:
        aside = folder / former
        aside.mkdir(exist_ok=True)
        for earlier in stored_steps(workdir):
            (folder / f"{earlier}.npy").rename(aside / f"{earlier}.npy")
        print(f"the held-out tokens have changed: the routing of the former ones was moved to {aside}", flush=True)
    write_whole(fingerprint, tokens)
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(expert_ids).astype(np.uint16))
    write_whole(folder / f"{step}.npy", buffer.getvalue())


def stored_steps(workdir: Path) -> list[int]:
    """The steps whose routing the run has stored, in ascending order."""
    folder = workdir / "routing"
    files = folder.iterdir() if folder.is_dir() else []
    return sorted(int(file.stem) for file in files if file.suffix == ".npy" and file.stem.isdigit())


def saturation(workdir: Path, num_choices: int) -> dict[str, Any]:
    """Router saturation by step and layer: the share of the last stored routing that each stored step already had.

    Args:
        workdir: of a run with measure_every > 0.
        num_choices: ids from this number on are empty slots.

    Returns:
        steps; saturation [steps][L], 0 to 1; its last row is 1.

    Raises:
        ValueError: fewer than two steps are stored, or their tokens differ.
    """
    steps = stored_steps(workdir)
    if len(steps) < 2:
        raise ValueError(
            f"--workdir={workdir} has stored the routing of {len(steps)} evaluations, and saturation compares two; "
            "train with measure_every > 0 and an eval_every that gives at least two."
        )
    last = stored_ids(workdir, steps[-1])
    return {"steps": steps, "saturation": [_saturation(workdir, step, last, num_choices).tolist() for step in steps]}


def _saturation(workdir: Path, step: int, last: np.ndarray, num_choices: int) -> np.ndarray:
    ids = stored_ids(workdir, step)
    if ids.shape[:2] != last.shape[:2]:
        raise ValueError(
            f"{workdir / 'routing'} holds the routing of other tokens at step {step} {ids.shape} than at the last "
            f"one {last.shape}; delete the files of the older run."
        )
    return measures.saturation(ids, last, num_choices)


def stored_ids(workdir: Path, step: int) -> np.ndarray:
    """The expert ids that a run stored at a step, uint16 [L, T, S].

    Raises:
        ValueError: the file is damaged.
    """
    file = workdir / "routing" / f"{step}.npy"
    try:
        return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it.") from None
