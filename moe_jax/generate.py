"""`python -m moe_jax.generate --workdir=DIR --prompt="..."`: text from the newest checkpoint of a run.

Several --prompt, a --prompts_file with one a line, or --num_samples of each are made together; a single text appears
as it is made. It ends at the separator of documents (or the model's own end of text), where a --stop string begins, or
after --max_new_tokens. --temperature=0 takes the likeliest token; --top_k and --top_p leave only likely ones. The same
--seed gives the same text, whatever else is made with it.

--show_experts colours every token by its top expert in one MoE layer (--layer, the middle one if left out);
--html=FILE writes the same as a page in which the layer can be chosen.

No copy of a token is dropped, and the logits are those of the training's forward pass.
"""

import codecs
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import app, flags

from moe_jax.cache import keep_compiled
from moe_jax.command import fail, parse_flags
from moe_jax.config import Config
from moe_jax.files import workdir_of, write_whole
from moe_jax.show import Traced, as_html, on_terminal, printable
from moe_jax.workdir import config_of_run

if TYPE_CHECKING:
    from moe_jax.data import Tokenizer
    from moe_jax.sampling import Sampling

CHUNK = 256  # tokens of a prompt that enter the cache at a time: their logits are in memory together
TOKENIZER_FOLDER = "tokenizer"  # of a workdir: the files that came with a converted model


class Model(NamedTuple):
    """What text is made with: a config and the arrays of a state, on one device or on a mesh."""

    config: Config
    params: Any
    bias: Any
    balance: Any
    mesh: Any = None


class New(NamedTuple):
    """One more token of one text.

    row: which text. id: the token. text: the characters that are certain now, which may be none, or several tokens'.
    why: "" while the text goes on; "end", "stop" or "length" with its last token.
    """

    row: int
    id: int
    text: str
    why: str


class Completion(NamedTuple):
    """What followed a prompt: its token ids without an end of text, the text up to a stop string, and why it ended."""

    ids: list[int]
    text: str
    why: str


# --- the library ----------------------------------------------------------------------------------------------


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    tokenizer: "Tokenizer",
    *,
    max_new_tokens: int,
    sampling: "Sampling | None" = None,
    stop: Sequence[str] = (),
    key: Any = None,
    rows: Sequence[int] | None = None,
    max_length: int = 0,
) -> Iterator[New]:
    """Continue prompts together, token by token, with a cache.

    One program is compiled for the prompts' padded length and one for a single token; lengths are rounded up.

    Args:
        model: config, parameters and bias.
        prompts: token ids, at least one in each; lengths may differ.
        tokenizer: gives the texts; ids that it does not know are never drawn.
        max_new_tokens: of each text, at least 1.
        sampling: `Sampling()` if None.
        stop: a text ends before the first of these strings.
        key: of the randomness; `jax.random.key(0)` if None.
        rows: what tells the draws of the texts apart, their number if None: a text depends on its row, not on others.
        max_length: prompt and new tokens together must not exceed it; 0 is no limit.

    Yields:
        A `New` for every text that goes on, then for the next token of each.

    Raises:
        ValueError: an argument is out of range, or the model cannot route one token at a time.
    """
    import jax
    import numpy as np

    from moe_jax.sampling import Sampling

    check_model(model.config, tokenizer)
    check_prompts(prompts, max_new_tokens, stop, max_length)
    count = _whole_shards(len(prompts), model.mesh)
    lengths = np.array([len(prompt) for prompt in prompts] + [0] * (count - len(prompts)))
    names = np.arange(count) if rows is None else np.resize(np.asarray(rows, np.int64), count)
    step = _step(*_compiled_by(model), sampling or Sampling(), tokenizer.vocab_size)
    arrays = (model.params, model.bias, model.balance)
    how = jax.random.key(0) if key is None else key, names.astype(np.int32)
    cache = _cache_maker(model.config.model, model.mesh, count, rounded(int(lengths.max()) + max_new_tokens))()
    new = np.zeros(count, np.int32)
    for tokens, positions in _chunks(prompts, count):
        new, cache = step(arrays, tokens, positions, new, cache, *how)
    texts = [Growing(tokenizer, stop, _lead(tokenizer, prompt)) for prompt in prompts]
    for number in range(max_new_tokens):
        ids = np.asarray(new)
        for row, text in enumerate(texts):
            if not text.why:
                grown = text.take(int(ids[row]), last=number + 1 == max_new_tokens)
                yield New(row, int(ids[row]), grown, text.why)
        if all(text.why for text in texts):
            return
        going = np.array([not text.why for text in texts] + [False] * (count - len(texts)))
        positions = np.where(going, lengths + number, -1).astype(np.int32)
        new, cache = step(arrays, ids[:, None], positions[:, None], new, cache, *how)


