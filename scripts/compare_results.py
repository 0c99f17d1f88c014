"""Gathers the `results.json` of many runs into one table and one plot.

    python scripts/compare_results.py runs/tiny-glue runs/tiny-squad runs/bert-glue --output_dir runs/comparison

A folder counts as the run it holds, or else as all runs directly below it. A row is a model, with the baselines that were
scored beside it; a second run of a model on the same task has a row of its own. A column is the main score of a task.
`comparison.png` plots quality, the mean over the tasks that all rows have, against parameters, and where runs were timed
on the same tasks and hardware against the time of a row of text.
"""

import json
import logging
import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from modernalbert.training.checkpoints import RESULTS_NAME, write_files
from modernalbert.training.finetuning import format_markdown, format_score


logger = logging.getLogger(__name__)

FIELDS = ("task", "model", "parameters", "scores", "details", "environment")


def read_results(folder: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Names of the folders and results of the run in a folder, or of those directly below it.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A file holds something else.
    """
    folder = Path(folder)
    own = folder / RESULTS_NAME
    paths = [own] if own.is_file() else sorted(folder.glob(f"*/{RESULTS_NAME}"))
    if not paths:
        raise FileNotFoundError(f"'{folder}' holds no {RESULTS_NAME}, nor does a folder in it; give folders of runs")
    found = []
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            found.append((path.parent.name, {name: results[name] for name in FIELDS}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}' is not what run_glue.py, run_squad.py or run_beir.py writes; leave its folder out"
            ) from error
    return found


def collect(runs: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Rows by their name.

    Returns:
        For each its `scores`, pairs `(value, std or None)` by their column; `parameters`, None for a baseline;
        `milliseconds` for a row of text, and the hardware and tasks where they were `measured`.
    """
    rows = {}

    def add(name: str, folder: str, results: dict, scores: dict[str, float], parameters: int | None) -> None:
        std = results["details"].get("std", {}) if parameters else {}
        if results["task"] == "glue":  # one column a task
            cells = {column.replace("mean", "GLUE mean"): (value, std.get(column)) for column, value in scores.items()}
        else:
            main = next(iter(scores))
            cells = {results["task"]: (scores[main], std.get(main))}
        if rows.get(name, {}).get("scores", {}).keys() & cells.keys():
            if not parameters:  # the same baseline, beside another model
                return
            name = f"{name} ({folder})"
        row = rows.setdefault(name, {"scores": {}, "parameters": parameters, "milliseconds": None, "measured": None})
        row["scores"] |= cells
        if parameters and "milliseconds_per_row" in results["details"]:
            row["milliseconds"] = results["details"]["milliseconds_per_row"]
            row["measured"] = results["environment"]["hardware"], *sorted(cells)

    for folder, results in runs:
        merged = {
            name.removeprefix("merged_"): value for name, value in results["scores"].items() if "merged_" in name
        }
        scores = {name: value for name, value in results["scores"].items() if "merged_" not in name}
        add(results["model"], folder, results, scores, results["parameters"])
        if merged:
            parameters = results["details"]["merged_parameters"]
            milliseconds = results["details"].get("merged_milliseconds_per_row")
            details = {"milliseconds_per_row": milliseconds}
            add(f"{results['model']}, merged", folder, {**results, "details": details}, merged, parameters)
        for name, figures in results["details"].get("baselines", {}).items():
            add(name, folder, results, figures, None)
    return rows


def tabulate(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row["scores"]))
    columns.sort(key=lambda column: column == "GLUE mean")  # after its tasks
    lines = [
        [
            name,
            f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else "",
            *(format_score(*row["scores"].get(column, (None,))) for column in columns),
        ]
        for name, row in rows.items()
    ]
    return format_markdown(["model", "parameters", *columns], lines)


def plot(rows: dict[str, dict[str, Any]]) -> Figure | None:
    """Quality against parameters and, where two rows have it, against time; None where rows have no task in common."""
    models = {name: row for name, row in rows.items() if row["parameters"]}
    shared = set.intersection(*(set(row["scores"]) for row in models.values())) - {"GLUE mean"}
    if not shared:
        return None
    panels = [("parameters", "parameters in millions", 1e-6)]
    timed = [row for row in models.values() if row["milliseconds"] is not None]
    if len(timed) > 1 and len({row["measured"] for row in timed}) == 1:
        panels.append(("milliseconds", f"milliseconds a row of text, {timed[0]['measured'][0]}", 1))
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (field, label, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, row in models.items():
            if row[field] is not None:
                point = scale * row[field], 100 * statistics.mean(row["scores"][column][0] for column in shared)
                axes.scatter(*point)
                axes.annotate(name, point, xytext=(4, 4), textcoords="offset points")
        axes.set(xscale="log", xlabel=label, ylabel=f"mean of {', '.join(sorted(shared))}")
        axes.margins(0.2)
    return figure


def main(argv: Sequence[str] | None = None) -> str:
    """Writes `comparison.md` and `comparison.png` into `output_dir`; returns the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders of such folders")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that receives table and plot")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    rows = collect([results for folder in args.runs for results in read_results(folder)])
    table, figure = tabulate(rows), plot(rows)

    def write(draft: Path) -> None:
        (draft / "comparison.md").write_text(table, encoding="utf-8")
        if figure is not None:
            figure.savefig(draft / "comparison.png", dpi=150)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_files(args.output_dir, write)
    if figure is None:
        logger.warning("no plot: there is no task that all models were scored on")
    logger.info("\n%s", table)
    return table


if __name__ == "__main__":
    main()
