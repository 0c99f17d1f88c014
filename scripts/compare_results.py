"""Gathers the `results.json` of many runs into one table and one plot.

    python scripts/compare_results.py --runs runs/tiny-glue runs/tiny-squad runs/bert-glue --output_dir runs/comparison

A folder counts as the run it holds, or else as all runs directly below it. A row is a model, by its name on the Hub or the
name of its folder, with the hash of its files where two folders have one name; then come the baselines that were scored
beside them. A second run of a model on the same task has a row of its own. A column is the main score of a task. `comparison.png` plots quality, the mean over the tasks that all models have,
against parameters, and where all were timed on the same hardware in batches of the same size, against time.
"""

import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from modernalbert.training.cli import parse_arguments, run_script
from modernalbert.training.evaluation.results import format_score
from modernalbert.training.reports.tables import markdown_table
from modernalbert.training.runs import RESULTS_NAME, read_json, write_files


logger = logging.getLogger(__name__)


@dataclass
class ComparisonArguments:
    """Which runs, and where to write."""

    runs: list[str] = field(metadata={"help": "Folders of runs, or folders of such folders."})
    output_dir: str = field(metadata={"help": "Folder that receives table and plot."})


FIELDS = {
    "task": str,
    "model": str,
    "parameters": int,
    "scores": dict,
    "data": dict,
    "settings": dict,
    "details": dict,
}
FIELDS |= {"environment": dict}


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
            results = read_json(path)
            for name, kind in FIELDS.items():
                if not isinstance(results[name], kind):
                    raise TypeError(name)
            if not results["scores"] or not all(map(math.isfinite, results["scores"].values())):
                raise ValueError("scores")
            found.append((path.parent.name, {name: results[name] for name in FIELDS}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}' is not what the task scripts (run_glue.py and others) write; leave its folder out"
            ) from error
    return found


def collect(runs: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Rows of the table by name: models, then baselines.

    Returns:
        For each its `scores`, pairs `(value, std or None)` by their column; `parameters`, None for a baseline; and
        `times`, milliseconds for a row of text, the batch size and the hardware, by column where they were measured.
    """
    rows, scored = {}, defaultdict(set)
    for _, results in runs:
        for task, prints in fingerprints(results).items():
            scored[task].add(prints)
    if mixed := [task for task, prints in scored.items() if len(prints) > 1]:
        raise ValueError(
            f"the runs of '{mixed[0]}' were scored on different rows; compare runs with the same validation files, split "
            "and `max_eval_samples`"
        )

    def add(name: str, folder: str, results: dict, prefix: str = "") -> None:
        """Of a model (`prefix` "") or its merged form ("merged_")."""
        details, batch = results["details"], results["details"].get("eval_batch_size")
        own = {
            score.removeprefix(prefix): (value, details.get("std", {}).get(score))
            for score, value in results["scores"].items()
            if score.startswith("merged_") == bool(prefix)
        }
        if not own:
            return
        cells = to_cells(results, own)
        if rows.get(name, {"scores": {}})["scores"].keys() & cells.keys():
            name = f"{name} ({folder})"
        while rows.get(name, {"scores": {}})["scores"].keys() & cells.keys():  # folders of one name
            name += "'"
        row = rows.setdefault(name, {"scores": {}, "parameters": None, "times": {}})
        row["scores"] |= cells
        row["parameters"] = details["merged_parameters"] if prefix else results["parameters"]
        for column, facts in details.get("tasks", {results["task"]: details}).items():
            if (time := facts.get(f"{prefix}milliseconds_per_row")) is not None:
                row["times"][column] = time, batch, results["environment"]["hardware"]

    names = name_models([results for _, results in runs])
    for (folder, results), name in zip(runs, names, strict=True):
        name += ", LoRA" if results["settings"].get("peft") else ""
        add(name, folder, results)
        add(f"{name}, merged", folder, results, "merged_")
    for _, results in runs:  # the same for every model: the first of each task is kept
        for name, figures in results["details"].get("baselines", {}).items():
            row = rows.setdefault(name, {"scores": {}, "parameters": None, "times": {}})
            row["scores"] = (
                to_cells(results, {score: (value, None) for score, value in figures.items()}) | row["scores"]
            )
    return rows


def fingerprints(results: dict[str, Any]) -> dict[str, str]:
    """Hashes of the rows that each task was scored on."""
    data = results["data"] if results["task"] == "glue" else {results["task"]: results["data"]}
    return {
        task: " ".join(facts["fingerprint"] for split, facts in sorted(splits.items()) if split != "train")
        for task, splits in data.items()
    }


def name_models(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Name of each run's model: its folder or Hub name, with a hash if several models share it."""
    identities = [results["settings"].get("model_name_or_path", results["model"]) for results in runs]
    models = defaultdict(set)
    for results, identity in zip(runs, identities, strict=True):
        models[results["model"]].add(identity)
    return [
        results["model"] + (f" ({identity.split()[-1][:8]})" if len(models[results["model"]]) > 1 else "")
        for results, identity in zip(runs, identities, strict=True)
    ]


def to_cells(results: dict[str, Any], scores: dict[str, tuple]) -> dict[str, tuple]:
    """Main score of each task, by column."""
    if results["task"] == "glue":
        return {"GLUE mean" if column == "mean" else column: value for column, value in scores.items()}
    return {results["task"]: next(iter(scores.values()))}


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
    return markdown_table(["model", "parameters", *columns], lines)


def plot(rows: dict[str, dict[str, Any]]) -> Figure | None:
    """Quality against parameters and, where all models were timed alike, time; None where they share no task."""
    models = {name: row for name, row in rows.items() if row["parameters"]}
    shared = sorted(set.intersection(*(set(row["scores"]) for row in models.values())) - {"GLUE mean"})
    if not shared:
        return None
    quality = [100 * statistics.mean(row["scores"][column][0] for column in shared) for row in models.values()]
    panels = {"parameters in millions": [row["parameters"] / 1e6 for row in models.values()]}
    timed = [
        column
        for column in shared
        if len({row["times"].get(column, (None, None, name))[1:] for name, row in models.items()}) == 1
    ]
    if timed and len(models) > 1:
        (_, batch, hardware), *_ = (row["times"][timed[0]] for row in models.values())
        label = f"milliseconds a row of {', '.join(timed)}\n{hardware}, batches of {batch}"
        panels[label] = [statistics.mean(row["times"][column][0] for column in timed) for row in models.values()]
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, *point in zip(models, values, quality, strict=True):
            axes.scatter(*point)
            axes.annotate(name, point, xytext=(4, 4), textcoords="offset points")
        axes.set(xscale="log", xlabel=label, ylabel=f"mean of {', '.join(shared)}")
        axes.margins(0.2)
    return figure


def main(argv: Sequence[str] | None = None) -> str:
    """Writes `comparison.md` and `comparison.png` into `output_dir`; returns the table."""
    (args,) = parse_arguments((ComparisonArguments,), argv, description=__doc__)
    rows = collect([results for folder in args.runs for results in read_results(folder)])
    table, figure = tabulate(rows), plot(rows)

    def write(draft: Path) -> None:
        (draft / "comparison.md").write_text(table, encoding="utf-8")
        if figure is not None:
            figure.savefig(draft / "comparison.png", dpi=150)

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, write)
    if figure is None:
        logger.warning("no plot: there is no task that all models were scored on")
    logger.info("\n%s", table)
    return table


if __name__ == "__main__":
    run_script(main)
