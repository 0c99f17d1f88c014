"""Fine-tunes and evaluates a tagger of tokens: named entities in CoNLL files, a data set of the Hub, or your own rows.

A data set of the Hub with `tokens` and `ner_tags`, three seeds, with a LoRA:

    python scripts/run_ner.py --model_name_or_path runs/tiny --dataset tner/wikineural:en --output_dir runs/ner \
        --do_train --learning_rate 5e-5 --num_train_epochs 3 --per_device_train_batch_size 32 --seeds 1 2 3 --peft

Your own CoNLL files (`token ... tag` a line, an empty line between sentences), or jsonl or parquet with lists `tokens`
and `tags`, on a CPU within a minute:

    python scripts/run_ner.py --model_name_or_path runs/nano --train_files train.conll --validation_files dev.conll \
        --output_dir runs/ner --do_train --max_steps 50

Tags are IOB1, IOB2, IOBES or BILOU. A word has its tag on its first token; texts longer than `max_length` are cut into
windows that overlap, and every word is scored once. Scores are those of conlleval over whole entities. Predictions
are in `predictions.jsonl`. The same command resumes a stopped run; without `--do_train` the model is only evaluated.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import Count, run_script
from modernalbert.training.data import read_rows
from modernalbert.training.evaluation import labels, ner
from modernalbert.training.evaluation.metrics import Seqeval
from modernalbert.training.evaluation.task import Setup, Task, TransformersTask, run_task


logger = logging.getLogger(__name__)


@dataclass
class TaggingArguments:
    """Which model, on which tokens."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model and its tokenizer."})
    task_name: str = field(default="ner", metadata={"help": "Name of the task in results and model card."})
    dataset: str | None = field(
        default=None, metadata={"help": "Data set of the Hub, `name` or `name:configuration`."}
    )
    train_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs to train on."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs to evaluate on."})
    token_column: str = field(default="tokens", metadata={"help": "Column with the lists of tokens."})
    tag_column: str | None = field(default=None, metadata={"help": "Column of their tags; default: ner_tags or tags."})
    max_length: Count = field(default=256, metadata={"help": "Tokens of a window; a longer text has several."})
    stride: int = field(default=64, metadata={"help": "Tokens that neighbouring windows share."})

    def __post_init__(self):
        if (self.dataset is None) == (not self.validation_files):
            raise ValueError("give either `dataset` or `validation_files`")
        if self.dataset is not None and self.train_files:
            raise ValueError("`train_files` go with `validation_files`, not with `dataset`")


class TaggingTask(TransformersTask):
    """Tokens to the tags of entities."""

    arguments = TaggingArguments
    auto_class = AutoModelForTokenClassification
    peft_type = "TOKEN_CLS"
    without_effect = ("dataset", "train_files", "validation_files", "token_column", "tag_column")

    def __init__(self, setup: Setup):
        args, rows, sources = setup.args, {}, {}
        for split in setup.splits:
            if args.dataset is not None:
                sources[split] = args.dataset
                part = read_rows(args.dataset, split)
                rows[split] = ner.check_tagged(
                    part, f"{split} of '{args.dataset}'", args.token_column, args.tag_column
                )
            else:
                sources[split] = getattr(args, f"{split}_files")
                rows[split] = ner.read_tagged(sources[split], args.token_column, args.tag_column)
        schemes = {split: ner.find_scheme(part, f"{split} rows") for split, part in rows.items()}
        if "train" in rows:
            self.names = ner.list_tags(rows["train"], schemes["train"])
            if len(self.names) < 2:
                raise ValueError("all tags of the train rows are O: there is nothing to learn")
        else:
            self.names = labels.class_names(setup.config)
        for split, part in rows.items():
            ner.check_known(part, self.names, f"the {split} rows")
        rows = {split: setup.limit(part, split) for split, part in rows.items()}
        counts = {split: len(part) for split, part in rows.items()}
        logger.info("task %s: tags in %s, %s", args.task_name, schemes, labels.describe(self.names, counts))
        metrics = ("f1", "precision", "recall", "accuracy")
        super().__init__(setup, args.task_name, metrics, rows, sources, ("tokens",))

    @classmethod
    def load(cls, setup: Setup) -> list[Task]:
        args, tokenizer = setup.args, setup.tokenizer
        if setup.training_args.do_train and args.validation_files and not args.train_files:
            raise ValueError("`do_train` with `validation_files` needs `train_files` as well")
        room = args.max_length - tokenizer.num_special_tokens_to_add()
        if not 0 <= args.stride < room:
            raise ValueError(f"`stride` ({args.stride}) must be at least 0 and below the {room} tokens of a window")
        return [cls(setup)]

    def configure(self, config):
        if self.setup.training_args.do_train:
            labels.write_classes(config, self.names)

    def encode(self, rows):
        numbers = {name: number for number, name in enumerate(self.names)}
        lengths = {"max_length": self.setup.args.max_length, "stride": self.setup.args.stride}
        return rows.map(
            ner.make_windows,
            with_indices=True,
            batched=True,
            fn_kwargs={"tokenizer": self.setup.tokenizer, "numbers": numbers, **lengths},
            remove_columns=rows.column_names,
            desc="Tokenising",
        )

    def collate(self, features):
        names = (*self.setup.tokenizer.model_input_names, "labels")
        rows = [{name: row[name] for name in names if name in row} for row in features]
        return DataCollatorForTokenClassification(self.setup.tokenizer)(rows)

    def assess(self, predictions, labels, split):
        rows, windows = self.rows[split], self.features[split].select_columns(["row", "words"])
        predicted = ner.read_tags(rows, windows, predictions, labels, self.names)
        scores = Seqeval().compute(predictions=predicted, references=rows["tags"], by_type=True)

        def write() -> dict[str, str]:
            columns = {"tokens": rows["tokens"], "tags": rows["tags"], "predictions": predicted}
            lines = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
            return {"predictions.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)}

        return scores, {"by_type": scores.pop("by_type")}, write


def main(argv: Sequence[str] | None = None) -> dict:
    """See [`run_task`]."""
    return run_task(TaggingTask, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
