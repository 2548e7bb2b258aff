"""MkDocs hooks: pages of the repository outside docs/ become pages of the site, and links to them are rewritten."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve each relative link in the repository, and write it relative to the page's place in the site."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if source in OUTSIDE else f"docs/{source}")

    def in_site(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1])).removeprefix("docs/")
        return f"]({posixpath.relpath(target, posixpath.dirname(source) or '.')}"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)", in_site, markdown)
