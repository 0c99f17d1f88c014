"""The program of all task scripts: seeds and learning rates, loading, training, evaluation, merging, cards and results.

A script defines a subclass of [`TransformersTask`], or of [`Task`] if another library provides model and Trainer, and
calls [`run_task`] with it.
"""

import copy
import json
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..cli import parse_arguments
from ..data import fingerprint, first_rows
from ..export.cards import MERGED_NAME, write_finetuned_cards
from ..export.folder import fit_tokenizer
from ..export.redaction import redact
from ..finetuning import (
    FIXED,
    FineTuningArguments,
    FineTuningTrainer,
    add_lora,
    check_max_length,
    check_training,
    choose_metric,
    fine_tune,
    load_config,
    merge_trained,
    place_runs,
    plan_runs,
    save_trained,
)
from ..loading import is_adapter, load_model, load_tokenizer
from ..runs import RESULTS_NAME, describe_model, read_json, run_settings, start_run, write_json, write_text
from .results import choose_rate, summarise, to_markdown, write_results


logger = logging.getLogger(__name__)

PEFT = ("peft_rank", "peft_target_modules")

# Where our defaults differ from transformers'. An empty metric stands for the task's main one.
DEFAULTS = {"save_total_limit": 1, "logging_steps": 50, "metric_for_best_model": ""}


