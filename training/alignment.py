"""Texts as whole sequences for a student and a teacher, and which tokens of the two stand for the same words."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset, IterableDataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .packing import PackedCollator, encode_texts, map_texts, split_pairs


NO_WORD = -1  # of tokens that are compared with nothing: special ones, padding, words that the other side lacks


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers cut every text into the same tokens."""
    states = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (first, second)]
    names = ("added_tokens", "normalizer", "pre_tokenizer", "model", "post_processor")
    return all(states[0].get(name) == states[1].get(name) for name in names)


def words_of_tokens(text: str, offsets: Iterable[tuple[int, int]]) -> list[int]:
    """Number of the word that each token lies in; words are what white space separates.

    Args:
        text: The text.
        offsets: Characters `[start, end)` of each token; empty for special tokens and what a normaliser has removed.

    Returns:
        A number from 0 for each token, -1 for tokens without characters.
    """
    word_at = [NO_WORD] * len(text)
    for number, match in enumerate(re.finditer(r"\S+", text)):
        word_at[match.start() : match.end()] = [number] * (match.end() - match.start())
    words = []
    for start, end in offsets:
        covered = [word for word in word_at[start:end] if word != NO_WORD]
        words.append(covered[0] if covered else NO_WORD)
    return words


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, **kwargs
) -> BatchEncoding:
    """Tokens of texts, or of pairs, with `offset_mapping`: that of a pair is into its two texts, joined by a line break."""
    kwargs |= {"truncation": True, "return_offsets_mapping": True, "return_attention_mask": False}
    if pairs is None:
        return encode_texts(tokenizer, texts, **kwargs)
    encoded = encode_texts(tokenizer, texts, pairs, **kwargs)
    for row, offsets in enumerate(encoded["offset_mapping"]):
        shift = len(texts[row]) + 1
        encoded["offset_mapping"][row] = [
            (start + shift, end + shift) if part == 1 else (start, end)
            for (start, end), part in zip(offsets, encoded.sequence_ids(row), strict=True)
        ]
    return encoded


def split_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, pairs: Sequence[str] | None = None
) -> dict[str, list]:
    """Texts as sequences of at most `max_length` tokens, `[CLS] ... [SEP]`; a longer text becomes several.

    Args:
        texts: Texts that are not empty.
        tokenizer: With offsets.
        max_length: Tokens of a sequence.
        pairs: Second texts, for sequences `[CLS] text [SEP] pair [SEP]`. A longer pair is cut, first its longer text.

    Returns:
        `input_ids`, `texts`, maybe `pairs`, and `offsets` into them (see `encode_with_offsets`), for each sequence.
    """
    sequences = {"input_ids": [], "offsets": [], "texts": [], **({} if pairs is None else {"pairs": []})}
    if not texts:
        return sequences
    encoded = encode_with_offsets(
        tokenizer, texts, pairs, max_length=max_length, return_overflowing_tokens=pairs is None
    )
    owners = encoded.get("overflow_to_sample_mapping", range(len(texts)))
    for ids, offsets, owner in zip(encoded["input_ids"], encoded["offset_mapping"], owners, strict=True):
        spans = [(start, end) for start, end in offsets if end > start]
        if not spans:  # nothing but special tokens
            continue
        if pairs is not None:
            sequences["texts"].append(texts[owner])
            sequences["pairs"].append(pairs[owner])
            first = 0
        else:
            first, last = min(start for start, _ in spans), max(end for _, end in spans)
            sequences["texts"].append(texts[owner][first:last])
        sequences["input_ids"].append(ids)
        sequences["offsets"].append([(s - first, e - first) if e > s else (0, 0) for s, e in offsets])
    return sequences


