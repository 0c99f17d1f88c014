"""Pretrains ModernALBERT with masked-language modelling, with or without a teacher.

`tiny`, initialised by `scripts/init_from_teacher.py` and distilled from the same teacher, by the recipe of that size:

    torchrun --nproc_per_node 8 scripts/pretrain.py --config recipes/tiny.yaml --output_dir runs/tiny

`nano` on a CPU within a minute, on whatever text is at hand (the tokenizer is that of `scripts/train_tokenizer.py`):

    python scripts/pretrain.py --preset nano --tokenizer tokenizer-tiny --train_data "*.md" --validation_data README.md \
        --max_length 128 --output_dir runs/nano --per_device_train_batch_size 16 --learning_rate 1e-3 --max_steps 50

The same command resumes a stopped run from its last checkpoint; Ctrl-C writes one. A ModernBERT is pretrained in the
same way, from its `config.json` (`--config_name`): as a teacher or a baseline.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated

from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    TrainingArguments,
    set_seed,
)

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM
from modernalbert.tokenization import load_tokenizer, save_tokenizer, vocabulary_fields
from modernalbert.training.alignment import AlignedCollator, pack_sequences, same_tokenizer
from modernalbert.training.callbacks import ReportWriter
from modernalbert.training.cli import (
    Bounds,
    Count,
    NotNegative,
    Positive,
    Share,
    Workers,
    check_names,
    parse_arguments,
    parse_json,
    run_script,
)
from modernalbert.training.data import find_files, first_rows, is_local, load_texts, name_sources
from modernalbert.training.distillation import Distiller, EncoderDistiller, Teacher, start_from_table
from modernalbert.training.export.cards import PretrainingFacts, environment, write_card
from modernalbert.training.export.embedder import read_projection, write_embedder
from modernalbert.training.export.redaction import redact
from modernalbert.training.initialization import add_experts, has_experts
from modernalbert.training.loading import check_folder, check_size, is_sentence_transformer, load_config, load_model
from modernalbert.training.loading import load_tokenizer as load_any_tokenizer
from modernalbert.training.packing import PackedCollator, TokenMasker, mask_rows, pack_enough, pack_texts
from modernalbert.training.pretraining import PretrainingTrainer
from modernalbert.training.runs import (
    RESULTS_NAME,
    bytes_of_run,
    check_output_dir,
    describe_model,
    hash_file,
    run_settings,
    start_run,
    write_files,
    write_json,
)
from modernalbert.training.trainer import train_to_the_end


logger = logging.getLogger(__name__)

# Where our defaults differ from transformers'. Betas and schedule are ModernBERT's.
DEFAULTS = {
    "lr_scheduler_type": "warmup_stable_decay",
    "adam_beta2": 0.98,
    "warmup_steps": 0.1,
    "logging_steps": 50,
    "save_total_limit": 2,
    "eval_on_start": True,
}
# Arguments of Trainer that the script relies on.
FIXED = {
    "prediction_loss_only": (True, "the logits of all masked tokens do not fit in memory"),
    "remove_unused_columns": (False, "rows are packed already"),
    "include_num_input_tokens_seen": ("no", "the log holds the real tokens, padding excluded, already"),
    "average_tokens_across_devices": (True, "each loss is a mean over the tokens of all processes"),
    "auto_find_batch_size": (False, "masks depend on the index of a row in its batch"),
    "label_names": (None, "masks are made here"),
    "label_smoothing_factor": (0.0, "the masked-LM loss is computed at masked positions only"),
}

# Arguments of Trainer that the model card lists.
RECIPE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "warmup_steps", "max_steps", "num_train_epochs"),
    *("bf16", "seed"),
)

LOSSES = ("mlm_loss", "kl_loss", "hidden_loss", "pooled_loss", "pair_loss", "depth_loss", "aux_loss")

# Arguments of the script that change neither weights nor losses.
WITHOUT_EFFECT = ("license", "preprocessing_num_workers", "teacher_cache", "teacher_cache_gb")

RowLength = Annotated[int, Bounds(least=3, most=10**9)]  # [CLS], a token, [SEP]


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
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Packed rows of each validation source to evaluate on; default: all."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of Hub data sets to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split of Hub data sets to evaluate on."})
    mixing_weights: list[Positive] = field(
        default_factory=list, metadata={"help": "Share of each item of `train_data`; default: all texts once."}
    )
    streaming: bool = field(default=False, metadata={"help": "Tokenise `train_data` while training, not before."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    pair_column: str | None = field(
        default=None,
        metadata={"help": "Column that holds second texts: rows that have one become [CLS] text [SEP] pair [SEP]."},
    )
    preprocessing_num_workers: Workers | None = field(default=None, metadata={"help": "Processes that tokenise."})
    max_length: RowLength = field(default=512, metadata={"help": "Tokens of a packed row."})
    mlm_probability: Share = field(default=0.3, metadata={"help": "Share of tokens that is masked (ModernBERT's)."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "Model to distil from, Hub name or folder: any encoder, or a SentenceTransformer."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "File that keeps the states of a teacher of another kind than ModernBERT, for later epochs and runs."
        },
    )
    teacher_cache_gb: Positive = field(default=20.0, metadata={"help": "Largest size of that file, in gigabytes."})
    temperature: Positive = field(default=1.0, metadata={"help": "Temperature of the distilled logits."})
    hidden_loss: str = field(default="cosine", metadata={"help": "Distance of hidden states: cosine or mse."})
    mlm_weight: NotNegative = field(default=1.0, metadata={"help": "Weight of the masked-LM loss."})
    kl_weight: NotNegative = field(default=1.0, metadata={"help": "Weight of the distilled logits."})
    hidden_weight: NotNegative = field(default=1.0, metadata={"help": "Weight of the distilled hidden states."})
    pooled_weight: NotNegative = field(
        default=1.0,
        metadata={"help": "Weight of the pooled sequences, with a teacher of another kind than ModernBERT."},
    )
    pair_weight: NotNegative = field(
        default=1.0,
        metadata={"help": "Weight of the similarity of pairs, with such a teacher and a `pair_column`."},
    )
    masked_share: Annotated[float, Bounds(least=0, most=1)] = field(
        default=1.0,
        metadata={"help": "Share of the sequences that are masked; the others teach by the teacher alone."},
    )
    elastic_depth: bool = field(
        default=False,
        metadata={"help": "Train smaller depths beside the full one, so that the model may be run at them."},
    )
    decay_steps: NotNegative = field(
        default=0.1, metadata={"help": "Last steps, in which the learning rate falls; below 1: a share of the run."}
    )
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, for the model card."})

    def __post_init__(self):
        starts = (self.preset, self.config_name, self.model_name_or_path)
        if sum(start is not None for start in starts) != 1:
            raise ValueError("give exactly one of `preset`, `config_name` and `model_name_or_path`")
        if not self.train_data:
            raise ValueError("`train_data` is empty; give texts to train on")
        if self.masked_share < 1 and self.teacher is None:
            raise ValueError("without a `teacher` nothing is learned from clean sequences: `masked_share` must be 1")
        if self.teacher_cache is not None and self.teacher is None:
            raise ValueError("`teacher_cache` keeps states of a `teacher`, and there is none")
        if self.hidden_loss not in ("cosine", "mse"):
            raise ValueError(f"`hidden_loss` must be 'cosine' or 'mse', got '{self.hidden_loss}'")


def build_model(args: PretrainingArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model, with the tokenizer's vocabulary and special tokens, or a trained one, in float32.

    Raises:
        ValueError: The preset is unknown, the vocabulary is smaller than the tokenizer's, or rows are longer than the
            model takes.
    """
    if args.preset is None:
        saved = load_config(args.model_name_or_path or args.config_name)
        known = {*saved.to_dict(), *saved.attribute_map}
    else:
        known = {field.name for field in fields(ModernAlbertConfig)}
    shared = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    overrides = parse_json("config_overrides", args.config_overrides)
    check_names(overrides, known, "field in `config_overrides`,")
    if args.model_name_or_path is None:
        overrides = {**vocabulary_fields(tokenizer), **overrides}
    if args.preset is not None:
        config = ModernAlbertConfig.preset(args.preset, **overrides)
    else:
        config = load_config(args.model_name_or_path or args.config_name, **overrides)
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
        adds = config.model_type == "modernalbert" and has_experts(config) and not has_experts(saved)
        model, new = load_model(AutoModelForMaskedLM, args.model_name_or_path, saved if adds else config, **shared)
        if new:
            logger.warning("'%s' does not hold %s, which start at random", args.model_name_or_path, ", ".join(new))
        if adds:
            model = add_experts(model, config)
            logger.info("%d experts were added in groups %s", config.num_experts, config.mol_groups)
    else:
        check_size(config)
        model = AutoModelForMaskedLM.from_config(config, **shared)
    # The head needs to run at masked positions only, here and in no later use of the model.
    set_sparse_prediction(model, True)
    return model