@dataclass(frozen=True)
class Setup:
    """Arguments of a command, and configuration and tokenizer of the model that it starts from.

    Attributes:
        args: The script's own arguments, with `model_name_or_path`.
        tuning: Arguments of fine-tuning.
        training_args: Arguments of Trainer.
        config: Configuration of the model.
        tokenizer: Tokenizer of the model.
    """

    args: Any
    tuning: FineTuningArguments
    training_args: TrainingArguments
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def model_name(self) -> str:
        """Hub name or folder of the model."""
        return self.args.model_name_or_path

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that a task reads."""
        return ("train", "validation") if self.training_args.do_train else ("validation",)

    def limit(self, rows: Dataset, split: str) -> Dataset:
        """The first rows, as many as the command asks for."""
        return first_rows(rows, self.tuning.max_train_samples if split == "train" else self.tuning.max_eval_samples)


class Task(ABC):
    """A task with its checked rows: what [`run_task`] needs of it. Subclasses set the class attributes.

    Args:
        setup: Arguments of the command.
        name: Name of the task.
        metrics: Names of the scores that may choose the best checkpoint; the first is the main one.
        rows: Rows by split; `train` only with `do_train`. The other splits are evaluated; the first one chooses models.
            Scores of a split `validation_x` end in `_x`.
        sources: Source of the rows of each split.
        inputs: Columns that the model reads, to find validation rows that are in training.
        settings: Settings that scores depend on, beside the arguments.

    Raises:
        ValueError: Training and validation have the same rows.
    """

    arguments: type  # dataclass of the script's own arguments
    training_arguments: type = TrainingArguments
    without_effect: Sequence[str] = ()  # own arguments that change no scores, or that `data` stands for
    fixed: Mapping[str, tuple[Any, str]] = FIXED  # Trainer's arguments that must have this value, and why
    defaults: Mapping[str, Any] = {}  # of Trainer's arguments, beside `DEFAULTS`
    auto_class: type | None = None  # Auto class of the head
    peft_type: str  # PEFT's name of the task
    start_from: str | None = None  # another task of the command, or a model
    overrides: Mapping[str, Any] = {}  # Trainer's arguments of this task alone
    pairs = False  # whether a classifier takes two texts

    def __init__(
        self,
        setup: Setup,
        name: str,
        metrics: Sequence[str],
        rows: Mapping[str, Dataset],
        sources: Mapping[str, Any],
        inputs: Sequence[str],
        settings: Mapping[str, Any] | None = None,
    ):
        self.setup, self.name, self.rows = setup, name, rows
        self.metrics, self.settings = tuple(metrics), settings or {}
        self.data = {
            split: {"source": redact(sources[split]), "rows": len(part), "fingerprint": fingerprint(part)}
            for split, part in rows.items()
        }
        if "train" in rows:
            check_overlap(rows["train"], rows["validation"], inputs, name)

    @classmethod
    @abstractmethod
    def open(cls, args: Any, tuning: FineTuningArguments, training_args: TrainingArguments) -> Setup:
        """Configuration and tokenizer of the model, once the arguments were checked."""

    @classmethod
    @abstractmethod
    def load(cls, setup: Setup) -> list["Task"]:
        """Reads and checks the rows of the command's tasks."""

    @abstractmethod
    def load_model(self, start: str) -> tuple[Any, list[str]]:
        """A model in float32, and the names of the tensors that its checkpoint lacks."""

    @abstractmethod
    def add_lora(self, model: Any, new: Sequence[str]) -> Any:
        """The model with a LoRA; `new` are the tensors that its checkpoint lacked."""

    def prepare(self, run: TrainingArguments) -> None:  # noqa: B027
        """Encodes the rows, once for all runs, where this is not done batch by batch."""

    @abstractmethod
    def build_trainer(self, model: Any, run: TrainingArguments, scored: bool = False) -> Trainer:
        """A Trainer; `scored`: with scores in its evaluations."""

    @abstractmethod
    def save(self, trainer: Trainer, folder: Path) -> None:
        """Writes the trained model into the run's folder."""

    def saved(self, folder: Path) -> Path:
        """Folder of the trained model."""
        return folder

    @abstractmethod
    def merge(self, trainer: Trainer, model: Any, folder: Path) -> Any:
        """A copy with merged experts, which is saved in the folder `merged`."""

    def encoder(self, model: Any) -> PreTrainedModel:
        """The transformers model inside, whose class and size are reported."""
        return model

    @abstractmethod
    def evaluate(self, model: Any, run: TrainingArguments, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
        """Scores and details of a model on all validation splits; writes its predictions into the folder."""

    @classmethod
    def score_baselines(cls, tasks: Mapping[str, "Task"]) -> dict[str, dict[str, float]]:
        """Scores of baselines without a model, by name, if the command asks for them."""
        return {}

    @classmethod
    def combine(cls, summaries: Mapping[str, dict], tasks: Mapping[str, "Task"]) -> dict[str, Any]:
        """Results of all tasks of the command, from those of each task."""
        (summary,) = summaries.values()
        return summary


class TransformersTask(Task):
    """A task whose model is one of transformers, with a head from an Auto class, trained by its Trainer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.features: dict[str, Dataset] = {}

    @classmethod
    def open(cls, args: Any, tuning: FineTuningArguments, training_args: TrainingArguments) -> Setup:
        config = load_config(tuning, args.model_name_or_path)
        tokenizer = load_tokenizer(args.model_name_or_path, tuning.trust_remote_code)
        if config.model_type == "modernalbert":  # the saved tokenizer says what the model takes
            tokenizer = fit_tokenizer(tokenizer, config)
        check_max_length("max_length", args.max_length, tokenizer, config)
        return Setup(args, tuning, training_args, config, tokenizer)

    def configure(self, config: PreTrainedConfig) -> None:  # noqa: B027
        """Sets what the configuration says about the head, before the model is loaded."""

    @abstractmethod
    def encode(self, rows: Dataset) -> Dataset:
        """Rows as the model takes them."""

    @abstractmethod
    def collate(self, features: Sequence[Mapping]) -> Mapping[str, torch.Tensor]:
        """A padded batch."""

    @abstractmethod
    def assess(self, predictions: Any, labels: Any, split: str) -> tuple[dict, dict, Callable[[], dict[str, str]]]:
        """Scores and details of the outputs for a split, and a function that gives the texts of the prediction files."""

    def load_model(self, start: str) -> tuple[PreTrainedModel, list[str]]:
        tuning = self.setup.tuning
        config = load_config(tuning, start)
        self.configure(config)
        return load_model(self.auto_class, start, config, tuning.trust_remote_code)

    def add_lora(self, model: PreTrainedModel, new: Sequence[str]) -> Any:
        tuning = self.setup.tuning
        return add_lora(model, self.peft_type, new, tuning.peft_rank, tuning.peft_target_modules)

    def build_trainer(self, model: Any, run: TrainingArguments, scored: bool = False) -> Trainer:
        return FineTuningTrainer(
            model=model,
            args=run,
            data_collator=self.collate,
            processing_class=self.setup.tokenizer,
            train_dataset=self.features.get("train"),
            eval_dataset=self.features["validation"],
            compute_metrics=self.score_output if scored else None,
            elastic_depth=self.setup.tuning.elastic_depth,
        )

    def score_output(self, output: Any) -> dict[str, float]:
        """Scores during training."""
        return self.assess(output.predictions, output.label_ids, "validation")[0]

    def prepare(self, run: TrainingArguments) -> None:
        with run.main_process_first():  # the other processes read its tokenised rows from the cache
            self.features = self.features or {split: self.encode(rows) for split, rows in self.rows.items()}
        for split, features in self.features.items():
            if len(features) != len(self.rows[split]):
                self.data[split]["windows"] = len(features)

    def save(self, trainer: Trainer, folder: Path) -> None:
        save_trained(trainer, folder)

    def merge(self, trainer: Trainer, model: Any, folder: Path) -> Any:
        return merge_trained(trainer, model, self.setup.tuning.merge_after)

    def evaluate(self, model: Any, run: TrainingArguments, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
        trainer = self.build_trainer(model, run)
        scores, details = {}, {}
        for split, features in self.features.items():
            if split == "train":
                continue
            output = trainer.predict(features)
            ending = split.removeprefix("validation")
            values, more, write = self.assess(output.predictions, output.label_ids, split)
            scores |= {f"{name}{ending}": value for name, value in values.items()}
            details = {
                "milliseconds_per_row": 1000 * output.metrics["test_runtime"] / len(features),
                **more,
                **details,
            }
            if run.should_save:
                folder.mkdir(exist_ok=True)
                for name, text in write().items():
                    write_text(folder / name, text)
        return scores, details


def check_overlap(train: Dataset, validation: Dataset, inputs: Sequence[str], name: str) -> None:
    """Warns if validation rows are in the training rows.

    Raises:
        ValueError: Both have the same rows.
    """
    if fingerprint(train) == fingerprint(validation):
        raise ValueError(
            f"the train and validation rows of '{name}' are the same: scores on them say nothing; give other files"
        )

    def keys(rows):
        return (json.dumps(values) for values in zip(*(rows[column] for column in inputs), strict=True))

    seen = set(keys(train))
    shared = sum(key in seen for key in keys(validation))
    if shared:
        logger.warning(
            "task '%s': %d of %d validation rows are in the training rows as well; scores on these say little",
            *(name, shared, len(validation)),
        )


def run_task(kind: type[Task], argv: Sequence[str] | None = None, description: str = "") -> dict[str, Any]:
    """Runs all runs that are not finished, and writes `results.json` and `results.md` into `output_dir`; returns the results.

    A run is one task, seed and learning rate. A single run writes into `output_dir` itself. Several runs have folders
    below it (`TASK/seed-N-lr-X`, without `TASK` if there is one task), and `output_dir` has their means.

    Args:
        kind: Class of the tasks.
        argv: Command line; default: the process's own.
        description: Text of `--help`.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped a run, after its checkpoint was written.
        ValueError: Arguments contradict each other, or the data is invalid.
    """
    types = (kind.arguments, FineTuningArguments, kind.training_arguments)
    args, tuning, training_args = parse_arguments(types, argv, {**DEFAULTS, **kind.defaults}, description, kind.fixed)
    check_training(tuning, training_args, args.model_name_or_path, load_config(tuning, args.model_name_or_path))
    setup = kind.open(args, tuning, training_args)
    if not (training_args.do_train or is_adapter(setup.model_name) or is_trained(setup.config, kind)):
        raise ValueError(
            f"'{setup.model_name}' is a {', '.join(setup.config.architectures)}: it was not trained for this task; give "
            "`do_train`"
        )
    with training_args.main_process_first():
        tasks = {task.name: task for task in kind.load(setup)}
    runs = plan(setup, tasks)

    results = defaultdict(list)
    for name, run in runs:
        start = find_start(setup, tasks[name], run, runs, results)
        results[name].append(execute(tasks[name], run, start))
    if len(runs) == 1:
        ((summary,),) = results.values()
    else:
        summaries = {name: summarise(results[name]) for name in tasks}
        summary = kind.combine(summaries, tasks)
    if training_args.should_save:
        if "baselines" not in summary["details"] and (baselines := kind.score_baselines(tasks)):
            summary["details"]["baselines"] = baselines
        root = Path(training_args.output_dir)
        write_json(root / RESULTS_NAME, summary)
        write_text(root / "results.md", to_markdown(summary, {task.name: task.metrics[0] for task in tasks.values()}))
    logger.info("%s", json.dumps({**summary["scores"], **summary["details"].get("baselines", {})}))
    return summary


def is_trained(config: PreTrainedConfig, kind: type[Task]) -> bool:
    """Whether a configuration names a class with the task's head, or none at all."""
    head = kind.auto_class.__name__.removeprefix("AutoModel") if kind.auto_class else ""
    return not config.architectures or any(name.endswith(head) for name in config.architectures)


def plan(setup: Setup, tasks: Mapping[str, Task]) -> list[tuple[str, TrainingArguments]]:
    """Task name and arguments of each run; a run that starts from another task's model comes after that task.

    Raises:
        FileExistsError: `output_dir` holds a single run, and there are several now.
        ValueError: Tasks start from each other's models, or a task lacks the metric that chooses checkpoints.
    """

    def depth(name: str, below: tuple[str, ...] = ()) -> int:
        if name in below:
            raise ValueError(f"the tasks {', '.join(below)} start from each other's models: see `start_from`")
        return 1 + depth(tasks[name].start_from, (*below, name)) if tasks[name].start_from in tasks else 0

    runs = []
    for name in sorted(tasks, key=depth):
        own = copy.copy(setup.training_args)
        choose_metric(own, tasks[name].metrics, name)
        for argument, value in tasks[name].overrides.items():
            setattr(own, argument, value)
        if len(tasks) > 1:
            own.output_dir = str(Path(own.output_dir) / name)
        runs += [(name, run) for run in plan_runs(setup.tuning, own)]
    place_runs([run for _, run in runs], setup.training_args.output_dir)
    return runs


def find_start(setup: Setup, task: Task, run: TrainingArguments, runs: Sequence[tuple], results: Mapping) -> str:
    """Hub name or folder of the model that a run starts from."""
    if task.start_from is None or setup.tuning.peft or not run.do_train:  # an adapter belongs to one base
        return setup.model_name
    if task.start_from not in results:
        return task.start_from
    rate, _ = choose_rate(results[task.start_from])
    (folder,) = (
        other.output_dir
        for name, other in runs
        if (name, other.seed, other.learning_rate) == (task.start_from, run.seed, rate)
    )
    return folder


def execute(task: Task, run: TrainingArguments, start: str) -> dict[str, Any]:
    """Does one run, unless it is finished: trains from the model `start` if asked to, evaluates, writes the folder.

    Returns:
        Content of its `results.json`.
    """
    setup, tuning, folder = task.setup, task.setup.tuning, Path(run.output_dir)
    sources = list(dict.fromkeys([setup.model_name, start]))
    settings = run_settings(
        *(setup.args, tuning, run),
        without=("seeds", "learning_rates", *PEFT * (not tuning.peft), *task.without_effect),
        model_name_or_path=describe_model(setup.model_name),
        start_from=describe_model(start),
        data={split: facts["fingerprint"] for split, facts in task.data.items()},
        **task.settings,
    )
    if (results := start_run(folder, settings, sources)) is not None:
        logger.info("'%s' holds a finished run", folder)
        return results
    logger.info("task %s, seed %d, in '%s'", task.name, run.seed, folder)

    set_seed(run.seed)
    model, new = task.load_model(start)
    if not run.do_train and new:
        raise ValueError(f"'{start}' has no {', '.join(new)}: it was not trained for this task; give `do_train`")
    if tuning.peft:
        model = task.add_lora(model, new)
    task.prepare(run)
    details = {"eval_batch_size": run.eval_batch_size}
    if run.do_train:
        trainer = task.build_trainer(model, run, scored=True)
        fine_tune(trainer, tuning.early_stopping_patience)
        if trainer.state.global_step == 0:
            raise ValueError(
                f"the {len(trainer.train_dataset)} train rows make no batch; leave out `dataloader_drop_last`, or lower "
                "`per_device_train_batch_size`"
            )
        if run.should_save or trainer.is_fsdp_enabled:
            task.save(trainer, folder)
        trainer.accelerator.wait_for_everyone()
        details["steps"] = trainer.state.global_step
        if tuning.peft:  # what is scored is what was saved
            details["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            model, _ = task.load_model(str(task.saved(folder)))

    scores, more = task.evaluate(model, run, folder)
    details |= more
    if tuning.merge_after is not None and getattr(task.encoder(model).config, "has_router", False):
        merged = task.merge(trainer, model, folder)
        figures, more = task.evaluate(merged, run, folder / MERGED_NAME)
        scores |= {f"merged_{name}": value for name, value in figures.items()}
        details |= {f"merged_{name}": value for name, value in more.items()}
        details["merged_parameters"] = task.encoder(merged).num_parameters()
    elif tuning.merge_after is not None:
        logger.info("a %s has no experts: `merge_after` does nothing", task.encoder(model).config.model_type)

    if run.should_save:
        facts = {
            "task": task.name,
            "model_name": setup.model_name,
            "model": task.encoder(model),
            "scores": scores,
            "data": task.data,
            "seed": run.seed,
            "settings": settings,
            "details": details,
        }
        if run.do_train:
            write_finetuned_cards(folder, pairs=task.pairs, **facts)
        write_results(folder, **facts)
    with run.main_process_first(desc="results"):
        return read_json(folder / RESULTS_NAME)
