"""Continued training from converted weights or those of another run: the same model, a new optimizer, any balance.

Source: the config of the given workdir.
Command: python -m moe_jax.train --config=configs/from_checkpoint.py:WORKDIR --workdir=/tmp/on
Result: depends on WORKDIR; the first step routes by the weights and the bias in it.
"""

import json

from moe_jax.config import SourceGone, default
from moe_jax.config.paths import workdir_of


def get_config(arg: str = ""):
    """`arg` is a workdir of `moe_jax.convert` or of a run. Its `balance` is kept; if empty, it is an auxiliary loss."""
    file = workdir_of(arg, "configs/from_checkpoint.py:WORKDIR") / "config.json"
    if not arg or not file.is_file():
        raise SourceGone(
            arg,
            f"configs/from_checkpoint.py:{arg} must name a workdir with config.json; write "
            "--config=configs/from_checkpoint.py:WORKDIR, as moe_jax.convert writes them.",
        )
    there = json.loads(file.read_text())
    return default(
        init_from=arg,
        num_steps=1000,
        batch_size=8,
        sequence_length=256,
        model=there["model"] | dict(param_dtype="float32"),  # small updates vanish in bfloat16
        balance=there.get("balance") or dict(aux_loss=dict(weight=1e-3)),
        optimizer=dict(learning_rate=1e-5, schedule="wsd", warmup_steps=50),
    )
