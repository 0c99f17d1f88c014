"""Training, loading and saving a tokenizer of ModernBERT's kind."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


# The order is that of the ids, 0 to 4. [MASK] takes the space before it, so that "a [MASK]" is two
# tokens and the prediction for it carries its own leading space, as every other word does.
SPECIAL_TOKENS = {
    "unk_token": AddedToken("[UNK]", special=True),
    "cls_token": AddedToken("[CLS]", special=True),
    "sep_token": AddedToken("[SEP]", special=True),
    "pad_token": AddedToken("[PAD]", special=True),
    "mask_token": AddedToken("[MASK]", special=True, lstrip=True),
}
# Without them the model cannot be pretrained or batched; [UNK] is never produced at byte level.
REQUIRED_TOKENS = ("cls_token", "sep_token", "pad_token", "mask_token")


def _round_up(size: int, multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f"the multiple ({multiple}) that the vocabulary is padded to must be 1 or more")
    return -(-size // multiple) * multiple


def _only_str(texts: Iterable[str]) -> Iterator[str]:
    for index, text in enumerate(texts):
        # The trainer itself would take a list of strings for a batch, and say nothing.
        if not isinstance(text, str):
            raise TypeError(f"text {index} is of type {type(text).__name__}; every text must be a str")
        yield text


def vocabulary_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Fields of the configuration of a new model that is to read this tokenizer: `vocab_size` and special tokens."""
    ids = {"pad": tokenizer.pad_token_id, "cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id}
    ids |= {"bos": ids["cls"], "eos": ids["sep"]}
    return {"vocab_size": padded_vocab_size(tokenizer), **{f"{name}_token_id": token for name, token in ids.items()}}


def padded_vocab_size(tokenizer: PreTrainedTokenizerBase, multiple: int = 64) -> int:
    """Smallest `vocab_size` that a model may have for this tokenizer.

    It counts up to the highest id, not the number of tokens, since some vocabularies have gaps.

    Args:
        tokenizer: The tokenizer that the model is to read.
        multiple: The result is a multiple of this; 64 keeps the output projection aligned on tensor cores.

    Returns:
        The size to write into the model's config. Rows past the highest id are never looked up.

    Raises:
        ValueError: `multiple` is below 1.
    """
    return _round_up(max(tokenizer.get_vocab().values()) + 1, multiple)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 50368,
    min_frequency: int = 2,
    pad_vocab_to_multiple_of: int = 64,
    model_max_length: int = 8192,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with ModernBERT's special tokens, `[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`.

    `[UNK]`, `[CLS]`, `[SEP]`, `[PAD]`, `[MASK]` take the ids 0 to 4, where ModernBERT has them at 50280 to
    50284: read the ids from the tokenizer, never write them down. Any text without a special token in it comes
    back unchanged from `decode(..., skip_special_tokens=True)`.

    `vocab_size` is the size of the model, rounded up to `pad_vocab_to_multiple_of`. The tokenizer never has more
    tokens than that, and has fewer where the corpus is too small to fill it; the config of the model then takes
    either that `vocab_size` or, to spare the empty rows, `padded_vocab_size(tokenizer)`.

    Args:
        texts: What to learn from, read once.
        vocab_size: Size of the model's vocabulary, at least 261: the 256 bytes and the special tokens.
        min_frequency: How often a pair must occur to be merged.
        pad_vocab_to_multiple_of: `vocab_size` is rounded up to a multiple of this.
        model_max_length: Longest input of the model in tokens, where `truncation=True` cuts.

    Returns:
        A tokenizer whose encodings hold `input_ids` and `attention_mask`, padded on the right.

    Raises:
        TypeError: `texts` is one str, or holds something that is not a str.
        ValueError: `texts` is empty or holds only empty texts, `vocab_size` has no room for the 256 bytes and the
            special tokens, or `pad_vocab_to_multiple_of` is below 1.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` ({vocab_size}) is below {smallest}, the 256 bytes and {len(SPECIAL_TOKENS)} special tokens;"
            " raise it"
        )
    vocab_size = _round_up(vocab_size, pad_vocab_to_multiple_of)
    if isinstance(texts, str):
        raise TypeError("`texts` is a single str and would be read letter by letter; pass a list of texts")
    filled = filter(None, _only_str(texts))
    first = next(filled, None)
    if first is None:
        raise ValueError("nothing to train on: `texts` is empty, or all its texts are")

    # No NFC normaliser, which ModernBERT has: it rewrites text that is not composed ("e" + accent), so that decoding
    # would not give back the input, nor offsets point into it. Normalise the corpus beforehand where that is wanted.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS.values()),
        # All of them, seen or not, so that no text is ever out of vocabulary.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(chain([first], filled), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def load_tokenizer(name_or_folder: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and makes sure that the model can be trained with it.

    `token_type_ids`, for which the model has no use, is taken out of `model_input_names`.

    Args:
        name_or_folder: Name on the Hub, such as `answerdotai/ModernBERT-base`, or a local folder.

    Returns:
        The tokenizer, as `AutoTokenizer` gives it.

    Raises:
        OSError: There is no such tokenizer, from `AutoTokenizer`.
        ValueError: It knows only special tokens, or has no token for `[CLS]`, `[SEP]`, `[PAD]` or `[MASK]`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        if str(name_or_folder) in str(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load the tokenizer of '{name_or_folder}': {error}") from error
    # transformers 5 builds an empty tokenizer for a folder that has a model's config but no tokenizer file.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"'{name_or_folder}' has no vocabulary; save a tokenizer in it with `save_tokenizer`")
    missing = [name for name in REQUIRED_TOKENS if getattr(tokenizer, name, None) is None]
    if missing:
        cure = {name: SPECIAL_TOKENS[name].content for name in missing}
        raise ValueError(
            f"the tokenizer of '{name_or_folder}' has no {', '.join(missing)}; load it with `AutoTokenizer`, call"
            f" `add_special_tokens({cure})`, save it with `save_tokenizer` and load that folder, or train one with"
            " `train_tokenizer`"
        )
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Saves a tokenizer such that transformers 4.x, 5.x and `tokenizers` alone all read it alike.

    Args:
        tokenizer: A tokenizer backed by `tokenizers`.
        folder: Where to write `tokenizer.json` and `tokenizer_config.json`; created if need be.

    Raises:
        ValueError: The tokenizer is a pure Python one, which has no `tokenizer.json`.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no `tokenizer.json` to save; load its fast counterpart")
    # An earlier call with `truncation=True` or `padding=True` leaves both set in the backend, to be saved with it;
    # each call sets them anew, a reader with `tokenizers` alone would not.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)

    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # 5.x writes `TokenizersBackend`, a class that 4.x does not have; both know this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # The class above has `token_type_ids` by default, and 5.x writes only what it was constructed with.
    config["model_input_names"] = tokenizer.model_input_names
    # 4.x takes `extra_special_tokens` for a dict and fails on the list of 5.x; both know the older name.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # These describe how this process found the tokenizer.
    for name in ("is_local", "local_files_only"):
        config.pop(name, None)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
