"""One rule across the keys of a config, and the sentence where it is broken."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from moe_jax.config.schema import Config

Text = str | Callable[[Config], str]  # `{key}` in it is replaced by `key=value`


@dataclass(frozen=True)
class Rule:
    """A rule for the configs for which `when` is true, and the sentence where it is broken: `must; fix.`"""

    must: Text
    fix: Text
    holds: Callable[[Config], bool]
    when: Callable[[Config], bool] = lambda c: True

    def __call__(self, c: Config) -> None:
        """Raise a ValueError with the sentence if the config breaks the rule."""
        if not self.when(c) or self.holds(c):
            return
        sentence = "; ".join(text if isinstance(text, str) else text(c) for text in (self.must, self.fix))
        raise ValueError(re.sub(r"\{([\w.]+)\}", lambda key: f"{key[1]}={attrgetter(key[1])(c)!r}", f"{sentence}."))


def rises_within(values: tuple[float, ...], end: float) -> bool:
    """Whether the values increase strictly and are all between 0 and `end`."""
    return list(values) == sorted(set(values)) and all(0 < value < end for value in values)
