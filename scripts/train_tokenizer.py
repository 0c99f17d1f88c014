"""Trains a ModernBERT-compatible byte-level tokenizer on local files or on a data set of the Hub.

On a million documents of the Hub, streamed:

    python scripts/train_tokenizer.py --dataset_name HuggingFaceFW/fineweb-edu --dataset_config sample-10BT \
        --max_texts 1000000 --vocab_size 50368 --output_dir tokenizer

On a CPU within a minute, from whatever text is at hand:

    python scripts/train_tokenizer.py --files "*.md" "docs/*.md" --vocab_size 1024 --output_dir tokenizer-tiny
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.cli import Bounds, Count, parse_arguments, run_script
from modernalbert.training.data import stream_texts
from modernalbert.training.runs import check_output_dir


logger = logging.getLogger(__name__)


VocabSize = Annotated[int, Bounds(least=1, most=10**7)]  # the library takes memory for all of it before it reads


@dataclass
class TokenizerArguments:
    """Texts, vocabulary size and output."""

    output_dir: str = field(metadata={"help": "Folder that receives the tokenizer."})
    files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Local files or globs. A row of .parquet or .jsonl is a text, and so is a line of .txt or .md,"
            " with its line break: prefer the former where a text spans lines."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, instead of `files`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    split: str = field(default="train", metadata={"help": "Split of the Hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts; unused for .txt, .md."})
    max_texts: Count | None = field(default=None, metadata={"help": "Stop reading after so many texts."})
    vocab_size: VocabSize = field(default=50368, metadata={"help": "Vocabulary of the model, rounded up to 64."})
    min_frequency: Count = field(default=2, metadata={"help": "How often a pair must occur to be merged."})
    model_max_length: Count = field(default=8192, metadata={"help": "Longest input of the model, in tokens."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a tokenizer that `output_dir` already holds."})

    def __post_init__(self):
        if bool(self.files) == (self.dataset_name is not None):
            raise ValueError("give exactly one of `files` and `dataset_name`")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and saves the tokenizer; the log says what to write into the config of a model.

    Raises:
        FileExistsError: `output_dir` holds a tokenizer and `overwrite` is not given.
    """
    (args,) = parse_arguments((TokenizerArguments,), argv, description=__doc__)
    if not args.overwrite and (Path(args.output_dir) / "tokenizer.json").exists():
        raise FileExistsError(f"`output_dir` '{args.output_dir}' holds a tokenizer; pass --overwrite to replace it")
    sources = args.files
    if args.dataset_name is not None:
        sources = [":".join(filter(None, (args.dataset_name, args.dataset_config)))]
    # Without its line break a line would teach the tokenizer nothing about line ends.
    texts = islice(stream_texts(sources, args.split, args.text_column, line_breaks=True), args.max_texts)
    first = list(islice(texts, 1))  # what cannot be read shows before a folder is made
    if not first:
        raise ValueError(f"nothing to train on: {', '.join(sources)} has no texts")
    check_output_dir(args.output_dir)

    tokenizer = train_tokenizer(
        chain(first, texts),
        vocab_size=args.vocab_size,
        min_frequency=args.min_frequency,
        model_max_length=args.model_max_length,
    )
    save_tokenizer(tokenizer, args.output_dir)
    logger.info("saved %d tokens (of at most %d asked for) in %s", len(tokenizer), args.vocab_size, args.output_dir)
    logger.info(
        "config of a model: vocab_size=%d, cls_token_id=%d, sep_token_id=%d, pad_token_id=%d, mask_token_id=%d",
        padded_vocab_size(tokenizer),
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
        tokenizer.mask_token_id,
    )


if __name__ == "__main__":
    run_script(main)
