"""One HTML file with the curves of a training run, readable without network."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path

from matplotlib.axes import Axes

from .html import INK, draw_panels, write_page
from .tables import html_table


# Panels in the order of the page, and the logged terms that each shows; a group of the pattern fills the title.
PANELS = {
    "losses": r"(?:mlm_|kl_|hidden_|pooled_|depth_|eval_.*)?loss",
    "balancing loss, 1 = even": r"aux_loss",  # about 1, beside which the others would look flat
    "learning rate": r"learning_rate",
    "tokens per second{speed}": r"tokens_per_second",
    "gradient norm": r"grad_norm",
    "router entropy, 1 = uniform": r"router_entropy/.+",
    "expert load, {}": r"expert_load/(.+)/.+",
}
MAX_POINTS = 500  # of a curve: more make the file large, and a screen shows no more
Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


def write_report(path: str | Path, log_history: list[dict], title: str, facts: dict[str, str]) -> None:
    """Writes the report atomically.

    Args:
        path: HTML file.
        log_history: `trainer.state.log_history`. Where a resumed run logged a step again, the later value counts.
        title: Heading.
        facts: Rows of the table below it.
    """
    curves = read_curves(log_history)
    panels = [draw_curves(title, lines) for title, lines in select_panels(curves).items()]
    last = [(name, show(values[-1]), f"step {steps[-1]}") for name, (steps, values) in curves.items()]
    figure = f"<figure>{draw_panels(panels, columns=2)}</figure>" if panels else "<p>Nothing was logged yet.</p>"
    note = "<p><small>Long curves show means of neighbouring values.</small></p>"
    write_page(path, title, [html_table(facts.items()), figure, note, "<h2>Last values</h2>", html_table(last)])


def show(value: float) -> str:
    """A number with six digits."""
    return f"{value:.6g}" if math.isfinite(value) else "not finite"


def read_curves(log_history: list[dict]) -> dict[str, Curve]:
    """Steps and values of every logged number. NaN and infinity stay: a curve has a gap there."""
    points = {}
    for entry in log_history:
        for name, value in entry.items():
            if "step" in entry and name not in ("step", "epoch") and isinstance(value, Real):
                points.setdefault(name, {})[int(entry["step"])] = float(value)
    return {name: tuple(zip(*sorted(values.items()), strict=True)) for name, values in points.items()}


def select_panels(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Curves by name, by the title of their panel; panels without curves are left out."""
    panels = {}
    for title, pattern in PANELS.items():
        for name, curve in curves.items():
            if match := re.fullmatch(pattern, name):
                panels.setdefault(title.format(*match.groups(), speed=describe_speed(curves)), {})[name] = curve
    return panels


def describe_speed(curves: dict[str, Curve]) -> str:
    """Median model FLOPs utilisation, for a title; empty if it was not logged."""
    values = [value for value in curves.get("mfu", ((), ()))[1] if math.isfinite(value)]
    return f", MFU {statistics.median(values):.1%} (median)" if values else ""


def draw_curves(title: str, curves: dict[str, Curve]) -> Callable[[Axes], None]:
    """A panel of curves, as [`~training.reports.html.draw_panels`] takes it."""

    def panel(axes):
        for name, curve in curves.items():
            steps, values = thin(curve)
            axes.plot(steps, values, marker="." if len(steps) < 30 else None, label=name.split("/")[-1])
        if title.startswith("expert load"):
            axes.axhline(1 / len(curves), color=INK, linestyle="--", label="even")
        if len(axes.lines) > 1 or title == "losses":
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
        if "loss" not in title:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))  # noise does not look like change
        axes.set(title=title, xlabel="step")

    return panel


def thin(curve: Curve) -> Curve:
    """At most `MAX_POINTS` of a curve, each the mean of neighbours."""
    width = math.ceil(len(curve[0]) / MAX_POINTS)
    return tuple([statistics.fmean(part[i : i + width]) for i in range(0, len(part), width)] for part in curve)
