"""A trained model, restored for text, and its tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from moe_jax.config import Config, longest
from moe_jax.data import Tokenizer
from moe_jax.runtime.workdir import TOKENIZER, config_of_run


def restore(workdir: Path) -> "tuple[Model, int]":
    """The model of a workdir's newest checkpoint, on the present devices, and its step.

    Raises:
        ValueError: there is no run or no checkpoint, or it is damaged.
    """
    from moe_jax.mesh import is_sharded, make_mesh
    from moe_jax.training.restore import on_these_devices, restore_model

    config = on_these_devices(config_of_run(workdir))
    check_trained(workdir)
    mesh = make_mesh(config.mesh)
    state = restore_model(config, workdir, mesh)
    assert state is not None
    model = Model(config, state.params, state.bias, state.balance, mesh if is_sharded(mesh) else None)
    return model, int(state.step)


def check_trained(workdir: Path) -> None:
    """Raise a ValueError if there is no finished checkpoint."""
    from moe_jax.runtime.checkpoint import committed

    if not committed(workdir / "checkpoints"):
        raise ValueError(f"--workdir={workdir} has no finished checkpoint; train first.")


def tokenizer_of(workdir: Path, config: Config, name: str = "", eos: str = "") -> tuple[Tokenizer, bool]:
    """The model's tokenizer, and whether a prompt begins with its separator, as the texts in training did.

    Args:
        workdir: of a run or of a converted model.
        config: its config.
        name: of another tokenizer, as for `get_tokenizer`; "" takes the files of a converted model, or else the
            tokenizer of the run's corpus.
        eos: one more token, by name or id, that ends texts.

    Raises:
        ValueError: a converted model has no tokenizer that can be read; or as `get_tokenizer`.
    """
    from moe_jax.data import check_corpus, get_tokenizer
    from moe_jax.data.manifest import TOKENIZER_FOLDER
    from moe_jax.data.trained import TOKENIZER_FILE, read_tokenizer
    from moe_jax.data.vocabularies import TOKENIZERS

    own = workdir / TOKENIZER
    if name:
        tokenizer = get_tokenizer(name, eos=eos, flag="eos")
        return tokenizer, tokenizer.opens_text
    if (own / TOKENIZER_FILE).is_file():
        tokenizer = read_tokenizer(own, eos=eos, flag="eos")
        return tokenizer, tokenizer.opens_text
    if own.is_dir():
        raise ValueError(f"{own} has no {TOKENIZER_FILE}; put one there, or give --tokenizer=DIR_OR_JSON.")
    tokenizer = check_corpus(config.data.path).tokenizer
    if eos:
        name = tokenizer.name if tokenizer.name in TOKENIZERS else str(Path(config.data.path) / TOKENIZER_FOLDER)
        tokenizer = get_tokenizer(name, tokenizer.separator, eos, flag="eos")
    return tokenizer, True


def known_length(workdir: Path, config: Config) -> int:
    """The most tokens that the model can handle: from a converted model's config.json, for others as in training."""
    from moe_jax.data.trained import read_settings

    own = read_settings(workdir / TOKENIZER / "config.json").get("max_position_embeddings")
    length = own if isinstance(own, int) else config.sequence_length
    return int(min(length, longest(config.model)))


def encode(tokenizer: Tokenizer, prompt: str, opened: bool) -> list[int]:
    """A prompt's ids, after the separator if `opened`; names of special tokens become these tokens."""
    ids = tokenizer.encode(prompt, special=True).tolist()
    return [tokenizer.separator, *ids] if opened and ids[:1] != [tokenizer.separator] else ids


class Model(NamedTuple):
    """A config and the arrays of a state, on one device or on a mesh."""

    config: Config
    params: Any
    bias: Any
    balance: Any
    mesh: Mesh | None = None