def complete(model: Model, prompts: Sequence[Sequence[int]], tokenizer: "Tokenizer", **how: Any) -> list[Completion]:
    """As `generate`, but all of every text at once, in the order of the prompts."""
    ids: list[list[int]] = [[] for _ in prompts]
    texts, why = [""] * len(prompts), [""] * len(prompts)
    for new in generate(model, prompts, tokenizer, **how):
        ids[new.row] += [] if new.why == "end" else [new.id]
        texts[new.row] += new.text
        why[new.row] = new.why
    return [Completion(*one) for one in zip(ids, texts, why, strict=True)]


class Growing:
    """One text while it is made: only whole characters leave it, and nothing that may become a stop string."""

    def __init__(self, tokenizer: "Tokenizer", stop: Sequence[str], lead: int = 0) -> None:
        self.why = ""
        self._tokenizer, self._stop, self._lead = tokenizer, stop, lead
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def take(self, token: int, last: bool = False) -> str:
        """The characters that one more token makes certain; `last` says that no other follows."""
        ended = token in self._tokenizer.ends
        data = b"" if ended else self._tokenizer.to_bytes([token])
        if data and self._lead:
            data, self._lead = data.removeprefix(b" "), 0
        self._held += self._decoder.decode(data, final=ended or last)
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        self.why = "stop" if found else "end" if ended else "length" if last else ""
        certain = min(found) if found else len(self._held) if self.why else len(self._held) - self._doubtful()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _doubtful(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        beginnings = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        return max((len(begun) for begun in beginnings if self._held.endswith(begun)), default=0)


def trace(model: Model, sequences: Sequence[Sequence[int]], prompts: Sequence[int], tokenizer: Any) -> list[Traced]:
    """Where the tokens of finished texts go: the routing of all MoE layers, by one forward pass.

    Args:
        model: with experts.
        sequences: token ids of whole texts, prompt and what followed.
        prompts: how many of each are the prompt's.
        tokenizer: gives their bytes.
    """
    import numpy as np

    count = _whole_shards(len(sequences), model.mesh)
    longest = rounded(max(map(len, sequences)))
    tokens, positions = _padded(sequences, count, longest)
    arrays = (model.params, model.bias, model.balance)
    found = _routes(*_compiled_by(model))(arrays, tokens, positions)
    ids, gates = (np.asarray(a).reshape(len(a), count, longest, -1) for a in found)
    pieces = [[tokenizer.to_bytes([i]) for i in sequence] for sequence in sequences]
    return [
        Traced(sequence, pieces[n], prompts[n], ids[:, n, : len(sequence)], gates[:, n, : len(sequence)])
        for n, sequence in enumerate(sequences)
    ]


# --- what is refused ------------------------------------------------------------------------------------------


def check_model(config: Config, tokenizer: "Tokenizer") -> None:
    """Raise a ValueError where a model cannot make text token by token, or not that of the tokenizer."""
    from moe_jax import balance

    for entry in config.balance:
        if not balance.make((entry,), config.model).by_token:
            raise ValueError(
                f"balance.{entry.label} chooses a token's experts by the whole batch, in evaluation too, so no text "
                "can be made token by token; train with another method."
            )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the {tokenizer.vocab_size} ids of tokenizer "
            f"{tokenizer.name!r}; give the tokenizer that the model was trained with."
        )


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = (), max_length: int = 0
) -> None:
    """Raise a ValueError where there is nothing to continue, or too much."""
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens={max_new_tokens} must be at least 1; raise it.")
    if not prompts:
        raise ValueError("there is no prompt; give at least one.")
    if "" in stop:
        raise ValueError("--stop is empty, and every text has that at once; give a string, or leave it out.")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise ValueError(f"prompt {number} has no token to continue; give some text, or --separator.")
        if max_length and len(prompt) + max_new_tokens > max_length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with --max_new_tokens={max_new_tokens} are more than "
                f"the {max_length} that the model was trained on; lower --max_new_tokens, or set --max_length."
            )


