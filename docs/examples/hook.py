"""A hook of one's own: it logs a number of its own, and says which experts got no token."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

from configs import tiny
from moe_jax.config import validate
from moe_jax.training.hooks import Context, Hook, Now
from moe_jax.training.loop import run

norm = jax.jit(optax.tree.norm)


class DeadExperts(Hook):
    """Every 5 steps logs the norm of the parameters, and says which experts got no token in the step."""

    every = 5

    def before(self, context: Context, now: Now) -> dict[str, jax.Array]:
        """A number before the step, logged in its line; one compiled program, not an operation for each parameter."""
        return {"parameters/norm": norm(now.state.params)}

    def after(self, context: Context, now: Now) -> None:
        """The numbers of the step, which is waited for."""
        for layer, expert in np.argwhere(np.asarray(now.values["loads"]) == 0):
            context.display.say(f"step {now.done}: expert {expert} of layer {layer} got no token")


config = tiny.get_config()
config.num_steps = 10
with tempfile.TemporaryDirectory() as workdir:
    run(validate(config), Path(workdir), hooks=[DeadExperts()])
    assert "parameters/norm" in (Path(workdir) / "metrics.jsonl").read_text()
