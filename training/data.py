"""Texts from local files or the Hub, packed into rows that hold several texts each, and masked."""

import glob
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase


READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".md": "text"}


def find_files(patterns: Sequence[str]) -> dict[str, list[str]]:
    """Resolves paths and globs, and sorts the files by the `datasets` reader that opens them.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: A file has an ending for which there is no reader.
    """
    found = defaultdict(list)
    for pattern in patterns:
        names = glob.escape(pattern) if Path(pattern).exists() else pattern
        paths = [path for path in sorted(glob.glob(names, recursive=True)) if Path(path).is_file()]
        if not paths:
            raise FileNotFoundError(f"no file matches '{pattern}'")
        for path in paths:
            reader = READERS.get(Path(path).suffix)
            if reader is None:
                raise ValueError(f"cannot read '{path}'; convert it to one of {', '.join(READERS)}")
            found[reader].append(path)
    return found


def load_files(patterns: Sequence[str], streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of local files, as [`find_files`] finds them.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: A file has an ending for which there is no reader, or cannot be read.
    """
    return concatenate_datasets(list(open_files(patterns, streaming)))


def load_labelled(patterns: Sequence[str], text_columns: Sequence[str], label_column: str) -> Dataset:
    """Rows of local files that have texts and a label, the latter in a column `label`.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: What [`load_files`] and [`check_labelled`] raise.
    """
    return check_labelled(load_files(patterns), ", ".join(patterns), text_columns, label_column)


def check_labelled(rows: Dataset, source: str, text_columns: Sequence[str], label_column: str) -> Dataset:
    """Texts and labels alone, the latter in a column `label`, once each row was seen to have them.

    Raises:
        ValueError: There are no rows, a column is missing, or a row lacks a text or a label.
    """
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows")
    for column in (*text_columns, label_column):
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column '{column}', but {', '.join(map(repr, rows.column_names))}")
        for index, value in enumerate(rows[column]):
            if value is None or value != value:
                raise ValueError(f"row {index} of {source} has no '{column}'; mend or drop that row")
            if column != label_column and not isinstance(value, str):
                raise ValueError(f"row {index} of {source} has {value!r} as '{column}', expected a text")
            if column == label_column and value == -1 and isinstance(value, int):
                raise ValueError(f"row {index} of {source} has the label -1, as in test sets; give labelled rows")
    rows = rows.select_columns([*text_columns, label_column])
    return rows if label_column == "label" else rows.rename_column(label_column, "label")


def fingerprint(rows: Dataset) -> str:
    """Hash of what the rows hold; that of `datasets` is of the files' paths and times."""
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def open_files(patterns: Sequence[str], streaming: bool = False) -> Iterator[Dataset | IterableDataset]:
    """One data set for each kind of file; for errors see [`load_files`]."""
    for reader, paths in find_files(patterns).items():
        try:
            part = load_dataset(reader, data_files=paths, split="train", streaming=streaming)
            next(iter(part), None)  # a stream reads nothing before
        except (DatasetGenerationError, OSError, ValueError, StopIteration) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"cannot read {', '.join(paths)} as {reader}: {cause}; mend or leave out the file"
            ) from error
        yield part


