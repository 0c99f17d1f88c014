"""Fine-tunes and evaluates a sentence or sentence-pair classifier: a GLUE task, or your own files.

A GLUE task from the Hub:

    python scripts/run_glue.py --model_name_or_path runs/tiny --task_name mrpc --output_dir runs/mrpc --do_train \
        --learning_rate 5e-5 --num_train_epochs 5 --per_device_train_batch_size 32

Your own csv, jsonl or parquet, with the columns `text` and `label` (any encoder of the Auto classes will do):

    python scripts/run_glue.py --model_name_or_path runs/nano --train_files train.csv --validation_files dev.csv \
        --text_columns text --output_dir runs/mine --do_train --max_steps 50

Without `--do_train` the model is only evaluated.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.callbacks import RoutingFrequencies
from modernalbert.training.data import load_labelled
from modernalbert.training.metrics import GLUE_TASKS, compute_metrics


logger = logging.getLogger(__name__)


@dataclass
class ClassificationArguments:
    """Which model, on which task."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model and its tokenizer."})
    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}."})
    train_files: list[str] = field(default_factory=list, metadata={"help": "Instead: files or globs to train on."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs to evaluate on."})
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "One or two columns that hold the texts."}
    )
    label_column: str = field(default="label", metadata={"help": "Integer classes from 0, or floats to regress on."})
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer texts are cut."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code from the Hub."})

    def __post_init__(self):
        if (self.task_name is None) == (not self.validation_files):
            raise ValueError("give either `task_name` or `validation_files`")
        if self.task_name is not None and self.task_name not in GLUE_TASKS:
            raise ValueError(f"there is no task '{self.task_name}'; the tasks are {', '.join(GLUE_TASKS)}")
        if not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"`text_columns` must name one or two columns, got {self.text_columns}")


def load_task(args: ClassificationArguments) -> tuple[Dataset | None, Dataset, list[str], tuple[str, ...]]:
    """Training and validation rows with a column `label`, the text columns, and the names of the metrics.

    Raises:
        ValueError: A column is missing, or a row has no label.
    """
    if args.task_name is not None:
        columns, metrics = GLUE_TASKS[args.task_name]
        splits = load_dataset("nyu-mll/glue", args.task_name)
        validation = splits["validation_matched" if args.task_name == "mnli" else "validation"]
        return splits["train"], validation, [column for column in columns if column], metrics
    columns = (args.text_columns, args.label_column)
    train = load_labelled(args.train_files, *columns) if args.train_files else None
    validation = load_labelled(args.validation_files, *columns)
    regression = isinstance(validation[0]["label"], float)
    return train, validation, args.text_columns, ("pearson", "spearman") if regression else ("accuracy",)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains if asked to, evaluates, and writes model and `results.json` into `output_dir`; returns the results."""
    args, training_args = HfArgumentParser((ClassificationArguments, TrainingArguments)).parse_args_into_dataclasses(
        argv
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    set_seed(training_args.seed)

    train, validation, columns, metrics = load_task(args)
    if training_args.do_train and train is None:
        raise ValueError("`do_train` needs `train_files`")
    labels = (train or validation)["label"]
    num_labels = 1 if isinstance(labels[0], float) else max(labels) + 1
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        dtype="float32",  # whatever the checkpoint holds, the master weights are float32
        trust_remote_code=args.trust_remote_code,
        **({"num_labels": num_labels} if training_args.do_train else {}),
    )

    def encode(rows):
        encoded = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=args.max_length)
        return {**encoded, "label": rows["label"]}

    train, validation = (
        rows and rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenising")
        for rows in (train, validation)
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=lambda prediction: compute_metrics(metrics, prediction.predictions, prediction.label_ids),
    )
    if getattr(model.config, "has_router", False):
        trainer.add_callback(RoutingFrequencies())
    if training_args.do_train:
        checkpoints = list(Path(training_args.output_dir).glob("checkpoint-*/trainer_state.json"))
        trainer.train(resume_from_checkpoint=bool(checkpoints))
        trainer.save_model()
    evaluation = trainer.evaluate()
    results = {name: evaluation[f"eval_{name}"] for name in metrics}
    Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(training_args.output_dir) / "results.json").write_text(json.dumps(results, indent=1))
    logger.info("%s", results)
    return results


if __name__ == "__main__":
    main()
