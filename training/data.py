"""The reader of all scripts: local files of any kind, and data sets of the Hub. See docs/data.md."""

import csv
import glob
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError


logger = logging.getLogger(__name__)

ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")
LARGEST_SHARE_DROPPED = 0.01
csv.field_size_limit(2**31 - 1)  # of one text, in characters


def find_files(patterns: Sequence[str]) -> list[str]:
    """Resolves paths and globs, in their order; a name that exists is a path, not a glob.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: A file has an ending for which there is no reader.
    """
    found = []
    for pattern in patterns:
        names = glob.escape(pattern) if Path(pattern).exists() else pattern
        paths = [path for path in sorted(glob.glob(names, recursive=True)) if Path(path).is_file()]
        if not paths:
            there = f"'{pattern}' is a folder; name its files, such as '{pattern}/*.jsonl'"
            raise FileNotFoundError(there if Path(pattern).is_dir() else f"no file matches '{pattern}'")
        for path in paths:
            if Path(path).suffix.lower() not in ENDINGS:
                raise ValueError(f"cannot read '{path}'; convert it to one of {', '.join(ENDINGS)}")
        found += paths
    return list(dict.fromkeys(found))


def is_local(source: str) -> bool:
    """Whether a source names files, rather than a data set of the Hub."""
    return glob.has_magic(source) or Path(source).exists() or Path(source).suffix.lower() in ENDINGS


def read_rows(sources: str | Sequence[str], split: str = "train", configuration: str | None = None) -> Dataset:
    """All rows of local files or of data sets of the Hub; a row that cannot be read is an error.

    Cells of csv and tsv are texts, empty ones None. A column that holds texts in one file or row and other values
    elsewhere holds texts: JSON's `1` becomes "1", `true` becomes "true".

    Args:
        sources: Local files or globs, or names on the Hub, `name` or `name:configuration`.
        split: Split of Hub data sets; local files have none.
        configuration: Of Hub data sets whose name states none.

    Raises:
        FileNotFoundError: A pattern matches no file, or there is no such data set.
        ValueError: A file cannot be read, or there are no rows.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    local = [source for source in sources if is_local(source)]
    parts = [_load_hub(source, split, configuration) for source in sources if source not in local]
    if local:
        paths = find_files(local)
        features = find_features(paths)
        texts = [name for name, feature in features.items() if feature == Value("string")]
        parts.insert(
            0, _generate(generate_rows, features, paths=tuple(paths), stamps=_stamps(paths), texts=tuple(texts))
        )
    rows = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if len(rows) == 0:
        raise ValueError(f"'{', '.join(sources)}' has no rows")
    return rows


def _load_hub(source: str, split: str, configuration: str | None = None, streaming: bool = False):
    name, _, stated = source.partition(":")
    try:
        return load_dataset(name, stated or configuration, split=split, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"cannot read '{source}': {error.__cause__ or error}") from error


def _stamps(paths: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Size and time of files, so that the cache of an older version is not used."""
    return tuple((Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths)


def _generate(generator, features: Features, **kwargs) -> Dataset:
    if next(generator(**kwargs), None) is None:  # `datasets` would fail without naming the file
        raise ValueError(f"{', '.join(map(repr, kwargs['paths']))} has no rows")
    try:
        return Dataset.from_generator(generator, features=features, gen_kwargs=kwargs)
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | OSError):
            raise cause from error
        raise ValueError(f"cannot read {', '.join(kwargs['paths'])}: {cause or error}") from error


def generate_rows(paths: Sequence[str], stamps: tuple, texts: Sequence[str]) -> Iterator[dict]:
    """Rows of files; values of the columns named in `texts` become text."""
    for path in paths:
        for _, row in read_file(path):
            yield {
                name: as_text(value) if name in texts and not isinstance(value, str) else value
                for name, value in row.items()
            }


