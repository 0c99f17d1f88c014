"""What the scripts that fine-tune share: arguments, loading, LoRA, the Trainer, one resumable run, merging, tables."""

import copy
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..merging_modernalbert import METHODS, check_mergeable
from ..tokenization import save_tokenizer
from .callbacks import ROUTING_NAME, ConciseProgress, RoutingFrequencies, StopOnSignal
from .export.cards import MERGED_NAME
from .pretraining import routing_statistics
from .reports.merging import read_routing_weights
from .runs import check_output_dir, is_complete, last_checkpoint, same_run, write_files


logger = logging.getLogger(__name__)

# Of ModernALBERT and ModernBERT; a shared block has them once, for all its depths.
TARGET_MODULES = ("Wqkv", "Wi", "Wo")
ADAPTER_NAME = "adapter_config.json"
CALIBRATION_ROWS = 256  # of the training set, for the merging methods that look at text

# Of transformers' arguments, those that scores depend on.
SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "lr_scheduler_type", "warmup_steps", "max_steps"),
    *("num_train_epochs", "bf16", "fp16", "eval_strategy", "eval_steps", "load_best_model_at_end", "seed"),
)


@dataclass
class FineTuningArguments:
    """How a model with a head of its task is fine-tuned, whatever the task."""

    seeds: list[int] = field(default_factory=list, metadata={"help": "One run for each; default: `seed`."})
    learning_rates: list[float] = field(
        default_factory=list, metadata={"help": "One run for each; the best on validation is reported."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better score; the best checkpoint is kept."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the balancing loss, 0 for none; default: the checkpoint's."}
    )
    merge_after: str | None = field(
        default=None, metadata={"help": "Then merge the experts, save that model in `merged`, and score it too."}
    )
    peft: bool = field(default=False, metadata={"help": "Train a LoRA and the head; the output is a PEFT folder."})
    peft_rank: int = field(default=8, metadata={"help": "Rank of the LoRA; its alpha is twice as large."})
    peft_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": f"Default: {', '.join(TARGET_MODULES)} or, in other models, every linear layer."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code from the Hub."})

    def __post_init__(self):
        # "cluster" leaves experts and a router, and has a number of experts to choose.
        methods = [method for method in METHODS if method != "cluster"]
        if self.merge_after is not None and self.merge_after not in methods:
            raise ValueError(
                f"there is no `merge_after` method '{self.merge_after}'; give one of {', '.join(methods)}"
            )
        if self.peft_rank < 1:
            raise ValueError(f"`peft_rank` ({self.peft_rank}) must be at least 1")
        for name in ("max_train_samples", "max_eval_samples", "early_stopping_patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1")
        for name in ("seeds", "learning_rates"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"`{name}` {getattr(self, name)} names a run twice")


def check_training(
    args: FineTuningArguments, training_args: TrainingArguments, name: str, config: PreTrainedConfig
) -> None:
    """Sees, before any work, that the arguments go together, and with the model of that name or folder.

    Raises:
        ValueError: They do not.
    """
    if training_args.n_gpu > 1:
        raise ValueError(
            f"{training_args.n_gpu} GPUs are visible to one process; start one process for each, with `torchrun "
            f"--nproc_per_node {training_args.n_gpu} ...`"
        )
    if training_args.push_to_hub:
        raise ValueError(
            "`push_to_hub` would upload checkpoints as well; upload what the finished folder holds beside them, with `hf "
            "upload --exclude 'checkpoint-*'`, or the merged model with scripts/merge_experts.py"
        )
    if training_args.do_train and (Path(name) / ADAPTER_NAME).is_file():
        raise ValueError(f"'{name}' is a LoRA: fine-tune the model that it belongs to, or leave out `do_train`")
    if not training_args.do_train:
        for argument in ("seeds", "learning_rates", "peft", "merge_after", "early_stopping_patience"):
            if getattr(args, argument):
                raise ValueError(f"`{argument}` is for training: give `do_train`, or leave it out")
    if args.merge_after is not None and getattr(config, "has_router", False):
        check_mergeable(config, text=METHODS[args.merge_after][1] == "text")
    if getattr(config, "has_router", False) and training_args.label_smoothing_factor > 0:
        raise ValueError(
            f"`label_smoothing_factor` ({training_args.label_smoothing_factor}) takes the labels from the model, and "
            "with them the balancing loss of its router; leave it out"
        )
    if args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        raise ValueError(
            "`early_stopping_patience` needs evaluations and the best checkpoint: give `load_best_model_at_end true`, "
            "with `eval_strategy` and `save_strategy` both `epoch` or both `steps`"
        )