def set_sparse_prediction(model: PreTrainedModel, sparse: bool) -> None:
    """Whether the head runs at labelled positions only, for ModernALBERT and ModernBERT."""
    model.config.sparse_prediction = sparse
    if hasattr(model, "sparse_prediction"):  # ModernBERT keeps a copy
        model.sparse_prediction = sparse


def load_teacher(
    args: PretrainingArguments, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, half: bool
) -> tuple[Distiller | EncoderDistiller, PreTrainedTokenizerBase | None]:
    """The teacher's part of the loss, and its tokenizer where it is an encoder with another one than the student's.

    A ModernBERT or ModernALBERT with a trained masked-LM head and the student's tokenizer gives logits and the states
    of its layers; any other encoder its last hidden states and pooled sequences. Teachers are in bfloat16 where
    training is, else in the precision of their checkpoint.

    Raises:
        ValueError: The teacher has no tokenizer with offsets.
    """
    dtype = "bfloat16" if half else "auto"
    teacher_tokenizer = load_any_tokenizer(args.teacher)
    if not teacher_tokenizer.is_fast:
        raise ValueError(
            f"the teacher '{args.teacher}' has a slow tokenizer, {type(teacher_tokenizer).__name__}: it does not say "
            "which characters a token stands for, so that its tokens cannot be compared with the student's"
        )
    same = same_tokenizer(tokenizer, teacher_tokenizer)
    plain = same and not is_sentence_transformer(args.teacher)
    if plain and load_config(args.teacher).model_type in ("modernbert", "modernalbert"):
        teacher, new = load_model(AutoModelForMaskedLM, args.teacher, dtype=dtype)
        if not new:
            distiller = Distiller(teacher, model, args.temperature, args.hidden_loss)
            logger.info("hidden states after layers %s (student, teacher) are matched", distiller.layer_map)
            if args.teacher_cache is not None:
                raise ValueError(
                    f"the teacher '{args.teacher}' sees masked rows, which differ each time: leave `teacher_cache` out"
                )
            return distiller, None
    if args.pair_column is not None and teacher_tokenizer.sep_token_id is None:
        raise ValueError(
            f"the tokenizer of the teacher '{args.teacher}' has no `sep_token`, which parts the texts of a pair: leave "
            "`pair_column` out"
        )
    teacher = Teacher(
        args.teacher,
        dtype,
        args.teacher_cache,
        int(args.teacher_cache_gb * 1e9),
        teacher_tokenizer.sep_token_id if args.pair_column is not None else None,
    )
    if args.hidden_loss != "cosine" or args.temperature != 1:
        raise ValueError(
            f"the teacher '{args.teacher}' gives last hidden states alone, compared by their cosine: leave "
            "`hidden_loss` and `temperature` out"
        )
    logger.info("last hidden states are matched %s by %s", *(("token", "token") if same else ("word", "word")))
    if same and args.model_name_or_path is None and model.config.model_type == "modernalbert":
        kept = start_from_table(teacher.encoder.get_input_embeddings().weight, model)
        logger.info("the embedding starts from the teacher's: %.1f%% of its energy", 100 * kept)
    distiller = EncoderDistiller(teacher, model, args.pair_column is not None and args.pair_weight > 0)
    before = read_projection(args.model_name_or_path) if args.model_name_or_path is not None else None
    if before is not None and before.weight.shape == distiller.pooled_projection.weight.shape:
        distiller.pooled_projection.load_state_dict(before.state_dict())
        logger.info("the projection to the teacher goes on from '%s'", redact(args.model_name_or_path))
    return distiller, None if same else teacher_tokenizer


