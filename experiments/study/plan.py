"""The tables of the study, in the order in which they are run, and what each of them lists.

To add a table, add its name and config to `TABLES`; to add an arm, add it to the ARMS of a table's config.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import as_dict, validate
from moe_jax.config.build import complete, did_you_mean
from moe_jax.config.command import load, locate, run_own

from .. import hyper
from ..branched import Part, claim_branched, execute_branched, jobs_of, plan_branched
from ..progress import Progress
from ..runs import Run, claim, execute, folder_of, plan, planned_steps, read_settings, sweep_record

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


class Table(NamedTuple):
    """A sweep of the study, validated.

    Attributes:
        name: of the table, and of its folder in the workdir of the study.
        folder: of the table's runs.
        source: the module of its config.
        base: the config that the settings override, as nested dicts.
        runs: of a plain sweep; empty for a branched one.
        parts: trunks with their branches; empty for a plain sweep.
        at: the step of branching; 0 for a plain sweep.
    """

    name: str
    folder: Path
    source: Any
    base: dict[str, Any]
    runs: list[Run]
    parts: list[Part]
    at: int

    def claim(self, command: str) -> list[str]:
        """Write every sweep.json of the table; returns and raises what `runs.claim` does."""
        if self.parts:
            return claim_branched(self.folder, self.parts, self.base, self.at, self.source, command)
        return claim(self.folder, sweep_record(self.runs, self.base, self.source, command), self.runs)

    def work(self, shard: tuple[int, int]) -> list[int]:
        """The tokens that every run of a shard (i, n) has yet to train, in the order of `train`; 0 if it is done."""
        if self.parts:
            return [job.steps * _tokens(job.run) for job in jobs_of(self.parts, self.folder, self.at, shard)]
        runs = self.runs[shard[0] :: shard[1]]
        return [planned_steps(run, folder_of(self.folder, run)) * _tokens(run) for run in runs]

    def train(self, shard: tuple[int, int], progress: Progress) -> tuple[int | None, list[str]]:
        """Train a shard's runs, as `runs.execute` does; the weights of finished branches are removed."""
        if self.parts:
            return execute_branched(self.parts, self.folder, self.at, shard, discard_weights=True, progress=progress)
        return execute(self.runs[shard[0] :: shard[1]], self.folder, progress)

    @property
    def every_run(self) -> list[Run]:
        """Trunks and branches, or the runs of a plain sweep, of all shards."""
        return self.runs + [run for part in self.parts for run in (part.trunk, *part.branches)]


def _tokens(run: Run) -> int:
    """In a step."""
    return run.config.batch_size * run.config.sequence_length


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


def read_tables(names: Iterable[str], workdir: Path) -> list[Table]:
    """Plan tables as a whole, before anything is trained.

    Args:
        names: keys of `TABLES`.
        workdir: of the study.

    Raises:
        ValueError: a config is not valid; what a file itself raises ends the command.
    """
    return [_read_table(name, TABLES[name], workdir / name) for name in names]


def _read_table(name: str, config: str, folder: Path) -> Table:
    file, argument = locate(config)
    source = run_own(file, lambda: load(file))
    base = as_dict(validate(run_own(file, lambda: complete(source.get_config(*argument)))))
    listed = read_settings(file, source, argument)
    if isinstance(listed, hyper.Branches):
        return Table(name, folder, source, base, [], plan_branched(base, listed, folder), listed.at)
    return Table(name, folder, source, base, plan(base, listed), [], 0)
