"""Fine-tuning, for all task scripts: arguments, runs, LoRA, Trainer, merging afterwards."""

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, SchedulerType

from ..merging_modernalbert import METHODS, check_mergeable
from ..tokenization import save_tokenizer
from . import loading
from .callbacks import ROUTING_NAME, read_routing_weights
from .cli import Bounds, Count, NotNegative, Positive, Seed
from .export.cards import MERGED_NAME
from .loading import is_adapter
from .packing import collate_batches
from .runs import bytes_of_run, check_output_dir, write_files
from .trainer import TrainerMixin, depth_loss, draw_depth, labelled_share, set_elastic, train_to_the_end


logger = logging.getLogger(__name__)

# Linear layers of ModernALBERT and ModernBERT; a shared block has them once, for all its depths.
TARGET_MODULES = ("Wqkv", "Wi", "Wo")
CALIBRATION_ROWS = 256  # of the training set, for merging methods that need calibration text

Rank = Annotated[int, Bounds(least=1, most=4096)]

# Arguments of Trainer that must have this value, and why.
FIXED = {
    "prediction_loss_only": (False, "scores need predictions"),
    "dataloader_drop_last": (False, "evaluations would leave rows out"),
    "label_names": (None, "the task knows its labels"),
}


@dataclass
class FineTuningArguments:
    """How a model with a head of its task is fine-tuned, whatever the task."""

    seeds: list[Seed] = field(default_factory=list, metadata={"help": "One run for each; default: `seed`."})
    learning_rates: list[Positive] = field(
        default_factory=list, metadata={"help": "One run for each; the best on validation is reported."}
    )
    early_stopping_patience: Count | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better score; the best checkpoint is kept."},
    )
    max_train_samples: Count | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: Count | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    router_aux_loss_coef: NotNegative | None = field(
        default=None, metadata={"help": "Weight of the balancing loss, 0 for none; default: the checkpoint's."}
    )
    num_hidden_layers: Count | None = field(
        default=None, metadata={"help": "Layers of a ModernALBERT to run, a multiple of its groups; default: all."}
    )
    elastic_depth: bool = field(
        default=False,
        metadata={"help": "Train smaller depths beside the full one, so that the model may be run at them."},
    )
    merge_after: str | None = field(
        default=None, metadata={"help": "Then merge the experts, save that model in `merged`, and score it too."}
    )
    peft: bool = field(default=False, metadata={"help": "Train a LoRA and the head; the output is a PEFT folder."})
    peft_rank: Rank = field(default=8, metadata={"help": "Rank of the LoRA; its alpha is twice as large."})
    peft_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": f"Default: {', '.join(TARGET_MODULES)} or, in other models, `all-linear`."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code from the Hub."})

    def __post_init__(self):
        # "cluster" leaves experts and a router, and has a number of experts to choose.
        methods = [method for method in METHODS if method != "cluster"]
        if self.merge_after is not None and self.merge_after not in methods:
            raise ValueError(
                f"there is no `merge_after` method '{self.merge_after}'; give one of {', '.join(methods)}"
            )
        for name in ("seeds", "learning_rates"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"`{name}` {getattr(self, name)} names a run twice")


def check_training(
    args: FineTuningArguments, training_args: TrainingArguments, name: str, config: PreTrainedConfig
) -> None:
    """Checks, before any work, that the arguments fit each other and the model.

    Raises:
        ValueError: They do not.
    """
    if training_args.do_train and is_adapter(name):
        raise ValueError(f"'{name}' is a LoRA: fine-tune the model that it belongs to, or leave out `do_train`")
    if not training_args.do_train:
        for argument in ("seeds", "learning_rates", "peft", "elastic_depth", "merge_after", "early_stopping_patience"):
            if getattr(args, argument):
                raise ValueError(f"`{argument}` is for training: give `do_train`, or leave it out")
    if args.merge_after is not None and getattr(config, "has_router", False):
        check_mergeable(config, text=METHODS[args.merge_after].source == "text")
    if args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        raise ValueError(
            "`early_stopping_patience` needs evaluations and the best checkpoint: give `load_best_model_at_end true`, "
            "with `eval_strategy` and `save_strategy` both `epoch` or both `steps`"
        )


