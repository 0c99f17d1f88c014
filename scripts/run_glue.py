"""Fine-tunes and evaluates a sentence or sentence-pair classifier: GLUE tasks, or your own files.

All of GLUE by the protocol of ModernBERT's paper, three seeds each (`--data_dir` reads local parquet files instead of
`nyu-mll/glue`), or one task of it:

    python scripts/run_glue.py --config recipes/glue.yaml --model_name_or_path runs/tiny --output_dir runs/tiny-glue
    python scripts/run_glue.py --model_name_or_path runs/tiny --task_name mrpc --output_dir runs/mrpc --do_train \
        --learning_rate 5e-5 --num_train_epochs 5 --per_device_train_batch_size 32

Your own csv, jsonl or parquet, with the columns `text` and `label` (any encoder of the Auto classes will do):

    python scripts/run_glue.py --model_name_or_path runs/nano --train_files train.csv --validation_files dev.csv \
        --text_columns text --output_dir runs/mine --do_train --max_steps 50

A label is the name of a class, in every split: `1` in a csv is `1` in parquet. Numbers with a fraction are regressed on;
the log says how labels were read. A run is one task, seed and learning rate. A single run writes model,
`predictions.jsonl` and `results.json` into `output_dir`; several write into folders of their own below it, and their
means into `results.json` and `results.md`. The same command resumes a stopped run. Without `--do_train` the model is
only evaluated.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import Count, parse_json, run_script
from modernalbert.training.evaluation import glue, labels
from modernalbert.training.evaluation.metrics import GLUE_TASKS, compute_metrics, predict, score_baselines
from modernalbert.training.evaluation.task import Setup, Task, TransformersTask, run_task
from modernalbert.training.packing import encode_texts


logger = logging.getLogger(__name__)

# Keys of `task_arguments`; `start_from` is a task of the same command, or a model.
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
        default=None, metadata={"help": "Folder with DIR/TASK/SPLIT.parquet, instead of nyu-mll/glue."}
    )
    train_files: list[str] = field(default_factory=list, metadata={"help": "Your files or globs to train on."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs to evaluate on."})
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "One or two columns of your files that hold the texts."}
    )
    label_column: str = field(default="label", metadata={"help": "Names of classes, or numbers to regress on."})
    regression: bool | None = field(
        default=None, metadata={"help": "Regress on the labels; default: where one has a fraction."}
    )
    max_length: Count = field(default=128, metadata={"help": "Longest input in tokens; longer texts are cut."})
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
        elif self.train_files:
            raise ValueError("`train_files` need `validation_files`")
        elif self.task_name == ["all"]:
            self.task_name = list(GLUE_TASKS)
        if len(set(self.task_name)) < len(self.task_name):
            raise ValueError(f"`task_name` {self.task_name} names a task twice")
        if not self.validation_files:
            for task in self.task_name:
                if task not in GLUE_TASKS:
                    raise ValueError(f"there is no task '{task}'; the tasks are {', '.join(GLUE_TASKS)}, or `all`")
        if not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"`text_columns` must name one or two columns, got {self.text_columns}")
        if len({*self.text_columns, self.label_column}) <= len(self.text_columns):
            raise ValueError(
                f"`text_columns` {self.text_columns} and `label_column` '{self.label_column}' name a column twice"
            )
        self.by_task = read_task_arguments(self.task_arguments, (*GLUE_TASKS, *self.task_name))


def read_task_arguments(text: str, tasks: Sequence[str]) -> dict[str, dict]:
    """Checked `task_arguments`.

    Raises:
        ValueError: The text is no JSON object of objects, or names something unknown.
    """
    by_task = parse_json("task_arguments", text)
    for task, values in by_task.items():
        if task not in tasks:
            raise ValueError(f"`task_arguments` names '{task}', which is no task")
        if not isinstance(values, dict):
            raise ValueError(f"`task_arguments` has {values!r} for '{task}', expected an object of arguments")
        for name, value in values.items():
            if name not in TASK_ARGUMENTS:
                raise ValueError(
                    f"`task_arguments` of '{task}' has '{name}', expected some of {', '.join(TASK_ARGUMENTS)}"
                )
            if name == "start_from":
                if not isinstance(value, str):
                    raise ValueError(f"`task_arguments` of '{task}' has {value!r} as `{name}`, expected a name")
            elif isinstance(value, bool) or not isinstance(value, int | float):  # YAML takes 5e-5 for a text
                raise ValueError(f"`task_arguments` of '{task}' has {value!r} as `{name}`, expected a number")
            elif not 0 <= value < float("inf") or (value == 0 and name != "weight_decay"):
                raise ValueError(f"`task_arguments` of '{task}' has {value!r} as `{name}`, expected a positive number")
            elif name == "per_device_train_batch_size" and value != int(value):
                raise ValueError(f"`task_arguments` of '{task}' has {value!r} as `{name}`, expected a whole number")
    return by_task


class ClassificationTask(TransformersTask):
    """One or two texts to a class or a number."""

    arguments = ClassificationArguments
    auto_class = AutoModelForSequenceClassification
    peft_type = "SEQ_CLS"
    without_effect = ("task_name", "data_dir", "train_files", "validation_files", "text_columns", "label_column")
    without_effect += ("task_arguments", "baselines")

    def __init__(self, setup: Setup, name: str):
        args = setup.args
        columns, metrics = GLUE_TASKS[name] if not args.validation_files else (args.text_columns, None)
        self.columns = [column for column in columns if column]
        label_column = args.label_column if args.validation_files else "label"
        self.overrides = {key: value for key, value in args.by_task.get(name, {}).items() if key != "start_from"}
        self.start_from = args.by_task.get(name, {}).get("start_from")

        rows, sources = {}, {}
        for split in setup.splits:
            files = args.train_files if split == "train" else args.validation_files
            for ending in ("_matched", "_mismatched") if name == "mnli" and metrics and split != "train" else ("",):
                key = split + ending.replace("_matched", "")
                rows[key], sources[key] = glue.read_split(
                    name, split + ending, files, args.data_dir, self.columns, label_column
                )
        known, regression = None, args.regression  # of a trained model
        if setup.config.num_labels > 1:
            known = labels.class_names(setup.config)
        if metrics:
            regression = "pearson" in metrics
        rows, self.names = glue.read_classes(rows, sources, known, regression)
        rows = {split: setup.limit(part, split) for split, part in rows.items()}
        if args.baselines and self.names and len(set(rows["train"]["label"])) < 2:
            raise ValueError(
                f"`baselines` need two classes, and the {len(rows['train'])} train rows of '{name}' have one"
            )
        facts = {split: len(part) for split, part in rows.items()}
        logger.info("task %s: column '%s' is %s", name, label_column, labels.describe(self.names, facts))
        if self.names is None and setup.training_args.label_smoothing_factor > 0:
            raise ValueError(f"`label_smoothing_factor` is for classes, and '{name}' is a regression; leave it out")
        metrics = metrics or (("pearson", "spearman") if self.names is None else ("accuracy",))
        self.pairs, self.unnamed = len(self.columns) == 2, labels.are_unnamed(self.names)
        super().__init__(setup, name, metrics, rows, sources, self.columns)

    @classmethod
    def load(cls, setup: Setup) -> list[Task]:
        args = setup.args
        if setup.training_args.do_train and args.validation_files and not args.train_files:
            raise ValueError("`do_train` with `validation_files` needs `train_files`")
        if args.baselines and not setup.training_args.do_train:
            raise ValueError("`baselines` learn from training rows: give `do_train`, or leave it out")
        if setup.config.problem_type == "multi_label_classification" and not setup.training_args.do_train:
            raise ValueError(
                f"'{setup.model_name}' gives several classes to a text; this script scores one class each"
            )
        for task in args.task_name:
            start = args.by_task.get(task, {}).get("start_from")
            needed = setup.training_args.do_train and not setup.tuning.peft
            if needed and start in GLUE_TASKS and start not in args.task_name:
                raise ValueError(
                    f"task '{task}' starts from the model of '{start}': name both in `task_name`, or give a folder as "
                    "`start_from` in `task_arguments`"
                )
        return [cls(setup, name) for name in args.task_name]

    def configure(self, config):
        # Some models set `problem_type` in training, and a later task would inherit it.
        config.problem_type = "regression" if self.names is None else "single_label_classification"
        if self.setup.training_args.do_train:
            labels.write_classes(config, self.names)

    def encode(self, rows):
        def encode_batch(batch):
            texts = (batch[column] for column in self.columns)
            encoded = encode_texts(
                self.setup.tokenizer, *texts, truncation=True, max_length=self.setup.args.max_length
            )
            return {**encoded, "label": batch["label"]}

        return rows.map(encode_batch, batched=True, remove_columns=rows.column_names, desc="Tokenising")

    def collate(self, features):
        return DataCollatorWithPadding(self.setup.tokenizer)(features)

    def assess(self, predictions, labels, split):
        def write() -> dict[str, str]:
            lines = []
            for index, (row, *values) in enumerate(zip(predictions, labels, predict(predictions), strict=True)):
                label, prediction = (value.item() if self.unnamed else self.names[value] for value in values)
                line = {"index": index, "label": label, "prediction": prediction, "logits": row.tolist()}
                lines.append(json.dumps(line))
            return {f"{split.replace('validation', 'predictions')}.jsonl": "\n".join(lines) + "\n"}

        return compute_metrics(self.metrics, predictions, labels), {}, write

    @classmethod
    def score_baselines(cls, tasks):
        scores = {}
        for name, task in tasks.items():
            if task.setup.args.baselines:
                train, rows = (
                    ([part[column] for column in task.columns], list(part["label"]))
                    for part in (task.rows["train"], task.rows["validation"])
                )
                scores[name] = score_baselines(task.metrics, *train, *rows)
        return glue.gather_baselines(scores, {name: task.metrics[0] for name, task in tasks.items()})

    @classmethod
    def combine(cls, summaries, tasks):
        if len(tasks) == 1:
            return super().combine(summaries, tasks)
        return glue.combine(summaries, {name: task.metrics[0] for name, task in tasks.items()})


def main(argv: Sequence[str] | None = None) -> dict:
    """See [`run_task`]."""
    return run_task(ClassificationTask, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
