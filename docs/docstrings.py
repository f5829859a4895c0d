"""How docstrings become Markdown: plain text, with code in backticks, and the fields of records line by line."""

import re
from pathlib import Path
from typing import Any

import griffe

FIELD = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")
COMMENT = re.compile(r"^\s*# (.*)|.*\S  # (.*)")


class PlainText(griffe.Extension):
    """Adapts docstrings, takes a field's comment for its docstring, and shows a package's names in its modules only."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one module, class, function or attribute."""
        if obj.docstring is None and obj.is_attribute and isinstance(obj.parent, griffe.Class):
            obj.docstring = comment_of(obj)
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        """Drop the names that a package imports from its modules."""
        if mod.is_init_module:
            for name in [name for name, member in mod.members.items() if member.is_alias]:
                mod.del_member(name)


def as_markdown(text: str) -> str:
    """`[L][E]` is a shape and no link; a line `field: what it is` is an item of a list."""
    text = re.sub(r"`[^`]*`|\]\[", lambda found: "]\\[" if found[0] == "][" else found[0], text)
    head, *rest = text.split("\n")
    return "\n".join([head, *(FIELD.sub(r"\n- `\1`: ", line) for line in rest)])


def comment_of(field: griffe.Object) -> griffe.Docstring | None:
    """The comment at the end of a field's line, or those in the lines above it."""
    if field.lineno is None or not isinstance(field.filepath, Path):
        return None
    lines = field.lines_collection[field.filepath]
    found = COMMENT.match(lines[(field.endlineno or field.lineno) - 1])
    words = [found[2]] if found else []
    above = field.lineno - 2
    while not found and (comment := COMMENT.match(lines[above])) and comment[1]:
        words.insert(0, comment[1])
        above -= 1
    return griffe.Docstring(" ".join(words), parent=field, lineno=field.lineno) if words else None
