"""Self-contained HTML pages: one file, figures as SVG, all text escaped."""

import html
import math
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs import write_text


INK = "#010203"  # stands for the reader's text colour, light or dark, which matplotlib cannot name
STYLE = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"), INK),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
    "axes.grid": True,
    "font.size": 8,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1,
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "modernalbert",  # the same figures give the same file
    "text.parse_math": False,  # names may hold a dollar sign
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }}
body {{ max-width: 75rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
svg {{ width: 100%; height: auto; }}
figure {{ margin: 0; overflow-x: auto; }}
figure svg {{ min-width: 40rem; }}
table {{ display: block; overflow-x: auto; overflow-wrap: normal; }}
th, td {{ padding: 0 1.5rem 0 0; text-align: left; font-variant-numeric: tabular-nums; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_page(path: str | Path, title: str, parts: Sequence[str]) -> None:
    """Writes a page atomically.

    Args:
        path: HTML file.
        title: Plain text.
        parts: HTML of the body, in order.
    """
    write_text(path, PAGE.format(title=html.escape(title), body="\n".join(parts)))


def draw_panels(panels: Sequence[Callable[[Axes], None]], columns: int = 3) -> str:
    """SVG element with one panel per function, each drawing into its axes."""
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.7 * rows), layout="constrained")
        for index, panel in enumerate(panels, start=1):
            panel(figure.add_subplot(rows, columns, index))
        buffer = StringIO()
        # Metadata would bring a date and addresses.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def draw_matrix(axes: Axes, values: Sequence[Sequence[float]], center: float = 0) -> None:
    """Square matrix with its values as text, coloured by their distance from `center`; NaN is left blank."""
    indices = range(len(values))
    # Not `imshow`, which would embed a bitmap. Saturated colours are left out: numbers stay readable.
    shades = [[min(value - center, 1) for value in row] for row in values]
    axes.pcolormesh(indices, indices, shades, vmin=-1.5, vmax=1.5, cmap="RdBu_r")
    for row, column in ((i, j) for i in indices for j in indices if not math.isnan(values[i][j])):
        axes.text(column, row, f"{values[row][column]:.1f}", color="black", ha="center", va="center", size=6)
    axes.set(xticks=indices, yticks=indices)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(False)
