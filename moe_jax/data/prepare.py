"""Turns a folder of text into a corpus of memory-mapped tokens.

    python -m moe_jax.data.prepare --input=FOLDER --output=DIR [--validation_fraction=0.05] [--text_key=text]
                                   [--domain=NAME] [--include='*.txt,*.parquet'] [--overwrite]
                                   [--tokenizer=DIR_OR_JSON [--separator=TOKEN]] [--processes=N]
                                   [--prompt_key=KEY --answer_key=KEY | --messages_key=KEY] [--weight_key=KEY]

First-level subfolders are the domains; files directly in FOLDER belong to a domain named after it, or to
--domain. A file is one document, except that every line of a .jsonl, .ndjson or .json file is one, and every row of a
.parquet or .arrow table, with the text under --text_key. Text and lines may be compressed (.gz, .bz2, .xz, .zst, .lz4).

Tokens are bytes, or those of a trained vocabulary: --tokenizer names a tokenizer.json or the folder of the model that
holds it. Its files are copied into the output, which needs nothing else. Documents are opened by the model's bos or eos
token, or by --separator; names of special tokens in the text are text.

For fine-tuning, --prompt_key and --answer_key name two fields of which only the second is trained on, and
--messages_key a list of {"role", "content"} that the tokenizer's chat template renders, of which only what the
assistant writes is trained on. --weight_key names a number by which a document's loss is multiplied.

Everything is read twice. The first reading checks it, so that bad input is reported before anything is written, and
decides by a hash of each document's path and line which documents are held out. The second reading writes, domain after
domain, and the manifest last. A command that was killed at any moment can be repeated: finished domains are kept, and
the result is the same to the last byte. Repeated with other settings beside the same tokenizer.json, such as another
generation_config.json, it replaces only those.
"""

import argparse
from collections.abc import Sequence

from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of
from moe_jax.data import output
from moe_jax.data.manifest import MANIFEST
from moe_jax.data.scan import scan
from moe_jax.data.sources import INCLUDE, Options, find_sources
from moe_jax.data.spans import chat_digest, check_keys
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.data.vocabularies import get_tokenizer
from moe_jax.data.writer import write_domains


def prepare(options: Options) -> None:
    """Prepares a corpus, or resumes one that was interrupted.

    Args:
        options: see the flags of this command.

    Raises:
        ValueError: an option is out of range, the input has bad documents (up to 20 are named), or the output
            folder holds something else.
        FileNotFoundError: the input is not a folder.
    """
    _check_options(options)
    check_keys(options)
    output.refuse_foreign(options)
    tokenizer = get_tokenizer(options.tokenizer, options.separator) if options.tokenizer else ByteTokenizer()
    chat_digest(options)  # refuses a tokenizer without a template before anything is read
    tokenizer_files = output.read_tokenizer_files(options)
    described = output.describe_tokenizer(tokenizer, tokenizer_files)
    plans = scan(options, find_sources(options))
    inputs = output.input_hash(options, plans, tokenizer)
    obstacle = output.obstacle(options.output, inputs)
    if obstacle and not options.overwrite:
        raise obstacle
    earlier = {} if obstacle else output.read_note(options.output / MANIFEST)
    if earlier.get("tokenizer") == described and not (options.output / output.PARTIAL).exists():
        print(f"{options.output} is complete already.")
        return
    with output.locked(options.output):
        if obstacle:
            output.discard(options.output)
        elif earlier:
            output.reopen(options.output, earlier)
        output.write_plan(options.output, inputs)
        entries = {plan.name: output.finished(options, plan) for plan in plans}
        missing = [plan for plan in plans if not entries[plan.name]]
        written = write_domains(options, missing, tokenizer)
        entries |= {plan.name: entry for plan, entry in zip(missing, written, strict=True)}
        output.write_tokenizer_files(options.output, tokenizer_files)
        output.complete(options.output, output.make_manifest(options, inputs, entries, tokenizer, described))
    print(f"Wrote {options.output / MANIFEST}.")


def _check_options(options: Options) -> None:
    if not options.input.is_dir():
        raise FileNotFoundError(f"--input={options.input} is not a folder; give the folder that holds the text.")
    if not 0 < options.validation_fraction < 1:
        raise ValueError(f"--validation_fraction={options.validation_fraction} must be above 0 and below 1; try 0.05.")
    if options.processes < 0:
        raise ValueError(f"--processes={options.processes} must be at least 1, or 0 to choose; leave it out.")
    if options.separator and not options.tokenizer:
        raise ValueError(f"--separator={options.separator} is a token of a --tokenizer, which is missing; give both.")
    source = options.input.resolve()
    target = options.output.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ValueError(
            f"--output={options.output} and --input={options.input} must not be inside each other; give an output "
            "folder elsewhere."
        )


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.data.prepare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="folder of text")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="share held out (0.05)")
    parser.add_argument("--text_key", default="text", help="key of the text in a .jsonl line (text)")
    parser.add_argument("--prompt_key", default="", help="key of a prompt, which is not trained on")
    parser.add_argument("--answer_key", default="", help="key of the answer to --prompt_key")
    parser.add_argument("--messages_key", default="", help="key of a list of messages, for a chat template")
    parser.add_argument("--weight_key", default="", help="key of how much a document counts (1)")
    parser.add_argument("--domain", default="", help="domain of files directly in the input")
    parser.add_argument("--include", default=INCLUDE, help=f"patterns of file names ({INCLUDE})")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json, or the folder that holds it (bytes)")
    parser.add_argument("--separator", default="", help="token of the vocabulary that opens documents (its bos or eos)")
    parser.add_argument("--processes", type=int, default=0, help="files read at a time (0: a core each, if it pays)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    values = vars(parser.parse_args(arguments))
    return Options(**values | {name: path_of(values[name], f"--{name}") for name in ("input", "output")})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; bad input ends it with a message and status 2."""
    print_any_name()
    try:
        prepare(parse(arguments))
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
