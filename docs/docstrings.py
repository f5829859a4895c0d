"""Docstrings are plain text with code in backticks: `[L][E]` in them is a shape, and no Markdown link."""

import re
from typing import Any

import griffe


class PlainBrackets(griffe.Extension):
    """Escape `][` outside backticks, which Markdown would take for a link and its target."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"`[^`]*`|\]\[", lambda found: "]\\[" if found[0] == "][" else found[0], obj.docstring.value
            )