def load_rows(
    args: PretrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    distiller: Distiller | EncoderDistiller | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> tuple:
    """Packed rows to train on, and masked rows to evaluate on, by the name of their source.

    Raises:
        ValueError: There are fewer rows than a step takes; and what `load_texts` and `pack_texts` raise.
    """
    packing = {"max_length": args.max_length, "text_column": args.text_column, "pair_column": args.pair_column}
    pack = pack_texts
    if isinstance(distiller, EncoderDistiller):
        longest = distiller.teacher.max_length
        if teacher_tokenizer is None and args.max_length > longest:
            raise ValueError(f"`max_length` ({args.max_length}) exceeds the {longest} tokens that the teacher takes")
        pack = partial(pack_sequences, teacher_tokenizer=teacher_tokenizer, teacher_length=longest)
    batch = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    with training_args.main_process_first():  # the other processes read its tokenised rows from the cache
        texts = load_texts(
            args.train_data,
            args.train_split,
            args.text_column,
            args.streaming,
            args.mixing_weights,
            training_args.seed,
            pair_column=args.pair_column,
        )
        pack_training = partial(pack, tokenizer=tokenizer, **packing, num_proc=args.preprocessing_num_workers)
        if isinstance(texts, Dataset) and training_args.max_steps > 0:
            rows = pack_enough(texts, pack_training, training_args.max_steps * batch, training_args.seed)
        else:
            rows = pack_training(texts)
        masker = TokenMasker(tokenizer, args.mlm_probability, training_args.seed, args.masked_share)
        # An evaluation masks all sequences, or none where it measures the teacher's terms.
        share = 0.0 if isinstance(distiller, EncoderDistiller) and args.masked_share == 0 else 1.0
        evaluation_masker = TokenMasker(tokenizer, args.mlm_probability, training_args.seed, share)
        validation = {}
        for source, name in name_sources(args.validation_data).items():
            texts = load_texts([source], args.validation_split, args.text_column, pair_column=args.pair_column)
            packed = first_rows(pack(texts, tokenizer, **packing), args.max_eval_samples)
            validation[name] = mask_rows(packed, evaluation_masker)
    if isinstance(rows, Dataset) and len(rows) < batch:
        raise ValueError(
            f"the texts fill {len(rows)} rows of {args.max_length} tokens, fewer than the {batch} of a step; give "
            "more texts, or lower `max_length` or the batch size"
        )
    return rows, validation, masker


def main(argv: Sequence[str] | None = None) -> dict:
    """Trains, and writes model, tokenizer, card, report and `results.json` into `output_dir`; returns the results.

    A stopped run resumes from its last complete checkpoint when the same command is given again.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped the run, after its checkpoint was written.
    """
    args, training_args = parse_arguments((PretrainingArguments, TrainingArguments), argv, DEFAULTS, __doc__, FIXED)
    check_evaluation(args, training_args)
    folder = Path(training_args.output_dir)
    models = [name for name in (args.model_name_or_path, args.config_name, args.teacher, args.tokenizer) if name]
    for name in models:
        check_folder(name)
    if (results := start_run(folder, describe_settings(args, training_args), models)) is not None:
        logger.info("'%s' holds a finished run", folder)
        return results
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(args.tokenizer)
    model = build_model(args, tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    distiller = teacher_tokenizer = None
    if args.teacher is not None:
        distiller, teacher_tokenizer = load_teacher(args, tokenizer, model, training_args.bf16)
    check_output_dir(folder, bytes_of_run(training_args, model.num_parameters()))
    rows, validation, masker = load_rows(args, training_args, tokenizer, distiller, teacher_tokenizer)
    count = f"{len(rows)} packed rows" if isinstance(rows, Dataset) else "a stream of packed rows"
    logger.info("%s: %.1fM parameters, %s", model.config.model_type, model.num_parameters() / 1e6, count)

    collator = PackedCollator(tokenizer, args.max_length)
    if teacher_tokenizer is not None:
        collator = AlignedCollator(tokenizer, args.max_length, teacher_tokenizer.pad_token_id)
    training_args.eval_on_start = training_args.eval_on_start and bool(validation)
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=validation if len(validation) > 1 else next(iter(validation.values()), None),
        processing_class=tokenizer,
        masker=masker,
        distiller=distiller,
        mlm_weight=args.mlm_weight,
        kl_weight=args.kl_weight,
        hidden_weight=args.hidden_weight,
        pooled_weight=args.pooled_weight,
        pair_weight=args.pair_weight,
        elastic_depth=args.elastic_depth,
        decay_steps=args.decay_steps,
    )
    trainer.add_callback(
        ReportWriter(f"Training report of {folder.resolve().name}", describe(args, training_args, model))
    )
    train_to_the_end(trainer)

    if isinstance(distiller, EncoderDistiller):
        distiller.remove_heads(model)

    def write(draft: Path) -> None:
        trainer.save_model(str(draft))
        (draft / "training_args.bin").unlink(missing_ok=True)  # a pickle, with local paths
        save_tokenizer(tokenizer, draft)

    if trainer.is_fsdp_enabled or training_args.should_save:
        write_files(folder, write)
        if isinstance(distiller, EncoderDistiller):
            write_embedder(folder, distiller.pooled_projection, args.max_length)
    set_sparse_prediction(model, False)
    # The model is saved: a failure from here on loses no training.
    if validation and not just_evaluated(trainer):
        trainer.evaluate()
    results = summarise(trainer, model)
    if training_args.should_save:
        if isinstance(model, ModernAlbertForMaskedLM):
            write_files(folder, lambda draft: write_card(draft, card_facts(args, trainer, results)))
        write_json(folder / RESULTS_NAME, results)
    return results


def check_evaluation(args: PretrainingArguments, training_args: TrainingArguments) -> None:
    """Checks, before any work, that the arguments of evaluation fit the data.

    Raises:
        ValueError: They do not.
    """
    if args.streaming and training_args.max_steps <= 0:
        raise ValueError("a stream has no length: give `max_steps`")
    train, validation = (list_sources(sources) for sources in (args.train_data, args.validation_data))
    if shared := train & validation:
        logger.warning("%s: in training and validation; losses on it say little", ", ".join(sorted(shared)))
    if training_args.eval_strategy != "no" and not args.validation_data:
        raise ValueError("`eval_strategy` needs texts to evaluate on: give `validation_data`")
    names = name_sources(args.validation_data).values()
    known = ["loss"] if len(names) < 2 else [f"{name}_loss" for name in names]
    metric = training_args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise ValueError(f"there is no `metric_for_best_model` '{metric}'; give one of {', '.join(known)}")
    if training_args.greater_is_better:
        raise ValueError("`greater_is_better` (True) is wrong for a loss; leave it out")


def list_sources(sources: Sequence[str]) -> set[str]:
    """Files of local sources, and the names of others."""
    local = [source for source in sources if is_local(source)]
    return {str(Path(path).resolve()) for path in find_files(local)} | (set(sources) - set(local))


def describe_settings(args: PretrainingArguments, training_args: TrainingArguments) -> dict:
    """Settings of the run, with files and models described by their content."""
    names = ("tokenizer", "config_name", "model_name_or_path", "teacher")
    identities = {name: describe_model(getattr(args, name)) for name in names if getattr(args, name) is not None}
    for name in ("train_data", "validation_data"):
        local = [source for source in getattr(args, name) if is_local(source)]
        hashes = [hash_file(path) for path in find_files(local)]
        identities[name] = [source for source in getattr(args, name) if source not in local] + hashes
    return run_settings(args, training_args, without=WITHOUT_EFFECT, **identities)


def just_evaluated(trainer: PretrainingTrainer) -> bool:
    """Whether the last step ended with an evaluation."""
    evaluated = [
        entry["step"] for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)
    ]
    return bool(evaluated) and evaluated[-1] == trainer.state.global_step


