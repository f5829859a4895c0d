"""moe_jax: train Mixture-of-Experts transformers in JAX, and find out which way of balancing experts is best.

This file imports no library, so that a mistake in a config is reported in well under a second (jax takes two).
"""

import sys
from typing import Any

__version__ = "0.1.0"


def _one_line_for_ctrl_c(kind: Any, error: Any, trace: Any) -> None:
    """Ctrl-C ends a command with a line and status 130, from its first import on; what else goes wrong shows where."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr)
    raise SystemExit(130)


COMMAND = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv[:-1] else ""
if COMMAND.startswith(("moe_jax.", "experiments.")):  # never in a program that imports this package
    sys.excepthook = _one_line_for_ctrl_c
