"""Pretrains ModernALBERT with masked-language modelling, with or without a teacher.

`tiny`, initialised by `scripts/init_from_teacher.py` and distilled from the same teacher, by the recipe of that size:

    torchrun --nproc_per_node 8 scripts/pretrain.py --config recipes/tiny.yaml --output_dir runs/tiny

`nano` on a CPU within a minute, on whatever text is at hand (the tokenizer is that of `scripts/train_tokenizer.py`):

    python scripts/pretrain.py --preset nano --tokenizer tokenizer-tiny --train_data "*.md" --validation_data README.md \
        --max_length 128 --output_dir runs/nano --per_device_train_batch_size 16 --learning_rate 1e-3 --max_steps 50

The same command goes on where a run was stopped: at the last checkpoint, which Ctrl-C writes as well. A ModernBERT is
pretrained in the same way, from its `config.json` (`--config_name`): a teacher, or a baseline.
"""

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    SchedulerType,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM
from modernalbert.tokenization import load_tokenizer, padded_vocab_size, save_tokenizer
from modernalbert.training.callbacks import ConciseProgress, ReportWriter, RoutingFrequencies, StopOnSignal
from modernalbert.training.cli import parse_arguments
from modernalbert.training.data import PackedCollator, TokenMasker, load_texts, mask_rows, name_sources, pack_texts
from modernalbert.training.distillation import Distiller
from modernalbert.training.export.cards import PretrainingFacts, clean, environment, write_card
from modernalbert.training.pretraining import PretrainingTrainer
from modernalbert.training.runs import (
    RESULTS_NAME,
    check_output_dir,
    is_complete,
    last_checkpoint,
    same_run,
    write_files,
    write_text,
)


logger = logging.getLogger(__name__)

# Where our defaults differ from transformers'. Betas and schedule are ModernBERT's.
DEFAULTS = {
    "lr_scheduler_type": "warmup_stable_decay",
    "adam_beta2": 0.98,
    "warmup_steps": 0.1,
    "logging_steps": 50,
    "save_total_limit": 2,
}


# Of transformers' arguments, those that a model card repeats.
RECIPE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "warmup_steps", "max_steps", "num_train_epochs"),
    *("bf16", "seed"),
)


