"""Fine-tunes and evaluates a sentence or sentence-pair classifier: GLUE tasks, or your own files.

All of GLUE by the protocol of ModernBERT's paper, three seeds each (`--data_dir` reads local parquet files in place of
`nyu-mll/glue`), or one task of it:

    python scripts/run_glue.py --config recipes/glue.yaml --model_name_or_path runs/tiny --output_dir runs/tiny-glue
    python scripts/run_glue.py --model_name_or_path runs/tiny --task_name mrpc --output_dir runs/mrpc --do_train \
        --learning_rate 5e-5 --num_train_epochs 5 --per_device_train_batch_size 32

Your own csv, jsonl or parquet, with the columns `text` and `label` (any encoder of the Auto classes will do):

    python scripts/run_glue.py --model_name_or_path runs/nano --train_files train.csv --validation_files dev.csv \
        --text_columns text --output_dir runs/mine --do_train --max_steps 50

One task, seed and learning rate are a run. A single one writes model, `predictions.jsonl` and `results.json` into
`output_dir`; several write into folders of their own below it, and their means into `results.json` and `results.md`.
The same command goes on where it was stopped. Without `--do_train` the model is only evaluated.
"""

import copy
import functools
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import parse_arguments
from modernalbert.training.evaluation.glue import (
    ClassificationArguments,
    Task,
    combine,
    compare_baselines,
    describe_data,
    load_task,
    to_markdown,
    write_predictions,
)
from modernalbert.training.evaluation.metrics import GLUE_TASKS, compute_metrics
from modernalbert.training.evaluation.results import (
    choose_rate,
    describe_model,
    read_finished,
    summarise,
    write_results,
)
from modernalbert.training.export.cards import write_finetuned_cards
from modernalbert.training.finetuning import (
    MERGED_NAME,
    FineTuningArguments,
    FineTuningTrainer,
    add_lora,
    check_max_length,
    check_training,
    describe_run,
    fine_tune,
    load_config,
    load_model,
    merge_trained,
    place_runs,
    plan_runs,
)
from modernalbert.training.runs import RESULTS_NAME, write_text


logger = logging.getLogger(__name__)

# Where our defaults differ from transformers'.
DEFAULTS = {"save_total_limit": 1, "logging_steps": 50}


@dataclass(frozen=True)
class Run:
    """One task, seed and learning rate; its arguments name the folder that is its own."""

    task: str
    args: TrainingArguments


def plan(args: ClassificationArguments, tuning: FineTuningArguments, training_args: TrainingArguments) -> list[Run]:
    """All runs, those that start from another task's model after it.

    Raises:
        FileExistsError: `output_dir` holds a single run, and there are several now.
        ValueError: A run starts from a task that is not among them.
    """
    starts = {task: args.by_task.get(task, {}).get("start_from") for task in args.task_name}

    def depth(task: str, below: tuple[str, ...] = ()) -> int:
        if task in below:
            raise ValueError(f"the tasks {', '.join(below)} start from each other's models: see `start_from`")
        return 1 + depth(starts[task], (*below, task)) if starts[task] in starts else 0

    runs = []
    for task in sorted(starts, key=depth):
        if starts[task] in GLUE_TASKS and starts[task] not in starts and training_args.do_train and not tuning.peft:
            raise ValueError(
                f"task '{task}' starts from the model of '{starts[task]}': name both in `task_name`, or give a folder "
                "as `start_from` in `task_arguments`"
            )
        own = copy.copy(training_args)
        for name, value in args.by_task.get(task, {}).items():
            if name != "start_from":
                setattr(own, name, value)
        own.output_dir = str(Path(training_args.output_dir) / task)
        runs += [Run(task, arguments) for arguments in plan_runs(tuning, own)]
    place_runs([run.args for run in runs], training_args.output_dir)
    return runs


