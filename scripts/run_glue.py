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
from collections.abc import Sequence
from dataclasses import replace
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
from modernalbert.training.arguments import parse_arguments
from modernalbert.training.checkpoints import RESULTS_NAME, write_text
from modernalbert.training.finetuning import (
    MERGED_NAME,
    FineTuningArguments,
    FineTuningTrainer,
    add_lora,
    check_training,
    describe_run,
    fine_tune,
    load_config,
    load_model,
    merge_trained,
    read_finished,
)
from modernalbert.training.glue import (
    ClassificationArguments,
    Run,
    Task,
    best_rate,
    compare_baselines,
    describe_data,
    load_task,
    summarise,
    to_markdown,
    write_predictions,
)
from modernalbert.training.metrics import GLUE_TASKS, compute_metrics
from modernalbert.training.results import write_results


logger = logging.getLogger(__name__)

# Where our defaults differ from transformers'.
DEFAULTS = {"save_total_limit": 1, "logging_steps": 50}


def plan_runs(
    args: ClassificationArguments, tuning: FineTuningArguments, training_args: TrainingArguments
) -> list[Run]:
    """All runs, those that start from another task's model after it.

    Raises:
        FileExistsError: `output_dir` holds a single run, and there are several now.
        ValueError: A run starts from a task that is not among them.
    """
    root = Path(training_args.output_dir)
    starts = {task: args.by_task.get(task, {}).get("start_from") for task in args.task_name}

    def depth(task: str) -> int:
        return 1 + depth(starts[task]) if starts[task] in starts else 0

    runs = []
    for task in sorted(starts, key=depth):
        if starts[task] in GLUE_TASKS and starts[task] not in starts and not tuning.peft:
            raise ValueError(
                f"task '{task}' starts from the model of '{starts[task]}': name both in `task_name`, or give a folder "
                "as `start_from` in `task_arguments`"
            )
        rates = tuning.learning_rates or [args.by_task.get(task, {}).get("learning_rate", training_args.learning_rate)]
        for seed in tuning.seeds or [training_args.seed]:
            runs += [Run(task, seed, rate, root / task / f"seed-{seed}-lr-{rate:g}") for rate in rates]
    if len(runs) == 1:
        return [replace(runs[0], folder=root)]
    if (root / "arguments.json").exists():
        raise FileExistsError(f"'{root}' holds a single run; choose another `output_dir` for {len(runs)} runs")
    return runs


def execute(
    run: Run,
    task: Task,
    start: str,
    args: ClassificationArguments,
    tuning: FineTuningArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Trains from the model `start` if asked to, evaluates, and writes the run's folder, unless it is finished.

    Returns:
        What its `results.json` holds.
    """
    training_args = copy.copy(training_args)
    for name, value in {**args.by_task.get(run.task, {}), "learning_rate": run.learning_rate}.items():
        setattr(training_args, name, value)
    training_args.output_dir, training_args.seed = str(run.folder), run.seed
    others = {"model_name_or_path": args.model_name_or_path, "start_from": start, "max_length": args.max_length}
    settings = describe_run(tuning, training_args, **others)
    if (results := read_finished(run.folder, settings)) is not None:
        logger.info("'%s' holds a finished run", run.folder)
        return results
    logger.info("task %s, seed %d, learning rate %g, in '%s'", run.task, run.seed, run.learning_rate, run.folder)

    set_seed(run.seed)
    config = load_config(tuning, start)
    config.num_labels = task.num_labels
    if task.labels is not None:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: number for number, name in enumerate(task.labels)}
    load = functools.partial(
        load_model,
        AutoModelForSequenceClassification,
        config=config,
        trust_remote_code=tuning.trust_remote_code,
        ignore_mismatched_sizes=start != args.model_name_or_path,  # the head of another task
    )
    model, fresh = load(start)
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
    details = {}
    if training_args.do_train:
        trainer = build(model=model, train_dataset=train)
        fine_tune(trainer, settings, tuning.early_stopping_patience, task.metrics[0])
        details["steps"] = trainer.state.global_step
        if tuning.peft:  # what is scored is what was saved
            details["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
            model, _ = load(str(run.folder))
    elif fresh:
        raise ValueError(f"'{start}' has no {', '.join(fresh)}: it is no trained classifier; give `do_train`")

    scorer = build(model=model)
    scores, details["milliseconds_per_row"] = evaluate(scorer, task, validation, run.folder)
    if tuning.merge_after is not None and scorer.routed:
        merged = merge_trained(trainer, model, tuning.merge_after)
        details["merged_parameters"] = merged.num_parameters()
        figures, milliseconds = evaluate(build(model=merged), task, validation, run.folder / MERGED_NAME)
        scores |= {f"merged_{name}": value for name, value in figures.items()}
        details["merged_milliseconds_per_row"] = milliseconds
    elif tuning.merge_after is not None:
        logger.info("a %s has no experts: `merge_after` does nothing", config.model_type)

    if training_args.should_save:
        write_results(
            run.folder,
            task=run.task,
            model_name=args.model_name_or_path,
            model=model,
            scores=scores,
            data=describe_data(args, task),
            seeds=[run.seed],
            settings=settings,
            details=details,
        )
    scorer.accelerator.wait_for_everyone()
    return json.loads((run.folder / RESULTS_NAME).read_text(encoding="utf-8"))


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
    if args.baselines and not training_args.do_train:
        raise ValueError("`baselines` learn from training rows: give `do_train`, or leave it out")
    runs = plan_runs(args, tuning, training_args)
    tasks = {
        task: load_task(args, tuning, task, None if training_args.do_train else config) for task in args.task_name
    }

    results = {}
    for run in runs:
        start = args.by_task.get(run.task, {}).get("start_from", name)
        if tuning.peft:  # an adapter belongs to one base
            start = name
        elif start in tasks:
            best = (start, run.seed, best_rate(results, start))
            (start,) = (str(r.folder) for r in results if (r.task, r.seed, r.learning_rate) == best)
        results[run] = execute(run, tasks[run.task], start, args, tuning, training_args)

    if len(runs) == 1:
        (summary,) = results.values()
    else:
        summary = summarise(results, tasks, {task: describe_data(args, tasks[task]) for task in tasks})
    if args.baselines and "baselines" not in summary["details"]:
        summary["details"]["baselines"] = compare_baselines(tasks)
    if training_args.should_save:
        root = Path(training_args.output_dir)
        write_text(root / RESULTS_NAME, json.dumps(summary, indent=1))
        write_text(root / "results.md", to_markdown(summary, tasks))
    logger.info("%s", json.dumps(summary["scores"]))
    return summary


if __name__ == "__main__":
    main()
