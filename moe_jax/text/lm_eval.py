"""What the evaluation harness asks of a model: likelihoods and text."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.config.paths import workdir_of
from moe_jax.runtime.workdir import config_of_run
from moe_jax.text.model import check_trained, encode, longest, restore, tokenizer_of

if TYPE_CHECKING:
    from moe_jax.data import Tokenizer
    from moe_jax.text.model import Model


OURS = Path(__file__).parent / "tasks"


GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # what a task may ask of text


TOGETHER = 32  # documents whose pieces share batches


MOST_NEW = 256  # tokens of a text whose task sets no limit, as in the harness's own models


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that reads and writes: what answers the harness.

    restore: gives the model when it is first needed. opened: whether a text begins with the separator. max_length:
    most tokens that are seen at a time.
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


def reader(workdir: Path, tokenizer: str = "", max_length: int = 0, batch_size: int = 8, eos: str = "") -> Reader:
    """The newest checkpoint of a workdir, with its own tokenizer and length unless others are asked for.

    Raises:
        ValueError: no run, no checkpoint, or a model that cannot make text token by token.
    """
    from moe_jax.text.decoding import check_model

    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} must be at least 1; raise it.")
    config = config_of_run(workdir)
    spoken, opened = tokenizer_of(workdir, config, tokenizer, eos)
    check_model(config, spoken)
    length = max_length or longest(workdir, config)
    if length < 2:
        raise ValueError(f"--max_length={length} must be at least 2: a token to see and one to predict.")
    check_trained(workdir)
    return Reader(lambda: restore(workdir)[0], spoken, opened, length, batch_size)


# --- what is refused ------------------------------------------------------------------------------------------


def check(read: Reader, requests: Sequence[Any]) -> None:
    """Raise a ValueError that names each task of which a request cannot be answered, and its first such document.

    Args:
        read: who is to answer; the model is not restored for that.
        requests: of any kind, as the harness makes them (`lm_eval.api.instance.Instance`).
    """
    problems: dict[str, str] = {}
    for request in requests:
        task = request.task_name or "the task"
        if task in problems:
            continue
        try:
            if request.request_type == "loglikelihood":
                pair(read, *request.args[:2])
            if request.request_type == "generate_until":
                wish(read, request.args[1])
        except ValueError as error:
            where = "" if request.doc_id is None else f" (document {request.doc_id})"
            problems[task] = f"{task}{where}: {error}"
    if problems:
        raise ValueError(f"{'; '.join(problems.values())}; leave out {', '.join(problems)}, or mend what is named.")


# --- likelihoods ----------------------------------------------------------------------------------------------


def windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], int]]:
    """A long text in pieces that a model can see, every token predicted once, with as much before it as fits.

    Args:
        tokens: of the text.
        prefix: stands before the first.
        length: how many tokens the model sees.

    Yields:
        At most length + 1 tokens, of which all but the last are seen, and how many of the last ones are new.
    """
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        whole = [prefix, *tokens[:stop]] if stop <= length else tokens[stop - length - 1 : stop]
        yield list(whole), stop - start


def rolling(read: Reader, texts: Sequence[str]) -> list[float]:
    """ln of the probability of each text behind the separator, in windows; names of special tokens are text."""
    pieces, owners = [], []
    for number, text in enumerate(texts):
        for piece in windows(read.tokenizer.encode(text).tolist(), read.tokenizer.separator, read.max_length):
            pieces.append(piece)
            owners.append(number)
    sums = [0.0] * len(texts)
    for owner, (log, _) in zip(owners, _scored(read, pieces), strict=True):
        sums[owner] += log
    return sums


def pair(read: Reader, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids that are seen, at least one, and those that are scored for a continuation of a context, at least one.

    Both together are the ids of the whole text. Scored are those from the first that differs from the context's own,
    where these are taken without spaces at their end, which belong to the word that follows. So the ids that are seen
    stand for a beginning of the context, and every byte of the continuation is scored. Behind no context, or where
    nothing of its ids is left, the separator is seen.

    Source: lm-evaluation-harness, `TemplateLM._encode_pair`, which cuts behind as many ids as the context has.

    Raises:
        ValueError: nothing would be scored, or more than the model sees.
    """
    whole = encode(read.tokenizer, context + continuation, read.opened)
    alone = encode(read.tokenizer, context.rstrip(), read.opened)
    cut = next((n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
    if not cut:
        whole, cut = encode(read.tokenizer, context + continuation, True), 1
    if not continuation or not whole[cut:]:
        raise ValueError(f"the continuation {continuation!r} adds no token to its context, so nothing can be scored")
    if len(whole) - cut > read.max_length:
        raise ValueError(
            f"a continuation has {len(whole) - cut} tokens, more than the {read.max_length} that the model sees "
            "(--max_length)"
        )
    return whole[:cut], whole[cut:]


def likelihoods(read: Reader, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """ln of the probability of each continuation after its context, and whether each of its tokens was the likeliest.

    Args:
        read: the model; of a context that is too long the last tokens are seen.
        requests: (context, continuation) as token ids, at least one in each, as `pair` gives them.
    """
    return _scored(read, [([*seen, *new][-(read.max_length + 1) :], len(new)) for seen, new in requests])


def _scored(read: Reader, pieces: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Of each piece the sum over its last tokens, and whether all were the likeliest: longest first, in batches."""
    from moe_jax.text.decoding import score

    results: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(pieces)), key=lambda n: -len(pieces[n][0]))
    for part in _parts(order, read.batch_size):
        full = [*part, *[part[-1]] * (read.batch_size - len(part))]  # as many rows each time: nothing compiles anew
        found = score(read.model, [pieces[n][0] for n in full])
        for n, (logs, likeliest) in zip(part, found, strict=False):
            new = pieces[n][1]
            results[n] = float(logs[-new:].astype(float).sum()), bool(likeliest[-new:].all())
    return [results[n] for n in range(len(pieces))]


# --- text -----------------------------------------------------------------------------------------------------


class Wish(NamedTuple):
    """How a task wants its texts."""

    max_new_tokens: int
    sampling: Any
    stop: tuple[str, ...]


def until(read: Reader, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What follows each prompt, up to the strings or the length that its task names.

    Raises:
        ValueError: as `wish`.
    """
    from moe_jax.text.decoding import complete

    wishes = [wish(read, options) for _, options in requests]
    texts = [""] * len(requests)
    for one in dict.fromkeys(wishes):
        members = [n for n, other in enumerate(wishes) if other == one]
        prompts = {n: _last(read, requests[n][0], one.max_new_tokens) for n in members}
        members.sort(key=lambda n: -len(prompts[n]))
        for part in _parts(members, read.batch_size):
            found = complete(read.model, [prompts[n] for n in part], read.tokenizer, rows=part, **one._asdict())
            for n, completion in zip(part, found, strict=True):
                texts[n] = completion.text
    return texts


def wish(read: Reader, options: Mapping[str, Any]) -> Wish:
    """What a task's generation_kwargs say.

    Raises:
        ValueError: they have what is not known here, a value out of range, or leave no room for a prompt.
    """
    from moe_jax.text.sampling import Sampling

    if unknown := set(options) - GENERATION:
        raise ValueError(
            f"the task's generation_kwargs have {', '.join(sorted(unknown))}, but known are "
            f"{', '.join(sorted(GENERATION))} (--gen_kwargs)"
        )
    stop = options.get("until") or []
    try:
        drawn = options.get("do_sample", float(options.get("temperature", 0.0)) > 0)
        sampling = Sampling(
            float(options.get("temperature", 1.0)) if drawn else 0.0,
            int(options.get("top_k", 0)),
            float(options.get("top_p", 1.0)),
        )
        room = int(options.get("max_gen_toks", min(MOST_NEW, read.max_length // 2)))
    except (TypeError, ValueError) as error:
        problem = str(error).removeprefix("--").removesuffix(".")
        raise ValueError(f"the task's generation_kwargs: {problem} (--gen_kwargs)") from None
    if not 0 < room < read.max_length:
        raise ValueError(
            f"max_gen_toks={room} leaves no room for {'a text' if room < 1 else 'a prompt'} in the {read.max_length} "
            "tokens that the model sees (--gen_kwargs, --max_length)"
        )
    return Wish(room, sampling, tuple(s for s in ([stop] if isinstance(stop, str) else stop) if s))


def _last(read: Reader, prompt: str, new: int) -> list[int]:
    """The prompt's last tokens, as many as leave room for the new ones; the separator where there are none."""
    ids = encode(read.tokenizer, prompt, read.opened) or [read.tokenizer.separator]
    return ids[-(read.max_length - new) :]


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# --- the harness's own interface ------------------------------------------------------------------------------


@functools.cache  # a name is registered once
def adapter() -> Any:
    """The class by which the harness knows our models, registered as "moe_jax".

    Raises:
        ValueError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
        from tqdm import tqdm
    except ImportError as error:
        raise ValueError(
            f"the lm-evaluation-harness is not installed ({error}); pip install 'moe_jax[lm-eval]'."
        ) from None

    class MoeJax(LM):
        """A workdir's model, as the harness asks for one.

        tasks: those that will ask, where they are known: none is answered if one cannot be.
        """

        def __init__(
            self,
            workdir: str,
            tokenizer: str = "",
            max_length: int = 0,
            batch_size: int = 8,
            eos: str = "",
            **others: Any,
        ) -> None:
            super().__init__()
            if unknown := {name for name, value in others.items() if value is not None} - {"max_batch_size", "device"}:
                raise ValueError(
                    f"model_args has {', '.join(sorted(unknown))}, which moe_jax does not know; remove it."
                )
            self.reader = reader(workdir_of(workdir), tokenizer, int(max_length), int(batch_size), str(eos))
            self.tasks: Sequence[Any] = ()
            self.answering = False

        @property
        def max_length(self) -> int:
            return self.reader.max_length

        @property
        def tokenizer_name(self) -> str:
            return self.reader.tokenizer.name

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._check(requests)
            pairs = [pair(self.reader, *request.args[:2]) for request in requests]
            return self._remember(requests, likelihoods(self.reader, pairs))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            self._check(requests)
            texts, found = [request.args[0] for request in requests], []
            for part in tqdm(list(_parts(range(len(texts)), TOGETHER)), desc="documents", disable=disable_tqdm):
                found += rolling(self.reader, [texts[n] for n in part])
            return self._remember(requests, found)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self._check(requests)
            return self._remember(requests, until(self.reader, [request.args for request in requests]))

        def _check(self, requests: Any) -> None:
            """Before the first answer: the harness has made all tasks' requests by then."""
            if not self.answering:
                check(self.reader, [one for task in self.tasks for one in task.instances] or requests)
            self.answering = bool(self.tasks)

        def _remember(self, requests: Sequence[Any], found: list[Any]) -> list[Any]:
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial(request.request_type, request.args, answer)
            return found

    return register_model("moe_jax")(MoeJax)
