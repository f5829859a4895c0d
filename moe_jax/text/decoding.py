"""Texts from a model, token by token with a cache, for `generate` and `harness`.

A prompt enters the cache in chunks, then every step adds one token to each row. What is compiled depends only on
rounded lengths. No copy of a token is dropped, and the logits are those of the forward pass in training.

Legend: B rows, N tokens at a time, V vocabulary, L MoE layers, S slots.
"""

import codecs
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moe_jax import balance
from moe_jax.config import DISPATCHERS, BalanceEntry, Config, ModelConfig, check_length
from moe_jax.data import Tokenizer
from moe_jax.mesh import replicated, spec, ways
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Pass, PerLayer, next_inputs
from moe_jax.text.colours import Traced
from moe_jax.text.model import Model
from moe_jax.text.sampling import Sampling, next_tokens

CHUNK = 256  # tokens of a prompt that enter the cache at a time, whose logits are in memory together
# lengths are rounded to powers of two from the first to the second of these, and to multiples of the third beyond
SHORTEST = 16
LONGEST_POWER = 1024
LENGTH_STEP = 512

Entries = tuple[BalanceEntry, ...]


class NewToken(NamedTuple):
    """One more token of one text.

    row: the text's number. id: the token. text: the characters that have become certain, perhaps none, perhaps those of
    several tokens. why: "" while the text continues; "end", "stop" or "length" with its last token.
    """

    row: int
    id: int
    text: str
    why: str


class Completion(NamedTuple):
    """The continuation of a prompt: token ids without an end of text, text up to a stop string, and why it ended."""

    ids: list[int]
    text: str
    why: str


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    key: Any = None,
    rows: Sequence[int] | None = None,
    max_length: int = 0,
) -> Iterator[NewToken]:
    """Continue prompts together, token by token, with a cache.

    Two programs are compiled, for a chunk of the prompts and for a single token; lengths are rounded up.

    Args:
        model: config, parameters and bias.
        prompts: token ids, at least one in each; lengths may differ.
        tokenizer: decodes the texts; ids outside its vocabulary are never drawn.
        max_new_tokens: of each text, at least 1.
        sampling: `Sampling()` if None.
        stop: a text ends before the first of these strings, which may contain names of special tokens.
        key: the random key; `jax.random.key(0)` if None.
        rows: numbers that distinguish the draws of the texts, 0, 1, ... if None: a text depends on its row only.
        max_length: prompt and new tokens together must not exceed it; 0 is no limit.

    Yields:
        A `NewToken` for every text that continues, then for the next token of each.

    Raises:
        ValueError: an argument is out of range, or the model cannot route one token at a time.
    """
    check_model(model.config, tokenizer)
    check_prompts(prompts, max_new_tokens, stop, max_length)
    check_length(model.config.model, max(map(len, prompts)) + max_new_tokens, "prompt and new tokens")
    count = _whole_shards(len(prompts), model.mesh)
    lengths = np.array([len(prompt) for prompt in prompts] + [0] * (count - len(prompts)))
    names = np.arange(count) if rows is None else np.resize(np.asarray(rows, np.int64), count)
    step = _step(*_compiled_by(model), sampling or Sampling(), tokenizer.vocab_size)
    arrays = (model.params, model.bias, model.balance)
    draws = jax.random.key(0) if key is None else key, names.astype(np.int32)
    cache = _cache_maker(model.config.model, model.mesh, count, rounded(int(lengths.max()) + max_new_tokens))()
    new = np.zeros(count, np.int32)
    for tokens, positions in _chunks(prompts, count, max(map(len, prompts))):
        new, cache = step(arrays, tokens, positions, new, cache, *draws)
    texts = [Growing(tokenizer, stop, opening=not tokenizer.to_bytes(prompt)) for prompt in prompts]
    for number in range(max_new_tokens):
        ids = np.asarray(new)
        for row, text in enumerate(texts):
            if not text.why:
                grown = text.take(int(ids[row]), last=number + 1 == max_new_tokens)
                yield NewToken(row, int(ids[row]), grown, text.why)
        if all(text.why for text in texts):
            return
        continues = np.array([not text.why for text in texts] + [False] * (count - len(texts)))
        positions = np.where(continues, lengths + number, -1).astype(np.int32)
        new, cache = step(arrays, ids[:, None], positions[:, None], new, cache, *draws)