def check_max_length(name: str, length: int, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Sees that inputs of so many tokens fit the model.

    Args:
        name: Of the argument, for the message.
        length: Its value.
        tokenizer: Its limit is the lower one where a model has positions that it does not use.
        config: Of the model.

    Raises:
        ValueError: They do not.
    """
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", length))
    if not 1 <= length <= longest:
        raise ValueError(
            f"`{name}` ({length}) must be at least 1, and at most the {longest} tokens that the model takes"
        )


def plan_runs(args: FineTuningArguments, training_args: TrainingArguments) -> list[TrainingArguments]:
    """Arguments of one run for each seed and learning rate, each with a folder of its own in `output_dir`."""
    runs = []
    for seed in args.seeds or [training_args.seed]:
        for rate in args.learning_rates or [training_args.learning_rate]:
            run = copy.copy(training_args)
            run.seed, run.learning_rate = seed, rate
            run.output_dir = str(Path(training_args.output_dir) / f"seed-{seed}-lr-{rate:g}")
            runs.append(run)
    return runs


def place_runs(runs: Sequence[TrainingArguments], root: str | Path) -> None:
    """A single run writes into the root itself.

    Raises:
        FileExistsError: The root holds a single run, and there are several now.
    """
    if len(runs) == 1:
        runs[0].output_dir = str(root)
    elif (Path(root) / "arguments.json").exists():
        raise FileExistsError(f"'{root}' holds a single run; choose another `output_dir` for {len(runs)} runs")


def load_model(
    auto_class: type, name: str, config: PreTrainedConfig, trust_remote_code: bool
) -> tuple[PreTrainedModel | PeftModel, list[str]]:
    """A model in float32, whatever its checkpoint holds, and the names of the tensors that the checkpoint lacks.

    The head of another task counts as lacking.

    Args:
        auto_class: Auto class of the head.
        name: Hub name or folder, of a model or of a LoRA that [`fine_tune`] wrote.
        config: With the fields of the head.
        trust_remote_code: Whether the model may run its own code from the Hub.
    """
    adapted = (Path(name) / ADAPTER_NAME).is_file()
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if adapted else name
    model, info = auto_class.from_pretrained(
        base,
        config=copy.deepcopy(config),
        dtype="float32",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if adapted:
        return PeftModel.from_pretrained(model, name), []
    mismatched = [key[0] for key in info["mismatched_keys"]]
    return model, sorted({*info["missing_keys"], *mismatched})


def load_config(args: FineTuningArguments, name: str) -> PreTrainedConfig:
    """Configuration of a model, or of a LoRA that [`fine_tune`] wrote, with the weight of the balancing loss."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if args.router_aux_loss_coef is not None:
        if getattr(config, "has_router", False):
            config.router_aux_loss_coef = args.router_aux_loss_coef
        else:
            logger.info("a %s has no router: `router_aux_loss_coef` does nothing", config.model_type)
    return config


def add_lora(
    model: PreTrainedModel, task_type: str, fresh: Iterable[str], rank: int, target_modules: Sequence[str] = ()
) -> PeftModel:
    """A LoRA on the encoder; the head, and what else starts at random, is trained and saved whole.

    Args:
        model: With the head of its task.
        task_type: PEFT's name of it, for example `"SEQ_CLS"`.
        fresh: Names of the tensors that the checkpoint lacked.
        rank: Of the LoRA.
        target_modules: Last parts of the names of the layers to adapt; see `FineTuningArguments`.
    """
    heads = {
        name
        for name, child in model.named_children()
        if child is not model.base_model and next(child.parameters(), None) is not None
    }
    inner = {name.rpartition(".")[0] for name in fresh if name.split(".")[0] not in heads}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] not in heads and name not in inner
    ]
    if not target_modules:
        named = {name.rpartition(".")[-1] for name in linear}
        target_modules = TARGET_MODULES if named.issuperset(TARGET_MODULES) else linear
    lora = LoraConfig(
        task_type=task_type,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(target_modules),
        modules_to_save=sorted(heads | inner),
    )
    return get_peft_model(model, lora)


