"""`python -m moe_jax.harness --workdir=DIR --tasks=held_out`: tasks of the lm-evaluation-harness, on our models.

Needs `pip install 'moe_jax[lm-eval]'`. Any task of the harness that asks for likelihoods or for text can be named, or
one of your own with --include_path; most of them download their data. Two of ours do not: `held_out`, the bits per
byte of the held-out documents of the run's corpus (or --data=DIR), each document by itself; and `continuation`, which
of four passages goes on a held-out text. With --output=FILE the results are also written as JSON.

In Python, `adapter()(workdir=...)` is a model for `lm_eval.simple_evaluate`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import app, flags

from moe_jax.cache import keep_compiled
from moe_jax.command import fail, parse_flags
from moe_jax.files import output_of, path_of, workdir_of, write_json
from moe_jax.generate import encode, longest, restore, tokenizer_of
from moe_jax.workdir import config_of_run

if TYPE_CHECKING:
    from moe_jax.data import Tokenizer
    from moe_jax.decoding import Model

OURS = Path(__file__).parent / "tasks"
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # what a task may ask of text
TOGETHER = 32  # documents whose pieces share batches
MOST_NEW = 256  # tokens of a text whose task sets no limit, as in the harness's own models


class Reader(NamedTuple):
    """A model that reads and writes: what answers the harness.

    opened: whether a text begins with the separator. max_length: most tokens that are seen at a time.
    """

    model: "Model"
    tokenizer: "Tokenizer"
    opened: bool
    max_length: int
    batch_size: int = 8


def reader(workdir: Path, tokenizer: str = "", max_length: int = 0, batch_size: int = 8) -> Reader:
    """The newest checkpoint of a workdir, with its own tokenizer and length unless others are asked for.

    Raises:
        ValueError: no run, no checkpoint, or a model that cannot make text token by token.
    """
    from moe_jax.decoding import check_model

    if batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} must be at least 1; raise it.")
    config = config_of_run(workdir)
    spoken, opened = tokenizer_of(workdir, config, tokenizer)
    check_model(config, spoken)
    length = max_length or longest(workdir, config)
    if length < 2:
        raise ValueError(f"--max_length={length} must be at least 2: a token to see and one to predict.")
    return Reader(restore(workdir)[0], spoken, opened, length, batch_size)


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


def likelihoods(read: Reader, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """ln of the probability of each continuation after its context, and whether each of its tokens was the likeliest.

    Args:
        read: the model; of a context that is too long the last tokens are seen.
        requests: (context, continuation) as token ids, at least one in a context.

    Raises:
        ValueError: a continuation by itself is longer than the model sees.
    """
    pieces = []
    for context, continuation in requests:
        if len(continuation) > read.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than the {read.max_length} that the model sees; "
                "leave the task out, or set --max_length."
            )
        pieces.append(([*context, *continuation][-(read.max_length + 1) :], len(continuation)))
    return _scored(read, pieces)


def _scored(read: Reader, pieces: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Of each piece the sum over its last tokens, and whether all were the likeliest: longest first, in batches."""
    from moe_jax.decoding import score

    results: list[tuple[float, bool]] = [(0.0, True)] * len(pieces)
    order = sorted((n for n, (_, new) in enumerate(pieces) if new), key=lambda n: -len(pieces[n][0]))
    for part in _parts(order, read.batch_size):
        full = [*part, *[part[-1]] * (read.batch_size - len(part))]  # as many rows each time: nothing compiles anew
        found = score(read.model, [pieces[n][0] for n in full])
        for n, (logs, likeliest) in zip(part, found, strict=False):
            new = pieces[n][1]
            results[n] = float(logs[-new:].astype(float).sum()), bool(likeliest[-new:].all())
    return results


# --- text -----------------------------------------------------------------------------------------------------


