"""Fine-tunes and evaluates an extractive question answerer: SQuAD v1.1 or v2, or your own files of that form.

SQuAD v2 from the Hub, with any encoder of the Auto classes:

    python scripts/run_squad.py --model_name_or_path runs/tiny --task_name squad_v2 --output_dir runs/squad_v2 \
        --do_train --learning_rate 3e-5 --num_train_epochs 2 --per_device_train_batch_size 16 --seeds 1 2 3

Your own parquet or jsonl, with the columns `id`, `context`, `question` and `answers {text, answer_start}`, on a CPU
within a minute:

    python scripts/run_squad.py --model_name_or_path runs/nano --train_files train.parquet --validation_files dev.parquet \
        --output_dir runs/mine --do_train --max_steps 20 --max_train_samples 500 --max_eval_samples 100

Without `--do_train` the model is only evaluated. The same command resumes a stopped run. The output folder also holds
`predictions.json`, which the official scripts read, `nbest_predictions.json` and, for v2, `null_odds.json`. Several seeds
or learning rates write into folders of their own, and their means into `results.json`. Scores are the official ones at
the given threshold; scores at the best threshold are kept apart, under `details`.

Training leaves out rows whose first answer is not at its `answer_start`, and counts them. Scores compare texts alone, so
evaluation keeps such rows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForQuestionAnswering

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import Count, run_script
from modernalbert.training.data import read_rows
from modernalbert.training.evaluation import squad
from modernalbert.training.evaluation.task import Setup, Task, TransformersTask, run_task
from modernalbert.training.finetuning import FIXED


TASKS = ("squad", "squad_v2")


@dataclass
class QuestionAnsweringArguments:
    """Which model, on which questions, and how answers are read off."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model and its tokenizer."})
    task_name: str = field(
        default="squad_v2", metadata={"help": "squad (v1.1) or squad_v2: whose rules, and the data set of the Hub."}
    )
    train_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs instead of the Hub's."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs to evaluate on."})
    max_length: Count = field(default=384, metadata={"help": "Tokens of a window; a longer context has several."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens of context that neighbouring windows share."})
    max_question_length: Count = field(default=64, metadata={"help": "Tokens that a longer question is cut to."})
    max_answer_length: Count = field(default=30, metadata={"help": "Tokens of the longest answer to give."})
    n_best_size: Count = field(default=20, metadata={"help": "Answers to list for each question."})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "squad_v2: no answer is given where its score exceeds the best one's by more."}
    )

    def __post_init__(self):
        if self.task_name not in TASKS:
            raise ValueError(f"there is no task '{self.task_name}'; the tasks are {', '.join(TASKS)}")
        if self.train_files and not self.validation_files:
            raise ValueError("`train_files` need `validation_files`: the Hub's may have the same questions")


class QuestionAnsweringTask(TransformersTask):
    """A question and its context to a part of the context, or to no answer."""

    arguments = QuestionAnsweringArguments
    auto_class = AutoModelForQuestionAnswering
    peft_type = "QUESTION_ANS"
    fixed = {**FIXED, "label_smoothing_factor": (0.0, "a span has no classes to smooth")}
    without_effect = ("train_files", "validation_files")

    def __init__(self, setup: Setup):
        args = setup.args
        self.threshold = args.null_score_diff_threshold if args.task_name == "squad_v2" else None  # v1.1 has no null
        rows, sources = {}, {}
        for split in setup.splits:
            files = getattr(args, f"{split}_files")
            sources[split] = files or f"rajpurkar/{args.task_name}"
            part = read_rows(sources[split], split)
            rows[split] = squad.check_rows(setup.limit(part, split), split, unanswerable=self.threshold is not None)
        if "train" in rows:
            rows["train"] = squad.keep_valid(rows["train"])
        self.golds = {row["id"]: row["answers"]["text"] for row in rows["validation"]}
        super().__init__(setup, args.task_name, ("f1", "exact"), rows, sources, ("context", "question"))

    @classmethod
    def load(cls, setup: Setup) -> list[Task]:
        args = setup.args
        if setup.training_args.do_train and args.validation_files and not args.train_files:
            raise ValueError("`do_train` with `validation_files` needs `train_files` as well")
        squad.check_windows(setup.tokenizer, args.max_length, args.doc_stride, args.max_question_length)
        return [cls(setup)]

    def encode(self, rows):
        lengths = {
            name: getattr(self.setup.args, name) for name in ("max_length", "doc_stride", "max_question_length")
        }
        return rows.map(
            squad.make_features,
            with_indices=True,
            batched=True,
            fn_kwargs={"tokenizer": self.setup.tokenizer, **lengths},
            remove_columns=rows.column_names,
            desc="Tokenising",
        )

    def collate(self, features):
        """Pads on the right whatever the tokenizer does: labels and answers are positions in the batch."""
        names = (*self.setup.tokenizer.model_input_names, "start_positions", "end_positions")
        columns = {name: [row[name] for row in features] for name in names if name in features[0]}
        return self.setup.tokenizer.pad(columns, padding_side="right", return_tensors="pt")

    def assess(self, predictions, labels, split):
        windows = self.features[split].select_columns(["row", "cls_position", "context_start", "offsets"])
        contexts, args = self.rows[split]["context"], self.setup.args
        ranked = squad.rank_answers(contexts, windows, *predictions[:2], args.n_best_size, args.max_answer_length)
        rankings = dict(zip(self.golds, ranked, strict=True))
        answers, scores, best = squad.evaluate_rankings(rankings, self.golds, self.threshold)

        def write() -> dict[str, str]:
            lists = {name: squad.list_answers(row, self.threshold is not None) for name, row in rankings.items()}
            files = {"predictions": answers, "nbest_predictions": lists}
            if self.threshold is not None:
                files["null_odds"] = {name: row.null_odds for name, row in rankings.items()}
            return {f"{name}.json": json.dumps(file, indent=1, ensure_ascii=False) for name, file in files.items()}

        return scores, {"best_threshold": best} if best else {}, write


def main(argv: Sequence[str] | None = None) -> dict:
    """See [`run_task`]."""
    return run_task(QuestionAnsweringTask, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