def generate_texts(
    paths: Sequence[str],
    column: str,
    line_breaks: bool = False,
    stamps: tuple = (),
    pair_column: str | None = None,
) -> Iterator[dict[str, str | None]]:
    """Texts of files, in a column of that name; null rows are counted and left out.

    With a `pair_column`, rows have a second text in it, or None, also where a file lacks that column.

    Raises:
        ValueError: A row lacks the column or holds no text in it, or more than 1% of the rows are null.
    """
    for path in paths:
        count = missing = 0
        for where, row in read_file(path, column, line_breaks):
            if column not in row:
                raise ValueError(f"'{path}' has no column '{column}', but {', '.join(map(repr, row))} ({where})")
            texts, count = {column: row[column]}, count + 1
            if pair_column is not None:
                texts[pair_column] = row.get(pair_column)
            for name, text in texts.items():
                if not isinstance(text, str | None):
                    raise ValueError(
                        f"{where} of '{path}' has {json.dumps(text, default=str)[:80]} as '{name}', expected a text; name "
                        f"another column with `{'text' if name == column else 'pair'}_column`, or correct that row"
                    )
            if texts[column] is None:
                missing += 1
            else:
                yield texts
        if count == 0:
            logger.warning("'%s' has no rows", path)
        report_dropped(missing, count, path, f"no '{column}'")


def report_dropped(dropped: int, count: int, source: str, reason: str) -> None:
    """Logs how many rows were left out, and why.

    Raises:
        ValueError: More than 1% of the rows were left out.
    """
    if dropped > LARGEST_SHARE_DROPPED * count:
        raise ValueError(
            f"{dropped} of the {count} rows of '{source}' have {reason}, more than {LARGEST_SHARE_DROPPED:.0%}; correct "
            "the file, or remove those rows"
        )
    if dropped:
        logger.warning("%d of the %d rows of '%s' are left out: they have %s", dropped, count, source, reason)


def read_file(path: str | Path, text_column: str = "text", line_breaks: bool = False) -> Iterator[tuple[str, dict]]:
    """Rows of one file, each after its position for messages, such as `line 7`.

    Args:
        path: File with one of the `ENDINGS`, in lower or upper case.
        text_column: Name of the column for the lines of .txt and .md.
        line_breaks: Whether these lines keep their line break.

    Raises:
        ValueError: The file is damaged or not UTF-8, a row has too many or too few fields, or a key occurs twice.
    """
    ending = Path(path).suffix.lower()
    try:
        if ending == ".parquet":
            yield from _read_parquet(path, text_column)
            return
        with open(path, encoding=_find_encoding(path), newline="" if ending == ".csv" else "\n") as file:
            if ending in (".csv", ".tsv"):
                yield from _read_table(file, path, ending)
            elif ending == ".jsonl":
                yield from _read_json_lines(file, path)
            elif ending == ".json":
                yield from _read_json(file.read(), path)
            else:
                for number, line in enumerate(file, start=1):
                    yield f"line {number}", {text_column: line if line_breaks else strip_break(line)}
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read '{path}': it is not UTF-8 ({error.object[error.start : error.start + 1]!r} at byte "
            f"{error.start} of a block); save it as UTF-8"
        ) from error


def strip_break(line: str) -> str:
    """A line without its line break."""
    return line.removesuffix("\n").removesuffix("\r")


def _find_encoding(path: str | Path) -> str:
    with open(path, "rb") as file:
        start = file.read(2)
    return "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _read_parquet(path: str | Path, text_column: str) -> Iterator[tuple[str, dict]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(1000):
                for content in batch.to_pylist():
                    row += 1
                    yield f"row {row}", content
    except pa.ArrowException as error:
        raise ValueError(f"cannot read '{path}' as parquet: {error}; correct or leave out the file") from error