def until(read: Reader, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What follows each prompt, up to the strings or the length that its task names.

    Raises:
        ValueError: a task asks for what is not known here, or leaves no room for its prompt.
    """
    from moe_jax.decoding import complete

    wishes = [_wishes(read, options) for _, options in requests]
    texts = [""] * len(requests)
    for wish in dict.fromkeys(wishes):
        members = [n for n, other in enumerate(wishes) if other == wish]
        prompts = {n: _last(read, requests[n][0], wish.max_new_tokens) for n in members}
        members.sort(key=lambda n: -len(prompts[n]))
        for part in _parts(members, read.batch_size):
            found = complete(read.model, [prompts[n] for n in part], read.tokenizer, rows=part, **wish._asdict())
            for n, one in zip(part, found, strict=True):
                texts[n] = one.text
    return texts


class Wish(NamedTuple):
    """How a task wants its texts."""

    max_new_tokens: int
    sampling: Any
    stop: tuple[str, ...]


def _wishes(read: Reader, options: Mapping[str, Any]) -> Wish:
    from moe_jax.sampling import Sampling

    if unknown := set(options) - GENERATION:
        raise ValueError(
            f"the task's generation_kwargs have {', '.join(sorted(unknown))}, but known are "
            f"{', '.join(sorted(GENERATION))}; change them with --gen_kwargs, or leave the task out."
        )
    stop = options.get("until") or []
    drawn = options.get("do_sample", float(options.get("temperature", 0.0)) > 0)
    sampling = Sampling(
        float(options.get("temperature", 1.0)) if drawn else 0.0,
        int(options.get("top_k", 0)),
        float(options.get("top_p", 1.0)),
    )
    room = int(options.get("max_gen_toks", min(MOST_NEW, read.max_length // 2)))
    return Wish(room, sampling, tuple(s for s in ([stop] if isinstance(stop, str) else stop) if s))


def _last(read: Reader, prompt: str, new: int) -> list[int]:
    """The prompt's last tokens, as many as leave room for the new ones."""
    if new >= read.max_length:
        raise ValueError(
            f"max_gen_toks={new} leaves no room for a prompt in the {read.max_length} tokens that the model sees; "
            "set --max_length, or leave the task out."
        )
    return encode(read.tokenizer, prompt, read.opened)[-(read.max_length - new) :]


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# --- the harness's own interface ------------------------------------------------------------------------------


def adapter() -> Any:
    """The class by which the harness knows our models, registered as "moe_jax".

    Raises:
        ValueError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from tqdm import tqdm
    except ImportError as error:
        raise ValueError(
            f"the lm-evaluation-harness is not installed ({error}); pip install 'moe_jax[lm-eval]'."
        ) from None

    class MoeJax(TemplateLM):
        """A workdir's model, as the harness asks for one."""

        def __init__(
            self, workdir: str, tokenizer: str = "", max_length: int = 0, batch_size: int = 8, **others: Any
        ) -> None:
            super().__init__()
            if unknown := {name for name, value in others.items() if value is not None} - {"max_batch_size", "device"}:
                raise ValueError(
                    f"model_args has {', '.join(sorted(unknown))}, which moe_jax does not know; remove it."
                )
            self.reader = reader(workdir_of(workdir), tokenizer, int(max_length), int(batch_size))

        @property
        def eot_token_id(self) -> int:
            return self.reader.tokenizer.separator

        @property
        def max_length(self) -> int:
            return self.reader.max_length

        @property
        def tokenizer_name(self) -> str:
            return self.reader.tokenizer.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            opened = self.reader.opened if add_special_tokens is None else add_special_tokens
            return encode(self.reader.tokenizer, string, opened)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = likelihoods(self.reader, pairs)
            self._remember("loglikelihood", [request[0] for request in requests], found)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts, found = [request.args[0] for request in requests], []
            for part in tqdm(list(_parts(range(len(texts)), TOGETHER)), desc="documents", disable=disable_tqdm):
                found += rolling(self.reader, [texts[n] for n in part])
            self._remember("loglikelihood_rolling", [request.args for request in requests], found)
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found = until(self.reader, [request.args for request in requests])
            self._remember("generate_until", [request.args for request in requests], found)
            return found

        def _remember(self, kind: str, arguments: Sequence[Any], found: Sequence[Any]) -> None:
            for given, answer in zip(arguments, found, strict=True):
                self.cache_hook.add_partial(kind, given, answer)

    return register_model("moe_jax")(MoeJax)


# --- the command ----------------------------------------------------------------------------------------------


def run(flag: Any) -> dict[str, Any]:
    """Evaluate, print the harness's table, and give its results.

    Raises:
        ValueError, OSError: whatever the flags, the workdir or a task lack.
    """
    made, workdir = adapter(), workdir_of(flag.workdir)
    if flag.output:
        output_of(flag.output, "--output")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    data = flag.data or config_of_run(workdir).data.path
    ours = {file.stem for file in OURS.glob("*.yaml")}
    names = [name for name in flag.tasks.split(",") if name]
    paths = [str(OURS), *([str(path_of(flag.include_path, "--include_path"))] if flag.include_path else [])]
    manager = TaskManager(include_path=paths, include_defaults=not ours.issuperset(names), metadata={"data_path": data})
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"--tasks={flag.tasks} names {unknown[0]}, which is no task; ours are {', '.join(sorted(ours))}."
        )
    found = simple_evaluate(
        model=made(str(workdir), flag.tokenizer, flag.max_length, flag.batch_size),
        tasks=names,
        num_fewshot=flag.num_fewshot,
        limit=flag.limit or None,
        gen_kwargs=flag.gen_kwargs or None,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=flag.bootstrap,
    )
    print(make_table(found))
    if flag.output:
        write_json(output_of(flag.output, "--output"), json.loads(json.dumps(found["results"], default=str)))
    return found["results"]


def define_flags(values: Any = flags.FLAGS) -> None:
    """The flags of the command."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", None, "Of a training run, or of a converted model.", flag_values=values, required=True)
    text("tasks", "held_out", "Names of tasks, with commas.", flag_values=values)
    text("include_path", "", "A folder with tasks of your own.", flag_values=values)
    text("data", "", "A prepared folder for our tasks; the run's own if left out.", flag_values=values)
    text("tokenizer", "", "bytes, or a tokenizer.json's folder; the model's own.", flag_values=values)
    text("gen_kwargs", "", "As temperature=0.5,max_gen_toks=32.", flag_values=values)
    text("output", "", "Write the results to this file.", flag_values=values)
    whole("num_fewshot", None, "Examples before each question; the task's own number.", flag_values=values)
    whole("limit", 0, "Only so many documents of each task; 0: all.", flag_values=values)
    whole("batch_size", 8, "Texts at the same time.", flag_values=values)
    whole("max_length", 0, "Most tokens seen at a time; 0: what the model is made for.", flag_values=values)
    whole("bootstrap", 1000, "Samples for the standard errors; 0: none.", flag_values=values)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    keep_compiled()
    try:
        run(flags.FLAGS)
    except (ValueError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
