"""Rows of GLUE tasks and of labelled files, and the summary of several tasks."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import check_labelled, read_rows
from .labels import find_classes, number_labels, read_labels, relabel
from .metrics import GLUE_MEAN, glue_mean
from .results import common, deviations


def read_split(
    task: str, split: str, files: Sequence[str], data_dir: str | None, columns: Sequence[str], label_column: str
) -> tuple[Dataset, str]:
    """Checked rows with the text columns and `label`, and their source.

    Args:
        task: Name of a GLUE task; unused with `files`.
        split: For example `validation_matched`.
        files: The user's files or globs; empty for GLUE.
        data_dir: Folder with `TASK/SPLIT.parquet`, instead of the Hub's data set.
        columns: One or two text columns.
        label_column: Column of the labels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a row lacks a text or a label.
    """
    if files:
        rows, source = read_rows(files), ", ".join(files)
    elif data_dir is not None:
        source = str(Path(data_dir) / task / f"{split}.parquet")
        rows = read_rows(source)
    else:
        rows, source = read_rows(f"nyu-mll/glue:{task}", split), "nyu-mll/glue"
    return check_labelled(rows, source, columns, label_column), source


def read_classes(
    rows: Mapping[str, Dataset], sources: Mapping[str, str], known: list[str] | None, regression: bool | None
) -> tuple[dict[str, Dataset], list[str] | None]:
    """Rows whose labels are class indices or values, and the names of the classes; None for a regression.

    Args:
        rows: Rows by split, with the column `label`. Classes are those of `train`, if there is one.
        sources: Source of each split, for messages.
        known: Classes of the trained model, used without `train`; None for a regression.
        regression: Whether to regress; None: see [`~labels.find_classes`].

    Raises:
        ValueError: See [`~labels.find_classes`] and [`~labels.number_labels`].
    """
    texts = {split: read_labels(part) for split, part in rows.items()}
    names, whose = known, "trained model"
    if "train" in rows:
        names, whose = find_classes(rows["train"], texts["train"], sources["train"], regression), "train rows"
    numbered = {
        split: relabel(part, number_labels(texts[split], sources[split], names, whose)) for split, part in rows.items()
    }
    return numbered, names


def combine(summaries: Mapping[str, dict[str, Any]], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Results of several tasks: the mean of their main scores if GLUE is complete, then the main score of each task.

    Args:
        summaries: Summary of each task, see [`~results.summarise`].
        metrics: Main metric of each task.
    """
    first = next(iter(summaries.values()))
    seeds, flat = first["seeds"], {}
    for prefix in ("", "merged_"):
        figures = {}
        for task, summary in summaries.items():
            values = summary["details"]["by_seed"]
            if (main := prefix + metrics[task]) in values:
                figures[task] = values[main]
        means = [glue_mean({task: values[index] for task, values in figures.items()}) for index in range(len(seeds))]
        named = {f"{prefix}{task}": values for task, values in figures.items()}
        flat |= ({f"{prefix}mean": means} if None not in means else {}) | named
    missing = ", ".join(task for task in GLUE_MEAN if task not in metrics)
    details = {
        "std": deviations(flat),
        "tasks": {task: summary["details"] for task, summary in summaries.items()},
        "notes": [f"mean: of {', '.join(GLUE_MEAN)}" + (f"; left out, for want of {missing}." if missing else ".")],
    }
    for name in ("milliseconds_per_row", "merged_milliseconds_per_row"):
        if name in first["details"]:
            details[name] = statistics.mean(summary["details"][name] for summary in summaries.values())
    for name in ("merged_parameters", "eval_batch_size"):  # those of the first task, like `parameters`
        if name in first["details"]:
            details[name] = first["details"][name]
    return {
        **first,
        "task": "glue",
        "scores": {name: statistics.mean(values) for name, values in flat.items()},
        "data": {task: summary["data"] for task, summary in summaries.items()},
        "settings": common([summary["settings"] for summary in summaries.values()], "data"),
        "details": details,
    }


def gather_baselines(scores: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]) -> dict[str, dict]:
    """Scores by baseline under the names of the results, from scores by task and baseline."""
    gathered = defaultdict(dict)
    for task, baselines in scores.items():
        for name, figures in baselines.items():
            gathered[name] |= figures if len(scores) == 1 else {task: figures[metrics[task]]}
    for figures in gathered.values():
        if (mean := glue_mean(figures)) is not None:
            figures["mean"] = mean
    return dict(gathered)