def complete(model: Model, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, **options: Any) -> list[Completion]:
    """As `generate`, but returns whole texts, in the order of the prompts."""
    ids: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    why = [""] * len(prompts)
    for new in generate(model, prompts, tokenizer, **options):
        ids[new.row] += [] if new.why == "end" else [new.id]
        texts[new.row] += new.text
        why[new.row] = new.why
    return [Completion(*one) for one in zip(ids, texts, why, strict=True)]


class Growing:
    """A text while it is generated: it releases only whole characters, and nothing that may become a stop string.

    Names of special tokens are never released, but a stop string may contain them.

    Args:
        tokenizer: decodes the tokens.
        stop: the strings before which the text ends.
        opening: whether no text precedes it, so that what the tokenizer puts before texts must be removed.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], opening: bool = False) -> None:
        self.why = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._first: list[int] | None = [] if opening else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._is_text: list[bool] = []  # for each character that is held

    def take(self, token: int, last: bool = False) -> str:
        """Add a token; returns the characters that have become certain. `last`: no other token follows."""
        ended = token in self._tokenizer.ends
        data = self._bytes_of([] if ended else [token], final=ended or last)
        text = self._decoder.decode(data, final=ended or last)
        name = self._tokenizer.names.get(token, "")
        self._held += text + name
        self._is_text += [True] * len(text) + [False] * len(name)
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        self.why = "end" if ended else "stop" if found else "length" if last else ""
        certain = min(found) if found else len(self._held) if self.why else len(self._held) - self._doubtful()
        released = "".join(itertools.compress(self._held[:certain], self._is_text))
        self._held = self._held[certain:]
        self._is_text = self._is_text[certain:]
        return released

    def _bytes_of(self, ids: list[int], final: bool) -> bytes:
        """The bytes of more ids; none at the beginning of a text until it is clear which bytes belong to it."""
        if self._first is None:
            return self._tokenizer.to_bytes(ids)
        self._first += ids
        data = self._tokenizer.to_bytes(self._first)
        if len(data) < 2 * self._tokenizer.lead_bytes and not final:
            return b""
        lead = self._tokenizer.lead(self._first)
        self._first = None
        return data[lead:]

    def _doubtful(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        beginnings = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        return max((len(begun) for begun in beginnings if self._held.endswith(begun)), default=0)


def trace(
    model: Model, sequences: Sequence[Sequence[int]], prompts: Sequence[int], tokenizer: Tokenizer
) -> list[Traced]:
    """The routing of finished texts in all MoE layers, from one forward pass.

    Args:
        model: with experts.
        sequences: token ids of whole texts, each with its prompt.
        prompts: the number of tokens of each prompt.
        tokenizer: decodes them.
    """
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


def score(model: Model, sequences: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """How likely given texts are; lengths are rounded, so that few programs are compiled.

    Args:
        model: config, parameters and bias.
        sequences: token ids, at least two in each.

    Returns:
        For each text, the logarithms of the probabilities of its tokens after the first, float32 [N - 1], over the
        model's whole vocabulary, and whether each was the likeliest token, bool [N - 1].
    """
    count = _whole_shards(len(sequences), model.mesh)
    found = []
    inputs = [s[:-1] for s in sequences]
    targets = [s[1:] for s in sequences]
    longest = max(map(len, inputs))
    check_length(model.config.model, longest, "tokens of a text")
    step = _score(*_compiled_by(model))
    arrays = (model.params, model.bias, model.balance)
    cache = _cache_maker(model.config.model, model.mesh, count, rounded(longest))()
    pieces = zip(_chunks(inputs, count, longest), _chunks(targets, count, longest), strict=True)
    for (tokens, positions), (following, _) in pieces:
        *result, cache = step(arrays, tokens, positions, following, cache)
        found.append([np.asarray(a) for a in result])
    logs, likeliest = (np.concatenate(parts, 1) for parts in zip(*found, strict=True))
    return [(logs[n, : len(t)], likeliest[n, : len(t)]) for n, t in enumerate(targets)]


# --- checks ---------------------------------------------------------------------------------------------------


def check_model(config: Config, tokenizer: Tokenizer) -> None:
    """Raise a ValueError if a model cannot generate token by token, or lacks ids of the tokenizer."""
    for entry in config.balance:
        if not balance.make((entry,), config.model).by_token:
            raise ValueError(
                f"balance.{entry.label} does not choose a token's experts by that token alone, in evaluation either, "
                "so no text can be generated token by token; train with another method."
            )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the {tokenizer.vocab_size} ids of tokenizer "
            f"{tokenizer.name!r}; give the tokenizer that the model was trained with."
        )


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = (), max_length: int = 0
) -> None:
    """Raise a ValueError if there is nothing to continue, or too much."""
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens={max_new_tokens} must be at least 1; raise it.")
    if not prompts:
        raise ValueError("there is no prompt; give at least one.")
    if "" in stop:
        raise ValueError("--stop is empty, and every text contains that; give a string, or leave it out.")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise ValueError(f"prompt {number} has no token to continue; give some text, or --separator.")
        if max_length and len(prompt) + max_new_tokens > max_length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with --max_new_tokens={max_new_tokens} are more than "
                f"the {max_length} that the model was trained for; lower --max_new_tokens, or set --max_length."
            )


def notice_of_drops(config: Config) -> str:
    """A sentence for a run whose training dropped copies, which generation does not; "" for others."""
    droppers = [f"balance.{e.label}" for e in config.balance if balance.make((e,), config.model).drop is not None]
    if config.model.num_experts and not DISPATCHERS[config.model.dispatch].dropless:
        droppers.append(f"model.dispatch={config.model.dispatch!r}")
    return f"{' and '.join(droppers)} dropped copies of tokens in training; here none is dropped." if droppers else ""


# --- compiled programs ----------------------------------------------------------------------------------------


def _compiled_by(model: Model) -> tuple[ModelConfig, Entries, Mesh | None]:
    """What of a model decides which program is compiled."""
    return model.config.model, model.config.balance, model.mesh


@functools.lru_cache(maxsize=16)
def _extend(model: ModelConfig, entries: Entries, mesh: Mesh | None) -> Any:
    """(arrays, tokens, positions, cache) -> logits, report, cache; compiled by its callers."""

    def extend(arrays: Any, tokens: Any, positions: Any, cache: Any, **options: Any) -> Any:
        params, bias, state = arrays
        transformer: Any = nnx.merge(abstract_model(model).graphdef, params, bias)
        cache = transformer.init_cache(*tokens.shape) if cache is None else cache
        inputs, balancer = next_inputs(tokens, positions), balance.make(entries, model)
        fwd = Pass(inputs, balancer, PerLayer(state), jax.random.key(0), mesh=mesh)
        return transformer.extend(fwd, cache, **options)

    return extend


@functools.lru_cache(maxsize=32)
def _step(model: ModelConfig, entries: Entries, mesh: Mesh | None, sampling: Sampling, num_tokens: int) -> Any:
    """(arrays, tokens, positions, before, cache, key, rows) -> next tokens [B], cache; compiled for each shape.

    A row without tokens keeps its token from before.
    """
    extend = _extend(model, entries, mesh)

    def step(arrays: Any, tokens: Any, positions: Any, before: Any, cache: Any, key: Any, rows: Any) -> Any:
        logits, _, cache = extend(arrays, tokens, positions, cache, last_only=True)
        logits = logits[:, 0]
        known = jnp.where(jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] < num_tokens, logits, -jnp.inf)
        new = next_tokens(known, sampling, key, rows, positions.max(-1) + 1)
        return jnp.where((positions >= 0).any(-1), new, before), cache

    shardings = None if mesh is None else (replicated(mesh), _cache_sharding(mesh))
    return jax.jit(step, donate_argnums=4, out_shardings=shardings)


@functools.lru_cache(maxsize=16)
def _score(model: ModelConfig, entries: Entries, mesh: Mesh | None) -> Any:
    """(arrays, tokens, positions, targets, cache) -> ln p of the targets [B, N], likeliest [B, N], cache."""
    extend = _extend(model, entries, mesh)

    def step(arrays: Any, tokens: Any, positions: Any, targets: Any, cache: Any) -> Any:
        logits, _, cache = extend(arrays, tokens, positions, cache)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        logs = chosen - jax.nn.logsumexp(logits, axis=-1)
        return logs, jnp.argmax(logits, -1).astype(jnp.int32) == targets, cache

    whole = None if mesh is None else replicated(mesh)
    shardings = None if mesh is None else (whole, whole, _cache_sharding(mesh))
    return jax.jit(step, donate_argnums=4, out_shardings=shardings)


@functools.lru_cache(maxsize=16)
def _routes(model: ModelConfig, entries: Entries, mesh: Mesh | None) -> Any:
    """(arrays, tokens, positions) -> expert ids and gates [L, B N, S], compiled for each shape."""
    extend = _extend(model, entries, mesh)

    def routes(arrays: Any, tokens: Any, positions: Any) -> Any:
        routing = extend(arrays, tokens, positions, None)[1].details.routing
        return routing.expert_ids, routing.gates

    return jax.jit(routes, out_shardings=None if mesh is None else replicated(mesh))


@functools.lru_cache(maxsize=16)
def _cache_maker(model: ModelConfig, mesh: Mesh | None, count: int, length: int) -> Any:
    """() -> an empty cache for `count` rows of `length` tokens."""
    abstract = abstract_model(model)
    transformer: Any = nnx.merge(abstract.graphdef, abstract.params, abstract.bias)
    make = functools.partial(transformer.init_cache, count, length)
    return jax.jit(make, out_shardings=None if mesh is None else _cache_sharding(mesh))


def _cache_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all axes that split tokens, behind the axis of stacked layers: decoding cuts no sequence."""
    return NamedSharding(mesh, spec("layers", "pieces"))


def rounded(length: int) -> int:
    """The next of few lengths: a power of two from SHORTEST to LONGEST_POWER, beyond that a multiple of LENGTH_STEP."""
    if length <= LONGEST_POWER:
        return max(SHORTEST, 1 << (length - 1).bit_length())
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _whole_shards(rows: int, mesh: Mesh | None) -> int:
    """The number of rows, rounded up so that all shards of the batch have equally many."""
    shards = ways(mesh, "pieces")
    return -(-rows // shards) * shards


def _chunks(sequences: Sequence[Sequence[int]], count: int, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and positions [B, N] of sequences of at most `longest` tokens, chunk after chunk, N at most CHUNK."""
    width = min(CHUNK, rounded(longest))
    tokens, positions = _padded(sequences, count, -(-longest // width) * width)
    for start in range(0, tokens.shape[1], width):
        yield tokens[:, start : start + width], positions[:, start : start + width]


def _padded(sequences: Sequence[Sequence[int]], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, 0 where there is none, and positions, -1 there: int32 [count, width] each."""
    tokens = np.zeros((count, width), np.int32)
    positions = np.full((count, width), -1, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        positions[row, : len(sequence)] = np.arange(len(sequence))
    return tokens, positions
