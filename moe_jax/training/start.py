"""What a run begins with: its checkpoint, other weights, or parameters drawn at random."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_jax.config import Config, as_dict, differences, keys_that_change, validate
from moe_jax.config.paths import workdir_of
from moe_jax.runtime import processes
from moe_jax.runtime.files import copy_tree, is_remote, new_folder
from moe_jax.runtime.log import METRICS, has_evaluation, newest
from moe_jax.runtime.workdir import TOKENIZER, Identity, config_of_run, identity_of, refuse_another_run
from moe_jax.training.restore import has_another_tokenizer, restore_run

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.data import Corpus
    from moe_jax.training.state import TrainState


def is_unaccounted(logged: int, first: int, ended: int, save_every: int) -> bool:
    """Whether a log has steps that a checkpoint must have held once, and which the newest one there is does not.

    A crash leaves lines after the newest checkpoint too, at most up to the next save.

    Args:
        logged: the steps done by its newest line.
        first: those of the newest checkpoint.
        ended: those that the last attempt that ended well had saved.
        save_every: of the config; 0 saves at the end only.
    """
    next_save = first // save_every * save_every + save_every if save_every else first
    return logged > first and (ended > first or logged > next_save)


def is_finished(config: Config, workdir: Path) -> bool:
    """Whether the log ends with the evaluation after the last step."""
    return has_evaluation(newest(workdir / METRICS), config.num_steps)


def why_finished(config: Config, workdir: Path) -> str:
    """A sentence if the run is finished and its checkpoints are gone; empty for every other."""
    from moe_jax.runtime import checkpoint

    if not is_finished(config, workdir) or checkpoint.committed(workdir / "checkpoints"):
        return ""
    return (
        f"the log of {workdir} ends with the evaluation after its last step, so the run is finished, though no "
        "checkpoint is there any more; to train it again, use another workdir or move metrics.jsonl away"
    )


class Start(NamedTuple):
    """What a run begins with: its state, what was saved beside it, its identity, and lines for the reader."""

    state: "TrainState"
    extra: dict[str, Any]
    identity: Identity
    remarks: list[str]


def _resume(config: Config, workdir: Path, mesh: "Mesh", corpus: "Corpus") -> Start | None:
    """The newest checkpoint of the workdir; None if there is none. Needs nothing of `init_from`."""
    found = restore_run(config, workdir, mesh)
    if found is None:
        return None
    state, extra = found
    there = identity_of(extra)

    def check() -> list[str]:
        refuse_another_run(workdir, "checkpoint", extra["config"], there, config, corpus.fingerprint)
        return refuse_other_weights(workdir, there, validate(extra["config"]), config)

    remarks = processes.by_first(check)
    return Start(state, extra, there or Identity(corpus.fingerprint), remarks)


def refuse_other_weights(workdir: Path, identity: Identity | None, there: Config, config: Config) -> list[str]:
    """Check `init_from` against the start of the run that is resumed; a line where that can be checked no more.

    A run needs nothing of the weights once it has a checkpoint, so they may be gone, moved or left out.

    Raises:
        ValueError: `init_from` names other weights than those that the run started from.
    """
    if not config.init_from:
        return []
    if identity is None:  # older than identities: the weights are those that its config names
        same = config.init_from == there.init_from
    elif identity.weights is None:
        same = False
    else:
        now = _fingerprint_at(workdir_of(config.init_from, "init_from") / "checkpoints", identity.weights["step"])
        if now is None:
            return [f"init_from={config.init_from!r} no longer has the weights that this run started from; not needed"]
        same = now == identity.weights["fingerprint"]
    if not same:
        raise ValueError(
            f"init_from={config.init_from!r} has other weights than the run in --workdir={workdir} started from; use "
            "another workdir to start from them, or init_from='' to resume."
        )
    return []


def _fingerprint_at(checkpoints: Path, step: int) -> str | None:
    """The fingerprint of the finished checkpoint of a step; None where it is gone or damaged."""
    from moe_jax.runtime.manifest import fingerprint

    try:
        return fingerprint(checkpoints / f"{step:08d}")
    except ValueError:
        return None


def _start(config: Config, workdir: Path, mesh: "Mesh", corpus: "Corpus") -> Start:
    """A new run: parameters drawn, or those of `init_from` with what came along."""
    from moe_jax.training.state import init_state

    state, weights = weights_of(config, mesh) if config.init_from else (init_state(config, mesh), None)
    state = with_hash_tables(config, state, corpus)
    remarks = processes.by_first(lambda: [*changes_of_model(config), *carry_tokenizer(config, workdir, corpus)])
    return Start(state, {}, Identity(corpus.fingerprint, weights), remarks)


def weights_of(config: Config, mesh: "Mesh") -> tuple["TrainState", dict[str, Any]]:
    """A start from the newest checkpoint of `config.init_from`: its parameters and bias, and nothing else of it.

    A bias that is zero everywhere says nothing; where balancing starts from is this run's to say.

    Returns:
        the state before step 0; "step" and "fingerprint" of that checkpoint, by which the run will know it.

    Raises:
        ValueError: no such checkpoint, a damaged one, of another model, or with a bias that this run cannot use.
    """
    import jax

    from moe_jax.runtime import checkpoint, manifest
    from moe_jax.training.state import abstract_state, state_around

    target, options = abstract_state(config, mesh), config.checkpoint
    folder = workdir_of(config.init_from, "init_from") / "checkpoints"
    found = checkpoint.restore_weights(
        folder,
        {"params": target.params, "bias": target.bias},
        verify=options.verify,
        fallback=options.fallback,
        cast=True,
    )
    if found is None:
        raise ValueError(f"init_from={config.init_from!r} has no finished checkpoint; name the workdir of one.")
    weights, extra = found
    told = any(np.asarray(leaf).any() for leaf in jax.device_get(jax.tree.leaves(weights["bias"])))
    if told:
        _refuse_bias_of_another_kind(config, validate(extra["config"]))
    step = extra["step"]
    known = {"step": step, "fingerprint": processes.by_first(lambda: manifest.fingerprint(folder / f"{step:08d}"))}
    return state_around(config, weights["params"], weights["bias"] if told else None, mesh), known


def changes_of_model(config: Config) -> list[str]:
    """A line if the model of `init_from` was another than these weights now become, though of the same shapes."""
    if not config.init_from:
        return []
    there, here = (as_dict(c)["model"] for c in (config_of_run(workdir_of(config.init_from, "init_from")), config))
    another = keys_that_change("model")
    changed = [line for line in differences(there, here) if f"model.{line.partition(':')[0]}" in another]
    return [f"the weights were trained in another model: {'; '.join(changed)}"] if changed else []


def carry_tokenizer(config: Config, workdir: Path, corpus: "Corpus") -> list[str]:
    """Keep the tokenizer, for text and for export: that of `init_from`, or the corpus's; a line if they differ."""
    from moe_jax.data import ByteTokenizer, publish_tokenizer

    target, source = workdir / TOKENIZER, workdir_of(config.init_from, "init_from") if config.init_from else workdir
    if target.exists():
        return []
    differs = has_another_tokenizer(source, corpus)
    from_source = (source / TOKENIZER).is_dir() and not differs
    if from_source or not isinstance(corpus.tokenizer, ByteTokenizer):
        with nullcontext(target) if is_remote(target) else new_folder(target) as partial:
            if from_source:
                copy_tree(source / TOKENIZER, partial)
            else:
                publish_tokenizer(config.data.path, corpus.tokenizer, partial)
    name = corpus.tokenizer.name
    return [f"the weights came with another tokenizer than {name!r}, the corpus's, which counts now"] * differs


