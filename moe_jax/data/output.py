"""The folder that `prepare` writes: whether it is ours, what is finished in it, its manifest and its tokenizer.

Until a corpus is complete, its folder has a subfolder `.partial` with the plan, the lock, unfinished streams and a note
on every finished domain. The manifest appears last, and then `.partial` is removed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.config.paths import path_of
from moe_jax.data.chat import TEMPLATE_FILE
from moe_jax.data.corpus import open_corpus
from moe_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    WEIGHTS,
    File,
    check_files,
    part_dtypes,
    parts_of,
    version_of,
)
from moe_jax.data.scan import DomainPlan
from moe_jax.data.sources import LINES, Options, Source, has_lines
from moe_jax.data.spans import chat_digest, keys_of
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.runtime.files import lock, read_json, write_json, write_whole

PARTIAL = ".partial"
FINISHED = "finished"  # subfolder of PARTIAL with the notes, because a domain may have any name, such as "plan"
PLAN = "plan.json"


def refuse_foreign(options: Options) -> None:
    """Raises a ValueError for an output folder with files that are not ours, which could not be recreated."""
    output = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file and must be a folder; give another path.")
    ours = not output.exists() or (output / MANIFEST).exists() or (output / PARTIAL).exists()
    if not ours and any(output.iterdir()):
        raise ValueError(f"--output={output} holds other files and must be new or empty; give another folder.")
    if (output / MANIFEST).exists() and read_note(output / MANIFEST).get("format") != FORMAT:
        raise ValueError(
            f"--output={output} has a {MANIFEST} that is not a corpus's; give another folder, or remove it yourself."
        )


def obstacle(output: Path, inputs: str) -> Exception | None:
    """What is wrong with the corpus that is there already: it has other inputs, or it is damaged.

    Args:
        output: the output folder.
        inputs: the hash of the inputs and options, as `input_hash`.
    """
    for path in (output / MANIFEST, output / PARTIAL / PLAN):
        if path.exists() and read_note(path).get("fingerprint") != inputs:
            return ValueError(
                f"--output={output} holds a corpus made from other inputs or options; give another folder, or "
                "--overwrite to replace it."
            )
    return _damage(output) if (output / MANIFEST).exists() else None


def _damage(output: Path) -> Exception | None:
    try:
        open_corpus(str(output), verify="full")
    except (FileNotFoundError, ValueError) as error:
        return error
    return None


def read_note(path: Path) -> dict[str, Any]:
    """The JSON object in a manifest, plan or note; empty where there is none, or another program wrote the file."""
    try:
        return read_json(path, "")
    except ValueError:
        return {}


def note_of(output: Path, domain: str) -> Path:
    """The note on a finished domain: its entry in the manifest."""
    return output / PARTIAL / FINISHED / f"{domain}.json"


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """Creates `.partial`, and keeps a second run out of the folder; the lock ends with the process."""
    partial = output / PARTIAL
    (partial / FINISHED).mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as file:
        lock(file, partial, f"--output={output} is being written by another run; wait for it to end.")
        yield partial


def discard(output: Path) -> None:
    """Removes a corpus of ours, data first: after a kill in between, what is left still shows that it is ours."""
    for split in SPLITS:
        for ending in ("bin", "offsets.bin", "weights.bin"):
            for path in output.glob(f"*.{split}.{ending}"):
                path.unlink()
    shutil.rmtree(output / TOKENIZER_FOLDER, ignore_errors=True)
    for note in (output / PARTIAL / FINISHED).iterdir():
        note.unlink()
    for path in (output / PARTIAL / PLAN, output / MANIFEST):
        path.unlink(missing_ok=True)


def reopen(output: Path, manifest: dict[str, Any]) -> None:
    """Turns a complete corpus into one of which only the domains are finished, because its tokenizer's files change."""
    for domain, entry in manifest["domains"].items():
        write_json(note_of(output, domain), entry, durable=True)
    write_plan(output, manifest["fingerprint"])
    (output / MANIFEST).unlink()


def write_plan(output: Path, inputs: str) -> None:
    """Records the inputs that the unfinished corpus is made from."""
    write_json(output / PARTIAL / PLAN, {"fingerprint": inputs}, durable=True)


