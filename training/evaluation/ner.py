"""Token classification: CoNLL files and rows of tokens and tags, tag schemes, windows in which each word is scored once."""

import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from ..data import read_rows
from ..packing import encode_texts
from .labels import show


logger = logging.getLogger(__name__)

CONLL = (".conll", ".bio", ".iob", ".iob2", ".tsv", ".txt")
DELIMITERS = {"\t": "tabs", None: "white space"}

# Prefixes of a scheme, and those that may follow each other within an entity.
SCHEMES = {
    "IOB2": ("BI", {"BI", "II"}),
    "IOBES": ("BIES", {"BI", "BE", "II", "IE"}),
    "BILOU": ("BILU", {"BI", "BL", "II", "IL"}),
}


def read_tagged(paths: Sequence[str], token_column: str, tag_column: str | None) -> Dataset:
    """Rows with `tokens` and `tags` (strings), from CoNLL files or from rows of lists.

    Args:
        paths: Files or globs, all CoNLL (by ending, see `CONLL`) or all readable by [`~data.read_rows`].
        token_column: Column of tokens, in rows of lists.
        tag_column: Column of tags, in rows of lists; default: `ner_tags` or `tags`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line or a row is broken, or there are none.
    """
    files = [name for pattern in paths for name in match_files(pattern)]
    conll = [name for name in files if Path(name).suffix.lower() in CONLL]
    if conll and len(conll) < len(files):
        raise ValueError(f"{', '.join(files)} are files of two kinds; give {', '.join(CONLL)} or lists of tokens")
    source = ", ".join(paths)
    if not conll:
        return check_tagged(read_rows(paths), source, token_column, tag_column)
    rows = [sentence for name in files for sentence in read_conll(name)]
    return check_tagged(Dataset.from_list(rows), source, "tokens", "tags")


def match_files(pattern: str) -> list[str]:
    """The file of that name if it exists, else the files that match it as a glob.

    Raises:
        FileNotFoundError: No file matches.
    """
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not names:
        raise FileNotFoundError(f"no file matches '{pattern}'")
    return names


def read_conll(path: str) -> Iterator[dict[str, list[str]]]:
    """Sentences of a CoNLL file: one `token ... tag` per line, separated by tabs or spaces, an empty line between sentences.

    `-DOCSTART-` lines are skipped, and so are comments: lines that begin with `# ` and do not end with a tag.

    Raises:
        ValueError: The file is not UTF-8, or the number of columns changes between lines.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is no UTF-8 ({error}); convert it") from error
    delimiter = "\t" if any("\t" in line for line in lines) else None
    expected, tokens, tags = None, [], []
    for number, line in enumerate([*lines, ""], 1):
        columns = line.rstrip("\r").split(delimiter) if line.strip() else []
        if columns and columns[0] == "-DOCSTART-":
            columns = []
        if not columns:
            if tokens:
                yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []
            continue
        if line.startswith("# ") and not is_tag(columns[-1]):
            continue
        expected = expected or len(columns)
        if len(columns) < 2 or len(columns) != expected or not (columns[0].strip() and columns[-1].strip()):
            raise ValueError(
                f"line {number} of '{path}' is {line!r}, {len(columns)} columns separated by {DELIMITERS[delimiter]}; "
                f"expected {max(expected, 2)}, a token first and its tag last"
            )
        tokens.append(columns[0])
        tags.append(columns[-1].strip())


def check_tagged(rows: Dataset, source: str, token_column: str, tag_column: str | None) -> Dataset:
    """Rows with `tokens` and `tags`, the tags as names.

    Raises:
        ValueError: There are no rows; a column is missing; or a row has no tokens, another number of tags, or a tag
            without a name.
    """
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows")
    tag_column = tag_column or next((name for name in ("ner_tags", "tags") if name in rows.column_names), "tags")
    for column in (token_column, tag_column):
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column '{column}', but {', '.join(map(repr, rows.column_names))}")
    kind = getattr(rows.features[tag_column], "feature", None)
    names = kind.names if isinstance(kind, ClassLabel) else None
    tokens, tags = [], []
    for index, row in enumerate(rows.select_columns([token_column, tag_column])):
        words, given = row[token_column], row[tag_column]
        where = f"row {index} of {source}"
        if not isinstance(words, list) or not isinstance(given, list):
            raise ValueError(f"{where} has {words!r} and {given!r}, expected a list of tokens and a list of tags")
        if len(words) != len(given) or not words:
            raise ValueError(
                f"{where} has {len(words)} tokens and {len(given)} tags, expected as many of both, and some"
            )
        for word, tag in zip(words, given, strict=True):
            if not isinstance(word, str):
                raise ValueError(f"{where} has the token {word!r}, expected a text")
            if not isinstance(tag, str) and (
                names is None or not isinstance(tag, int) or tag not in range(len(names))
            ):
                raise ValueError(
                    f"{where} has the tag {tag!r}, expected a name such as B-PER or O; numbers need the names of a "
                    "`ClassLabel`, as on the Hub and in parquet files of `datasets`"
                )
        tokens.append(words)
        tags.append([tag if isinstance(tag, str) else names[tag] for tag in given])
    return Dataset.from_dict({"tokens": tokens, "tags": tags})


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and type of a tag; `("O", "O")` for `O`.

    Raises:
        ValueError: The tag belongs to no scheme.
    """
    prefix, delimiter, kind = tag.partition("-")
    if tag == "O":
        return "O", "O"
    if delimiter != "-" or prefix not in set("BIESLU") or not kind:
        raise ValueError(f"'{tag}' is no tag of IOB, IOBES or BILOU; write O, or a prefix and a type, such as B-PER")
    return prefix, kind


