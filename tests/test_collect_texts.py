"""Texts to train on, and nothing of what is evaluated on in them."""

import json
import random
import re

import pytest
import yaml
from helpers import ROOT, load_script


HELD_OUT = "The Quick brown fox, it jumps over dogs."
SHORT = "a lazy cat"


@pytest.fixture(scope="module")
def script():
    return load_script("collect_texts")


@pytest.fixture
def make(tmp_path, script):
    def make(texts, held_out=(), **fields):
        for name, rows in (("texts", texts), ("held", [*held_out, "Something else."])):
            lines = "".join(json.dumps({"a": row, "b": f"b {row}"}) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        collection = {
            "texts": {"out": [{"source": str(tmp_path / "texts.jsonl"), "columns": ["a"], **fields}]},
            "held_out": [{"source": str(tmp_path / "held.jsonl"), "columns": ["a"]}],
        }
        (tmp_path / "collection.yaml").write_text(yaml.safe_dump(collection))
        folder = tmp_path / "made"
        counts = script.main(["--collection", str(tmp_path / "collection.yaml"), "--output_dir", str(folder)])
        return counts["out"], [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text().splitlines()]

    return make


def test_held_out_texts_are_left_out_whole_and_inside_others(make):
    texts = [
        "the quick brown fox it jumps over dogs",  # the same words
        f"He said: {HELD_OUT} Then he left.",  # inside another
        "The quick brown fox, it jumps over cats.",  # its beginning alone
        "A lazy  CAT!",  # short, the same words
        "There is a lazy cat in the garden.",  # short, inside another: by chance
        "Another text.",
    ]
    counts, kept = make(texts, [HELD_OUT, SHORT])
    assert sorted(kept) == sorted([texts[2], texts[4], texts[5]])
    assert counts == {"texts": 3, "left_out": 3, "characters": sum(map(len, kept))}


def test_what_is_left_holds_no_held_out_text_by_a_naive_search(make):
    """Against a search for every held-out text in every other one."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=rng.randrange(1, 30))) + f" {n}"[: rng.randrange(3)] for n in range(300)]
    held_out = [" ".join(rng.choices("abc", k=rng.randrange(1, 9))) for _ in range(60)]
    _, kept = make(texts, held_out)

    def plain(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    def holds(text):
        return any(
            plain(other) == plain(text)
            or (len(plain(other).split()) >= 6 and f" {plain(other)} " in f" {plain(text)} ")
            for other in held_out
        )

    expected = {text.strip() for text in texts if not holds(text)}
    assert set(kept) == expected and 20 < len(expected) < len(set(texts)) - 20


def test_passages_are_the_sentences_in_order(script):
    texts = ["Heading", *(" ".join(f"Sentence {n} of text {t}." for n in range(20)) for t in range(30))]
    passages = list(script.cut_passages(texts, random.Random(0)))
    assert " ".join(passages) == " ".join(texts[1:])
    lengths = {passage.count(".") for passage in passages}
    assert {1, 2, 3, 6} <= lengths and len(passages) > 100


def test_pairs_are_rows_of_two_texts_of_which_none_is_held_out(make, tmp_path):
    counts, kept = make(
        ["One. ", HELD_OUT, "One.", "Two."], [f"b {HELD_OUT}", "b Two."], columns=["a", "b"], pairs=True
    )
    rows = [json.loads(line) for line in (tmp_path / "made" / "out.jsonl").read_text().splitlines()]
    # "One. " and "One." are one text, and so are what stands beside them.
    assert kept == ["One."] and rows == [{"text": "One.", "text_pair": "b One."}]
    assert counts == {"texts": 1, "left_out": 2, "characters": len("One.") + len("b One.")}


@pytest.mark.parametrize("fields", [{"columns": ["a"]}, {"columns": ["a", "b"], "cut": True}], ids=str)
def test_pairs_need_two_columns_of_whole_texts(make, fields):
    with pytest.raises(ValueError, match="`pairs` of `out` .* needs two `columns`, without `cut`"):
        make(["One."], pairs=True, **fields)


def test_columns_samples_and_order(make, tmp_path, script):
    texts = [f"Text number {n}." for n in range(50)]
    _, kept = make(texts, columns=["a", "b"])
    assert sorted(kept) == sorted([*texts, *(f"b {text}" for text in texts)])
    assert kept != [*texts, *(f"b {text}" for text in texts)]
    assert make(texts, columns=["a", "b"])[1] == kept
    _, sampled = make(texts, sample=7)
    assert len(set(sampled)) == 7 and set(sampled) < set(texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"columns": ["c"]}, "has no column 'c'; it has a, b"),
        ({"colums": ["a"]}, "no field of a source in .* `colums`; did you mean `columns`"),
        ({"columns": "a"}, "lacks `source` or the list `columns`"),
    ],
)
def test_a_wrong_source_is_refused(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(["A text."], **fields)


def test_an_empty_output_is_refused(make):
    with pytest.raises(ValueError, match="`out` in .* holds no text that is not held out"):
        make([HELD_OUT], [HELD_OUT])


@pytest.mark.parametrize(("text", "message"), [("a: [", "is no YAML"), ("- a", "must map `texts`"), ("", "must map")])
def test_something_else_than_a_collection_is_refused(script, tmp_path, text, message):
    (tmp_path / "collection.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        script.main(["--collection", str(tmp_path / "collection.yaml"), "--output_dir", str(tmp_path / "out")])


def test_the_collection_of_the_checkpoints_holds_out_what_they_are_evaluated_on(script):
    collection = script.read_collection(str(ROOT / "recipes" / "nano-texts.yaml"))
    used = {source["source"] for sources in collection["texts"].values() for source in sources}
    held_out = {source["source"] for source in collection["held_out"]}
    assert not used & held_out
    for name in used:
        if "/corpus/" not in name:
            assert re.sub("train.parquet", "validation.parquet", name) in held_out
    tasks = json.loads((ROOT / "benchmarks" / "tasks.json").read_text())
    evaluated = {name for task in tasks.values() for name in task.get("validation_files", [])}
    assert evaluated <= held_out
