"""What the wheel has besides moe_jax/: the configs, and what makes sweeps and reports."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Layout(BuildHookInterface):
    """Puts configs/ and the modules of experiments/ inside moe_jax, so that no wheel brings modules called `configs`.

    An editable install needs neither: both are in the clone.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files of a standard wheel."""
        root = Path(self.root)
        if version == "standard":
            report = root.glob("experiments/report/*.*")  # a style sheet, too
            names = ("corpus", "statistics", "study")
            folders = [file for name in names for file in root.glob(f"experiments/{name}/*.py")]
            for file in [*root.glob("configs/**/*.py"), *root.glob("experiments/*.py"), *folders, *report]:
                build_data["force_include"][str(file)] = str("moe_jax" / file.relative_to(root))
