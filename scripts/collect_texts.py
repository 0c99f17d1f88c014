"""Collects unlabelled texts to distil or pretrain on, and leaves out whatever a set to evaluate on holds.

    python scripts/collect_texts.py --collection recipes/nano-texts.yaml --output_dir runs/nano-texts

The collection is a YAML file. `texts` maps the name of each output, `NAME.jsonl`, to its sources; `held_out` lists the
sources of which no text may be in any output:

    texts:
      sentences:
        - {source: nyu-mll/glue:sst2, columns: [sentence]}
      books:
        - {source: "books/*.parquet", columns: [text], cut: true, sample: 60000}
    held_out:
      - {source: nyu-mll/glue:sst2, split: validation, columns: [sentence]}

A source is what the other scripts read, local files or a data set of the Hub, with its `split` (train). `sample` draws so
many of its texts. `cut` makes passages of one to six sentences, or all, of each text. `pairs` makes pairs of two columns,
`text` and `text_pair`, for `pretrain.py --pair_column text_pair`. An output holds a text once, in random order. A text is left
out if its words, without case and punctuation, are those of a held-out text, or contain all words of one of at least six; a
pair is left out if one of its texts is.
"""

import json
import logging
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.progress import track

from modernalbert.training.cli import Seed, check_names, parse_arguments, run_script
from modernalbert.training.data import read_rows
from modernalbert.training.runs import check_output_dir, write_json, write_text


logger = logging.getLogger(__name__)

COLUMNS = ("text", "text_pair")
HEADING = 20  # characters of a text that is too short to be cut into passages
SHORTEST = 15  # characters of a passage
SENTENCES = (1, 1, 2, 3, 6, None)  # of a passage, one of these each time; None for all that are left
WINDOW = 6  # words of the shortest held-out text that is looked for inside others


@dataclass
class CollectionArguments:
    """Which texts, and where to."""

    collection: str = field(metadata={"help": "YAML file, see above."})
    output_dir: str = field(metadata={"help": "Folder that receives a .jsonl file for each name in `texts`."})
    seed: Seed = field(default=0, metadata={"help": "Of samples, passages and order."})


def read_collection(path: str) -> dict:
    """A collection, whose entries are checked.

    Raises:
        OSError: There is no such file.
        ValueError: It is no collection.
    """
    try:
        collection = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}' is no YAML: {error}") from error
    if not isinstance(collection, dict) or not isinstance(collection.get("texts"), dict) or not collection["texts"]:
        raise ValueError(f"'{path}' must map `texts` to names of outputs, and these to their sources")
    check_names(collection, {"texts", "held_out"}, f"entry in '{path}',")
    parts = {**collection["texts"], "held_out": collection.setdefault("held_out", [])}
    for name, sources in parts.items():
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            raise ValueError(f"`{name}` in '{path}' must be a list of sources, each with `source` and `columns`")
        for source in sources:
            check_names(
                source, {"source", "split", "columns", "cut", "sample", "pairs"}, f"field of a source in '{path}',"
            )
            if not isinstance(source.get("source"), str) or not isinstance(source.get("columns"), list):
                raise ValueError(f"a source of `{name}` in '{path}' lacks `source` or the list `columns`: {source}")
            if source.get("pairs") and (len(source["columns"]) != 2 or source.get("cut") or name == "held_out"):
                raise ValueError(
                    f"`pairs` of `{name}` in '{path}' needs two `columns`, without `cut`, in `texts`: {source}"
                )
    return collection


def read_source(source: dict) -> list[str] | list[tuple[str, str]]:
    """All texts of a source, column by column, or its pairs.

    Raises:
        ValueError: It has no such column.
    """
    rows = read_rows(source["source"], source.get("split", "train"))
    for column in source["columns"]:
        if column not in rows.column_names:
            raise ValueError(f"'{source['source']}' has no column '{column}'; it has {', '.join(rows.column_names)}")
    columns = [rows[column] for column in source["columns"]]
    if source.get("pairs"):
        return [pair for pair in zip(*columns, strict=True) if all(pair)]
    return [text for column in columns for text in column if text]


def cut_passages(texts: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Passages of whole sentences, which together are the texts, without headings and what else is short."""
    for text in texts:
        if len(text) < HEADING:
            continue
        sentences = re.split(r"(?<=[.!?]) +", text)
        start = 0
        while start < len(sentences):
            count = rng.choice(SENTENCES) or len(sentences)
            passage = " ".join(sentences[start : start + count])
            start += count
            if len(passage) >= SHORTEST:
                yield passage


def words_of(text: str) -> tuple[str, ...]:
    """Words without case and punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


class HeldOut:
    """Texts that nothing may be trained on, to be found in other texts."""

    def __init__(self, texts: Iterable[str]):
        self.whole = {words_of(text) for text in texts}
        self.by_start = defaultdict(list)
        for words in self.whole:
            if len(words) >= WINDOW:
                self.by_start[words[:WINDOW]].append(words)

    def __contains__(self, text: str) -> bool:
        words = words_of(text)
        return words in self.whole or any(
            words[start : start + len(other)] == other
            for start in range(len(words) - WINDOW + 1)
            for other in self.by_start.get(words[start : start + WINDOW], ())
        )


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """Writes the outputs; returns for each how many texts were kept and left out, and its characters.

    Raises:
        ValueError: The collection is wrong, or an output would be empty.
    """
    (args,) = parse_arguments((CollectionArguments,), argv, description=__doc__)
    collection = read_collection(args.collection)
    folder = Path(args.output_dir)
    check_output_dir(folder)
    held_out = HeldOut(text for source in collection["held_out"] for text in read_source(source))
    logger.info("%d held-out texts", len(held_out.whole))
    rng = random.Random(args.seed)
    counts = {}
    for name, sources in collection["texts"].items():
        whole, cut = [], []
        for source in sources:
            texts = read_source(source)
            if "sample" in source:
                texts = rng.sample(texts, min(source["sample"], len(texts)))
            (cut if source.get("cut") else whole).extend(texts)
        found = dict.fromkeys(
            tuple(text.strip() for text in ((row,) if isinstance(row, str) else row))
            for row in [*whole, *cut_passages(cut, rng)]
        )
        kept = [
            texts
            for texts in track(found, description=name, transient=True)
            if all(text and text not in held_out for text in texts)
        ]
        if not kept:
            raise ValueError(f"`{name}` in '{args.collection}' holds no text that is not held out")
        rng.shuffle(kept)
        rows = (json.dumps(dict(zip(COLUMNS, texts, strict=False))) for texts in kept)
        write_text(folder / f"{name}.jsonl", "".join(row + "\n" for row in rows))
        characters = sum(len(text) for texts in kept for text in texts)
        counts[name] = {"texts": len(kept), "left_out": len(found) - len(kept), "characters": characters}
        logger.info("%s: %s", name, json.dumps(counts[name]))
    write_json(folder / "counts.json", counts)
    return counts


if __name__ == "__main__":
    run_script(main)
