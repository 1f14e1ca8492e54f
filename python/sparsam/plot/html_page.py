"""Parts of a self-contained HTML page: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparsam.checkpoint.atomic import publish
from sparsam.inputs.display import as_html

__all__ = ["document", "paragraph", "picture", "table", "write"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom: 2px solid #888; }
.text { text-align: left; }
.wide { overflow-x: auto; }
img { max-width: 100%; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """Returns the page; `parts` are HTML, as the other functions here return it."""
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{as_html(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write(text: str, file: Path) -> None:
    """Writes the page, completely or not at all; OSError if it cannot be written."""
    publish({file: lambda path: path.write_text(text, encoding="utf-8")})


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{as_html(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 0) -> str:
    """A table whose first columns are text, the others numbers."""

    def line(tag: str, cells: Sequence[object]) -> str:
        opening = (f'<{tag} class="text">' if i < texts else f"<{tag}>" for i in range(len(cells)))
        joined = "".join(
            f"{start}{as_html(str(cell))}</{tag}>" for start, cell in zip(opening, cells, strict=True)
        )
        return f"<tr>{joined}</tr>"

    lines = [
        f"<thead>{line('th', header)}</thead>",
        "<tbody>",
        *(line("td", row) for row in rows),
        "</tbody>",
    ]
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def picture(figure: Any, description: str) -> str:
    """A matplotlib figure as an image inside the page."""
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    return f'<img alt="{as_html(description)}" src="data:image/svg+xml;base64,{encoded}">'