def check_max_length(name: str, length: int, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Checks that inputs of a length fit the model.

    Args:
        name: Name of the argument, for the message.
        length: Value of the argument.
        tokenizer: Tokenizer of the model; its limit is lower where a model has positions that it does not use.
        config: Configuration of the model.

    Raises:
        ValueError: They do not.
    """
    shortest = tokenizer.num_special_tokens_to_add(pair=True) + 1
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", length))
    if not shortest <= length <= longest:
        raise ValueError(
            f"`{name}` ({length}) must be at least {shortest}, and at most the {longest} tokens that the model takes"
        )


def plan_runs(args: FineTuningArguments, training_args: TrainingArguments) -> list[TrainingArguments]:
    """Arguments of one run per seed and learning rate, each with its own folder in `output_dir`."""
    runs = []
    for seed in args.seeds or [training_args.seed]:
        for rate in args.learning_rates or [training_args.learning_rate]:
            run = copy.copy(training_args)
            run.seed, run.learning_rate = seed, rate
            run.output_dir = str(Path(training_args.output_dir) / f"seed-{seed}-lr-{rate!r}")
            runs.append(run)
    return runs


def place_runs(runs: Sequence[TrainingArguments], root: str | Path) -> None:
    """Lets a single run write into the root itself.

    Raises:
        FileExistsError: The root holds a single run, and there are several now.
    """
    if len(runs) == 1:
        runs[0].output_dir = str(root)
    elif (Path(root) / "arguments.json").exists():
        raise FileExistsError(f"'{root}' holds a single run; choose another `output_dir` for {len(runs)} runs")


def load_config(args: FineTuningArguments, name: str) -> PreTrainedConfig:
    """Configuration of a model, or of a LoRA that [`fine_tune`] wrote, with the depth and the weight of the balancing loss.

    Raises:
        ValueError: The model has no such depth, or no smaller ones to train.
    """
    config = loading.load_config(name, args.trust_remote_code)
    if args.num_hidden_layers is not None:
        if config.model_type != "modernalbert":
            raise ValueError(
                f"`num_hidden_layers` is for a ModernALBERT, whose groups share weights; '{name}' is a {config.model_type}"
            )
        config = config.at_depth(args.num_hidden_layers)
    set_elastic(config, args.elastic_depth)
    if args.router_aux_loss_coef is not None:
        if getattr(config, "has_router", False):
            config.router_aux_loss_coef = args.router_aux_loss_coef
        else:
            logger.info("a %s has no router: `router_aux_loss_coef` does nothing", config.model_type)
    return config


def make_lora(
    model: PreTrainedModel, task_type: str, new: Iterable[str], rank: int, target_modules: Sequence[str] = ()
) -> LoraConfig:
    """A LoRA on the encoder; the head and other randomly initialised modules are trained and saved in full.

    Args:
        model: Model with the head of its task, or an encoder alone.
        task_type: PEFT's name of the task, for example `"SEQ_CLS"`.
        new: Names of the tensors that the checkpoint lacked.
        rank: Rank of the LoRA.
        target_modules: Last parts of the names of the layers to adapt, or `all-linear`; see `FineTuningArguments`.
    """
    heads = {
        name
        for name, child in model.named_children()
        if model.base_model not in (child, model) and next(child.parameters(), None) is not None
    }
    inner = {name.rpartition(".")[0] for name in new if name.split(".")[0] not in heads}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] not in heads and name not in inner
    ]
    if not target_modules:
        named = {name.rpartition(".")[-1] for name in linear}
        target_modules = TARGET_MODULES if named.issuperset(TARGET_MODULES) else linear
    elif list(target_modules) == ["all-linear"]:
        target_modules = linear
    return LoraConfig(
        task_type=task_type,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(target_modules),
        modules_to_save=sorted(heads | inner) or None,
    )


def add_lora(model: PreTrainedModel, *args, **kwargs) -> PeftModel:
    """The model with the LoRA of [`make_lora`]."""
    return get_peft_model(model, make_lora(model, *args, **kwargs))


class FineTuningTrainer(TrainerMixin, Trainer):
    """Trainer of a model with the head of a task.

    Args:
        elastic_depth: Whether each step runs a smaller depth as well, drawn for the step, which learns the outputs of
            the full one: the KL divergence of the logits of each labelled item, of values the squared difference.
        **kwargs: As for `Trainer`.
    """

    def __init__(self, *args, elastic_depth: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.elastic_depth = elastic_depth

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch, **kwargs)
        if self.elastic_depth and self.model.training:
            config = self.model.config
            depth = draw_depth(config, self.args.seed, self.state.global_step)
            features = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
            smaller = model(**features, output_router_logits=self.routed, num_hidden_layers=depth)
            labels = inputs.get("labels")
            term = depth_loss(smaller, outputs, labels, num_items_in_batch, config.problem_type == "regression")
            self.record("depth_loss", term)
            if self.routed:
                share = labelled_share(labels, num_items_in_batch)
                term = term + config.router_aux_loss_coef * share * smaller.aux_loss
            loss = loss + self.loss_scale(num_items_in_batch) * term
        return (loss, outputs) if return_outputs else loss


def choose_metric(training_args: TrainingArguments, metrics: Sequence[str], task: str) -> None:
    """Sets the score that chooses the best checkpoint: `metric_for_best_model`, or the main score if that is empty.

    Args:
        training_args: Arguments of Trainer, changed in place.
        metrics: Scores of the task, the main one first; larger is better.
        task: Name of the task, for messages.

    Raises:
        ValueError: The task has no such score, or the arguments would minimise it.
    """
    asked = (training_args.metric_for_best_model or "").removeprefix("eval_")
    if asked not in ("", "loss", *metrics):
        raise ValueError(
            f"`metric_for_best_model` ({asked}) is no score of task '{task}'; give one of {', '.join(metrics)}, or loss"
        )
    plateau = training_args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    best = training_args.load_best_model_at_end or training_args.save_strategy == SaveStrategy.BEST
    chosen = asked or ("loss" if plateau and not best else metrics[0])
    if plateau and (training_args.lr_scheduler_kwargs or {}).get("mode", "min") != (
        "min" if chosen == "loss" else "max"
    ):
        raise ValueError(
            f"`reduce_lr_on_plateau` would look for a small '{chosen}': give `metric_for_best_model loss`, or "
            '`lr_scheduler_kwargs \'{"mode": "max"}\'`'
        )
    if plateau and not asked and training_args.greater_is_better:
        training_args.greater_is_better = None  # what transformers makes of a metric without a name
    if training_args.greater_is_better is not None and training_args.greater_is_better == (chosen == "loss"):
        raise ValueError(
            f"`greater_is_better` ({training_args.greater_is_better}) is wrong for `metric_for_best_model` '{chosen}'; "
            "leave it out"
        )
    needed = asked or best or plateau
    training_args.metric_for_best_model = chosen if needed else None
    training_args.greater_is_better = chosen != "loss" if needed else None


def fine_tune(trainer: Trainer, patience: int | None = None) -> None:
    """Trains, or resumes a stopped run.

    Args:
        trainer: Trainer of the run.
        patience: Evaluations without a better score before training stops.

    Raises:
        OSError: There is too little space.
        NotFiniteError: Training diverged.
        SystemExit: Ctrl-C or SIGTERM stopped the run, after its checkpoint was written.
        ValueError: There are damaged checkpoints and no complete one.
    """
    args = trainer.args
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    check_output_dir(args.output_dir, bytes_of_run(args, trained))
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
        args.restore_callback_states_from_checkpoint = True  # the count of evaluations without a better score
    train_to_the_end(trainer, patience)


def save_trained(trainer: Trainer, folder: Path) -> None:
    """Writes a trained transformers model or its LoRA, its tokenizer and its log into a folder."""

    def write(draft: Path) -> None:
        trainer.save_model(str(draft))
        (draft / "training_args.bin").unlink(missing_ok=True)  # a pickle, with local paths
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's empty template
        write_tokenizer(trainer.processing_class, draft)
        trainer.state.best_model_checkpoint = None  # a local path
        trainer.state.save_to_json(str(draft / TRAINER_STATE_NAME))  # the log
        if isinstance(trainer.model, PeftModel):  # adapter_config.json lacks the number of classes
            trainer.model.config.save_pretrained(draft)

    write_files(folder, write)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer without the truncation and padding of the run."""
    if type(tokenizer) is PreTrainedTokenizerFast:  # transformers 4 does not know the new name of this class
        save_tokenizer(tokenizer, folder)
        return
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def merge_trained(trainer: FineTuningTrainer, model: PreTrainedModel | PeftModel, method: str) -> PreTrainedModel:
    """A copy of a trained model with merged experts, saved in the folder `merged` of the run.

    A LoRA is folded into the shared weights first. Calibration text is taken from the training rows.
    """
    merged = copy.deepcopy(model).eval()
    if isinstance(merged, PeftModel):
        merged = merged.merge_and_unload()
    folder, source = Path(trainer.args.output_dir), METHODS[method].source
    weights = read_routing_weights(folder / ROUTING_NAME, merged.config) if source == "given" else None
    batches = None
    if source == "text":
        rows = trainer.train_dataset.select(range(min(CALIBRATION_ROWS, len(trainer.train_dataset))))
        batches = [
            {name: batch[name].to(merged.device) for name in ("input_ids", "attention_mask")}
            for batch in collate_batches(rows, trainer.data_collator, trainer.args.eval_batch_size)
        ]
    merged.merge_experts(method, weights=weights, batches=batches)

    def write(draft: Path) -> None:
        merged.save_pretrained(draft)
        write_tokenizer(trainer.processing_class, draft)

    if trainer.args.should_save:
        (folder / MERGED_NAME).mkdir(exist_ok=True)
        write_files(folder / MERGED_NAME, write)
    return merged