def notice_of_drops(config: Config) -> str:
    """What to tell of a run whose training dropped copies, which generation does not; "" of others."""
    from moe_jax import balance

    droppers = [f"balance.{e.label}" for e in config.balance if balance.make((e,), config.model).drop is not None]
    droppers += (
        ["model.dispatch='capacity'"] if config.model.num_experts and config.model.dispatch == "capacity" else []
    )
    return f"{' and '.join(droppers)} dropped copies of tokens in training; here none is dropped." if droppers else ""


# --- what is compiled -----------------------------------------------------------------------------------------


def _compiled_by(model: Model) -> tuple[Any, Any, Any]:
    return model.config.model, model.config.balance, model.mesh


@functools.lru_cache(maxsize=16)
def _extend(model: Any, entries: Any, mesh: Any) -> Any:
    """(arrays, tokens, positions, cache) -> logits, report, cache; not compiled by itself."""
    from flax import nnx

    from moe_jax import balance
    from moe_jax.moe import Balancing
    from moe_jax.state import abstract_model

    def extend(arrays: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        params, bias, state = arrays
        transformer: Any = nnx.merge(abstract_model(model).graphdef, params, bias)
        cache = transformer.init_cache(*tokens.shape) if cache is None else cache
        balancing = Balancing(balance.make(entries, model), state)
        return transformer.extend(tokens, positions, cache, balancing, mesh=mesh)

    return extend


@functools.lru_cache(maxsize=32)
def _step(model: Any, entries: Any, mesh: Any, sampling: "Sampling", num_tokens: int) -> Any:
    """(arrays, tokens, positions, before, cache, key, rows) -> next tokens [B], cache; compiled for each shape.

    A row without tokens keeps the one from before.
    """
    import jax
    import jax.numpy as jnp

    from moe_jax.mesh import replicated
    from moe_jax.sampling import next_tokens

    extend = _extend(model, entries, mesh)

    def step(arrays: Any, tokens: Any, positions: Any, before: Any, cache: Any, key: Any, rows: Any) -> Any:
        logits, _, cache = extend(arrays, tokens, positions, cache)
        last = jnp.argmax(positions, -1)
        logits = jnp.take_along_axis(logits, last[:, None, None], 1)[:, 0]
        known = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
        new = next_tokens(known, sampling, key, rows, positions.max(-1) + 1)
        return jnp.where((positions >= 0).any(-1), new, before), cache

    places = None if mesh is None else (replicated(mesh), _cache_place(mesh))
    return jax.jit(step, donate_argnums=4, out_shardings=places)


@functools.lru_cache(maxsize=16)
def _routes(model: Any, entries: Any, mesh: Any) -> Any:
    """(arrays, tokens, positions) -> expert ids and gates [L, B N, S], compiled for each shape."""
    import jax

    from moe_jax.mesh import replicated

    extend = _extend(model, entries, mesh)

    def routes(arrays: Any, tokens: Any, positions: Any) -> Any:
        routing = extend(arrays, tokens, positions, None)[1].details.routing
        return routing.expert_ids, routing.gates

    return jax.jit(routes, out_shardings=None if mesh is None else replicated(mesh))


@functools.lru_cache(maxsize=16)
def _cache_maker(model: Any, mesh: Any, count: int, length: int) -> Any:
    """() -> an empty cache for so many rows of so many tokens."""
    import jax
    from flax import nnx

    from moe_jax.state import abstract_model

    abstract = abstract_model(model)
    transformer: Any = nnx.merge(abstract.graphdef, abstract.params, abstract.bias)
    make = functools.partial(transformer.init_cache, count, length)
    return jax.jit(make, out_shardings=None if mesh is None else _cache_place(mesh))


def _cache_place(mesh: Any) -> Any:
    """Rows over the batch axes, behind the axis of stacked layers."""
    from jax.sharding import NamedSharding, PartitionSpec

    from moe_jax.mesh import BATCH

    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def rounded(length: int) -> int:
    """A length that few others are rounded to as well: a power of two from 16 to 1024, beyond a multiple of 512."""
    return max(16, 1 << (length - 1).bit_length()) if length <= 1024 else -(-length // 512) * 512


def _whole_shards(rows: int, mesh: Any) -> int:
    """So many rows that each shard of the batch has as many."""
    from moe_jax.mesh import BATCH

    shards = 1
    for axis in BATCH if mesh is not None else ():
        shards *= mesh.shape[axis]
    return -(-rows // shards) * shards


def _chunks(prompts: Sequence[Sequence[int]], count: int) -> Iterator[tuple[Any, Any]]:
    """The prompts as tokens and positions [B, N], N at most CHUNK."""
    longest = max(map(len, prompts))
    width = min(CHUNK, rounded(longest))
    tokens, positions = _padded(prompts, count, -(-longest // width) * width)
    for start in range(0, tokens.shape[1], width):
        yield tokens[:, start : start + width], positions[:, start : start + width]


def _padded(sequences: Sequence[Sequence[int]], count: int, width: int) -> tuple[Any, Any]:
    """Tokens, 0 where there is none, and positions, -1 there: int32 [count, width] each."""
    import numpy as np

    tokens, positions = np.zeros((count, width), np.int32), np.full((count, width), -1, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], positions[row, : len(sequence)] = sequence, np.arange(len(sequence))
    return tokens, positions


def _lead(tokenizer: "Tokenizer", prompt: Sequence[int]) -> int:
    """The space that a tokenizer puts before a text, where the prompt has no text to hold it."""
    return 0 if tokenizer.to_bytes(prompt) else tokenizer.lead_bytes


# --- the command ----------------------------------------------------------------------------------------------


def restore(workdir: Path) -> tuple[Model, int]:
    """The model of a workdir's newest checkpoint, on the devices at hand, and its step.

    Raises:
        ValueError: there is no run, no checkpoint, or a damaged one.
    """
    from moe_jax.evaluate import on_these_devices, restore_run
    from moe_jax.mesh import is_sharded, make_mesh

    config = on_these_devices(config_of_run(workdir))
    mesh = make_mesh(config.mesh)
    found = restore_run(config, workdir, mesh)
    if found is None:
        raise ValueError(f"--workdir={workdir} has no finished checkpoint; train first.")
    state = found[0]
    model = Model(config, state.params, state.bias, state.balance, mesh if is_sharded(mesh) else None)
    return model, int(state.step)


def tokenizer_of(workdir: Path, config: Config) -> "tuple[Tokenizer, bool]":
    """The run's tokenizer, and whether a prompt begins with its separator: as the model has seen its texts.

    The files of a converted model first, then those of the corpus, then bytes.
    """
    from moe_jax.data import check_corpus
    from moe_jax.data.trained import TOKENIZER_FILE, read_tokenizer

    own = workdir / TOKENIZER_FOLDER
    if (own / TOKENIZER_FILE).is_file():
        tokenizer = read_tokenizer(own)
        return tokenizer, tokenizer.opens_text
    return check_corpus(config.data.path).tokenizer, True


def encode(tokenizer: "Tokenizer", prompt: str, opened: bool) -> list[int]:
    """A prompt's ids, names of special tokens read as these, behind the separator if it is to be opened."""
    ids = tokenizer.encode(prompt, special=True).tolist()
    return [tokenizer.separator, *ids] if opened and ids[:1] != [tokenizer.separator] else ids


def read_prompts(prompts: Sequence[str], file: str) -> list[str]:
    """The prompts of the flags, then those of the file, one a line.

    Raises:
        ValueError: there is none, or the file cannot be read.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts_file={file} cannot be read ({error}); give a UTF-8 file.") from None
    if not prompts and not lines:
        raise ValueError('there is no prompt; give --prompt="...", or --prompts_file=FILE with one a line.')
    return [*prompts, *lines]


def chosen_layer(config: Config, layer: int | None) -> int:
    """The MoE layer to show: the one asked for, or the middle one.

    Raises:
        ValueError: there is no such layer.
    """
    from moe_jax.config import num_moe_layers

    layers = num_moe_layers(config.model) - config.model.mtp_depth
    if not config.model.num_experts:
        raise ValueError(
            "--show_experts and --html are about experts, and model.num_experts=0 has none; leave them out."
        )
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"--layer={layer} must be one of the MoE layers 0 to {layers - 1}; give one of them.")
    return layers // 2 if layer is None else layer


def run(flag: Any) -> None:
    """Restore, generate, print.

    Raises:
        ValueError, OSError: whatever the flags or the workdir lack.
    """
    from moe_jax.sampling import Sampling

    workdir, prompts = workdir_of(flag.workdir), read_prompts(flag.prompt, flag.prompts_file)
    sampling = Sampling(flag.temperature, flag.top_k, flag.top_p)
    config = config_of_run(workdir)
    coloured = flag.show_experts or flag.html
    layer = chosen_layer(config, flag.layer) if coloured or flag.layer is not None else 0
    tokenizer, opened = tokenizer_of(workdir, config)
    opened = opened if flag.separator is None else flag.separator
    given = [encode(tokenizer, prompt, opened) for prompt in prompts for _ in range(flag.num_samples)]
    check_model(config, tokenizer)
    check_prompts(given, flag.max_new_tokens, flag.stop, flag.max_length or config.sequence_length)
    model, step = restore(workdir)
    _tell(f"{workdir}, step {step}; {notice_of_drops(config)}".rstrip("; "))
    how = dict(max_new_tokens=flag.max_new_tokens, sampling=sampling, stop=flag.stop)
    live = len(given) == 1 and not flag.show_experts
    started = time.monotonic()
    found = list(_in_batches(model, given, tokenizer, flag.seed, flag.batch_size, how, prompts[0] if live else None))
    total, seconds = sum(len(one.ids) for one in found), time.monotonic() - started
    if not live and not flag.show_experts:
        _print_all([prompt for prompt in prompts for _ in range(flag.num_samples)], found)
    if coloured:
        _show(model, given, found, tokenizer, layer, flag)
    _tell(f"{total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s")


def _in_batches(
    model: Model,
    given: Sequence[Sequence[int]],
    tokenizer: "Tokenizer",
    seed: int,
    size: int,
    how: dict[str, Any],
    live: str | None,
) -> Iterator[Completion]:
    """The completions, so many rows at a time; `live` is the prompt of a single text that is printed while made."""
    import jax

    how = how | {"key": jax.random.key(seed)}
    if live is not None:
        print(printable(live), end="", flush=True)
        yield _print_live(model, given, tokenizer, how)
        return
    for start in range(0, len(given), size):
        part = given[start : start + size]
        yield from complete(model, part, tokenizer, rows=range(start, start + len(part)), **how)


def _print_live(
    model: Model, given: Sequence[Sequence[int]], tokenizer: "Tokenizer", how: dict[str, Any]
) -> Completion:
    ids, text, why = [], "", ""
    for new in generate(model, given, tokenizer, **how):
        print(printable(new.text), end="", flush=True)
        ids += [] if new.why == "end" else [new.id]
        text, why = text + new.text, new.why
    print(flush=True)
    return Completion(ids, text, why)


def _print_all(prompts: Sequence[str], found: Sequence[Completion]) -> None:
    for number, (prompt, one) in enumerate(zip(prompts, found, strict=True), 1):
        print(f"--- {number} ({one.why}) ---\n{printable(prompt)}{printable(one.text)}")


def _show(
    model: Model,
    given: Sequence[Sequence[int]],
    found: Sequence[Completion],
    tokenizer: "Tokenizer",
    layer: int,
    flag: Any,
) -> None:
    """The texts in colours, on the terminal, in a file, or both."""
    sequences = [[*prompt, *one.ids] for prompt, one in zip(given, found, strict=True)]
    texts = []
    for start in range(0, len(sequences), flag.batch_size):
        part = slice(start, start + flag.batch_size)
        texts += trace(model, sequences[part], [len(prompt) for prompt in given[part]], tokenizer)
    choices = model.config.model.num_experts + model.config.model.num_zero_experts
    if flag.show_experts:
        from rich.console import Console

        for line in on_terminal(texts, layer, choices):
            Console().print(line, soft_wrap=True)
    if flag.html:
        write_whole(Path(flag.html), as_html(texts, layer, choices, f"Experts of {flag.workdir}"))
        _tell(f"wrote {flag.html}")


def _tell(line: str) -> None:
    """A line about the text, which is not the text."""
    print(line, file=sys.stderr, flush=True)


def main(_: list[str]) -> None:
    """Check the flags, then run."""
    flag = flags.FLAGS
    keep_compiled()
    try:
        for name in ("num_samples", "batch_size"):
            if getattr(flag, name) < 1:
                raise ValueError(f"--{name}={getattr(flag, name)} must be at least 1; raise it.")
        run(flag)
    except (ValueError, OSError) as error:
        fail(str(error))


def define_flags(values: Any = flags.FLAGS) -> None:
    """The flags of the command."""
    flags.DEFINE_string(
        "workdir", None, "The workdir of a training run, or of a converted model.", flag_values=values, required=True
    )
    flags.DEFINE_multi_string("prompt", [], "The beginning of a text; may be given several times.", flag_values=values)
    flags.DEFINE_string("prompts_file", "", "A file of prompts, one a line.", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "Most tokens to add to a prompt.", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the likeliest token.", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "Draw from so many likeliest tokens; 0: from all.", flag_values=values)
    flags.DEFINE_float(
        "top_p", 1.0, "Draw from the likeliest tokens that together have this probability.", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "End a text before this string; may be given several times.", flag_values=values
    )
    flags.DEFINE_integer("num_samples", 1, "Texts of each prompt.", flag_values=values)
    flags.DEFINE_integer("batch_size", 8, "Texts made at the same time.", flag_values=values)
    flags.DEFINE_integer(
        "max_length", 0, "Most tokens of prompt and text; 0: the run's sequence_length.", flag_values=values
    )
    flags.DEFINE_bool(
        "separator", None, "Begin prompts as documents begin; as the model was trained if left out.", flag_values=values
    )
    flags.DEFINE_bool("show_experts", False, "Colour tokens by their top expert.", flag_values=values)
    flags.DEFINE_integer(
        "layer", None, "The MoE layer to colour by, from 0; the middle one if left out.", flag_values=values
    )
    flags.DEFINE_string("html", "", "Write the coloured tokens of all layers to this file.", flag_values=values)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
