"""Print the texts of the generate command: while they are generated, at the end, or in the colours of their experts."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import Console

from moe_jax.config import num_choices
from moe_jax.data import Tokenizer
from moe_jax.runtime.files import output_of, write_whole
from moe_jax.text.colours import Traced, as_html, on_terminal, printable
from moe_jax.text.decoding import Completion, complete, generate, trace
from moe_jax.text.model import Model


def completions(
    model: Model,
    prompt_ids: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    seed: int,
    size: int,
    options: dict[str, Any],
    live: str | None,
) -> Iterator[Completion]:
    """The completions, `size` rows at a time; `live`: the prompt of a single text, printed while it is generated."""
    options = options | {"key": jax.random.key(seed)}
    if live is not None:
        print(printable(live), end="", flush=True)
        yield _print_live(model, prompt_ids, tokenizer, options)
        return
    for start in range(0, len(prompt_ids), size):
        part = prompt_ids[start : start + size]
        yield from complete(model, part, tokenizer, rows=range(start, start + len(part)), **options)


def _print_live(
    model: Model, prompt_ids: Sequence[Sequence[int]], tokenizer: Tokenizer, options: dict[str, Any]
) -> Completion:
    ids: list[int] = []
    text = ""
    why = ""
    for new in generate(model, prompt_ids, tokenizer, **options):
        print(printable(new.text), end="", flush=True)
        if new.why != "end":  # the token that ends a text is no part of it
            ids.append(new.id)
        text += new.text
        why = new.why
    print(flush=True)
    return Completion(ids, text, why)


def print_all(prompts: Sequence[str], found: Sequence[Completion]) -> None:
    """Print every prompt with its completion, numbered, and why the text ended."""
    for number, (prompt, completion) in enumerate(zip(prompts, found, strict=True), 1):
        print(f"--- {number} ({completion.why}) ---\n{printable(prompt)}{printable(completion.text)}")


def show_experts(
    model: Model,
    prompt_ids: Sequence[Sequence[int]],
    found: Sequence[Completion],
    tokenizer: Tokenizer,
    layer: int,
    flag: Any,
) -> None:
    """Show the texts in the colours of their experts: on the terminal, in a file, or both, as the flags say."""
    sequences = [[*prompt, *completion.ids] for prompt, completion in zip(prompt_ids, found, strict=True)]
    texts: list[Traced] = []
    for start in range(0, len(sequences), flag.batch_size):
        part = slice(start, start + flag.batch_size)
        texts += trace(model, sequences[part], [len(prompt) for prompt in prompt_ids[part]], tokenizer)
    choices = num_choices(model.config.model)
    if flag.show_experts:
        for line in on_terminal(texts, layer, choices):
            Console().print(line, soft_wrap=True)
    if flag.html:
        write_whole(output_of(flag.html, "--html"), as_html(texts, layer, choices, f"Experts of {flag.workdir}"))
