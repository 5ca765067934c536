"""A hook of MkDocs: pages from outside ``docs/`` (notebooks, CONTRIBUTING.md, cards, tables), and the links to them.

Links in Markdown are those of the repository, so that they also work where the files are read one by one. This hook
makes each of them a link of the site; a link to a file that is no page becomes plain text.
"""

from __future__ import annotations

import base64
import json
import logging
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PROJECT_PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "covray/assets/*/README.md",
    "benchmarks/results/*.md",
)
"""Files outside ``docs/`` that are pages of the site, below ``project/``."""
_FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_LOADED = re.compile(
    r'<(?:script|img|iframe|link rel="(?:stylesheet|preconnect|icon)")[^>]*(?:src|href)="(https?:[^"]+)"'
)
_LOG = logging.getLogger("mkdocs.hooks")
_IMAGE = re.compile(r'<img alt="([^"]*)"[^>]* src="data:image/png;base64,([^"]+)">')


@dataclass
class NotebookPage:
    """A notebook as Markdown, with its pictures as files."""

    text: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)


def notebook_page(notebook: Mapping[str, Any], name: str) -> NotebookPage:
    """Return the page of a notebook.

    Args:
        notebook: The content of its file.
        name: The stem of its file; pictures are called ``NAME-NUMBER.png``.
    """
    page = NotebookPage()
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            page.text += f"{source}\n\n"
            continue
        page.text += f"```python\n{source}\n```\n\n"
        for output in cell["outputs"]:
            for alt, png in _pictures(output.get("data", {})):
                file = f"{name}-{len(page.pictures) + 1}.png"
                page.pictures[file] = png
                page.text += f"![{alt}]({file}){{ .answer }}\n\n"
    page.text += f'<a class="md-button" href="{name}.ipynb" download>This page as a notebook</a>\n'
    return page


def _pictures(data: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Return alternative text and PNG of each picture of an output."""
    if "text/html" in data:
        found = _IMAGE.findall("".join(data["text/html"]))
        return [(alt, base64.b64decode(png)) for alt, png in found]
    if "image/png" in data:
        return [("what the cell shows", base64.b64decode(data["image/png"]))]
    return []


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of notebooks and of files outside ``docs/``."""
    from mkdocs.structure.files import File  # the tests of the functions above need no MkDocs

    for file in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page = notebook_page(json.loads(file.read_text()), file.stem)
        files.append(File.generated(config, f"notebooks/{file.stem}.md", content=page.text))
        for name, png in page.pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=png))
    for pattern in PROJECT_PAGES:
        for path in sorted(ROOT.glob(pattern)):
            place = f"project/{path.relative_to(ROOT)}"
            files.append(File.generated(config, place, content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the repository's links in a page links of the site."""
    pages = {file.src_uri for file in files}
    return site_links(markdown, page.file.src_uri, pages)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, which a strict build takes for an error, where a page makes a browser ask another host."""
    for address in outside_requests(output):
        _LOG.warning("%s: loads %s; a page of the site asks no other host", page.file.src_uri, address)
    return output


def outside_requests(html: str) -> list[str]:
    """Return the addresses of other hosts that a browser loads with a page, links to click left out."""
    return _LOADED.findall(html)


def site_links(markdown: str, page: str, pages: set[str]) -> str:
    """Return ``markdown`` with links between pages of the site in place of links between files of the repository.

    Args:
        markdown: The text of a page.
        page: Its place below ``docs/``, as the site has it.
        pages: The places of all files of the site.
    """
    folder = posixpath.dirname(repository_path(page))

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        file = posixpath.normpath(posixpath.join(folder, path))
        place = site_path(file)
        if place in pages:
            address = posixpath.relpath(place, posixpath.dirname(page) or ".")
            return f"{picture}[{text}]({address}{'#' * bool(anchor)}{anchor})"
        return text if (ROOT / file).exists() and not file.startswith("docs/") else match[0]

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def site_path(file: str) -> str:
    """Return where the site has a file of the repository, if it has it."""
    if file == "README.md":
        return "index.md"
    if file.startswith("docs/"):
        return re.sub(r"^notebooks/([\w-]+)\.ipynb$", r"notebooks/\1.md", file.removeprefix("docs/"))
    return f"project/{file}"


def repository_path(page: str) -> str:
    """Return the file of the repository that a page of the site is made of."""
    return page.removeprefix("project/") if page.startswith("project/") else f"docs/{page}"
