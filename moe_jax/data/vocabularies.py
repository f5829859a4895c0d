"""From the name of a tokenizer to the tokenizer."""

from moe_jax.config.paths import path_of
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer

TOKENIZERS = {"bytes": ByteTokenizer}


def get_tokenizer(name: str, separator: str | int = "", eos: str = "", flag: str = "separator") -> Tokenizer:
    """Finds a tokenizer by its name, or reads the one in a folder.

    Args:
        name: a key of `TOKENIZERS`, or the path of a `tokenizer.json` or of the folder that holds it.
        separator: of a trained vocabulary, the token (or its id) that opens every document; "" finds it.
        eos: of a trained vocabulary, a token (or its id) that ends texts, in addition to those that its files name.
        flag: the caller's flag for such a token, for errors.

    Returns:
        The tokenizer.

    Raises:
        ValueError: no tokenizer has that name; or as `trained.read_tokenizer`.
    """
    if name in TOKENIZERS:
        if eos:
            raise ValueError(
                f"--{flag}={eos} is a token of a trained vocabulary, and {name!r} is not one; leave it out."
            )
        return TOKENIZERS[name]()
    path = path_of(name, "tokenizer")
    if not path.exists():
        known = ", ".join(sorted(TOKENIZERS))
        raise ValueError(
            f"tokenizer={name!r} is not known; use one of: {known}; or give a tokenizer.json, or a folder with one."
        )
    from moe_jax.data.trained import read_tokenizer

    return read_tokenizer(path, separator, eos, flag)
