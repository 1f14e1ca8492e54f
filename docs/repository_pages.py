"""A hook of mkdocs: pages of the repository's root are pages of the site too, and links work in both.

README.md is the first page. A link from a page to a file that is no page (an example, a source) becomes the
file's name, as code: the site has no copy of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "cpp/README.md": "core.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, source, page)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns the links of docs/ that lead out of it to where those files are on the site."""
    path = page.file.src_uri
    return markdown if path in PAGES.values() else relinked(markdown, f"docs/{path}", path)


def relinked(text: str, source: str, page: str) -> str:
    """The text of a repository file, with its links as they must be on a page of the site.

    Args:
        text: Markdown.
        source: The file's path in the repository.
        page: The page's path in docs/.
    """

    def link(found: re.Match[str]) -> str:
        picture, label, target, anchor = found.groups()
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            there = PAGES[path]
        elif path.startswith("docs/"):
            there = path.removeprefix("docs/")
        else:
            return label if label.startswith("`") else f"{label} (`{path}`)"
        start = posixpath.dirname(page)
        return f"{picture}[{label}]({posixpath.relpath(there, start or '.')}{anchor or ''})"

    return LINK.sub(link, text)
