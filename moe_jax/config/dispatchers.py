"""The static facts of every dispatcher: one row for each value of `model.dispatch`.

The implementation is the function that `moe_jax.dispatch` registers under the same name. Rules, evaluation, resuming
and the law suites read these rows instead of naming dispatchers.
"""

from typing import NamedTuple


class Dispatcher(NamedTuple):
    """The facts of one dispatcher.

    dropless: every copy reaches its expert, so the choice affects the speed but no number.
    splits_experts: works on a mesh that splits the experts over devices; otherwise every device must hold all of them.
    splits_sequences: works on a mesh that cuts sequences into pieces; otherwise a device must hold whole ones.
    gathers_tokens: devices that share experts gather each other's tokens, instead of exchanging copies.
    needs, not_on: the collective that it calls, and the platforms ("cpu", "gpu", "tpu") that lack it.
    is_oracle: takes whole arrays, which XLA splits, instead of one device's part; the others are compared with it.
    """

    dropless: bool = True
    splits_experts: bool = True
    splits_sequences: bool = True
    gathers_tokens: bool = False
    needs: str = ""
    not_on: tuple[str, ...] = ()
    is_oracle: bool = False


DISPATCHERS: dict[str, Dispatcher] = {
    "auto": Dispatcher(),
    "local": Dispatcher(splits_experts=False),
    "rounds": Dispatcher(),
    "ragged": Dispatcher(needs="ragged_all_to_all", not_on=("cpu",)),
    "gathered": Dispatcher(gathers_tokens=True),
    "dense": Dispatcher(is_oracle=True),
    "capacity": Dispatcher(dropless=False, splits_sequences=False),
}
