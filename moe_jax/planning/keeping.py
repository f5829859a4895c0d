"""What layers could keep for their backward pass by name, and what of it would fit: advice on `model.remat_keep`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_jax.config import DISPATCHERS, Config, ModelConfig, is_gated, num_moe_layers, routed_width
from moe_jax.config.schema import Kept
from moe_jax.planning.ranking import kept_names, rows_of_round, rows_that_arrive, tokens_of_device

if TYPE_CHECKING:
    from jax.sharding import Mesh

FLOAT32 = 4  # bytes


def policy(m: ModelConfig) -> str:
    """The policy of rematerialisation as text, with the names that it keeps."""
    names = (f"{name} (host)" if name in m.remat_offload else name for name in kept_names(m))
    return " ".join((m.remat, *names))


def keeping(config: Config, mesh: "Mesh", total: int | None, limit: int | None) -> dict[str, Any]:
    """The bytes of a chip that each name would keep, and which names fit, as JSON values.

    Args:
        total: bytes of a chip that the compiled step needs; None if that is not known.
        limit: bytes that a chip has; None if that is not known.

    Returns:
        `bytes` by name, and `fit`: those that fit together, the cheapest to keep for what it saves first; None where it
        cannot be said, as under a policy that keeps other tensors.
    """
    sizes = bytes_by_name(config, mesh)
    m = config.model
    if total is None or limit is None or m.remat not in ("full", "names"):
        return {"bytes": sizes, "fit": None}
    on_chip = [name for name in kept_names(m) if name not in m.remat_offload]
    return {"bytes": sizes, "fit": fitting(sizes, limit - total + sum(sizes[name] for name in on_chip))}


def fitting(sizes: Mapping[Kept, int], room: int) -> list[Kept]:
    """The names that fit into `room` bytes, each beside those before it; one of 0 bytes keeps nothing."""
    found = []
    for name, size in sizes.items():
        if 0 < size <= room:
            found.append(name)
            room -= size
    return found


def bytes_by_name(config: Config, mesh: "Mesh") -> dict[Kept, int]:
    """Bytes of a chip in which all layers keep the tensors of each name, for one micro-batch.

    Those of attention are its result and the logarithms of its softmax. A row travels with its gate, a gathered token
    with the gates and ids of all its experts. With a latent its sum over a token's experts is kept beside the rows.
    """
    from moe_jax.kernels.weights import DIMS
    from moe_jax.mesh import ways

    m = config.model
    number = 2 if m.compute_dtype == "bfloat16" else FLOAT32
    tokens = tokens_of_device(config, mesh)
    layers = m.num_layers + m.mtp_depth
    heads = m.num_heads // ways(mesh, "all_heads")
    head = m.v_head_dim if m.attention == "mla" else m.head_dim
    moe_layers = num_moe_layers(m) if DISPATCHERS[m.dispatch].dropless else 0
    multiplied = 0 if DISPATCHERS[m.dispatch].is_oracle else rows_of_round(config, mesh) or tokens * m.top_k
    numbers = 2 * m.top_k if DISPATCHERS[m.dispatch].gathers_tokens else 1
    ffw = m.expert_ffw_dim // ways(mesh, "ffw", DIMS["up"])
    arrived = moe_layers * rows_that_arrive(config, mesh) * (routed_width(m) * number + numbers * FLOAT32)
    return {
        "rows": arrived + num_moe_layers(m) * tokens * m.latent_dim * number,
        "attention": layers * tokens * heads * (head * number + FLOAT32),
        "residual": layers * tokens * m.embed_dim * number,
        "hidden": moe_layers * multiplied * (2 if is_gated(m) else 1) * ffw * number,
    }