def _refuse_bias_of_another_kind(config: Config, there: Config) -> None:
    """Biases that are added to scores and biases that multiply them are not the same numbers."""
    from moe_jax import balance

    kinds = [
        "is added to scores" if balance.make(c.balance, c.model).combine is None else "multiplies scores"
        for c in (there, config)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"init_from={config.init_from!r} has a bias that {kinds[0]}, but in this run's balance it {kinds[1]}; "
            "choose a balance of the same kind."
        )


def with_hash_tables(config: Config, state: "TrainState", corpus: "Corpus") -> "TrainState":
    """The state with the tables of `hash` balanced for the corpus's token frequencies.

    Every layer has the same groups of tokens, and its experts in an order of its own.
    """
    import jax

    from moe_jax.balance.selectors import balanced_table
    from moe_jax.data import token_frequencies

    labels = [e.label for e in config.balance if e.method == "hash"]
    if not labels:
        return state
    m = config.model
    frequencies = token_frequencies(corpus, m.vocab_size, config.data.weights)
    table = balanced_table(frequencies, m.num_experts, m.top_k, config.seed)

    def filled(path: Any, leaf: Any) -> Any:
        if path[-1] != jax.tree_util.DictKey("table"):
            return leaf
        orders = (np.random.default_rng((config.seed, layer)).permutation(m.num_experts) for layer in range(len(leaf)))
        return jax.device_put(np.stack([order[table] for order in orders]).astype(np.int32), leaf.sharding)

    own = {label: jax.tree_util.tree_map_with_path(filled, state.balance[label]) for label in labels}
    return state._replace(balance=state.balance | own)


def open_data(config: Config) -> "Corpus":
    """The corpus of the config, checked against it.

    Raises:
        ValueError, FileNotFoundError: missing or damaged files, a vocabulary too small, wrong data.weights.
    """
    from moe_jax.data import open_corpus
    from moe_jax.data.batches import check_weights

    corpus = open_corpus(config.data.path, config.data.verify)
    needed = corpus.tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least the {needed} tokens of the "
            f"{corpus.tokenizer.name!r} tokenizer of data.path={config.data.path!r}; set it to {needed} or more."
        )
    if config.data.weights:
        check_weights(corpus.domains, config.data.weights)  # before the workdir is claimed
    return corpus


def agree_on_data(config: Config, corpus: "Corpus") -> None:
    """Raise a ValueError in every process unless `data.path` leads all of them to the same data."""
    first = processes.by_first(lambda: corpus.fingerprint)

    def check() -> None:
        if corpus.fingerprint != first:
            raise ValueError(
                f"data.path={config.data.path!r} leads process {processes.index()} to other data (fingerprint "
                f"{corpus.fingerprint[:16]}) than process 0 ({first[:16]}); give all hosts the same prepared folder."
            )

    processes.by_all(check)
