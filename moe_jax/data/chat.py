"""Conversations become text by a model's chat template, and what its assistant says is separated from the rest.

A template is a Jinja program that comes with a tokenizer. It runs in a sandbox without access to files, to Python's
objects or to the clock, so that a corpus is the same whenever it is prepared.
"""

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config.paths import path_of
from moe_jax.data.vocabularies import get_tokenizer

TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "developer", "user", "assistant", "tool")
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Chat:
    """A chat template with what it may read besides the messages.

    Args:
        source: of the template, in Jinja.
        tokens: "bos_token" and the like -> the token's name, as far as the tokenizer's files say.
        names: of the special tokens, which only the template may write.
    """

    source: str
    tokens: tuple[tuple[str, str], ...]
    names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 in hex of what decides how messages are rendered."""
        return hashlib.sha256(json.dumps([self.source, self.tokens]).encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """The text of a conversation; with `prompt` also what opens the assistant's next message."""
        template = _compile(self.source)
        return template.render(messages=messages, add_generation_prompt=prompt, tools=None, **dict(self.tokens))

    def spans(self, messages: Sequence[Any]) -> list[tuple[str, bool]]:
        """The text of a conversation in spans, and whether the assistant writes each of them.

        What the assistant writes at its turn is the text with its message minus the prompt for it: the content and what
        the template puts behind it, such as the token that ends a turn.

        Raises:
            ValueError: what is wrong with the messages, to follow the document's name.
        """
        messages = [_checked(message, number, self.names) for number, message in enumerate(messages, 1)]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("has no message of the role assistant, so nothing in it would be trained on")
        texts = []
        for i in turns:
            texts += [self._rendered(messages[:i], True), self._rendered(messages[: i + 1])]
        if turns[-1] + 1 < len(messages):
            texts.append(self._rendered(messages))
        spans = []
        for number, (before, text) in enumerate(zip(["", *texts], texts, strict=False)):
            if not text.startswith(before):
                raise ValueError(
                    f"cannot be divided into turns: the chat template changes the beginning of the text once message "
                    f"{turns[min(number // 2, len(turns) - 1)] + 1} follows"
                )
            spans.append((text[len(before) :], number % 2 == 1))
        return spans

    def _rendered(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        try:
            return self.render(messages, prompt)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"is refused by the chat template ({' '.join(str(error).split())})") from None


def _checked(message: Any, number: int, names: Sequence[str]) -> dict[str, Any]:
    """A message without the empty fields that a table gives to those that lack them."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError(f"has a message {number} that is not an object with a string under 'content'")
    if message.get("role") not in ROLES:
        raise ValueError(f"has a message {number} of the role {message.get('role')!r}; use one of: {', '.join(ROLES)}")
    message = {key: value for key, value in message.items() if value is not None}
    text = json.dumps(message, ensure_ascii=False, default=str)
    if found := next((name for name in names if name in text), ""):
        raise ValueError(f"has {found!r} in message {number}, a special token that only the chat template may write")
    return message


@functools.lru_cache(maxsize=4)
def read_chat(tokenizer: str, separator: str) -> Chat:
    """The chat template of a tokenizer.

    Args:
        tokenizer: the folder of a tokenizer, with `chat_template.jinja`, or with `chat_template` in its
            `tokenizer_config.json`.
        separator: as the flag of `prepare`.

    Raises:
        ValueError: there is no template, it is no Jinja, or jinja2 is not installed.
    """
    from moe_jax.data.trained import read_settings

    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("--messages_key needs jinja2, which is not installed; run pip install 'moe_jax[chat]'.")
    path = path_of(tokenizer, "--tokenizer")
    folder = path if path.is_dir() else path.parent
    config = read_settings(folder / "tokenizer_config.json")
    source = _source(folder, config)
    settings = config | read_settings(folder / "special_tokens_map.json")
    named = {what: settings.get(what) for what in TOKENS}
    texts = {what: token.get("content") if isinstance(token, dict) else token for what, token in named.items()}
    tokens = tuple((what, text) for what, text in texts.items() if isinstance(text, str))
    names = tuple(get_tokenizer(tokenizer, separator).names.values())
    try:
        _compile(source)
    except Exception as error:
        raise ValueError(
            f"--tokenizer={folder} has a chat template that Jinja cannot read ({error}); copy it again from the model."
        ) from None
    return Chat(source, tokens, names)


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"--tokenizer={folder} has no chat template, neither {TEMPLATE_FILE} nor chat_template in its "
            "tokenizer_config.json, and --messages_key needs one; copy it from the model that was tuned for chats."
        )
    return found


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> Any:
    """The template, set up as the transformers library does, but for the time of day."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's text: here the text alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def special_names(names: Sequence[str]) -> re.Pattern[str]:
    """What finds the name of a special token in a text; the longest one where several begin there."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
