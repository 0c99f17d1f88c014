"""What `scripts/run_glue.py` reads and reports: rows of GLUE tasks and of your own, scores of several tasks, tables."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from transformers import PreTrainedConfig

from ..data import check_labelled, fingerprint, load_files
from ..export.cards import clean
from ..finetuning import FineTuningArguments, format_markdown, format_score
from ..runs import write_text
from .metrics import GLUE_MEAN, GLUE_TASKS, glue_mean, predict, score_baselines
from .results import common, deviations


# What `task_arguments` may set; `start_from` is a task of the same command, or a model.
TASK_ARGUMENTS = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size", "start_from")


@dataclass
class ClassificationArguments:
    """Which model, on which tasks."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model and its tokenizer."})
    task_name: list[str] = field(
        default_factory=list,
        metadata={"help": f"GLUE tasks: {', '.join(GLUE_TASKS)}, or all. With your own files: a name for their task."},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with DIR/TASK/SPLIT.parquet, in place of nyu-mll/glue."}
    )
    train_files: list[str] = field(default_factory=list, metadata={"help": "Your files or globs to train on."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs to evaluate on."})
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "One or two columns of your files that hold the texts."}
    )
    label_column: str = field(
        default="label", metadata={"help": "Names of classes, integer classes from 0, or floats to regress on."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer texts are cut."})
    task_arguments: str = field(
        default="{}", metadata={"help": f"JSON, by task: {', '.join(TASK_ARGUMENTS)}; go before the command's own."}
    )
    baselines: bool = field(default=False, metadata={"help": "Score the majority class and TF-IDF as well."})

    def __post_init__(self):
        if self.validation_files:
            if len(self.task_name) > 1 or self.data_dir is not None:
                raise ValueError("`validation_files` are one task: give at most one `task_name`, and no `data_dir`")
            self.task_name = self.task_name or ["custom"]
        elif not self.task_name:
            raise ValueError("give either `task_name` or `validation_files`")
        elif self.task_name == ["all"]:
            self.task_name = list(GLUE_TASKS)
        if not self.validation_files:
            for task in self.task_name:
                if task not in GLUE_TASKS:
                    raise ValueError(f"there is no task '{task}'; the tasks are {', '.join(GLUE_TASKS)}, or `all`")
        if not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"`text_columns` must name one or two columns, got {self.text_columns}")
        self.by_task = json.loads(self.task_arguments)
        for task, values in self.by_task.items():
            if task not in (*GLUE_TASKS, *self.task_name):
                raise ValueError(f"`task_arguments` names '{task}', which is no task")
            for name, value in values.items():
                if name not in TASK_ARGUMENTS:
                    raise ValueError(
                        f"`task_arguments` of '{task}' has '{name}', expected some of {', '.join(TASK_ARGUMENTS)}"
                    )
                if name != "start_from" and not isinstance(value, int | float):  # YAML takes 5e-5 for a text
                    raise ValueError(f"`task_arguments` of '{task}' has {value!r} as `{name}`, expected a number")


@dataclass
class Task:
    """Checked rows of a task.

    Args:
        name: Of the task.
        columns: One or two text columns; the column `label` has numbers.
        metrics: Names of the metrics; the first is the main one.
        train: Rows to train on, if there are any.
        validation: Rows to evaluate on, by the ending that their scores get; models are chosen by the first.
        num_labels: Classes; 1 for a regression.
        labels: Names of the classes, where they have some.
    """

    name: str
    columns: list[str]
    metrics: tuple[str, ...]
    train: Dataset | None
    validation: dict[str, Dataset]
    num_labels: int
    labels: list[str] | None


def load_task(
    args: ClassificationArguments, tuning: FineTuningArguments, name: str, trained: PreTrainedConfig | None
) -> Task:
    """Reads and checks a task.

    Args:
        args: Where its rows are.
        tuning: How many of them to take.
        name: Of the task.
        trained: Configuration of a trained classifier, which knows the classes; None to read rows to train on.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a row lacks a text or a label, or has a label that is no class; or the data
            and the trained classifier name their classes in another order.
    """
    if args.validation_files:
        columns, metrics, label = args.text_columns, None, args.label_column
    else:
        columns, metrics = GLUE_TASKS[name]
        columns, label = [column for column in columns if column], "label"

    def read(split: str) -> Dataset:
        if args.validation_files:
            files = args.train_files if split == "train" else args.validation_files
            rows, source = load_files(files), f"{split} of task '{name}'"
        elif args.data_dir is not None:
            source = str(Path(args.data_dir) / name / f"{split}.parquet")
            rows = load_files([source])
        else:
            rows, source = load_dataset("nyu-mll/glue", name, split=split), f"{split} of nyu-mll/glue {name}"
        return check_labelled(rows, source, columns, label)

    if trained is None and args.validation_files and not args.train_files:
        raise ValueError("`do_train` needs `train_files`")
    train = read("train") if trained is None else None
    endings = ("_matched", "_mismatched") if metrics and name == "mnli" else ("",)
    validation = {end.replace("_matched", ""): read(f"validation{end}") for end in endings}

    feature = (validation[""] if train is None else train).features["label"]
    labels, regression = getattr(feature, "names", None), feature.dtype.startswith("float")
    if "string" in feature.dtype:
        labels = list(trained.id2label.values()) if train is None else sorted(train.unique("label"))
    if train is None:
        num_labels, known = trained.num_labels, list(trained.id2label.values())
        if labels is not None and sorted(labels) == sorted(known) and labels != known:
            raise ValueError(f"the model's classes are {known}, those of '{name}' {labels}: their numbers differ")
    else:
        num_labels = 1 if regression else max(2, len(labels or ()) or max(train["label"]) + 1)
        train = number_labels(train, f"train of task '{name}'", labels, num_labels)
        train = train.select(range(min(len(train), tuning.max_train_samples or len(train))))
    for end, rows in validation.items():
        rows = number_labels(rows, f"validation{end} of task '{name}'", labels, num_labels)
        validation[end] = rows.select(range(min(len(rows), tuning.max_eval_samples or len(rows))))
    metrics = metrics or (("pearson", "spearman") if regression else ("accuracy",))
    return Task(name, columns, metrics, train, validation, num_labels, labels)


def number_labels(rows: Dataset, source: str, labels: list[str] | None, num_labels: int) -> Dataset:
    """Rows whose labels are integer classes, or floats of a regression.

    Raises:
        ValueError: A label is neither.
    """
    numbers = {name: number for number, name in enumerate(labels or ())}
    kind, known = (float, (int, float)) if num_labels == 1 else (int, int)
    values = []
    for index, label in enumerate(rows["label"]):
        value = numbers.get(label, label)
        if not isinstance(value, known) or (kind is int and value not in range(num_labels)):
            expected = "a number" if kind is float else f"one of {labels or list(range(num_labels))}"
            raise ValueError(f"row {index} of {source} has the label {label!r}, expected {expected}")
        values.append(kind(value))
    return rows.remove_columns("label").add_column("label", values)


def write_predictions(path: Path, logits: np.ndarray, expected: np.ndarray, labels: list[str] | None) -> None:
    """One JSON object a row, in the order of the rows, whole or not at all; classes by name where they have one."""
    lines = []
    for index, (row, *values) in enumerate(zip(logits, expected, predict(logits), strict=True)):
        label, prediction = (value.item() if labels is None else labels[value] for value in values)
        line = {"index": index, "label": label, "prediction": prediction, "logits": row.tolist()}
        lines.append(json.dumps(line))
    write_text(path, "\n".join(lines) + "\n")


def describe_data(args: ClassificationArguments, task: Task) -> dict[str, Any]:
    """What results say about the rows, those that were taken."""
    parts = {"train": task.train, **{f"validation{end}": rows for end, rows in task.validation.items()}}
    facts = {
        name: {"rows": len(rows), "fingerprint": fingerprint(rows)} for name, rows in parts.items() if rows is not None
    }
    source = [*args.train_files, *args.validation_files] or args.data_dir or "nyu-mll/glue"
    return {"source": clean(source), **facts}


def combine(summaries: dict[str, dict[str, Any]], tasks: dict[str, Task]) -> dict[str, Any]:
    """What `results.json` says of several tasks: the main score of each, and before them their mean, if all are there.

    Args:
        summaries: See [`~training.results.summarise`], by task.
        tasks: The tasks, by their names.
    """
    first = next(iter(summaries.values()))
    seeds, flat = first["seeds"], {}
    for prefix in ("", "merged_"):
        figures = {}
        for task, summary in summaries.items():
            values = summary["details"]["by_seed"]
            if (main := prefix + tasks[task].metrics[0]) in values:
                figures[task] = values[main]
        means = [glue_mean({task: values[place] for task, values in figures.items()}) for place in range(len(seeds))]
        named = {f"{prefix}{task}": values for task, values in figures.items()}
        flat |= ({f"{prefix}mean": means} if None not in means else {}) | named
    details = {"std": deviations(flat), "tasks": {task: summary["details"] for task, summary in summaries.items()}}
    for name in ("milliseconds_per_row", "merged_milliseconds_per_row"):
        if name in first["details"]:
            details[name] = statistics.mean(summary["details"][name] for summary in summaries.values())
    for name in ("merged_parameters", "eval_batch_size"):  # of the first task, as the parameters of the model itself
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


def compare_baselines(tasks: dict[str, Task]) -> dict[str, dict[str, float]]:
    """Scores of what needs no model, by its name, under the names that [`summarise`] gives."""
    scores = defaultdict(dict)
    for task in tasks.values():
        train, rows = task.train, task.validation[""]
        texts = [[rows[column] for column in task.columns] for rows in (train, rows)]
        baselines = score_baselines(task.metrics, texts[0], list(train["label"]), texts[1], list(rows["label"]))
        for name, figures in baselines.items():
            scores[name] |= figures if len(tasks) == 1 else {task.name: figures[task.metrics[0]]}
    for figures in scores.values():
        if (mean := glue_mean(figures)) is not None:
            figures["mean"] = mean
    return dict(scores)


def to_markdown(results: dict[str, Any], tasks: dict[str, Task]) -> str:
    """The table of `results.md`, and how to read it."""
    std, baselines = results["details"].get("std", {}), results["details"].get("baselines", {})
    rows = [
        [
            f"{name} ({tasks[name].metrics[0]})" if name in tasks else name,
            format_score(score, std.get(name)),
            *(format_score(figures.get(name)) for figures in baselines.values()),
        ]
        for name, score in results["scores"].items()
    ]
    notes = [f"{results['model']}, {results['parameters']:,} parameters; seeds {results['seeds']}, in percent."]
    if len(results["seeds"]) > 1:
        notes.append("±: standard deviation over the seeds.")
    if results["task"] == "glue":
        missing = ", ".join(task for task in GLUE_MEAN if task not in tasks)
        notes.append(f"mean: of {', '.join(GLUE_MEAN)}" + (f"; left out, for want of {missing}." if missing else "."))
    details = results["details"].get("tasks", {"": results["details"]})
    if any(len(each.get("learning_rates", ())) > 1 for each in details.values()):
        notes.append("Learning rates were chosen on the rows that the scores are of.")
    if results["settings"].get("load_best_model_at_end"):
        notes.append("Checkpoints were chosen on the rows that the scores are of.")
    return format_markdown(["score", results["model"], *baselines], rows) + "\n" + "\n".join(notes) + "\n"