def execute(
    run: Run, task: Task, data: dict[str, Any], start: str, args: ClassificationArguments, tuning: FineTuningArguments
) -> dict[str, Any]:
    """Trains from the model `start` if asked to, evaluates, and writes the run's folder, unless it is finished.

    Returns:
        What its `results.json` holds.
    """
    training_args, folder = run.args, Path(run.args.output_dir)
    settings = describe_run(
        tuning,
        training_args,
        model_name_or_path=describe_model(args.model_name_or_path),
        start_from=describe_model(start),
        max_length=args.max_length,
        data={part: facts["fingerprint"] for part, facts in data.items() if part != "source"},
    )
    if (results := read_finished(folder, settings)) is not None:
        logger.info("'%s' holds a finished run", folder)
        return results
    logger.info("task %s, seed %d, in '%s'", run.task, training_args.seed, folder)

    set_seed(training_args.seed)
    config = load_config(tuning, start)
    config.num_labels = task.num_labels
    # Some models write down what they took a task for, and the next task inherits it.
    config.problem_type = "regression" if task.num_labels == 1 else "single_label_classification"
    if training_args.do_train:
        names = task.labels or [f"LABEL_{number}" for number in range(task.num_labels)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    load = functools.partial(
        load_model,
        AutoModelForSequenceClassification,
        config=config,
        trust_remote_code=tuning.trust_remote_code,
    )
    model, fresh = load(start)
    if not training_args.do_train and fresh:
        raise ValueError(f"'{start}' has no {', '.join(fresh)}: it is no trained classifier; give `do_train`")
    if tuning.peft:
        model = add_lora(model, "SEQ_CLS", fresh, tuning.peft_rank, tuning.peft_target_modules)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=tuning.trust_remote_code)

    def encode(rows: Dataset) -> Dataset:
        def encode_batch(batch):
            texts = (batch[column] for column in task.columns)
            return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "label": batch["label"]}

        return rows.map(encode_batch, batched=True, remove_columns=rows.column_names, desc="Tokenising")

    with training_args.main_process_first():  # the others find what it tokenised in the cache
        train = task.train and encode(task.train)
        validation = {end: encode(rows) for end, rows in task.validation.items()}
    build = functools.partial(
        FineTuningTrainer,
        args=training_args,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        eval_dataset=validation[""],
        compute_metrics=lambda output: compute_metrics(task.metrics, output.predictions, output.label_ids),
    )
    details = {"eval_batch_size": training_args.eval_batch_size}
    if training_args.do_train:
        trainer = build(model=model, train_dataset=train)
        fine_tune(trainer, settings, tuning.early_stopping_patience, task.metrics[0])
        details["steps"] = trainer.state.global_step
        if tuning.peft:  # what is scored is what was saved
            details["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
            model, _ = load(str(folder))

    scorer = build(model=model)
    scores, details["milliseconds_per_row"] = evaluate(scorer, task, validation, folder)
    if tuning.merge_after is not None and scorer.routed:
        merged = merge_trained(trainer, model, tuning.merge_after)
        details["merged_parameters"] = merged.num_parameters()
        figures, milliseconds = evaluate(build(model=merged), task, validation, folder / MERGED_NAME)
        scores |= {f"merged_{name}": value for name, value in figures.items()}
        details["merged_milliseconds_per_row"] = milliseconds
    elif tuning.merge_after is not None:
        logger.info("a %s has no experts: `merge_after` does nothing", config.model_type)

    if training_args.should_save:
        facts = {
            "task": run.task,
            "model_name": args.model_name_or_path,
            "model": model,
            "scores": scores,
            "data": data,
            "seed": training_args.seed,
            "settings": settings,
            "details": details,
        }
        if training_args.do_train:
            write_finetuned_cards(folder, pairs=len(task.columns) == 2, **facts)
        write_results(folder, **facts)
    scorer.accelerator.wait_for_everyone()
    return json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))


def evaluate(
    trainer: FineTuningTrainer, task: Task, validation: dict[str, Dataset], folder: Path
) -> tuple[dict[str, float], float]:
    """Scores on each validation set, whose predictions are written into the folder; milliseconds a row of the first."""
    scores, times = {}, []
    for end, rows in validation.items():
        output = trainer.predict(rows)
        scores |= {f"{name}{end}": output.metrics[f"test_{name}"] for name in task.metrics}
        times.append(1000 * output.metrics["test_runtime"] / len(rows))
        if trainer.args.should_save:
            path = folder / f"predictions{end}.jsonl"
            write_predictions(path, output.predictions, output.label_ids, task.labels)
    return scores, times[0]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not finished, and writes `results.json` and `results.md` into `output_dir`; returns the results.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped a run, after its checkpoint was written.
        ValueError: Arguments do not go together, or the data is broken.
    """
    args, tuning, training_args = parse_arguments(
        (ClassificationArguments, FineTuningArguments, TrainingArguments), argv, DEFAULTS, __doc__
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    name = args.model_name_or_path
    config = load_config(tuning, name)
    check_training(tuning, training_args, name, config)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=tuning.trust_remote_code)
    check_max_length("max_length", args.max_length, tokenizer, config)
    if args.baselines and not training_args.do_train:
        raise ValueError("`baselines` learn from training rows: give `do_train`, or leave it out")
    runs = plan(args, tuning, training_args)
    with training_args.main_process_first():
        tasks = {
            task: load_task(args, tuning, task, None if training_args.do_train else config) for task in args.task_name
        }
    data = {task: describe_data(args, tasks[task]) for task in tasks}

    results = defaultdict(list)
    for run in runs:
        start = args.by_task.get(run.task, {}).get("start_from", name)
        if tuning.peft or not training_args.do_train:  # an adapter belongs to one base
            start = name
        elif start in tasks:
            rate, _ = choose_rate(results[start])
            (start,) = (
                other.args.output_dir
                for other in runs
                if (other.task, other.args.seed, other.args.learning_rate) == (start, run.args.seed, rate)
            )
        results[run.task].append(execute(run, tasks[run.task], data[run.task], start, args, tuning))

    if len(runs) == 1:
        ((summary,),) = results.values()
    else:
        summaries = {task: summarise(results[task]) for task in tasks}
        summary = next(iter(summaries.values())) if len(tasks) == 1 else combine(summaries, tasks)
    if training_args.should_save:
        if args.baselines and "baselines" not in summary["details"]:
            summary["details"]["baselines"] = compare_baselines(tasks)
        root = Path(training_args.output_dir)
        write_text(root / RESULTS_NAME, json.dumps(summary, indent=1))
        write_text(root / "results.md", to_markdown(summary, tasks))
    logger.info("%s", json.dumps(summary["scores"]))
    return summary


if __name__ == "__main__":
    main()
