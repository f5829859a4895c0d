"""Plan one config, or search for the best mesh and rematerialisation policy."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moe_jax.config import Config
from moe_jax.config.axes import CONFIG_AXES
from moe_jax.planning.compile import DoesNotFit, compile_step, state_bytes, topology_devices
from moe_jax.planning.keeping import keeping
from moe_jax.planning.ranking import predict
from moe_jax.planning.report import heading, make_report, sizes_of
from moe_jax.planning.topology import Topology
from moe_jax.runtime.chips import GIB
from moe_jax.runtime.files import write_whole

if TYPE_CHECKING:
    from jax.sharding import Mesh


def plan(config: Config, topology: Topology, text_file: Path | None = None) -> dict[str, Any]:
    """The report of one config on one topology; the compiled program is written to `text_file`.

    Raises:
        ValueError: the topology is refused, or the mesh does not divide.
    """
    from moe_jax.config import resolve
    from moe_jax.mesh import make_mesh

    devices = topology_devices(topology)
    config = resolve(config, len(devices), topology.platform)
    return plan_on(config, topology, make_mesh(config.mesh, devices), text_file)


def plan_on(config: Config, topology: Topology, mesh: "Mesh", text_file: Path | None = None) -> dict[str, Any]:
    """As `plan`, for an existing mesh and a resolved config."""
    try:
        compiled = compile_step(config, mesh)
    except DoesNotFit as error:
        parameters, optimizer, rest = state_bytes(config, mesh)
        memory = dict(parameters=parameters, optimizer=optimizer, bias_and_balance=rest, total=error.needed or None)
        available = error.available or (topology.chip.hbm if topology.chip else None)
        names = keeping(config, mesh, error.needed or None, available)
        found = {"fits": False, "bytes_per_chip": memory | {"hbm": available}, "names": names}
        return heading(config, topology, mesh) | found
    if text_file:
        write_whole(text_file, compiled.text)
    return make_report(config, topology, mesh, compiled)


class Trial(NamedTuple):
    """One line of a search: sizes of the mesh, the remat policy, the result, and the predicted seconds of a step."""

    mesh: dict[str, int]
    remat: str
    verdict: str
    report: dict[str, Any]
    predicted: float | None = None


# from what keeps most to what keeps least
REMATS: tuple[Literal["none", "dots", "names", "full"], ...] = ("none", "dots", "names", "full")


def search(config: Config, topology: Topology, minutes: float, best: int) -> Iterator[Trial]:
    """Compile the real step on the best meshes that divide, until the time is up; yields each trial when it is done.

    Meshes are tried in the order of their predicted time until as many as `best` fit; without a chip all are tried.
    On each the remat policies are tried from the one that keeps most up to the first that fits. A mesh on which the
    state alone does not fit is not compiled.
    """
    from moe_jax.mesh import make_mesh

    devices = topology_devices(topology)
    until = time.monotonic() + 60 * minutes
    fitting = 0
    for seconds, resolved in ranked(meshes(config, len(devices)), topology, devices):
        mesh = make_mesh(resolved.mesh, devices)
        sizes = sizes_of(mesh)
        state = sum(state_bytes(resolved, mesh))
        if topology.chip and state > topology.chip.hbm:
            yield Trial(sizes, "any", f"the state alone takes {state / GIB:.1f} GiB", {"fits": False}, seconds)
        elif topology.chip and fitting == best:
            yield Trial(sizes, "any", "not compiled", {}, seconds)
        else:
            for trial in _remats(resolved, topology, mesh, until):
                fitting += trial.report.get("fits") is True
                yield trial._replace(predicted=seconds)


def ranked(configs: Sequence[Config], topology: Topology, devices: Sequence[Any]) -> list[tuple[float | None, Config]]:
    """Configs that differ in their mesh, with the predicted seconds of a step; best first, or as given without a chip.

    Those with a larger `tensor` follow, whose exchanges of activations are not predicted.
    """
    from moe_jax.mesh import make_mesh

    if topology.chip is None:
        return [(None, c) for c in configs]
    seconds = [predict(c, make_mesh(c.mesh, devices), topology).seconds for c in configs]
    return sorted(zip(seconds, configs, strict=True), key=lambda pair: (pair[1].mesh.tensor, pair[0]))


def _remats(config: Config, topology: Topology, mesh: "Mesh", until: float) -> Iterator[Trial]:
    """The policies of rematerialisation on one mesh, up to the first that fits."""
    import jax

    sizes = sizes_of(mesh)
    for remat in REMATS:
        if time.monotonic() > until:
            yield Trial(sizes, remat, "not tried: time is up", {})
            return
        jax.clear_caches()
        one = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        report = plan_on(one, topology, mesh)
        fits = report["fits"] in (True, None)
        yield Trial(sizes, remat, "fits" if fits else "does not fit", report)
        if fits:
            return


SEARCHED = ("data", "expert", "tensor")  # the axes whose sizes a search varies


def meshes(config: Config, devices: int) -> list[Config]:
    """The config on every mesh of data x expert x tensor that its rules accept; the other axes do not change.

    Meshes with the smallest `tensor` come first, and among them those with `expert` nearest to the config's, so that
    the likely ones are tried before the time is up.

    Raises:
        ValueError: none is accepted.
    """
    from moe_jax.config import resolve

    found: list[Config] = []
    kept = {axis: max(1, getattr(config.mesh, axis)) for axis in CONFIG_AXES if axis not in SEARCHED}
    own = max(1, config.mesh.expert)
    rest = devices // math.prod(kept.values())
    sizes = [n for n in range(1, rest + 1) if rest % n == 0]
    for expert, tensor in itertools.product(reversed(sizes), sizes):
        if rest % (expert * tensor):
            continue
        data = rest // (expert * tensor)
        mesh = dataclasses.replace(config.mesh, **kept, data=data, expert=expert, tensor=tensor)
        with contextlib.suppress(ValueError):
            found.append(resolve(dataclasses.replace(config, mesh=mesh), devices))
    if not found:
        resolve(config, devices)  # raises the reason, if there is one
        fixed = ", ".join(f"mesh.{axis}={size}" for axis, size in kept.items())
        raise ValueError(f"no mesh of {devices} devices with {fixed} fits the model and the batch.")
    return sorted(found, key=lambda c: (c.mesh.tensor, abs(math.log2(c.mesh.expert / own))))