def describe(args: PretrainingArguments, training_args: TrainingArguments, model: PreTrainedModel) -> dict[str, str]:
    """Facts of a run for the report."""
    rows = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    start = redact(args.preset or args.model_name_or_path or args.config_name)
    return {
        "model": f"{start}, {model.num_parameters():,} parameters",
        "texts": ", ".join(redact(args.train_data)),
        "step": f"{rows} rows of {args.max_length} tokens, {args.mlm_probability:.0%} masked"
        + (f" in {args.masked_share:.0%} of the sequences" if args.masked_share < 1 else ""),
        "teacher": redact(args.teacher) or "none",
        "learning rate": f"{training_args.learning_rate:g}, {SchedulerType(training_args.lr_scheduler_type).value}",
        **environment(),
    }


def summarise(trainer: PretrainingTrainer, model: PreTrainedModel) -> dict:
    """Results of a finished run, resumed or not: last losses, tokens, seconds of training, versions."""
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
    if "eval_loss" in results and not trainer.evaluates_teacher_terms:
        results["perplexity"] = math.exp(results["eval_loss"])
    for entry in trainer.state.log_history:
        results |= {name: entry[name] for name in LOSSES if name in entry}
    return {**results, **environment()}


def card_facts(args: PretrainingArguments, trainer: PretrainingTrainer, results: dict) -> PretrainingFacts:
    """Facts of a run for the model card, whose evaluations are those of masked tokens."""
    training_args = trainer.args
    names = {} if trainer.evaluates_teacher_terms else name_sources(args.validation_data)
    eval_losses = {
        source: results["eval_loss" if len(names) == 1 else f"eval_{name}_loss"] for source, name in names.items()
    }
    losses = LOSSES
    recipe = {**asdict(args), **{name: getattr(training_args, name) for name in RECIPE}}
    return PretrainingFacts(
        name=Path(training_args.output_dir).name,
        preset=args.preset,
        config=trainer.model.config,
        tokenizer=args.tokenizer,
        recipe={
            name: value
            for name, value in recipe.items()
            if value not in (None, [], "{}") and name not in WITHOUT_EFFECT
        },
        data=args.train_data,
        tokens=results["tokens"],
        max_length=args.max_length,
        mlm_probability=args.mlm_probability,
        masked_share=args.masked_share,
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
    run_script(main)