def complete(output: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, which makes the folder a corpus, and removes `.partial`."""
    partial = output / PARTIAL
    write_json(partial / MANIFEST, manifest, durable=True)
    os.replace(partial / MANIFEST, output / MANIFEST)
    shutil.rmtree(partial)


def finished(options: Options, plan: DomainPlan) -> dict[str, Any] | None:
    """The manifest's entry of a domain that an earlier run finished, if its files have not changed since."""
    entry = read_note(note_of(options.output, plan.name))
    if not entry:
        return None
    try:
        check_files(files_of(options.output, entry), full=True)
    except (FileNotFoundError, ValueError) as error:
        print(f"{plan.name}: {error} Writing it again.")
        return None
    print(f"{plan.name}: kept from an earlier run.")
    return entry


def files_of(folder: Path, entry: dict[str, Any]) -> list[File]:
    """The files of a domain, from its entry in the manifest."""
    parts = [entry[split][part] for split in SPLITS for part in parts_of(entry[split])]
    return [File(folder / part["file"], part["bytes"], part["sha256"]) for part in parts]


def input_hash(options: Options, plans: Sequence[DomainPlan], tokenizer: Tokenizer) -> str:
    """A hash of everything that the streams depend on."""
    everything = [
        VERSION,
        tokenizer.name,
        options.validation_fraction,
        options.text_key,
        [[plan.name, [_identity(source) for source in plan.sources]] for plan in plans],
    ]
    if list(keys := keys_of(options)) != ["text_key"]:
        everything += [keys, chat_digest(options)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _identity(source: Source) -> list[str]:
    """What of a file decides its documents; earlier versions took a .ndjson or .json file for a single document."""
    how = ["lines"] if has_lines(source.name) and not source.name.endswith(LINES[0]) else []
    return [source.name, source.sha256, *how]


def read_tokenizer_files(options: Options) -> dict[str, bytes]:
    """The files of a trained vocabulary by the names of their copies; read before anything is removed."""
    if not options.tokenizer:
        return {}
    from moe_jax.data.trained import TOKENIZER_FILE, tokenizer_files

    first, *others = tokenizer_files(path_of(options.tokenizer, "--tokenizer"))
    template = first.parent / TEMPLATE_FILE
    others += [template] if options.messages_key and template.is_file() else []
    return {TOKENIZER_FILE: first.read_bytes()} | {file.name: file.read_bytes() for file in others}


def describe_tokenizer(tokenizer: Tokenizer, files: dict[str, bytes]) -> Any:
    """The manifest's entry of the tokenizer: its name or, for a trained vocabulary, its files."""
    if not files:
        return tokenizer.name
    entries = [
        {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    ]
    return {"name": tokenizer.name, "separator": tokenizer.separator, "files": entries}


def write_tokenizer_files(output: Path, files: dict[str, bytes]) -> None:
    """Copies a trained vocabulary's files into the output, in place of those of an earlier one."""
    folder = output / TOKENIZER_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        folder.mkdir(exist_ok=True)
        write_whole(folder / name, data, durable=True)


def make_manifest(
    options: Options, inputs: str, domains: dict[str, Any], tokenizer: Tokenizer, described: Any
) -> dict[str, Any]:
    """The manifest of a finished corpus.

    Args:
        options: see the flags of `prepare`.
        inputs: as `input_hash`.
        domains: the entry of each domain.
        tokenizer: what the token ids mean.
        described: its entry, as `describe_tokenizer`.
    """
    weighted = version_of(domains) != VERSION
    keys = keys_of(options)
    dtypes = {part: dtype for part, dtype in part_dtypes(tokenizer).items() if part != WEIGHTS or weighted}
    return {
        "format": FORMAT,
        "version": version_of(domains),
        "fingerprint": inputs,
        "options": {"validation_fraction": options.validation_fraction, **keys},
        "tokenizer": described,
        "vocab_size": tokenizer.vocab_size,
        "dtypes": {part: f"{dtype.name}, little-endian" for part, dtype in dtypes.items()},
        "domains": domains,
    }
