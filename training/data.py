"""Texts from local files or the Hub, packed into rows that hold several texts each."""

import glob
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase


READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".md": "text"}


def find_files(patterns: Sequence[str]) -> dict[str, list[str]]:
    """Resolves paths and globs, and sorts the files by the `datasets` reader that opens them.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: A file has an ending for which there is no reader.
    """
    found = defaultdict(list)
    for pattern in patterns:
        paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
        if not paths:
            raise FileNotFoundError(f"no file matches '{pattern}'")
        for path in paths:
            reader = READERS.get(Path(path).suffix)
            if reader is None:
                raise ValueError(f"cannot read '{path}'; convert it to one of {', '.join(READERS)}")
            found[reader].append(path)
    return found


def load_files(patterns: Sequence[str]) -> Dataset:
    """Rows of local files, as [`find_files`] finds them."""
    parts = [load_dataset(reader, data_files=paths, split="train") for reader, paths in find_files(patterns).items()]
    return concatenate_datasets(parts)


def pack_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, text_column: str = "text"
) -> Dataset:
    """Rows of `max_length` tokens, cut from all texts laid end to end, each as `[CLS] text [SEP]`.

    No token is lost and none is padding, but for the last row of each thousand texts, which is shorter. A text that a
    row's end cuts goes on in the next row; [`PackedCollator`] keeps texts from seeing each other. Empty texts are
    dropped.

    Args:
        dataset: Texts.
        tokenizer: With `[CLS]` and `[SEP]`.
        max_length: Tokens of a row.
        text_column: Column that holds the texts.

    Returns:
        One column, `input_ids`.

    Raises:
        ValueError: The column is missing, or no text holds a token.
    """
    if text_column not in dataset.column_names:
        raise ValueError(f"there is no column '{text_column}', but {', '.join(map(repr, dataset.column_names))}")

    def pack(batch):
        texts = [text for text in batch[text_column] if text and not text.isspace()]
        encoded = tokenizer(texts, return_attention_mask=False)["input_ids"] if texts else []
        tokens = [token for text in encoded for token in text]
        return {"input_ids": [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]}

    # Rows are cut here, so a text longer than the model's limit is no concern of the tokenizer's.
    limit, tokenizer.model_max_length = tokenizer.model_max_length, int(1e30)
    try:
        packed = dataset.map(pack, batched=True, remove_columns=dataset.column_names, desc=f"Packing to {max_length}")
    finally:
        tokenizer.model_max_length = limit
    if len(packed) == 0:
        raise ValueError(f"column '{text_column}' holds no text: all of its {len(dataset)} rows are empty")
    return packed


class PackedCollator(DataCollatorForLanguageModeling):
    """Masks tokens for masked-language modelling, and gives positions that start anew with every `[CLS]`.

    The model takes position 0 for the start of another text, see `ModernAlbertModel.forward`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3):
        super().__init__(tokenizer=tokenizer, mlm_probability=mlm_probability)

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Rows `input_ids` of up to the same length to `input_ids`, `attention_mask`, `position_ids`, `labels`."""
        batch = super().torch_call(examples)
        places = torch.arange(batch["input_ids"].shape[1])  # [CLS] is special, so that it is never masked
        starts = torch.where(batch["input_ids"] == self.tokenizer.cls_token_id, places, 0).cummax(dim=1).values
        return {**batch, "position_ids": places - starts}