def _read_table(file, path: str | Path, ending: str) -> Iterator[tuple[str, dict]]:
    """Rows of csv, with quoted fields, and of tsv, where a quotation mark is text."""
    if ending == ".csv":
        reader = csv.reader(file, strict=True)
        rows = ((reader.line_num, fields) for fields in reader)
    else:
        rows = ((number, strip_break(line).split("\t")) for number, line in enumerate(file, start=1))
    header = None
    quoted = 0
    try:
        for number, cells in rows:
            if cells in ([], [""]):  # a blank line
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header):
                    raise ValueError(f"cannot read '{path}': a column of the header {header} is there twice")
                continue
            if len(cells) != len(header):
                cure = (
                    "quote a field that holds a comma"
                    if ending == ".csv"
                    else "a field cannot hold a tab or line break"
                )
                raise ValueError(
                    f"cannot read '{path}': line {number} has {len(cells)} fields, and the header {len(header)} "
                    f"({', '.join(header)}); {cure}"
                )
            quoted += ending == ".tsv" and any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)
            yield f"line {number}", {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(
            f"cannot read '{path}': {error} (line {reader.line_num}); a quotation mark that begins a field must end it, "
            "and be doubled inside"
        ) from error
    if quoted:
        logger.warning("'%s': %d rows have fields in quotation marks, which are text in a tsv file", path, quoted)


def _parse_json(text: str, path: str | Path, where: str) -> Any:
    def once(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key '{twice}' is there twice")
        return row

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
        if "\\ud" in text or "\\uD" in text:  # a surrogate without its pair is not a character
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read '{path}', {where}: {error}; correct or leave out the file") from error


def _read_json_lines(lines, path: str | Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"line {number}", _check_row(_parse_json(line, path, f"line {number}"), path, f"line {number}")


def _read_json(text: str, path: str | Path) -> Iterator[tuple[str, dict]]:
    """A list of objects, one object, or one object per line."""
    if not text.strip():
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_json_lines(text.split("\n"), path)
            return
    rows = _parse_json(text, path, "as JSON")
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"row {number}", _check_row(row, path, f"row {number}")


def _check_row(row: Any, path: str | Path, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"cannot read '{path}': {where} is no object but {json.dumps(row)[:80]}")
    return row


def as_text(value: Any) -> str | None:
    """A value as JSON writes it; strings are unchanged."""
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def find_features(paths: Sequence[str]) -> Features:
    """Types of the columns over all files.

    Raises:
        ValueError: A file cannot be read, or a column holds lists or objects beside something else.
    """
    found = {}
    for path in paths:
        for name, kind in _find_types(path).items():
            found[name] = _unite(found[name], kind, name, path) if name in found else kind
    return Features({name: Value("string") if kind == Value("null") else kind for name, kind in found.items()})


def _find_types(path: str) -> dict[str, Any]:
    ending = Path(path).suffix.lower()
    if ending == ".parquet":
        try:
            return dict(Features.from_arrow_schema(pyarrow.parquet.read_schema(path)))
        except pa.ArrowException as error:
            raise ValueError(f"cannot read '{path}' as parquet: {error}; correct or leave out the file") from error
    if ending not in (".json", ".jsonl"):
        _, first = next(read_file(path), (None, {}))
        return dict.fromkeys(first, Value("string"))
    types, chunk = {}, []
    for numbered_row in read_file(path):
        chunk.append(numbered_row)
        if len(chunk) == 1000:
            _add_types(types, chunk, path)
            chunk = []
    _add_types(types, chunk, path)
    return types


def _add_types(types: dict[str, Any], chunk: list[tuple[str, dict]], path: str) -> None:
    for name in dict.fromkeys(name for _, row in chunk for name in row):
        values = [row.get(name) for _, row in chunk]
        kinds = {type(value) for value in values} - {type(None)}
        nested = kinds & {list, dict}
        if nested and len(kinds) > 1:
            usual = Counter(map(type, values)).most_common(1)[0][0]
            where, value = next(
                (p, row.get(name)) for p, row in chunk if type(row.get(name)) not in (usual, type(None))
            )
            raise ValueError(
                f"column '{name}' of '{path}' holds {json.dumps(value)[:80]} in {where}, and values of another kind "
                "elsewhere; make them alike"
            )
        try:
            if not nested and len(kinds) > 1 and kinds != {int, float}:
                kind = Value("string")
            else:
                kind = Features.from_arrow_schema(pa.schema({name: pa.array(values).type}))[name]
        except OverflowError:  # an integer of more than 64 bits
            kind = Value("string")
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(f"cannot read column '{name}' of '{path}': {error}; make its values alike") from error
        types[name] = _unite(types[name], kind, name, path) if name in types else kind


def _unite(first: Any, second: Any, name: str, path: str) -> Any:
    """Common type of a column with two types: the wider of two numeric types, else text for single values."""
    if first == second:
        return first
    if Value("null") in (first, second):
        return second if first == Value("null") else first
    scalar = all(isinstance(kind, Value | ClassLabel) for kind in (first, second))
    if scalar and not all(pa.types.is_integer(k.pa_type) or pa.types.is_floating(k.pa_type) for k in (first, second)):
        return Value("string")
    schemas = [Features({name: kind}).arrow_schema.remove_metadata() for kind in (first, second)]
    try:
        return Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))[name]
    except pa.ArrowException as error:
        raise ValueError(
            f"column '{name}' of '{path}' is of another type than before ({error}); make them alike"
        ) from error


def check_columns(rows: Dataset | IterableDataset, source: str, columns: Sequence[str]) -> None:
    """Checks that columns exist and are named once.

    Raises:
        ValueError: One is missing, or named twice.
    """
    names = rows.column_names
    for column in columns:
        if column not in names:
            raise ValueError(f"'{source}' has no column '{column}', but {', '.join(map(repr, names))}")
        if list(columns).count(column) > 1:
            raise ValueError(f"the column '{column}' is named twice for '{source}'; name different ones")


def check_texts(rows: Dataset, source: str, columns: Sequence[str]) -> None:
    """Checks that each row has a text in each of these columns.

    Raises:
        ValueError: A column is missing, or a row has no text.
    """
    check_columns(rows, source, columns)
    for column in columns:
        for index, value in enumerate(rows[column]):
            if value is None:
                raise ValueError(f"row {index} of '{source}' has no '{column}'; correct or remove that row")
            if not isinstance(value, str):
                raise ValueError(
                    f"row {index} of '{source}' has {json.dumps(value, default=str)[:80]} as '{column}', expected a text"
                )


def check_labelled(rows: Dataset, source: str, text_columns: Sequence[str], label_column: str) -> Dataset:
    """Checked rows with texts and a label, which is renamed to `label`; other columns are dropped.

    Labels keep their type: text in csv and tsv.

    Raises:
        ValueError: There are no rows, a column is missing or named twice, or a row lacks a text or a label.
    """
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows")
    check_columns(rows, source, (*text_columns, label_column))
    check_texts(rows, source, text_columns)
    for index, value in enumerate(rows[label_column]):
        if value is None or value != value:
            raise ValueError(f"row {index} of '{source}' has no '{label_column}'; correct or remove that row")
        if isinstance(value, list | dict):
            raise ValueError(
                f"row {index} of '{source}' has {json.dumps(value)[:80]} as label, expected a single value"
            )
        if value in (-1, "-1") and not isinstance(value, bool | float):
            raise ValueError(f"row {index} of '{source}' has the label -1, as in test sets; give labelled rows")
    rows = rows.select_columns([*text_columns, label_column])
    return rows if label_column == "label" else rows.rename_column(label_column, "label")


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all if there are fewer or `limit` is None."""
    return rows.select(range(min(len(rows), limit or len(rows))))


def fingerprint(rows: Dataset) -> str:
    """Hash of the content of rows; the fingerprint of `datasets` depends on paths and times."""
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def load_texts(
    sources: Sequence[str],
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    mixing_weights: Sequence[float] | None = None,
    seed: int = 0,
    line_breaks: bool = False,
    pair_column: str | None = None,
) -> Dataset | IterableDataset:
    """Texts of several sources, one column `text_column`; null rows are counted and left out.

    Args:
        sources: Local files or globs, and data sets of the Hub, `name` or `name:configuration`.
        split: Split of the Hub data sets; local files have none.
        text_column: Column that holds the texts, in every source; of .txt and .md a line is a text.
        streaming: Read while training instead of before it. The texts then pass through a shuffling buffer.
        mixing_weights: Share of the texts to draw from each source; the small ones are repeated until the largest has
            ended. Default: each source once, one after the other.
        seed: Of mixing and shuffling.
        line_breaks: Whether lines of .txt and .md keep their line break.
        pair_column: Column that holds second texts, where a source and a row have one; it is a column of the result.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: The column is missing or a row holds no text, a file cannot be read, there are no rows, or the
            weights do not fit.
    """
    if mixing_weights and (len(mixing_weights) != len(sources) or min(mixing_weights) <= 0):
        raise ValueError(
            f"`mixing_weights` {list(mixing_weights)} must be positive, one for each of the {len(sources)} sources"
        )
    columns = {"column": text_column, "pair_column": pair_column}
    strings = Features({name: Value("string") for name in columns.values() if name is not None})
    parts = []
    for source in sources:
        if is_local(source):
            reading = {"paths": find_files([source]), **columns, "line_breaks": line_breaks}
            if streaming:
                part = IterableDataset.from_generator(generate_texts, features=strings, gen_kwargs=reading)
            else:
                reading |= {"paths": tuple(reading["paths"]), "stamps": _stamps(reading["paths"])}
                part = _generate(generate_texts, strings, **reading)
        else:
            part = _load_hub_texts(source, split, text_column, streaming, pair_column)
        if streaming and next(iter(part), None) is None:
            raise ValueError(f"'{source}' has no rows")
        parts.append(part)
    if mixing_weights and len(parts) > 1:
        shares = [weight / sum(mixing_weights) for weight in mixing_weights]
        texts = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        texts = concatenate_datasets(parts)
    return texts.shuffle(seed=seed, buffer_size=10_000) if streaming else texts


def stream_texts(
    sources: Sequence[str], split: str = "train", text_column: str = "text", line_breaks: bool = False
) -> Iterator[str]:
    """The texts of [`load_texts`] as an iterator, without a cache on disk or a shuffling buffer."""
    for source in sources:
        if is_local(source):
            rows = generate_texts(find_files([source]), text_column, line_breaks)
        else:
            rows = _load_hub_texts(source, split, text_column, True)
        for row in rows:
            yield row[text_column]


def _load_hub_texts(source: str, split: str, column: str, streaming: bool, pair_column: str | None = None):
    part = _load_hub(source, split, streaming=streaming)
    first = next(iter(part), None)
    if first is None:
        raise ValueError(f"'{source}' has no rows")
    if column not in first:
        raise ValueError(f"'{source}' has no column '{column}', but {', '.join(map(repr, first))}")
    if pair_column is not None and pair_column not in first:
        part = part.map(lambda batch: {pair_column: [None] * len(batch[column])}, batched=True)
    columns = {column: "text_column"} | ({} if pair_column is None else {pair_column: "pair_column"})
    for name, argument in columns.items():
        if not isinstance(first.get(name), str | None):
            raise ValueError(
                f"column '{name}' of '{source}' holds {type(first[name]).__name__}, expected texts; name another with "
                f"`{argument}`"
            )
    strings = Features({name: Value("string") for name in columns})
    part = part.select_columns(list(columns))
    if streaming:
        part = part.map(lambda batch: batch, batched=True, features=strings)
        return part.filter(lambda text: text is not None, input_columns=column)
    part = part.cast(strings)
    if missing := part.data.column(column).null_count:
        report_dropped(missing, len(part), source, f"no '{column}'")
        part = part.filter(lambda text: text is not None, input_columns=column)
    return part


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """A short, unique name for each source in reports: the stem of its file or data set if that is unique."""
    short = {source: Path(source.partition(":")[0]).stem for source in sources}
    count = Counter(short.values())
    names = {}
    for source, name in short.items():
        name = name if count[name] == 1 else re.sub(r"\W+", "_", source).strip("_")
        while name in names.values():
            name += "_"
        names[source] = name
    return names