class FineTuningTrainer(Trainer):
    """Trainer that logs, of a model with a router, the balancing loss and how tokens were routed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.routed = getattr(self.model.config, "has_router", False)
        self.terms = defaultdict(float)
        self.batches = 0
        if self.routed:
            self.add_callback(RoutingFrequencies())
            if not self.args.disable_tqdm:
                self.remove_callback(ProgressCallback)
                self.add_callback(ConciseProgress())

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if not (self.routed and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        config = self.model.config
        groups = sorted(config.mol_groups)
        with torch.no_grad():
            load, entropy = routing_statistics(outputs["router_logits"], config, inputs["attention_mask"])
        self.batches += 1
        self.terms["aux_loss"] += outputs["aux_loss"].detach()
        for group, shares, value in zip(groups, load, entropy, strict=True):
            self.terms[f"router_entropy/group_{group}"] += value
            for expert, share in enumerate(shares):
                self.terms[f"expert_load/group_{group}/expert_{expert}"] += share
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.batches:
            means = self.accelerator.reduce(torch.stack(list(self.terms.values())), "mean") / self.batches
            logs.update(zip(self.terms, means.tolist(), strict=True))
            self.terms.clear()
            self.batches = 0
        super().log(logs, start_time)


def describe_run(args: FineTuningArguments, training_args: TrainingArguments, **others) -> dict[str, Any]:
    """What the scores of one run depend on."""
    names = ("max_train_samples", "max_eval_samples", "early_stopping_patience", "router_aux_loss_coef", "merge_after")
    names += ("peft", "peft_rank", "peft_target_modules") if args.peft else ("peft",)
    trained = {name: getattr(training_args, name) for name in SETTINGS} if training_args.do_train else {}
    settings = {**others, **{name: getattr(args, name) for name in names}, **trained}
    return json.loads(json.dumps(settings, default=str))


def fine_tune(
    trainer: FineTuningTrainer, settings: dict[str, Any], patience: int | None = None, metric: str = "loss"
) -> None:
    """Trains from where the run was stopped, if it was, and writes the model into the run's folder.

    Args:
        trainer: Its arguments name the folder.
        settings: See [`describe_run`]; a checkpoint made with others is refused.
        patience: Evaluations without a better score before training stops.
        metric: Score, of the evaluation, that chooses the best checkpoint where one is chosen; more is better.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped the run, after its checkpoint was written.
        ValueError: The folder has checkpoints of a run with other settings.
    """
    args = trainer.args
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    # A checkpoint is the weights and AdamW's two moments; one more is written before an old one is removed.
    checkpoints = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    folder = check_output_dir(args.output_dir, (3 * checkpoints + 1) * 4 * trained)
    same_run(folder, settings)
    if args.load_best_model_at_end:
        args.metric_for_best_model, args.greater_is_better = metric, metric != "loss"
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
        args.restore_callback_states_from_checkpoint = True  # how often the score did not improve
    train_to_the_end(trainer, patience)

    def write(draft: Path) -> None:
        trainer.save_model(str(draft))
        (draft / "training_args.bin").unlink(missing_ok=True)  # a pickle, with the paths of this machine
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's template, without a fact in it
        write_tokenizer(trainer.processing_class, draft)
        trainer.state.best_model_checkpoint = None  # a path of this machine
        trainer.state.save_to_json(str(draft / TRAINER_STATE_NAME))  # the log
        if isinstance(trainer.model, PeftModel):  # an adapter does not say how many classes its base has
            trainer.model.config.save_pretrained(draft)

    if args.should_save or trainer.is_fsdp_enabled:
        write_files(folder, write)
    trainer.accelerator.wait_for_everyone()


def train_to_the_end(trainer: Trainer, patience: int | None = None) -> None:
    """Trains from the last complete checkpoint on, if there is one, to the last step or the early stop.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped the run, after its checkpoint was written.
    """
    args = trainer.args
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    checkpoint = last_checkpoint(args.output_dir)
    if checkpoint is not None and is_complete(checkpoint, 0, patience):
        args.num_train_epochs, args.max_steps = 0, -1  # Trainer would take one step more
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if stop.stopped:
        logger.warning("stopped at step %d; the same command goes on from there", trainer.state.global_step)
        sys.exit(130)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer without the truncation and padding that the run set in it."""
    if type(tokenizer) is PreTrainedTokenizerFast:  # the class that transformers 4 does not know by its new name
        save_tokenizer(tokenizer, folder)
        return
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def merge_trained(trainer: FineTuningTrainer, model: PreTrainedModel | PeftModel, method: str) -> PreTrainedModel:
    """A copy of a trained model without routing, which is saved in the folder `merged` of the run.

    A LoRA is folded into the shared weights first. Methods that look at how text is routed see training rows.
    """
    merged = copy.deepcopy(model).eval()
    if isinstance(merged, PeftModel):
        merged = merged.merge_and_unload()
    folder, source = Path(trainer.args.output_dir), METHODS[method][1]
    weights = read_routing_weights(folder / ROUTING_NAME, merged.config) if source == "given" else None
    batches = None
    if source == "text":
        size, rows = trainer.args.eval_batch_size, trainer.train_dataset
        rows = [rows[index] for index in range(min(CALIBRATION_ROWS, len(rows)))]
        batches = [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        names = ("input_ids", "attention_mask")
        batches = [{name: batch[name].to(merged.device) for name in names} for batch in batches]
    merged.merge_experts(method, weights=weights, batches=batches)

    def write(draft: Path) -> None:
        merged.save_pretrained(draft)
        write_tokenizer(trainer.processing_class, draft)

    if trainer.args.should_save:
        (folder / MERGED_NAME).mkdir(exist_ok=True)
        write_files(folder / MERGED_NAME, write)
    return merged


def format_markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_score(mean: float | None, std: float | None = None) -> str:
    """`91.3 ± 0.4`, in percent."""
    if mean is None:
        return ""
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")
