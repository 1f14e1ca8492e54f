"""Text from files made harmless where it is shown: one place for terminals, Markdown, HTML and errors.

Names of tensors are data. In a terminal they may hold escapes, in Markdown and HTML links and tags. Errors
show them by their repr, which escapes the same characters as `printable`.
"""

from __future__ import annotations

import html
import re

__all__ = ["as_html", "as_markdown", "html_table", "printable"]

_MARKUP = re.compile(r"[\\`*\[\]<>|~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)/(?=/)|(?<=www)\.|@")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def printable(text: str) -> str:
    """Returns the text with escapes for the characters that a terminal would interpret or hide."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_markdown(text: str) -> str:
    """Escapes a text so that Markdown, and HTML in it, shows it literally: no link, tag or new cell."""
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), printable(text))


def as_html(text: str) -> str:
    """Escapes a text so that HTML shows it literally, in attributes too."""
    return html.escape(printable(text))


def html_table(
    header: list[str] | tuple[str, ...], rows: list[tuple[str, ...]], texts: tuple[int, ...] = (0,)
) -> str:
    """Returns rows of plain text as a table of HTML; the columns `texts` are text, the others numbers."""

    def line(tag: str, cells: list[str] | tuple[str, ...]) -> str:
        aligned = ("left" if i in texts else "right" for i in range(len(cells)))
        shown = (
            f'<{tag} style="text-align: {side}">{as_html(cell)}</{tag}>'
            for side, cell in zip(aligned, cells, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
