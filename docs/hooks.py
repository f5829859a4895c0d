"""Pages and pictures that live outside docs/: links to them are written as they are on disk, and work in the site too."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "experiments/LOG.md", "experiments/results/*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of OUTSIDE, at the address in the site that they have in the repository."""
    root = Path(config.docs_dir).parent
    for pattern in OUTSIDE:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            file = File(f"../{name}", config.docs_dir, config.site_dir, config.use_directory_urls)
            file.dest_uri = file.dest_uri.removeprefix("../")
            file.inclusion = InclusionLevel.INCLUDED
            files.append(file)
    return files
