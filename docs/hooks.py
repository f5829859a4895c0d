"""The site has pages and pictures from outside docs/, and every link is written as it is on disk."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

STUDY = "experiments/results/study"
OUTSIDE = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "experiments/LOG.md", "experiments/results/*.*"),
    *(f"{STUDY}/report.md", f"{STUDY}/figures/*"),
)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of OUTSIDE, at their path in the repository."""
    root = Path(config.docs_dir).parent
    for pattern in OUTSIDE:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links between files of the repository become links between pages of the site, where docs/ is the root."""
    here = page.file.src_uri
    home = posixpath.dirname(here if page.file.generated_by else f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(home, link[1])).removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)
