"""The configuration: one frozen, typed schema; `ConfigDict` in, `Config` or one clear sentence out.

Imports no jax: a typo is reported before jax could be loaded. Every error is a ValueError whose sentence names the
key, its value, the rule and a fix.
"""

from moe_jax.config.balance import BalanceEntry
from moe_jax.config.build import (
    SourceGone,
    article,
    as_dict,
    balance_entries,
    complete,
    default,
    did_you_mean,
    differences,
    flatten,
    named,
    validate,
)
from moe_jax.config.dispatchers import DISPATCHERS, Dispatcher
from moe_jax.config.effects import at_defaults, changed_numbers, free_keys, keys_that_change
from moe_jax.config.mesh_rules import resolve
from moe_jax.config.model_rules import check_length, longest
from moe_jax.config.multipliers import Multipliers
from moe_jax.config.optimizer import EmaConfig, GuardConfig, MuonConfig, OptimizerConfig, Part
from moe_jax.config.scaling import ScalingConfig
from moe_jax.config.schema import (
    AnticipationConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LocalRopeConfig,
    LongRopeConfig,
    MeshConfig,
    ModelConfig,
    Weights,
    YarnConfig,
    branch_point,
    is_gated,
    local_layers,
    local_rotated_width,
    mesh_sizes,
    num_choices,
    num_moe_layers,
    parts,
    rotated_width,
    routed_width,
    shared_width,
)

__all__ = [
    "DISPATCHERS",
    "AnticipationConfig",
    "BalanceEntry",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Dispatcher",
    "EmaConfig",
    "GuardConfig",
    "LocalRopeConfig",
    "LongRopeConfig",
    "MeshConfig",
    "ModelConfig",
    "Multipliers",
    "MuonConfig",
    "OptimizerConfig",
    "Part",
    "ScalingConfig",
    "SourceGone",
    "Weights",
    "YarnConfig",
    "article",
    "as_dict",
    "at_defaults",
    "balance_entries",
    "branch_point",
    "changed_numbers",
    "check_length",
    "complete",
    "default",
    "did_you_mean",
    "differences",
    "flatten",
    "free_keys",
    "is_gated",
    "keys_that_change",
    "local_layers",
    "local_rotated_width",
    "longest",
    "mesh_sizes",
    "named",
    "num_choices",
    "num_moe_layers",
    "parts",
    "resolve",
    "rotated_width",
    "routed_width",
    "shared_width",
    "validate",
]
