"""Trains a ModernBERT-compatible byte-level tokenizer on local files or on a data set of the Hub.

On a million documents of the Hub, streamed:

    python scripts/train_tokenizer.py --dataset_name HuggingFaceFW/fineweb-edu --dataset_config sample-10BT \
        --max_texts 1000000 --vocab_size 50368 --output_dir tokenizer

On a CPU within a minute, from whatever text is at hand:

    python scripts/train_tokenizer.py --files "*.md" "docs/*.md" --vocab_size 1024 --output_dir tokenizer-tiny
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from datasets import load_dataset
from transformers import HfArgumentParser

from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.data import find_files


logger = logging.getLogger(__name__)


@dataclass
class TokenizerArguments:
    """What to read, how large a vocabulary to learn, and where to put it."""

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
    max_texts: int | None = field(default=None, metadata={"help": "Stop reading after so many texts."})
    vocab_size: int = field(default=50368, metadata={"help": "Vocabulary of the model, rounded up to 64."})
    min_frequency: int = field(default=2, metadata={"help": "How often a pair must occur to be merged."})
    model_max_length: int = field(default=8192, metadata={"help": "Longest input of the model, in tokens."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a tokenizer that `output_dir` already holds."})

    def __post_init__(self):
        if bool(self.files) == (self.dataset_name is not None):
            raise ValueError("give exactly one of `files` and `dataset_name`")


def read_texts(args: TokenizerArguments) -> Iterator[str]:
    """Streams the texts, so that neither a cache on disk nor the corpus in memory is needed.

    Raises:
        FileNotFoundError: A pattern in `files` matches no file.
        ValueError: A file has an unknown ending, or a row lacks `text_column`.
    """
    sources = []
    if args.dataset_name is not None:
        rows = load_dataset(args.dataset_name, args.dataset_config, split=args.split, streaming=True)
        sources.append((rows, args.text_column))
    for reader, paths in find_files(args.files).items():
        # Without its line break a line would teach the tokenizer nothing about line ends.
        options = {"keep_linebreaks": True} if reader == "text" else {}
        rows = load_dataset(reader, data_files=paths, split="train", streaming=True, **options)
        sources.append((rows, "text" if reader == "text" else args.text_column))
    for rows, column in sources:
        for row in rows:
            if column not in row:
                raise ValueError(f"`text_column`: there is no column '{column}', but {', '.join(map(repr, row))}")
            yield row[column]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and saves the tokenizer; the log says what to write into the config of a model.

    Raises:
        FileExistsError: `output_dir` holds a tokenizer and `overwrite` is not given.
    """
    (args,) = HfArgumentParser(TokenizerArguments).parse_args_into_dataclasses(args=argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if not args.overwrite and (Path(args.output_dir) / "tokenizer.json").exists():
        raise FileExistsError(f"`output_dir` '{args.output_dir}' holds a tokenizer; pass --overwrite to replace it")

    tokenizer = train_tokenizer(
        islice(read_texts(args), args.max_texts),
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
    main()
