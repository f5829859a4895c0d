"""The tables of the study, in the order in which they are run, and what each of them lists.

To add a table, add its name and config to `TABLES`; to add an arm, add it to the ARMS of a table's config.
"""

from collections.abc import Iterable
from pathlib import Path

from moe_jax.config import as_dict, validate
from moe_jax.config.build import complete, did_you_mean
from moe_jax.config.command import load, locate, run_own

from ..planned import Planned, plan_sweep
from ..runs import read_settings

# name -> what `--config` of ablate takes
TABLES = {
    "arms": "ablation/study",
    "gates": "ablation/gates",
    "leak": "ablation/leak",
    "systems": "ablation/systems",
    "quantile_16x2048": "ablation/quantile:16x2048",
    "quantile_16x8192": "ablation/quantile:16x8192",
    "quantile_64x2048": "ablation/quantile:64x2048",
    "quantile_64x8192": "ablation/quantile:64x8192",
}


def parse_tables(text: str) -> list[str]:
    """The names in a flag, `arms,gates`, in the order of `TABLES`.

    Raises:
        ValueError: a name is no table.
    """
    names = text.split(",")
    for name in names:
        if name not in TABLES:
            close = did_you_mean(name, TABLES) or f"; the tables are {', '.join(TABLES)}."
            raise ValueError(f"--tables={text} names {name!r}, which is not one{close}")
    return [name for name in TABLES if name in names]


def read_tables(names: Iterable[str], workdir: Path) -> list[Planned]:
    """Plan tables as a whole, before anything is trained.

    Args:
        names: keys of `TABLES`.
        workdir: of the study.

    Raises:
        ValueError: a config is not valid; what a file itself raises ends the command.
    """
    return [_read_table(TABLES[name], workdir / name) for name in names]


def _read_table(config: str, folder: Path) -> Planned:
    file, argument = locate(config)
    source = run_own(file, lambda: load(file))
    base = as_dict(validate(run_own(file, lambda: complete(source.get_config(*argument)))))
    return plan_sweep(source, base, read_settings(file, source, argument), folder)