def align(sequences: dict[str, list], teacher_tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
    """The teacher's tokens of each sequence, and which word each token of either side belongs to.

    Words that one side does not have, or that the teacher knows as unknown tokens only, are compared with nothing.

    Args:
        sequences: See [`split_texts`].
        teacher_tokenizer: With offsets.
        max_length: Tokens that the teacher takes; words behind them are compared with nothing.

    Returns:
        `words`, `teacher_ids` and `teacher_words` of each sequence; words are numbered from 0 without gaps.
    """
    if not sequences["texts"]:
        return {"words": [], "teacher_ids": [], "teacher_words": []}
    texts, pairs = sequences["texts"], sequences.get("pairs")
    encoded = encode_with_offsets(teacher_tokenizer, texts, pairs, max_length=max_length)
    aligned = {"words": [], "teacher_ids": encoded["input_ids"], "teacher_words": []}
    joined = texts if pairs is None else map("\n".join, zip(texts, pairs, strict=True))
    rows = zip(joined, sequences["offsets"], encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for text, offsets, teacher_ids, teacher_offsets in rows:
        words, teacher_words = words_of_tokens(text, offsets), words_of_tokens(text, teacher_offsets)
        known = {
            word
            for word, token in zip(teacher_words, teacher_ids, strict=True)
            if token != teacher_tokenizer.unk_token_id
        }
        shared = sorted((set(words) & set(teacher_words) & known) - {NO_WORD})
        numbers = {word: number for number, word in enumerate(shared)}
        aligned["words"].append([numbers.get(word, NO_WORD) for word in words])
        aligned["teacher_words"].append([numbers.get(word, NO_WORD) for word in teacher_words])
    return aligned


def pack_sequences(
    texts: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    teacher_length: int,
    text_column: str = "text",
    num_proc: int | None = None,
    pair_column: str | None = None,
) -> Dataset | IterableDataset:
    """Rows of at most `max_length` tokens that hold whole sequences, for distillation from an encoder.

    Args:
        texts: Texts.
        tokenizer: The student's.
        teacher_tokenizer: The teacher's; None where it is the student's, so that states are compared token by token.
        max_length: Tokens of a row.
        teacher_length: Tokens that the teacher takes.
        text_column: Column that holds the texts.
        num_proc: Processes that tokenise a `Dataset`.
        pair_column: Column that holds second texts, see [`split_texts`]; rows without one are single texts.

    Returns:
        The column `input_ids` and, with a teacher's tokenizer, `words`, `teacher_ids` and `teacher_words`, with
        `teacher_lengths`, the teacher's tokens of each sequence. Words are numbered through the row.

    Raises:
        ValueError: No text holds a token, or none a word that both sides know.
    """

    def pack(batch):
        columns = defaultdict(list)
        for texts, pairs in split_pairs(batch, text_column, pair_column):
            sequences = split_texts(texts, tokenizer, max_length, pairs)
            columns["input_ids"] += sequences["input_ids"]
            if teacher_tokenizer is not None:
                for name, values in align(sequences, teacher_tokenizer, teacher_length).items():
                    columns[name] += values
        if teacher_tokenizer is not None:
            columns["teacher_lengths"] = [[len(ids)] for ids in columns["teacher_ids"]]
        rows = {name: [] for name in columns}
        count = 0  # words of the current row
        for values in zip(*columns.values(), strict=True):
            sequence = dict(zip(columns, values, strict=True))
            if not rows["input_ids"] or len(rows["input_ids"][-1]) + len(sequence["input_ids"]) > max_length:
                for name in rows:
                    rows[name].append([])
                count = 0
            words = 1 + max(sequence.get("words", []), default=NO_WORD)
            for name, value in sequence.items():
                if name.endswith("words"):
                    value = [word + count if word != NO_WORD else NO_WORD for word in value]
                rows[name][-1].extend(value)
            count += words
        return rows

    packed = map_texts(texts, pack, text_column, f"Packing to {max_length} tokens", num_proc)
    if isinstance(packed, IterableDataset):
        return packed
    if teacher_tokenizer is not None and not any(max(words, default=NO_WORD) >= 0 for words in packed["words"]):
        raise ValueError("no word of the texts is known to the teacher: all its tokens of them are unknown")
    return packed


class AlignedCollator(PackedCollator):
    """A batch of [`pack_sequences`]: what [`PackedCollator`] gives, and for a teacher of another tokenizer its input.

    `words` `[batch, seq]` and `teacher_words` `[sequences, length]` number the words of the whole batch, -1 elsewhere;
    `teacher_input_ids` and `teacher_attention_mask` hold each sequence in a row of its own.
    """

    def __init__(self, tokenizer, max_length=None, teacher_pad_token_id: int | None = None):
        super().__init__(tokenizer, max_length)
        self.teacher_pad_token_id = teacher_pad_token_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        if self.teacher_pad_token_id is None:
            return batch
        count, words, ids, teacher_words = 0, [], [], []
        for row in rows:

            def shift(numbers, count=count):
                return [number + count if number != NO_WORD else NO_WORD for number in numbers]

            length = batch["input_ids"].shape[1]
            words.append(shift(row["words"]) + [NO_WORD] * (length - len(row["words"])))
            start = 0
            for size in row["teacher_lengths"]:
                ids.append(row["teacher_ids"][start : start + size])
                teacher_words.append(shift(row["teacher_words"][start : start + size]))
                start += size
            count += 1 + max(row["words"], default=NO_WORD)
        longest = max(map(len, ids))
        batch["words"] = torch.tensor(words)
        batch["teacher_input_ids"] = torch.tensor(
            [row + [self.teacher_pad_token_id] * (longest - len(row)) for row in ids]
        )
        batch["teacher_attention_mask"] = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        batch["teacher_words"] = torch.tensor([row + [NO_WORD] * (longest - len(row)) for row in teacher_words])
        return batch
