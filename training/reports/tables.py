"""Tables as HTML, Markdown and plain text, with escaped cells."""

import html
import re
from collections.abc import Iterable, Sequence


def html_table(rows: Iterable[Sequence]) -> str:
    """A table whose rows begin with their heading."""
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(str(name))}</th>{cells}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """A table with a header."""
    lines = ["| " + " | ".join(map(escape_markdown, line)) + " |" for line in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def text_table(rows: Iterable[Sequence], width: int = 18) -> str:
    """Right-aligned columns of one width, for a terminal."""
    return "\n".join("".join(f"{cell:>{width}}" for cell in row) for row in rows)


def escape_markdown(value: object) -> str:
    """A value as plain text on one line of Markdown, also valid in a table."""
    text = re.sub(r"\s*[\r\n\f\v\u2028\u2029]\s*", " ", str(value))
    # An underscore inside a word starts no emphasis.
    text = re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return html.escape(text, quote=False)