def load_texts(
    sources: Sequence[str],
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    mixing_weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Dataset | IterableDataset:
    """Texts of several sources, one column `text_column`.

    Args:
        sources: Each a local file or glob, or a data set of the Hub, `name` or `name:configuration`.
        split: Split of the Hub data sets; local files have none.
        text_column: Column that holds the texts, in every source.
        streaming: Read while training instead of before it. The texts then pass through a shuffling buffer.
        mixing_weights: Share of the texts to draw from each source; the small ones are repeated until the largest has
            ended. Default: each source once, one after the other.
        seed: Of mixing and shuffling.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: The column is missing or holds no strings, a file cannot be read, or the weights do not fit.
    """
    if mixing_weights and (len(mixing_weights) != len(sources) or min(mixing_weights) <= 0):
        raise ValueError(
            f"`mixing_weights` {list(mixing_weights)} must be positive, one for each of the {len(sources)} sources"
        )
    parts = []
    for source in sources:
        if glob.has_magic(source) or Path(source).exists() or Path(source).suffix in READERS:
            opened = open_files([source], streaming)
        else:
            name, _, configuration = source.partition(":")
            opened = [load_dataset(name, configuration or None, split=split, streaming=streaming)]
        # Other columns need not agree, and pandas and Polars make `large_string` where others make `string`.
        strings = Features({text_column: Value("string")})
        kinds = [check_texts(part, source, text_column).select_columns([text_column]) for part in opened]
        if streaming:  # `cast` leaves the tables of a stream as they are
            kinds = [part.map(lambda batch: batch, batched=True, features=strings) for part in kinds]
        else:
            kinds = [part.cast(strings) for part in kinds]
        parts.append(concatenate_datasets(kinds))
    if mixing_weights and len(parts) > 1:
        shares = [weight / sum(mixing_weights) for weight in mixing_weights]
        texts = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        texts = concatenate_datasets(parts)
    return texts.shuffle(seed=seed, buffer_size=10_000) if streaming else texts


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """A short name for each source, to report its figures under: the file's or the Hub data set's, where unique."""
    short = {source: Path(source.partition(":")[0]).stem for source in sources}
    count = Counter(short.values())
    names = {}
    for source, name in short.items():
        name = name if count[name] == 1 else re.sub(r"\W+", "_", source).strip("_")
        while name in names.values():
            name += "_"
        names[source] = name
    return names


def check_texts(part: Dataset | IterableDataset, source: str, text_column: str) -> Dataset | IterableDataset:
    """The data set itself, once its first row was seen to hold a text.

    Raises:
        ValueError: It is empty, or the column is missing or holds no strings.
    """
    first = next(iter(part), None)
    if first is None:
        raise ValueError(f"'{source}' has no rows")
    if text_column not in first:
        raise ValueError(f"'{source}' has no column '{text_column}', but {', '.join(map(repr, first))}")
    if not isinstance(first[text_column], str | None):
        raise ValueError(
            f"column '{text_column}' of '{source}' holds {type(first[text_column]).__name__}, expected texts; name "
            "another with `text_column`"
        )
    return part


def pack_texts(
    texts: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    text_column: str = "text",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Rows of `max_length` tokens, cut from all texts laid end to end, each as `[CLS] text [SEP]`.

    No token is lost and none is padding, but for the last row of each thousand texts, which is shorter. A text that a
    row's end cuts goes on in the next row; [`PackedCollator`] keeps texts from seeing each other. Empty texts are
    dropped. Rows of a `Dataset` are cached on disk by `datasets` and found again by the next run on the same texts;
    those of an `IterableDataset` are made on the fly.

    Args:
        texts: Texts.
        tokenizer: With `[CLS]` and `[SEP]`.
        max_length: Tokens of a row.
        text_column: Column that holds the texts.
        num_proc: Processes that tokenise a `Dataset`.

    Returns:
        One column, `input_ids`.

    Raises:
        ValueError: No text holds a token.
    """

    def pack(batch):
        filled = [text for text in batch[text_column] if text and not text.isspace()]
        # Rows are cut here, so a text longer than the model's limit is no concern of the tokenizer's: not verbose.
        encoded = tokenizer(filled, return_attention_mask=False, verbose=False)["input_ids"] if filled else []
        tokens = [token for text in encoded for token in text]
        return {"input_ids": [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]}

    if isinstance(texts, IterableDataset):
        return texts.map(pack, batched=True, remove_columns=[text_column])
    packed = texts.map(
        pack, batched=True, remove_columns=[text_column], num_proc=num_proc, desc=f"Packing to {max_length} tokens"
    )
    if len(packed) == 0:
        raise ValueError(f"column '{text_column}' holds no text: all of its {len(texts)} rows are empty")
    return packed


class TokenMasker:
    """Masks tokens for masked-language modelling; what it masks depends on nothing but the seed and a row's key.

    A run that is resumed, cut into other micro-batches or spread over processes thus masks the same tokens, and no
    state has to be saved. Of the chosen tokens 80% become `[MASK]`, 10% a random token, and 10% stay (BERT).

    Args:
        tokenizer: Its special tokens are never chosen.
        probability: Share of the other tokens that is chosen.
        seed: Of everything random.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.3, seed: int = 0):
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.mask_token_id = tokenizer.mask_token_id
        self.num_tokens = len(tokenizer)
        self.probability = probability
        self.seed = seed

    def __call__(self, input_ids: torch.Tensor, keys: Iterable[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids [rows, length]` with a key for each row, to masked `input_ids` and `labels`, -100 elsewhere."""
        draws = np.stack(
            [
                np.random.default_rng([self.seed, len(key), *key]).random((input_ids.shape[1], 2), dtype=np.float32)
                for key in keys
            ]
        )
        chance, fate = torch.from_numpy(draws).to(input_ids.device).unbind(dim=-1)
        special = self.special.to(input_ids.device)
        chosen = (chance < self.probability) & ~torch.isin(input_ids, special)
        labels = input_ids.masked_fill(~chosen, -100)
        masked = input_ids.masked_fill(chosen & (fate < 0.8), self.mask_token_id)
        random_tokens = ((fate - 0.8) / 0.1 * self.num_tokens).long().clamp(0, self.num_tokens - 1)
        # A random [CLS] would look like the start of another text.
        swapped = chosen & (fate >= 0.8) & (fate < 0.9) & ~torch.isin(random_tokens, special)
        return torch.where(swapped, random_tokens, masked), labels


def mask_rows(rows: Dataset, masker: TokenMasker) -> Dataset:
    """Packed rows with fixed masks and `labels`, to evaluate on: every evaluation predicts the same tokens."""

    def mask(row, index):
        input_ids, labels = masker(torch.tensor([row["input_ids"]]), [(index,)])
        return {"input_ids": input_ids[0].tolist(), "labels": labels[0].tolist()}

    return rows.map(mask, with_indices=True, desc="Masking")


class PackedCollator:
    """Pads packed rows to one length, and gives positions that start anew with every text.

    The model takes position 0 for the start of another text, see `ModernAlbertModel.forward`.

    Args:
        tokenizer: For its `[CLS]` and `[PAD]`.
        max_length: Length of every batch, so that processes have equal shapes; default: that of its longest row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None):
        self.max_length = max_length
        self.cls_token_id = tokenizer.cls_token_id
        self.pad_token_id = tokenizer.pad_token_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Rows of `input_ids` and maybe `labels` to `input_ids`, `attention_mask`, `position_ids`, `labels`."""
        length = self.max_length or max(len(row["input_ids"]) for row in rows)

        def pad(name, value):
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

        places = torch.arange(length)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {
            "input_ids": pad("input_ids", self.pad_token_id),
            "attention_mask": (places < lengths[:, None]).long(),
        }
        # [CLS] is special, so that it is never masked.
        starts = torch.where(batch["input_ids"] == self.cls_token_id, places, 0).cummax(dim=1).values
        batch["position_ids"] = places - starts
        if "labels" in rows[0]:
            batch["labels"] = pad("labels", -100)
        return batch