def is_tag(text: str) -> bool:
    """Whether [`split_tag`] accepts a string."""
    try:
        return bool(split_tag(text))
    except ValueError:
        return False


def find_scheme(rows: Dataset, source: str) -> str:
    """Tag scheme of the rows: IOB1, IOB2, IOBES or BILOU. The log counts the tags that break it, and shows the first.

    Raises:
        ValueError: A tag belongs to no scheme, or two schemes are mixed.
    """
    split = {tag: split_tag(tag) for row in rows["tags"] for tag in set(row)}
    prefixes = {prefix for prefix, _ in split.values()} - {"O"}
    if prefixes & set("ES") and prefixes & set("LU"):
        raise ValueError(
            f"{source} mixes tags of IOBES (E, S) and BILOU (L, U); use one scheme: {show(sorted(split))}"
        )
    scheme = "IOBES" if prefixes & set("ES") else "BILOU" if prefixes & set("LU") else "IOB2"
    broken, entities = find_broken(rows["tags"], split, scheme)
    if scheme == "IOB2" and broken:
        # IOB1 writes B only for an entity directly after another one of its type.
        needless = any(
            split[tag][0] == "B" and split[before][1] != split[tag][1]
            for row in rows["tags"]
            for before, tag in zip(["O", *row], row, strict=False)
        )
        if not needless:
            return "IOB1"
    if broken:
        row, position = broken[0]
        tags = rows[row]["tags"]
        logger.warning(
            "%s: %d of about %d entities break %s, the first in row %d (%s before %s); they are scored as conlleval does",
            *(source, len(broken), entities, scheme, row),
            *(tags[position - 1] if position else "the start", tags[position] if position < len(tags) else "the end"),
        )
    return scheme


def find_broken(tags: Sequence[Sequence[str]], split: Mapping[str, tuple], scheme: str) -> tuple[list[tuple], int]:
    """Row and position of each tag that must not follow its predecessor, and the number of entities."""
    within = SCHEMES[scheme][1]
    opening = set() if scheme == "IOB2" else set("BI")  # an entity must continue after these
    broken, entities = [], 0
    for row, sequence in enumerate(tags):
        before = ("O", "O")
        for position, (prefix, kind) in enumerate([*(split[tag] for tag in sequence), ("O", "O")]):
            goes_on = before[1] == kind and before[0] + prefix in within
            starts = prefix in "BSUO"
            unfinished = before[0] in opening and not goes_on
            if not (goes_on or starts) or unfinished:
                broken.append((row, position))
            entities += prefix in "BSU" or (prefix != "O" and not goes_on)
            before = (prefix, kind)
    return broken, entities


