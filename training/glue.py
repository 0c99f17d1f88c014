"""What `scripts/run_glue.py` reads and reports: rows of GLUE tasks and of your own, scores of several runs, tables."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from transformers import PreTrainedConfig

from .cards import clean
from .checkpoints import write_text
from .data import load_files
from .finetuning import FineTuningArguments, check_rows, format_markdown, format_score
from .metrics import GLUE_MEAN, GLUE_TASKS, glue_mean, predict, score_baselines


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
            for name in values:
                if name not in TASK_ARGUMENTS:
                    raise ValueError(
                        f"`task_arguments` of '{task}' has '{name}', expected some of {', '.join(TASK_ARGUMENTS)}"
                    )


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
        ValueError: A column is missing, or a row lacks a text or a label, or has a label that is no class.
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
        rows = check_rows(rows, source, columns, label)
        return rows if label == "label" else rows.rename_column(label, "label")

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
        num_labels = trained.num_labels
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


@dataclass(frozen=True)
class Run:
    """One task, seed and learning rate, and the folder that is its own."""

    task: str
    seed: int
    learning_rate: float
    folder: Path


def write_predictions(path: Path, logits: np.ndarray, expected: np.ndarray, labels: list[str] | None) -> None:
    """One JSON object a row, in the order of the rows, whole or not at all; classes by name where they have one."""
    lines = []
    for index, (row, *values) in enumerate(zip(logits, expected, predict(logits), strict=True)):
        label, prediction = (value.item() if labels is None else labels[value] for value in values)
        line = {"index": index, "label": label, "prediction": prediction, "logits": row.tolist()}
        lines.append(json.dumps(line))
    write_text(path, "\n".join(lines) + "\n")


def describe_data(args: ClassificationArguments, task: Task) -> dict[str, Any]:
    """What results say about the rows."""
    parts = {"train": task.train, **{f"validation{end}": rows for end, rows in task.validation.items()}}
    facts = {
        name: {"rows": len(rows), "fingerprint": rows._fingerprint} for name, rows in parts.items() if rows is not None
    }
    source = [*args.train_files, *args.validation_files] or args.data_dir or "nyu-mll/glue"
    return {"source": clean(source), **facts}


def best_rate(runs: dict[Run, dict], task: str) -> float:
    """Learning rate whose mean main score over the seeds is best, on the validation rows that are reported."""
    scores = defaultdict(list)
    for run, results in runs.items():
        if run.task == task:
            scores[run.learning_rate].append(next(iter(results["scores"].values())))
    return max(scores, key=lambda rate: statistics.mean(scores[rate]))


def summarise(runs: dict[Run, dict], tasks: dict[str, Task], data: dict[str, Any]) -> dict[str, Any]:
    """What `results.json` says of several runs: means over the seeds, at each task's best learning rate.

    Of several tasks it has the main score of each, and before them their mean, if all that it takes are there.
    """
    rates = {task: best_rate(runs, task) for task in tasks}
    chosen = {
        task: [runs[run] for run in runs if (run.task, run.learning_rate) == (task, rates[task])] for task in tasks
    }
    seeds = [results["seeds"][0] for results in next(iter(chosen.values()))]
    by_seed = {
        task: {name: [results["scores"][name] for results in part] for name in part[0]["scores"]}
        for task, part in chosen.items()
    }
    details = {
        "runs": [
            {"task": run.task, "seed": run.seed, "learning_rate": run.learning_rate, "scores": results["scores"]}
            for run, results in runs.items()
        ],
        "learning_rates": {
            task: {"best": rates[task], "of": sorted({r.learning_rate for r in runs if r.task == task})}
            for task in tasks
        },
        "tasks": by_seed,
    }
    if len(tasks) > 1:
        flat = {}
        for prefix in ("", "merged_"):
            figures = {
                f"{prefix}{task}": values[prefix + tasks[task].metrics[0]]
                for task, values in by_seed.items()
                if prefix + tasks[task].metrics[0] in values
            }
            plain = {name.removeprefix(prefix): values for name, values in figures.items()}
            means = [glue_mean({name: values[i] for name, values in plain.items()}) for i in range(len(seeds))]
            flat |= ({f"{prefix}mean": means} if None not in means else {}) | figures
    else:
        (flat,) = by_seed.values()
    details["std"] = {name: statistics.stdev(values) if len(seeds) > 1 else None for name, values in flat.items()}
    first = next(iter(runs.values()))
    for name in ("milliseconds_per_row", "merged_milliseconds_per_row", "merged_parameters"):
        if name in first["details"]:
            details[name] = statistics.mean(results["details"][name] for results in runs.values())

    def same(name: str) -> bool:
        return all(results["settings"].get(name) == first["settings"][name] for results in runs.values())

    return {
        **first,
        "task": "glue" if len(tasks) > 1 else next(iter(tasks)),
        "scores": {name: statistics.mean(values) for name, values in flat.items()},
        "seeds": seeds,
        "data": data,
        "settings": {name: value for name, value in first["settings"].items() if same(name)},
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
    if any(len(rates["of"]) > 1 for rates in results["details"].get("learning_rates", {}).values()):
        notes.append("Learning rates were chosen on the rows that the scores are of.")
    if results["settings"].get("load_best_model_at_end"):
        notes.append("So were checkpoints." if len(notes) > 3 else "Checkpoints were chosen on the same rows.")
    return format_markdown(["score", results["model"], *baselines], rows) + "\n" + "\n".join(notes) + "\n"
