"""Answers to the requests of the evaluation harness: likelihoods and generated text."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.runtime.workdir import config_of_run
from moe_jax.text.model import check_trained, encode, known_length, restore, tokenizer_of

if TYPE_CHECKING:
    from moe_jax.data import Tokenizer
    from moe_jax.text.model import Model

OURS = Path(__file__).parent / "tasks"
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # known generation_kwargs
MOST_NEW = 256  # tokens of a text whose task sets no limit, as in the harness's own models


@dataclass(frozen=True)
class Reader:
    """A model with its tokenizer, and how texts are given to it.

    restore: () -> the model, called when it is first needed. opened: whether a text begins with the separator.
    max_length: the most tokens that the model sees at a time. batch_size: texts processed at the same time.
    """

    restore: "Callable[[], Model]"
    tokenizer: "Tokenizer"
    opened: bool
    max_length: int
    batch_size: int = 8

    @functools.cached_property
    def model(self) -> "Model":
        """The model, restored once."""
        return self.restore()


def open_reader(workdir: Path, tokenizer: str = "", max_length: int = 0, batch_size: int = 8, eos: str = "") -> Reader:
    """A Reader of a workdir's newest checkpoint, with its own tokenizer and length unless others are given.

    Raises:
        ValueError: there is no run or no checkpoint, or the model cannot generate token by token.
    """
    from moe_jax.text.decoding import check_model

    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} must be at least 1; raise it.")
    config = config_of_run(workdir)
    its_tokenizer, opened = tokenizer_of(workdir, config, tokenizer, eos)
    check_model(config, its_tokenizer)
    length = max_length or known_length(workdir, config)
    if length < 2:
        raise ValueError(f"--max_length={length} must be at least 2: a token to see and one to predict.")
    check_trained(workdir)
    return Reader(lambda: restore(workdir)[0], its_tokenizer, opened, length, batch_size)


# --- what is refused ------------------------------------------------------------------------------------------


def check(reader: Reader, requests: Sequence[Any]) -> None:
    """Raise a ValueError that names each task with a request that cannot be answered, and its first such document.

    Args:
        reader: the model, which is not restored for this.
        requests: of any kind, as the harness builds them (`lm_eval.api.instance.Instance`).
    """
    problems: dict[str, str] = {}
    for request in requests:
        task = request.task_name or "the task"
        if task in problems:
            continue
        try:
            if request.request_type == "loglikelihood":
                pair(reader, *request.args[:2])
            if request.request_type == "generate_until":
                text_options(reader, request.args[1])
        except ValueError as error:
            where = "" if request.doc_id is None else f" (document {request.doc_id})"
            problems[task] = f"{task}{where}: {error}"
    if problems:
        raise ValueError(f"{'; '.join(problems.values())}; leave out {', '.join(problems)}, or correct what is named.")


# --- likelihoods ----------------------------------------------------------------------------------------------


def windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], int]]:
    """Cut a long text into windows, so that every token is predicted once, after as many tokens as fit.

    Args:
        tokens: of the text.
        prefix: a token that precedes the first.
        length: how many tokens the model sees.

    Yields:
        At most length + 1 tokens, of which the model sees all but the last, and how many of the last ones are new.
    """
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        whole = [prefix, *tokens[:stop]] if stop <= length else tokens[stop - length - 1 : stop]
        yield list(whole), stop - start


def rolling(reader: Reader, texts: Sequence[str]) -> list[float]:
    """ln of the probability of each text after the separator, in windows; names of special tokens are text."""
    pieces = []
    owners = []
    for number, text in enumerate(texts):
        for piece in windows(reader.tokenizer.encode(text).tolist(), reader.tokenizer.separator, reader.max_length):
            pieces.append(piece)
            owners.append(number)
    sums = [0.0] * len(texts)
    for owner, (log, _) in zip(owners, _scored(reader, pieces), strict=True):
        sums[owner] += log
    return sums


def pair(reader: Reader, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids that the model sees and the ids that are scored, at least one each, for a context and its continuation.

    Together they are the ids of the whole text. Scoring begins at the first id that differs from those of the context
    alone, whose trailing spaces are dropped because they belong to the next word. So the ids that are seen encode a
    beginning of the context, and every byte of the continuation is scored. If there is no context, or none of its ids
    is left, the model sees the separator.

    Source: lm-evaluation-harness, `TemplateLM._encode_pair`, which cuts after as many ids as the context alone has.

    Raises:
        ValueError: no id would be scored, or more than the model sees.
    """
    whole = encode(reader.tokenizer, context + continuation, reader.opened)
    alone = encode(reader.tokenizer, context.rstrip(), reader.opened)
    cut = next((n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
    if not cut:
        whole = encode(reader.tokenizer, context + continuation, True)
        cut = 1
    if not continuation or not whole[cut:]:
        raise ValueError(f"the continuation {continuation!r} adds no token to its context, so nothing can be scored")
    if len(whole) - cut > reader.max_length:
        raise ValueError(
            f"a continuation has {len(whole) - cut} tokens, more than the {reader.max_length} that the model sees "
            "(--max_length)"
        )
    return whole[:cut], whole[cut:]


def likelihoods(reader: Reader, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """ln of the probability of each continuation after its context, and whether each of its tokens was the likeliest.

    Args:
        reader: the model; of a context that is too long it sees the last tokens.
        requests: (context, continuation) as token ids, at least one in each, as from `pair`.
    """
    return _scored(reader, [([*seen, *new][-(reader.max_length + 1) :], len(new)) for seen, new in requests])


def _scored(reader: Reader, pieces: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """For each piece, the sum over its new tokens and whether all were the likeliest; in batches, longest first."""
    from moe_jax.text.decoding import score

    results: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(pieces)), key=lambda n: -len(pieces[n][0]))
    for part in batches(order, reader.batch_size):
        full = [
            *part,
            *[part[-1]] * (reader.batch_size - len(part)),
        ]  # the same number of rows, so that nothing is recompiled
        found = score(reader.model, [pieces[n][0] for n in full])
        for n, (logs, likeliest) in zip(part, found, strict=False):
            new = pieces[n][1]
            results[n] = float(logs[-new:].astype(float).sum()), bool(likeliest[-new:].all())
    return [results[n] for n in range(len(pieces))]


# --- text -----------------------------------------------------------------------------------------------------


class TextOptions(NamedTuple):
    """How the texts of a task are generated."""

    max_new_tokens: int
    sampling: Any
    stop: tuple[str, ...]


def until(reader: Reader, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The continuation of each prompt, up to the strings or the length that its task names.

    Raises:
        ValueError: as `text_options`.
    """
    from moe_jax.text.decoding import complete

    all_options = [text_options(reader, options) for _, options in requests]
    texts = [""] * len(requests)
    for one in dict.fromkeys(all_options):
        members = [n for n, other in enumerate(all_options) if other == one]
        prompts = {n: _last_tokens(reader, requests[n][0], one.max_new_tokens) for n in members}
        members.sort(key=lambda n: -len(prompts[n]))
        for part in batches(members, reader.batch_size):
            found = complete(reader.model, [prompts[n] for n in part], reader.tokenizer, rows=part, **one._asdict())
            for n, completion in zip(part, found, strict=True):
                texts[n] = completion.text
    return texts


def text_options(reader: Reader, options: Mapping[str, Any]) -> TextOptions:
    """Read a task's generation_kwargs.

    Raises:
        ValueError: a key is unknown, a value is out of range, or there is no room for a prompt.
    """
    from moe_jax.text.sampling import Sampling

    if unknown := set(options) - GENERATION:
        raise ValueError(
            f"the task's generation_kwargs have {', '.join(sorted(unknown))}, but known are "
            f"{', '.join(sorted(GENERATION))} (--gen_kwargs)"
        )
    stop = options.get("until") or []
    try:
        sampled = options.get("do_sample", float(options.get("temperature", 0.0)) > 0)
        sampling = Sampling(
            float(options.get("temperature", 1.0)) if sampled else 0.0,
            int(options.get("top_k", 0)),
            float(options.get("top_p", 1.0)),
        )
        room = int(options.get("max_gen_toks", min(MOST_NEW, reader.max_length // 2)))
    except (TypeError, ValueError) as error:
        problem = str(error).removeprefix("--").removesuffix(".")
        raise ValueError(f"the task's generation_kwargs: {problem} (--gen_kwargs)") from None
    if not 0 < room < reader.max_length:
        raise ValueError(
            f"max_gen_toks={room} leaves no room for {'a text' if room < 1 else 'a prompt'} in the {reader.max_length} "
            "tokens that the model sees (--gen_kwargs, --max_length)"
        )
    return TextOptions(room, sampling, tuple(s for s in ([stop] if isinstance(stop, str) else stop) if s))


def _last_tokens(reader: Reader, prompt: str, new: int) -> list[int]:
    """The prompt's last tokens, as many as leave room for the new ones; the separator if there are none."""
    ids = encode(reader.tokenizer, prompt, reader.opened) or [reader.tokenizer.separator]
    return ids[-(reader.max_length - new) :]


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The items in order, in parts of `size`; the last one may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))
