"""One HTML file with the curves of a training run, readable without network."""

import html
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from numbers import Real
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs import write_text


# Panels in the order of the page, and the logged terms that each shows; a group of the pattern fills the title.
PANELS = {
    "losses": r"(?:mlm_|kl_|hidden_|aux_|eval_.*)?loss",
    "learning rate": r"learning_rate",
    "tokens per second{speed}": r"tokens_per_second",
    "gradient norm": r"grad_norm",
    "router entropy, 1 = uniform": r"router_entropy/.+",
    "expert load, {}": r"expert_load/(.+)/.+",
}
MAX_POINTS = 500  # of a curve: more make the file large, and a screen shows no more
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
    "svg.hashsalt": "modernalbert",  # the same log gives the same file
    "text.parse_math": False,  # names may hold a dollar sign
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }}
body {{ max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
table {{ display: block; overflow-x: auto; }}
th, td {{ padding: 0 1.5rem 0 0; text-align: left; font-variant-numeric: tabular-nums; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
BODY = """{facts}
{curves}
<p><small>Long curves show means of neighbouring values.</small></p>
<h2>Last values</h2>
{values}"""

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


def write_report(path: str | Path, log_history: list[dict], title: str, facts: dict[str, str]) -> None:
    """Writes the report, whole or not at all.

    Args:
        path: HTML file.
        log_history: `trainer.state.log_history`. Where a resumed run logged a step again, the later value counts.
        title: Heading.
        facts: Rows of the table below it.
    """
    curves = read_curves(log_history)
    panels = select_panels(curves)
    last = [(name, f"{values[-1]:.6g}", f"step {steps[-1]}") for name, (steps, values) in curves.items()]
    body = BODY.format(
        facts=format_table(facts.items()),
        curves=draw(panels) if panels else "<p>Nothing was logged yet.</p>",
        values=format_table(last),
    )
    write_text(path, PAGE.format(title=html.escape(title), body=body))


def read_curves(log_history: list[dict]) -> dict[str, Curve]:
    """Steps and values of every logged number. NaN and infinity stay: a curve has a gap there."""
    points = {}
    for entry in log_history:
        for name, value in entry.items():
            if "step" in entry and name not in ("step", "epoch") and isinstance(value, Real):
                points.setdefault(name, {})[int(entry["step"])] = float(value)
    return {name: tuple(zip(*sorted(values.items()), strict=True)) for name, values in points.items()}


def select_panels(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The curves of each panel that has any, by name, under the panel's title."""
    panels = {}
    for title, pattern in PANELS.items():
        for name, curve in curves.items():
            if match := re.fullmatch(pattern, name):
                panels.setdefault(title.format(*match.groups(), speed=describe_speed(curves)), {})[name] = curve
    return panels


def describe_speed(curves: dict[str, Curve]) -> str:
    """Median utilisation, or else arithmetic, for a title; empty where neither was logged."""
    for name, text in (("mfu", ", MFU {:.1%} (median)"), ("tflops", ", {:.4g} TFLOPS (median)")):
        if values := [value for value in curves.get(name, ((), ()))[1] if math.isfinite(value)]:
            return text.format(statistics.median(values))
    return ""


def draw(panels: dict[str, dict[str, Curve]]) -> str:
    """All panels, as an SVG element in two columns."""
    rows = math.ceil(len(panels) / 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
        for place, (title, curves) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, 2, place, title=title, xlabel="step")
            for name, curve in curves.items():
                steps, values = thin(curve)
                axes.plot(steps, values, marker="." if len(steps) < 30 else None, label=name.split("/")[-1])
            if title.startswith("expert load"):
                axes.axhline(1 / len(curves), color=INK, linestyle="--", label="even")
            if len(axes.lines) > 1:
                axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
            if title != "losses":
                axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))  # noise does not look like change
        return to_svg(figure)


def draw_panels(panels: list[Callable]) -> str:
    """SVG of functions that each draw into axes, three in a row."""
    rows = -(-len(panels) // 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.8 * rows), layout="constrained")
        for place, panel in enumerate(panels, start=1):
            panel(figure.add_subplot(rows, 3, place))
        return to_svg(figure)


def draw_matrix(axes: Axes, values: Sequence[Sequence[float]], center: float = 0) -> None:
    """Square matrix with its numbers in it, coloured by their distance from `center`; a NaN is left blank."""
    places = range(len(values))
    # Not `imshow`, which would embed a bitmap. Saturated colours are left out: numbers stay readable.
    shades = [[min(value - center, 1) for value in row] for row in values]
    axes.pcolormesh(places, places, shades, vmin=-1.5, vmax=1.5, cmap="RdBu_r")
    for row, column in ((i, j) for i in places for j in places if not math.isnan(values[i][j])):
        axes.text(column, row, f"{values[row][column]:.1f}", color="black", ha="center", va="center", size=6)
    axes.set(xticks=places, yticks=places)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(False)


def to_svg(figure: Figure) -> str:
    """SVG element of a figure, to be called in the context of `STYLE`."""
    buffer = StringIO()
    # Metadata would bring a date and addresses.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def thin(curve: Curve) -> Curve:
    """At most `MAX_POINTS` of a curve, each the mean of neighbours."""
    width = math.ceil(len(curve[0]) / MAX_POINTS)
    return tuple([statistics.fmean(part[i : i + width]) for i in range(0, len(part), width)] for part in curve)


def format_table(rows: Iterable[tuple[str, ...]]) -> str:
    """HTML of a table whose rows begin with their heading."""
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(str(name))}</th>{cells}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"
