"""Classes of labelled rows. A class is identified by its name in every split, file format and trained model."""

import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedConfig

from ..data import as_text


logger = logging.getLogger(__name__)

WHOLE = re.compile(r"-?(0|[1-9]\d*)(\.0+)?")
SHOWN = 20  # classes in a message


def read_labels(rows: Dataset) -> list[str]:
    """Labels as strings: the name of a class, `true` or `false`, or a number as written."""
    feature = rows.features["label"]
    return [feature.int2str(v) if isinstance(feature, ClassLabel) else as_text(v) for v in rows["label"]]


def is_number(text: str) -> bool:
    """Whether a string is a finite number."""
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def is_measured(number: str) -> bool:
    """Whether a number is written with a fraction that is not 0, or with an exponent."""
    return not float(number).is_integer() or "e" in number.lower()


def find_classes(rows: Dataset, texts: Sequence[str], source: str, regression: bool | None) -> list[str] | None:
    """Names of the classes of training rows, by class index; None for a regression.

    Labels with a fraction are regressed on; whole numbers, codes such as `01` or `+1`, and other strings are classes.
    Whole numbers are sorted by value, other names alphabetically.

    Args:
        rows: All training rows.
        texts: Their labels, see [`read_labels`].
        source: Name of the rows in messages.
        regression: Whether to regress; None: as above.

    Raises:
        ValueError: A label to regress on is not a number; there is one class, or there are too many for the rows; two
            names mean the same class.
    """
    feature = rows.features["label"]
    names = list(feature.names) if isinstance(feature, ClassLabel) else sorted(set(texts))
    if regression is None:
        regression = all(map(is_number, names)) and any(map(is_measured, names))
    if regression:
        if isinstance(feature, ClassLabel) or not all(map(is_number, names)):
            odd = next((name for name in names if not is_number(name)), names[0])
            raise ValueError(f"'{source}' has the label {odd!r}, no number to regress on; set `regression` to false")
        if len(names) < 2:
            raise ValueError(f"all labels of '{source}' are {names[0]}: there is nothing to learn")
        return None
    if not isinstance(feature, ClassLabel) and all(map(WHOLE.fullmatch, names)):
        names.sort(key=float)
    if len(names) < 2:
        raise ValueError(
            f"all {len(rows)} rows of '{source}' have the label {names[0]!r}; a classifier needs two classes"
        )
    if len(names) > len(rows) or (len(names) == len(rows) > SHOWN):
        raise ValueError(
            f"'{source}' has {len(names)} classes in {len(rows)} rows; is '{names[0]}' a class? Name another "
            "`label_column`, or set `regression` to true for numbers"
        )
    index_names(names, source)
    return names


def canonical(name: str) -> str:
    """Canonical spelling of a whole number (`1`, `1.0`) or truth value (`True`, `true`); otherwise normalised Unicode."""
    name = unicodedata.normalize("NFC", name).strip()
    if match := WHOLE.fullmatch(name):
        return name.removesuffix(match[2] or "")
    return name.lower() if name.lower() in ("true", "false") else name


def index_names(names: Sequence[str], source: str) -> dict[str, int]:
    """Index of each class by its canonical name.

    Raises:
        ValueError: Two names are the same.
    """
    numbers = {}
    for number, name in enumerate(names):
        if (other := numbers.setdefault(canonical(name), number)) != number:
            raise ValueError(
                f"{source} has the classes {names[other]!r} and {name!r}, which are one; write one of them"
            )
    return numbers


def class_names(config: PreTrainedConfig) -> list[str]:
    """Names of a trained classifier's classes; `LABEL_1`, transformers' default for a class without a name, is `1`."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    unnamed = names == [f"LABEL_{number}" for number in range(len(names))]
    return [str(number) for number in range(len(names))] if unnamed else names


def are_unnamed(names: Sequence[str] | None) -> bool:
    """Whether classes are named 0, 1, 2, ..., or there are none."""
    return names is None or list(names) == [str(number) for number in range(len(names))]


def write_classes(config: PreTrainedConfig, names: Sequence[str] | None) -> None:
    """Sets the classes of the head; None: a regression."""
    if are_unnamed(names):
        names = [f"LABEL_{number}" for number in range(len(names or [0]))]  # transformers' default
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def number_labels(
    texts: Sequence[str], source: str, names: Sequence[str] | None, split: str = "training rows"
) -> list[int] | list[float]:
    """Class indices of labels, or values of a regression (`names` None).

    Raises:
        ValueError: A label is not one of the classes, or not a number.
    """
    if names is None:
        for index, text in enumerate(texts):
            if not is_number(text):
                raise ValueError(f"row {index} of '{source}' has the label {text!r}, expected a number")
        return [float(text) for text in texts]
    numbers = index_names(names, f"the {split}")
    if unknown := [index for index, text in enumerate(texts) if canonical(text) not in numbers]:
        raise ValueError(
            f"row {unknown[0]} of '{source}' has the label {texts[unknown[0]]!r}, expected one of the classes of the {split}: "
            f"{show(names)}; the labels of '{source}' are {show(sorted(set(texts)))}"
        )
    return [numbers[canonical(text)] for text in texts]


def show(names: Sequence[str]) -> str:
    """Names for a message, at most `SHOWN` of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def describe(names: Sequence[str] | None, counts: Mapping[str, int]) -> str:
    """How labels were read, for the log: `3 classes ('maybe', 'no', 'yes'); 24 train rows, 12 validation rows`."""
    kind = "a regression" if names is None else f"{len(names)} classes ({show(names)})"
    return f"{kind}; {', '.join(f'{count} {split} rows' for split, count in counts.items())}"


def relabel(rows: Dataset, values: Sequence[Any]) -> Dataset:
    """Rows with other labels, in the column `label`."""
    return rows.remove_columns("label").add_column("label", list(values))
