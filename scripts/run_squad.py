"""Fine-tunes and evaluates an extractive question answerer: SQuAD v1.1 or v2, or your own files of that form.

SQuAD v2 from the Hub, with any encoder of the Auto classes:

    python scripts/run_squad.py --model_name_or_path runs/tiny --task_name squad_v2 --output_dir runs/squad_v2 \
        --do_train --learning_rate 3e-5 --num_train_epochs 2 --per_device_train_batch_size 16 --seeds 1 2 3

Your own parquet or jsonl, with the columns `id`, `context`, `question` and `answers {text, answer_start}`, on a CPU
within a minute:

    python scripts/run_squad.py --model_name_or_path runs/nano --train_files train.parquet --validation_files dev.parquet \
        --output_dir runs/mine --do_train --max_steps 20 --max_train_samples 500 --max_eval_samples 100

Without `--do_train` the model is only evaluated. The same command goes on where it was stopped. Beside `results.json` lie
`predictions.json`, which the official scripts read, `nbest_predictions.json` and, for v2, `null_odds.json`. Several seeds
or learning rates write into folders of their own, and their means into `results.json`. Scores are the official ones at
the threshold given; what the best threshold would reach stands apart, under `details`.

Training leaves out rows whose first answer does not stand at its `answer_start`, and counts them. Scores look at the
texts alone, so that evaluation keeps such rows.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training import finetuning
from modernalbert.training.cli import parse_arguments
from modernalbert.training.data import fingerprint, load_files
from modernalbert.training.evaluation.results import describe_model, read_finished, summarise, write_results
from modernalbert.training.evaluation.squad import (
    COLUMNS,
    Ranking,
    check_rows,
    check_windows,
    evaluate_rankings,
    is_sound,
    list_answers,
    make_features,
    rank_answers,
)
from modernalbert.training.export.cards import write_finetuned_cards
from modernalbert.training.runs import RESULTS_NAME, write_text


logger = logging.getLogger(__name__)

# Where our defaults differ from transformers'.
DEFAULTS = {"save_total_limit": 1, "logging_steps": 50}

TASKS = ("squad", "squad_v2")


@dataclass
class QuestionAnsweringArguments:
    """Which model, on which questions, and how answers are read off."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model and its tokenizer."})
    task_name: str = field(
        default="squad_v2", metadata={"help": "squad (v1.1) or squad_v2: whose rules, and the data set of the Hub."}
    )
    train_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs in place of the Hub's."})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "Files or globs to evaluate on."})
    max_length: int = field(default=384, metadata={"help": "Tokens of a window; a longer context has several."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens of context that neighbouring windows share."})
    max_question_length: int = field(default=64, metadata={"help": "Tokens that a longer question is cut to."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of the longest answer to give."})
    n_best_size: int = field(default=20, metadata={"help": "Answers to list for each question."})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "squad_v2: no answer is given where its score exceeds the best one's by more."}
    )

    def __post_init__(self):
        if self.task_name not in TASKS:
            raise ValueError(f"there is no task '{self.task_name}'; the tasks are {', '.join(TASKS)}")
        if self.train_files and not self.validation_files:
            raise ValueError("`train_files` need `validation_files`: the Hub's may have the same questions")
        for name in ("max_question_length", "max_answer_length", "n_best_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1")

    @property
    def threshold(self) -> float | None:
        """Of the null odds; None in v1.1, where every question has an answer."""
        return self.null_score_diff_threshold if self.task_name == "squad_v2" else None


class Questions:
    """Questions as the model takes them, and how its logits become answers.

    Args:
        args: Which ones.
        splits: Most rows to take of each split; None: all.
        tokenizer: The model's.

    Raises:
        ValueError: A row cannot be scored, or none can be learned from.
    """

    def __init__(
        self,
        args: QuestionAnsweringArguments,
        splits: Mapping[str, int | None],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.args = args
        self.tokenizer = tokenizer
        self.rows = {split: self.load(split, limit) for split, limit in splits.items()}
        self.facts = {  # what results say about the data
            split: {"source": self.source(split), "rows": len(rows), "fingerprint": fingerprint(rows)}
            for split, rows in self.rows.items()
        }
        self.golds = {row["id"]: row["answers"]["text"] for row in self.rows["validation"]}

    def load(self, split: str, limit: int | None) -> Dataset:
        """Checked rows, from files where there are some, else from the Hub."""
        files = self.source(split)
        rows = load_dataset(files, split=split) if isinstance(files, str) else load_files(files)
        rows = rows.select(range(min(len(rows), limit or len(rows))))
        check_rows(rows, split, unanswerable=self.args.threshold is not None)
        rows = rows.select_columns(list(COLUMNS))
        if split == "validation":
            return rows
        sound = rows.filter(is_sound, desc="Checking answers")
        if len(sound) == 0:
            raise ValueError(
                f"of {len(rows)} train rows none has its first answer at `answer_start`, in characters from 0"
            )
        if len(sound) < len(rows):
            broken = len(rows) - len(sound)
            logger.warning("left out %d of %d train rows: no answer at `answer_start`", broken, len(rows))
        return sound

    def source(self, split: str) -> str | list[str]:
        """Data set of the Hub, or files."""
        return getattr(self.args, f"{split}_files") or f"rajpurkar/{self.args.task_name}"

    @cached_property
    def features(self) -> dict[str, Dataset]:
        """Windows of each split; a finished run needs none."""
        lengths = {name: getattr(self.args, name) for name in ("max_length", "doc_stride", "max_question_length")}
        encode = partial(make_features, tokenizer=self.tokenizer, **lengths)
        features = {
            split: rows.map(encode, True, batched=True, remove_columns=rows.column_names, desc="Tokenising")
            for split, rows in self.rows.items()
        }
        for split, windows in features.items():
            self.facts[split]["windows"] = len(windows)
        return features

    def collate(self, features: Sequence[Mapping]) -> Mapping[str, torch.Tensor]:
        """A batch, padded on the right whatever the tokenizer does: labels and answers are places in it."""
        names = (*self.tokenizer.model_input_names, "start_positions", "end_positions")
        rows = [{name: row[name] for name in names if name in row} for row in features]
        return pad_without_fast_tokenizer_warning(self.tokenizer, rows, padding_side="right", return_tensors="pt")

    def rank(self, predictions: tuple) -> dict[str, Ranking]:
        """Answers to every validation question, best first, by the logits of its windows."""
        windows = self.features["validation"].select_columns(["row", "cls_position", "context_start", "offsets"])
        contexts = self.rows["validation"]["context"]
        rankings = rank_answers(
            contexts, windows, *predictions[:2], self.args.n_best_size, self.args.max_answer_length
        )
        return dict(zip(self.golds, rankings, strict=True))


def evaluate(trainer: finetuning.FineTuningTrainer, questions: Questions, folder: Path) -> tuple[dict, dict, float]:
    """Scores of the Trainer's model, those of the best thresholds, milliseconds a window; writes answers into a folder."""
    threshold, windows = questions.args.threshold, questions.features["validation"]
    trainer.compute_metrics = None  # its time would count
    output = trainer.predict(windows)
    rankings = questions.rank(output.predictions)
    predictions, scores, best = evaluate_rankings(rankings, questions.golds, threshold)
    if trainer.is_world_process_zero():
        folder.mkdir(exist_ok=True)
        lists = {name: list_answers(ranking, threshold is not None) for name, ranking in rankings.items()}
        files = {"predictions": predictions, "nbest_predictions": lists}
        if threshold is not None:
            files["null_odds"] = {name: ranking.null_odds for name, ranking in rankings.items()}
        for name, content in files.items():
            write_text(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False))
    return scores, best, 1000 * output.metrics["test_runtime"] / len(windows)


def execute(
    args: QuestionAnsweringArguments,
    tuning: finetuning.FineTuningArguments,
    training_args: TrainingArguments,
    questions: Questions,
) -> dict[str, Any]:
    """One run: trains if asked to, and evaluates; returns what `results.json` in its folder holds, or held already."""
    folder = Path(training_args.output_dir)
    reading = {name: value for name, value in asdict(args).items() if not name.endswith("_files")}
    reading["model_name_or_path"] = describe_model(args.model_name_or_path)
    prints = {split: facts["fingerprint"] for split, facts in questions.facts.items()}
    settings = finetuning.describe_run(tuning, training_args, **reading, data=prints)
    if (results := read_finished(folder, settings)) is not None:
        logger.info("'%s' holds a finished run", folder)
        return results

    set_seed(training_args.seed)
    load = partial(
        finetuning.load_model,
        AutoModelForQuestionAnswering,
        config=finetuning.load_config(tuning, args.model_name_or_path),
        trust_remote_code=tuning.trust_remote_code,
    )
    model, fresh = load(args.model_name_or_path)
    if not training_args.do_train and fresh:
        raise ValueError(
            f"'{args.model_name_or_path}' has no {', '.join(fresh)}: it was not trained to answer; give `do_train`"
        )
    if tuning.peft:
        model = finetuning.add_lora(model, "QUESTION_ANS", fresh, tuning.peft_rank, tuning.peft_target_modules)
    with training_args.main_process_first():  # the others find what it tokenised in the cache
        features = questions.features
    build = partial(
        finetuning.FineTuningTrainer,
        args=training_args,
        data_collator=questions.collate,
        train_dataset=features.get("train"),
        eval_dataset=features["validation"],
        processing_class=questions.tokenizer,
        compute_metrics=lambda output: evaluate_rankings(
            questions.rank(output.predictions), questions.golds, args.threshold
        )[1],
    )
    details = {"eval_batch_size": training_args.eval_batch_size}
    if training_args.do_train:
        trainer = build(model=model)
        finetuning.fine_tune(trainer, settings, tuning.early_stopping_patience, "f1")
        details["steps"] = trainer.state.global_step
        if tuning.peft:  # what is scored is what was saved
            details["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
            model, _ = load(str(folder))

    evaluator = build(model=model)
    scores, best, details["milliseconds_per_row"] = evaluate(evaluator, questions, folder)
    details["best_threshold"] = best
    if tuning.merge_after is not None and evaluator.routed:
        merged = finetuning.merge_trained(trainer, model, tuning.merge_after)
        figures, best, milliseconds = evaluate(build(model=merged), questions, folder / finetuning.MERGED_NAME)
        scores |= {f"merged_{name}": score for name, score in figures.items()}
        details |= {"merged_parameters": merged.num_parameters(), "merged_best_threshold": best}
        details["merged_milliseconds_per_row"] = milliseconds
    elif tuning.merge_after is not None:
        logger.info("a %s has no experts: `merge_after` does nothing", model.config.model_type)

    if training_args.should_save:
        facts = {
            "task": args.task_name,
            "model_name": args.model_name_or_path,
            "model": model,
            "scores": scores,
            "data": questions.facts,
            "seed": training_args.seed,
            "settings": settings,
            "details": {name: value for name, value in details.items() if value != {}},  # v1.1 has no thresholds
        }
        if training_args.do_train:
            write_finetuned_cards(folder, **facts)
        write_results(folder, **facts)
    evaluator.accelerator.wait_for_everyone()
    return read_finished(folder, settings)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains if asked to, evaluates, and writes `output_dir`; returns what `results.json` holds.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped a run, after its checkpoint was written.
        ValueError: Arguments do not go together, or rows cannot be used.
    """
    types = (QuestionAnsweringArguments, finetuning.FineTuningArguments, TrainingArguments)
    args, tuning, training_args = parse_arguments(types, argv, DEFAULTS, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = finetuning.load_config(tuning, args.model_name_or_path)
    finetuning.check_training(tuning, training_args, args.model_name_or_path, config)
    if training_args.do_train and args.validation_files and not args.train_files:
        raise ValueError("`do_train` with `validation_files` needs `train_files` as well")
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=tuning.trust_remote_code)
    finetuning.check_max_length("max_length", args.max_length, tokenizer, config)
    check_windows(tokenizer, args.max_length, args.doc_stride, args.max_question_length)

    runs, root = finetuning.plan_runs(tuning, training_args), Path(training_args.output_dir)
    finetuning.place_runs(runs, root)
    splits = {"train": tuning.max_train_samples} if training_args.do_train else {}
    splits["validation"] = tuning.max_eval_samples
    with training_args.main_process_first():
        questions = Questions(args, splits, tokenizer)
    results = [execute(args, tuning, run, questions) for run in runs]
    summary = results[0]
    if len(runs) > 1:
        summary = summarise(results)
        if training_args.should_save:
            write_text(root / RESULTS_NAME, json.dumps(summary, indent=1))
    logger.info("%s", json.dumps(summary["scores"]))
    return summary


if __name__ == "__main__":
    main()
