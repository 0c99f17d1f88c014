"""Pretrains ModernALBERT with masked-language modelling, on local files or a data set of the Hub.

`tiny` on a data set of the Hub, with ModernBERT's tokenizer:

    python scripts/pretrain.py --preset tiny --tokenizer answerdotai/ModernBERT-base \
        --dataset_name HuggingFaceFW/fineweb-edu --dataset_config sample-10BT --max_length 512 \
        --output_dir runs/tiny --bf16 --per_device_train_batch_size 64 --learning_rate 8e-4 --max_steps 100000

`nano` on a CPU within a minute, on whatever text is at hand (the tokenizer is that of `scripts/train_tokenizer.py`):

    python scripts/pretrain.py --preset nano --tokenizer tokenizer-tiny --train_files "*.md" --validation_files README.md \
        --max_length 128 --output_dir runs/nano --per_device_train_batch_size 16 --learning_rate 1e-3 --max_steps 50
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM
from modernalbert.tokenization import load_tokenizer, padded_vocab_size, save_tokenizer
from modernalbert.training.data import PackedCollator, load_files, pack_texts


logger = logging.getLogger(__name__)


@dataclass
class PretrainingArguments:
    """Which model, and on which texts."""

    tokenizer: str = field(metadata={"help": "Hub name or folder of the tokenizer."})
    preset: str = field(default="tiny", metadata={"help": "Size: nano, tiny, medium, base or large."})
    config_overrides: str = field(default="{}", metadata={"help": "Fields of the configuration, as JSON."})
    train_files: list[str] = field(default_factory=list, metadata={"help": "Local files or globs to train on."})
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "Local files or globs to evaluate on."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, instead of `train_files`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of the Hub data set to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split of the Hub data set to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a packed row."})
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of tokens that is masked (ModernBERT's)."})

    def __post_init__(self):
        if bool(self.train_files) == (self.dataset_name is not None):
            raise ValueError("give exactly one of `train_files` and `dataset_name`")


def build_config(args: PretrainingArguments, tokenizer) -> ModernAlbertConfig:
    """The preset, with the tokenizer's vocabulary and special tokens.

    Raises:
        ValueError: The preset is unknown, or rows are longer than the model takes.
    """
    config = ModernAlbertConfig.preset(
        args.preset,
        **{
            "vocab_size": padded_vocab_size(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            **json.loads(args.config_overrides),
        },
    )
    if args.max_length > config.max_position_embeddings:
        raise ValueError(
            f"`max_length` ({args.max_length}) exceeds the model's `max_position_embeddings` "
            f"({config.max_position_embeddings}); lower it, or raise the other in `config_overrides`"
        )
    return config


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, and writes model, tokenizer and `results.json` into `output_dir`; returns the results.

    A run that was stopped goes on from its last checkpoint when the same command is given again.
    """
    args, training_args = HfArgumentParser((PretrainingArguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(args.tokenizer)
    config = build_config(args, tokenizer)
    if args.dataset_name is None:
        texts = load_files(args.train_files)
        validation_texts = load_files(args.validation_files) if args.validation_files else None
    else:
        texts = load_dataset(args.dataset_name, args.dataset_config, split=args.train_split)
        validation_texts = None
        if args.validation_split is not None:
            validation_texts = load_dataset(args.dataset_name, args.dataset_config, split=args.validation_split)
    rows = pack_texts(texts, tokenizer, args.max_length, args.text_column)
    validation_rows = None
    if validation_texts is not None:
        validation_rows = pack_texts(validation_texts, tokenizer, args.max_length, args.text_column)

    # The head needs to run at masked positions only, here and in no later use of the model.
    config.sparse_prediction = True
    model = ModernAlbertForMaskedLM(config)
    logger.info("%s: %.1fM parameters, %d packed rows", args.preset, model.num_parameters() / 1e6, len(rows))
    training_args.prediction_loss_only = True
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=PackedCollator(tokenizer, args.mlm_probability),
        train_dataset=rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
    )

    results = {"parameters": model.num_parameters()}
    checkpoints = sorted(Path(training_args.output_dir).glob("checkpoint-*/trainer_state.json"))
    if validation_rows is not None and not checkpoints:
        results["eval_loss_start"] = evaluate(trainer, training_args.seed)
    trainer.train(resume_from_checkpoint=bool(checkpoints))
    if validation_rows is not None:
        results["eval_loss"] = evaluate(trainer, training_args.seed)
        results["perplexity"] = math.exp(results["eval_loss"])

    model.config.sparse_prediction = False
    trainer.save_model()
    save_tokenizer(tokenizer, training_args.output_dir)
    (Path(training_args.output_dir) / "results.json").write_text(json.dumps(results, indent=1))
    return results


def evaluate(trainer: Trainer, seed: int) -> float:
    """Masked-LM loss in nats, with the same tokens masked at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    main()
