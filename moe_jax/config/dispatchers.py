"""What is known of every dispatcher before anything runs: one row for each value of `model.dispatch`.

What it does is the function that `moe_jax.dispatch` registers under the same name. Rules, evaluation, resuming and the
law suites read these rows and name no dispatcher.
"""

from typing import NamedTuple


class Dispatcher(NamedTuple):
    """The facts of one dispatcher.

    dropless: every copy reaches its expert, so that the choice changes the speed and no number.
    splits_experts: runs where the mesh splits the experts over devices; else every device must have all of them.
    needs, not_on: the collective that it calls, and the platforms ("cpu", "gpu", "tpu") that lack it.
    is_oracle: is given whole arrays, which XLA splits, and not a device's part: what others are compared with.
    """

    dropless: bool = True
    splits_experts: bool = True
    needs: str = ""
    not_on: tuple[str, ...] = ()
    is_oracle: bool = False


DISPATCHERS: dict[str, Dispatcher] = {
    "auto": Dispatcher(),
    "local": Dispatcher(splits_experts=False),
    "rounds": Dispatcher(),
    "ragged": Dispatcher(needs="ragged_all_to_all", not_on=("cpu",)),
    "dense": Dispatcher(is_oracle=True),
    "capacity": Dispatcher(dropless=False),
}