@dataclass
class PretrainingArguments:
    """Which model, on which texts, with which losses."""

    tokenizer: str = field(metadata={"help": "Hub name or folder of the tokenizer."})
    train_data: list[str] = field(
        metadata={"help": "Texts to train on: local files or globs, or data sets of the Hub, `name` or `name:config`."}
    )
    preset: str | None = field(default=None, metadata={"help": "New model: nano, tiny, medium, base or large."})
    config_name: str | None = field(
        default=None,
        metadata={"help": "New model: folder or Hub name with a config.json, ModernALBERT or ModernBERT."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to train further, with its weights."}
    )
    config_overrides: str = field(default="{}", metadata={"help": "Fields of the configuration to change, as JSON."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa (default), flash_attention_2, ..."})
    validation_data: list[str] = field(
        default_factory=list, metadata={"help": "Texts to evaluate on, each with a loss of its own."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Packed rows of each validation source to evaluate on; default: all."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of Hub data sets to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split of Hub data sets to evaluate on."})
    mixing_weights: list[float] = field(
        default_factory=list, metadata={"help": "Share of each item of `train_data`; default: all texts once."}
    )
    streaming: bool = field(default=False, metadata={"help": "Tokenise `train_data` while training, not before."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a packed row."})
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of tokens that is masked (ModernBERT's)."})
    teacher: str | None = field(default=None, metadata={"help": "ModernBERT to distil from: Hub name or folder."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the distilled logits."})
    hidden_loss: str = field(default="cosine", metadata={"help": "Distance of hidden states: cosine or mse."})
    mlm_weight: float = field(default=1.0, metadata={"help": "Weight of the masked-LM loss."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the distilled logits."})
    hidden_weight: float = field(default=1.0, metadata={"help": "Weight of the distilled hidden states."})
    decay_steps: float = field(
        default=0.1, metadata={"help": "Last steps, in which the learning rate falls; below 1: a share of the run."}
    )
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, for the model card."})

    def __post_init__(self):
        starts = (self.preset, self.config_name, self.model_name_or_path)
        if sum(start is not None for start in starts) != 1:
            raise ValueError("give exactly one of `preset`, `config_name` and `model_name_or_path`")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"`mlm_probability` ({self.mlm_probability}) must be between 0 and 1")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` ({self.temperature}) must be positive")


def build_model(args: PretrainingArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model, with the tokenizer's vocabulary and special tokens, or a trained one, in float32.

    Raises:
        ValueError: The preset is unknown, the vocabulary is smaller than the tokenizer's, or rows are longer than the
            model takes.
    """
    shared = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    overrides = json.loads(args.config_overrides)
    if args.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **overrides)
    else:
        overrides = {
            "vocab_size": padded_vocab_size(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            **overrides,
        }
        if args.preset is not None:
            config = ModernAlbertConfig.preset(args.preset, **overrides)
        else:
            config = AutoConfig.from_pretrained(args.config_name, **overrides)
    if args.max_length > config.max_position_embeddings:
        raise ValueError(
            f"`max_length` ({args.max_length}) exceeds the model's `max_position_embeddings` "
            f"({config.max_position_embeddings}); lower it, or raise the other in `config_overrides`"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; is it the model's own?"
        )
    if args.model_name_or_path is not None:
        model = AutoModelForMaskedLM.from_pretrained(args.model_name_or_path, config=config, dtype="float32", **shared)
    else:
        model = AutoModelForMaskedLM.from_config(config, **shared)
    # The head needs to run at masked positions only, here and in no later use of the model.
    set_sparse_prediction(model, True)
    return model


def set_sparse_prediction(model: PreTrainedModel, sparse: bool) -> None:
    """Whether the head runs at labelled positions only, for ModernALBERT and ModernBERT."""
    model.config.sparse_prediction = sparse
    if hasattr(model, "sparse_prediction"):  # ModernBERT keeps a copy
        model.sparse_prediction = sparse


def load_teacher(args: PretrainingArguments, tokenizer: PreTrainedTokenizerBase, half: bool) -> PreTrainedModel:
    """The teacher: in bfloat16 where training is, else in the precision of its checkpoint.

    Raises:
        ValueError: It was trained with another tokenizer.
    """
    if AutoTokenizer.from_pretrained(args.teacher).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"'{args.teacher}' has another tokenizer than '{args.tokenizer}'; use the teacher's")
    return AutoModelForMaskedLM.from_pretrained(args.teacher, dtype="bfloat16" if half else "auto")


def load_rows(args: PretrainingArguments, training_args: TrainingArguments, tokenizer) -> tuple:
    """Packed rows to train on, and masked rows to evaluate on, by the name of their source.

    Raises:
        ValueError: There are fewer rows than a step takes; and what `load_texts` and `pack_texts` raise.
    """
    packing = {"max_length": args.max_length, "text_column": args.text_column}
    with training_args.main_process_first():  # the others find what it tokenised in the cache
        texts = load_texts(
            args.train_data,
            args.train_split,
            args.text_column,
            args.streaming,
            args.mixing_weights,
            training_args.seed,
        )
        rows = pack_texts(texts, tokenizer, **packing, num_proc=args.preprocessing_num_workers)
        masker = TokenMasker(tokenizer, args.mlm_probability, training_args.seed)
        validation = {}
        for source, name in name_sources(args.validation_data).items():
            texts = load_texts([source], args.validation_split, args.text_column)
            packed = pack_texts(texts, tokenizer, **packing)
            if args.max_eval_samples is not None:
                packed = packed.select(range(min(args.max_eval_samples, len(packed))))
            validation[name] = mask_rows(packed, masker)
    if isinstance(rows, Dataset):
        batch = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
        if len(rows) < batch:
            raise ValueError(
                f"the texts fill {len(rows)} rows of {args.max_length} tokens, fewer than the {batch} of a step; give "
                "more texts, or lower `max_length` or the batch size"
            )
    elif training_args.max_steps <= 0:
        raise ValueError("a stream has no length: give `max_steps`")
    return rows, validation, masker


def main(argv: Sequence[str] | None = None) -> dict:
    """Trains, and writes model, tokenizer, card, report and `results.json` into `output_dir`; returns the results.

    A run that was stopped goes on from its last complete checkpoint when the same command is given again.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped the run, after its checkpoint was written.
    """
    args, training_args = parse_arguments((PretrainingArguments, TrainingArguments), argv, DEFAULTS, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if training_args.n_gpu > 1:
        raise ValueError(
            f"{training_args.n_gpu} GPUs are visible to one process; start one process for each, with `torchrun "
            f"--nproc_per_node {training_args.n_gpu} scripts/pretrain.py ...`"
        )
    check_output_dir(training_args.output_dir)
    same_run(training_args.output_dir, {**asdict(args), "seed": training_args.seed})
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(args.tokenizer)
    model = build_model(args, tokenizer)
    # A checkpoint is the weights and AdamW's two moments; one more is written before an old one is removed.
    checkpoints = 0 if training_args.save_strategy == "no" else (training_args.save_total_limit or 1) + 1
    check_output_dir(training_args.output_dir, (3 * checkpoints + 1) * 4 * model.num_parameters())
    distiller = None
    if args.teacher is not None:
        teacher = load_teacher(args, tokenizer, training_args.bf16)
        distiller = Distiller(teacher, model, args.temperature, args.hidden_loss)
        logger.info("hidden states after layers %s (student, teacher) are matched", distiller.layer_map)
    rows, validation, masker = load_rows(args, training_args, tokenizer)
    count = f"{len(rows)} packed rows" if isinstance(rows, Dataset) else "a stream of packed rows"
    logger.info("%s: %.1fM parameters, %s", model.config.model_type, model.num_parameters() / 1e6, count)

    checkpoint = last_checkpoint(training_args.output_dir)
    training_args.eval_on_start = bool(validation) and checkpoint is None
    training_args.prediction_loss_only = True
    training_args.remove_unused_columns = False
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        data_collator=PackedCollator(tokenizer, args.max_length),
        train_dataset=rows,
        eval_dataset=validation if len(validation) > 1 else next(iter(validation.values()), None),
        processing_class=tokenizer,
        masker=masker,
        distiller=distiller,
        mlm_weight=args.mlm_weight,
        kl_weight=args.kl_weight,
        hidden_weight=args.hidden_weight,
        decay_steps=args.decay_steps,
    )
    stop = StopOnSignal(trainer.accelerator)
    title = f"Pretraining of {Path(training_args.output_dir).name}"
    trainer.add_callback(stop)
    trainer.add_callback(ReportWriter(title, describe(args, training_args, model)))
    if getattr(model.config, "has_router", False):
        trainer.add_callback(RoutingFrequencies())
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ConciseProgress())

    try:
        # Of a finished run Trainer would take one step more.
        if checkpoint is not None and is_complete(checkpoint, training_args.max_steps):
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            trainer._load_from_checkpoint(str(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except BaseException:
        if training_args.should_save and (checkpoint := last_checkpoint(training_args.output_dir)) is not None:
            logger.error("training broke off; the same command goes on from '%s'", checkpoint.name)
        raise
    if stop.stopped:
        logger.warning("stopped at step %d; the same command goes on from there", trainer.state.global_step)
        sys.exit(130)
    if validation and not just_evaluated(trainer):
        trainer.evaluate()
    results = summarise(trainer, model)

    def write(folder: Path) -> None:
        set_sparse_prediction(model, False)
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, with the paths of this machine
        save_tokenizer(tokenizer, folder)
        if isinstance(model, ModernAlbertForMaskedLM):
            write_card(folder, card_facts(args, training_args, model, results))

    folder = Path(training_args.output_dir)
    if trainer.is_fsdp_enabled or training_args.should_save:
        write_files(folder, write)
    if training_args.should_save:
        write_text(folder / RESULTS_NAME, json.dumps(results, indent=1))
    return results


def just_evaluated(trainer: PretrainingTrainer) -> bool:
    """Whether the last step ended with an evaluation."""
    evaluated = [
        entry["step"] for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)
    ]
    return bool(evaluated) and evaluated[-1] == trainer.state.global_step


def describe(args: PretrainingArguments, training_args: TrainingArguments, model: PreTrainedModel) -> dict[str, str]:
    """What a report says of a run, beside its curves."""
    rows = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    start = clean(args.preset or args.model_name_or_path or args.config_name)
    return {
        "model": f"{start}, {model.num_parameters():,} parameters",
        "texts": ", ".join(clean(args.train_data)),
        "step": f"{rows} rows of {args.max_length} tokens, {args.mlm_probability:.0%} masked",
        "teacher": clean(args.teacher) or "none",
        "learning rate": f"{training_args.learning_rate:g}, {SchedulerType(training_args.lr_scheduler_type).value}",
        **environment(),
    }


def summarise(trainer: PretrainingTrainer, model: PreTrainedModel) -> dict:
    """Figures of a finished run, resumed or not: last losses, tokens, seconds of training, versions."""
    seconds, tokens = 0.0, 0
    for entry in trainer.state.log_history:
        if "tokens_per_second" in entry:
            seconds += (entry["tokens"] - tokens) / entry["tokens_per_second"]
            tokens = entry["tokens"]
    results = {"parameters": model.num_parameters(), "tokens": trainer.state.num_input_tokens_seen, "seconds": seconds}
    evaluations = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    for entry in evaluations:
        for name, value in entry.items():
            if name.startswith("eval_") and name.endswith("loss"):
                results.setdefault(f"{name}_start", value)
                results[name] = value
    if "eval_loss" in results:
        results["perplexity"] = math.exp(results["eval_loss"])
    for entry in trainer.state.log_history:
        results |= {name: entry[name] for name in ("mlm_loss", "kl_loss", "hidden_loss", "aux_loss") if name in entry}
    return {**results, **environment()}


def card_facts(args, training_args, model: ModernAlbertForMaskedLM, results: dict) -> PretrainingFacts:
    """What the model card says."""
    names = name_sources(args.validation_data)
    eval_losses = {
        source: results["eval_loss" if len(names) == 1 else f"eval_{name}_loss"] for source, name in names.items()
    }
    losses = ("mlm_loss", "kl_loss", "hidden_loss", "aux_loss")
    recipe = {**asdict(args), **{name: getattr(training_args, name) for name in RECIPE}}
    return PretrainingFacts(
        name=Path(training_args.output_dir).name,
        preset=args.preset,
        config=model.config,
        tokenizer=args.tokenizer,
        recipe={name: value for name, value in recipe.items() if value not in (None, [], "{}")},
        data=args.train_data,
        tokens=results["tokens"],
        max_length=args.max_length,
        mlm_probability=args.mlm_probability,
        precision="bf16" if training_args.bf16 else "fp32",
        seconds=results["seconds"],
        train_losses={name: results[name] for name in losses if name in results},
        eval_losses=eval_losses,
        validation_split=args.validation_split,
        teacher=args.teacher,
        initialised_from=args.model_name_or_path,
        license=args.license,
    )


if __name__ == "__main__":
    main()