def list_tags(rows: Dataset, scheme: str) -> list[str]:
    """All tags of a scheme for the types of the rows, `O` first."""
    letters = SCHEMES.get(scheme, SCHEMES["IOB2"])[0]
    kinds = sorted({split_tag(tag)[1] for row in rows["tags"] for tag in set(row)} - {"O"})
    return ["O", *(f"{letter}-{kind}" for kind in kinds for letter in letters)]


def check_known(rows: Dataset, names: Sequence[str], source: str) -> None:
    """Checks that the model knows all tags.

    Raises:
        ValueError: A tag is unknown.
    """
    found = sorted({tag for row in rows["tags"] for tag in row})
    if unknown := [tag for tag in found if tag not in names]:
        index = next(index for index, row in enumerate(rows["tags"]) if unknown[0] in row)
        raise ValueError(
            f"row {index} of {source} has the tag '{unknown[0]}', expected one of {show(names)}; the tags of {source} are "
            f"{show(found)}"
        )


def make_windows(
    batch: Mapping[str, list],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    numbers: Mapping[str, int],
    max_length: int,
    stride: int,
) -> dict[str, list]:
    """Windows over the tokens of a batch of rows, for `Dataset.map`.

    Each word has one label, on its first token, in the window where that token is farthest from a cut; all other labels
    are -100. Words without a token have no label.

    Args:
        batch: Columns `tokens` and `tags`.
        indices: Indices of the rows in the data set.
        tokenizer: A fast tokenizer.
        numbers: Class index of each tag.
        max_length: Tokens of a window, special tokens included.
        stride: Tokens that neighbouring windows share.

    Returns:
        Inputs of the model, `labels`, and for [`read_tags`] `row` and `words`, the indices of the labelled words.
    """
    encoded = encode_texts(
        tokenizer,
        batch["tokens"],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    owners = encoded.pop("overflow_to_sample_mapping")
    columns = {"labels": [], "row": [], "words": []}
    windows = [[] for _ in indices]  # of each row: (window, word of each position)
    for window, owner in enumerate(owners):
        windows[owner].append((window, encoded.word_ids(window)))
    for row, (index, tags) in enumerate(zip(indices, batch["tags"], strict=True)):
        last, best = None, {}  # word to (distance from a cut, window, position)
        for count, (window, words) in enumerate(windows[row]):
            inner = [position for position, word in enumerate(words) if word is not None]
            for order, position in enumerate(inner):
                word = words[position]
                if order > 0:
                    within = words[inner[order - 1]] == word
                else:  # the previous window has the start of a word that continues here and, with a stride, this token
                    within = count > 0 and (stride > 0 or last == word)
                if within:
                    continue
                left = order if count > 0 else len(inner)
                right = len(inner) - 1 - order if count + 1 < len(windows[row]) else len(inner)
                best[word] = max(best.get(word, (-1,)), (min(left, right), -window, position))
            last = words[inner[-1]] if inner else None
        for window, words in windows[row]:
            chosen = sorted((p, word) for word, (_, other, p) in best.items() if -other == window)
            labels = [-100] * len(words)
            for position, word in chosen:
                labels[position] = numbers[tags[word]]
            columns["labels"].append(labels)
            columns["row"].append(index)
            columns["words"].append([word for _, word in chosen])
    return {**encoded, **columns}


def read_tags(
    rows: Dataset, windows: Sequence[Mapping[str, Any]], logits: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> list[list[str]]:
    """The predicted tag of each word of each row; `O` for a word without a token.

    Args:
        rows: With `tokens`.
        windows: `row` and `words` of [`make_windows`].
        logits: `[windows, length, classes]`.
        labels: `[windows, length]`, -100 except at labelled words.
        names: Names of the classes.
    """
    predicted = [["O"] * len(words) for words in rows["tokens"]]
    for window, scores, given in zip(windows, logits, labels, strict=True):
        classes = scores[given != -100].argmax(-1)
        for word, number in zip(window["words"], classes, strict=True):
            predicted[window["row"]][word] = names[number]
    return predicted
