"""From texts to batches: tokenised, packed into rows that hold several sequences each, masked and collated."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import BatchEncoding, PreTrainedTokenizerBase


def encode_texts(tokenizer: PreTrainedTokenizerBase, *texts: Sequence[str], **kwargs) -> BatchEncoding:
    """Tokenises text of a user: the name of a special token in it, such as `[MASK]`, is tokenised as text.

    Args:
        tokenizer: Any tokenizer of transformers.
        texts: One list of texts, or two lists for pairs.
        **kwargs: As for the tokenizer's call.
    """
    return tokenizer(*map(list, texts), split_special_tokens=True, **kwargs)


def collate_batches(rows: Iterable[dict], collate: Callable[[list[dict]], dict], batch_size: int) -> list[dict]:
    """Collated batches of at most `batch_size` rows, in order."""
    rows = list(rows)
    return [dict(collate(rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)]


def pack_texts(
    texts: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    text_column: str = "text",
    num_proc: int | None = None,
    pair_column: str | None = None,
) -> Dataset | IterableDataset:
    """Rows of `max_length` tokens, cut from all texts, each as `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`.

    No token is lost, and only the last row of each thousand texts is shorter. A text that does not fit continues in the
    next row; [`PackedCollator`] keeps sequences from attending to each other. Empty texts are dropped. Rows of a
    `Dataset` are cached on disk by `datasets` and reused by the next run on the same texts; rows of an `IterableDataset`
    are computed on the fly.

    Args:
        texts: Rows with the texts.
        tokenizer: A tokenizer with `[CLS]` and `[SEP]`.
        max_length: Tokens of a row.
        text_column: Column that holds the texts.
        num_proc: Processes that tokenise a `Dataset`.
        pair_column: Column that holds second texts; rows without one are single texts.

    Returns:
        One column, `input_ids`.

    Raises:
        ValueError: All texts are empty.
    """

    def pack(batch):
        encoded = []
        for texts in split_pairs(batch, text_column, pair_column):
            texts = [part for part in texts if part is not None]
            if texts[0]:  # rows are cut here, so the tokenizer need not warn about long texts
                encoded += encode_texts(tokenizer, *texts, return_attention_mask=False, verbose=False)["input_ids"]
        tokens = [token for text in encoded for token in text]
        return {"input_ids": [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]}

    return map_texts(texts, pack, text_column, f"Packing to {max_length} tokens", num_proc)


def split_pairs(
    batch: dict, text_column: str, pair_column: str | None
) -> tuple[tuple[list[str], None], tuple[list[str], list[str]]]:
    """The single texts of a batch, and its pairs as first and second texts, without texts that are empty."""
    texts = batch[text_column]
    singles, firsts, seconds = [], [], []
    for text, pair in zip(texts, batch.get(pair_column) or [None] * len(texts), strict=True):
        filled = [part for part in (text, pair) if part and not part.isspace()]
        if len(filled) == 2:
            firsts.append(text)
            seconds.append(pair)
        else:
            singles += filled
    return (singles, None), (firsts, seconds)


def map_texts(
    texts: Dataset | IterableDataset,
    pack: Callable[[dict], dict],
    text_column: str,
    description: str,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    """Rows that a function makes of batches of texts.

    Raises:
        ValueError: There are none.
    """
    if isinstance(texts, IterableDataset):
        return texts.map(pack, batched=True, remove_columns=texts.column_names)
    packed = texts.map(pack, batched=True, remove_columns=texts.column_names, num_proc=num_proc, desc=description)
    if len(packed) == 0:
        raise ValueError(f"column '{text_column}' holds no text: all of its {len(texts)} rows are empty")
    return packed


def pack_enough(texts: Dataset, pack: Callable[[Dataset], Dataset], needed: int, seed: int = 0) -> Dataset:
    """Packed rows of as many texts, drawn at random, as fill `needed` rows; of all texts where they fill fewer.

    So a short run on a large collection need not wait for rows that it will not see.

    Args:
        texts: Rows with the texts.
        pack: Makes rows of them, as `pack_texts` does.
        needed: Rows that the run takes.
        seed: Of the draw.

    Raises:
        ValueError: The texts drawn are empty.
    """
    texts = texts.shuffle(seed=seed)
    count = min(1000, len(texts))  # tells how many texts the rows take
    while len(rows := pack(texts.select(range(count)))) < needed and count < len(texts):
        count = min(math.ceil(1.1 * count * needed / len(rows)), len(texts))
    return rows


class TokenMasker:
    """Masks tokens for masked-language modelling; the masks depend on the seed and a key per row alone.

    So a run masks the same tokens when it is resumed, or uses other micro-batches or numbers of processes, and no state
    has to be saved. Of the chosen tokens 80% become `[MASK]`, 10% a random token, and 10% stay (BERT).

    Args:
        tokenizer: Its special tokens are never chosen.
        probability: Share of the other tokens that is chosen.
        seed: Of everything random.
        masked_share: Share of the sequences in which tokens are chosen at all.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.3, seed: int = 0, masked_share: float = 1.0
    ):
        self.masked_share = masked_share
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.mask_token_id = tokenizer.mask_token_id
        self.cls_token_id = tokenizer.cls_token_id
        self.num_tokens = len(tokenizer)
        self.probability = probability
        self.seed = seed

    def choose_sequences(self, input_ids: torch.Tensor, keys: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Whether each token is of a sequence that is masked, `[rows, length]`; a `[CLS]` starts a sequence."""
        sequence_ids = (input_ids == self.cls_token_id).cumsum(dim=1)
        # Other numbers than those that choose tokens, which stay as they are without clean sequences.
        draws = np.stack(
            [np.random.default_rng([self.seed, len(key), *key, 1]).random(input_ids.shape[1] + 1) for key in keys]
        )
        return torch.from_numpy(draws < self.masked_share).to(input_ids.device).gather(1, sequence_ids)

    def __call__(self, input_ids: torch.Tensor, keys: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
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
        if self.masked_share < 1:
            chosen &= self.choose_sequences(input_ids, keys)
        labels = input_ids.masked_fill(~chosen, -100)
        masked = input_ids.masked_fill(chosen & (fate < 0.8), self.mask_token_id)
        random_tokens = ((fate - 0.8) / 0.1 * self.num_tokens).long().clamp(0, self.num_tokens - 1)
        # A random [CLS] would look like the start of a sequence.
        swapped = chosen & (fate >= 0.8) & (fate < 0.9) & ~torch.isin(random_tokens, special)
        return torch.where(swapped, random_tokens, masked), labels


def mask_rows(rows: Dataset, masker: TokenMasker) -> Dataset:
    """Packed rows with fixed masks and `labels`, so that every evaluation predicts the same tokens."""

    def mask(row, index):
        input_ids, labels = masker(torch.tensor([row["input_ids"]]), [(index,)])
        return {"input_ids": input_ids[0].tolist(), "labels": labels[0].tolist()}

    return rows.map(mask, with_indices=True, desc="Masking")


class PackedCollator:
    """Pads packed rows to one length, with positions that restart at 0 in every sequence.

    The model starts a new sequence at position 0, see `ModernAlbertModel.forward`.

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

        positions = torch.arange(length)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {
            "input_ids": pad("input_ids", self.pad_token_id),
            "attention_mask": (positions < lengths[:, None]).long(),
        }
        # [CLS] is special, so that it is never masked.
        starts = torch.where(batch["input_ids"] == self.cls_token_id, positions, 0).cummax(dim=1).values
        batch["position_ids"] = positions - starts
        if "labels" in rows[0]:
            batch["labels"] = pad("labels", -100)
        return batch
