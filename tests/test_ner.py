"""Token classification: files, tag schemes, windows in which every word is scored once, and the script end to end."""

import json
import re

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from helpers import load_script
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import modernalbert
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.evaluation.ner import (
    check_known,
    check_tagged,
    find_scheme,
    list_tags,
    make_windows,
    read_conll,
    read_tagged,
    read_tags,
)


TEXT = "Ada Lovelace met Charles Babbage in London and they never spoke of antidisestablishmentarianism"
WORDS = TEXT.split()
TAGS = ["B-PER", "I-PER", "O", "B-PER", "I-PER", "O", "B-LOC", *["O"] * 6]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=300, model_max_length=64)


# ---- Files


@pytest.mark.parametrize(
    "content",
    [
        "-DOCSTART- -X- O O\n\nAda NNP B-NP B-PER\nran VBD B-VP O\n\nRome NNP B-NP B-LOC\n",
        "Ada\tB-PER\nran\tO\n\n\nRome\tB-LOC",
        "\ufeffAda B-PER\r\nran O\r\n\r\nRome B-LOC\r\n\r\n",
        "# id 1 domain=en\nAda _ _ B-PER\nran _ _ O\n\n# id 2 x\nRome _ _ B-LOC\n",
    ],
    ids=["CoNLL-2003", "tabs", "Windows", "comments"],
)
def test_conll_files(tmp_path, content):
    (tmp_path / "a.conll").write_text(content, encoding="utf-8", newline="")
    rows = read_tagged([str(tmp_path / "*.conll")], "tokens", None)
    assert rows.to_list() == [
        {"tokens": ["Ada", "ran"], "tags": ["B-PER", "O"]},
        {"tokens": ["Rome"], "tags": ["B-LOC"]},
    ]


def test_a_token_may_hold_a_space_between_tabs(tmp_path):
    (tmp_path / "a.tsv").write_text("New York\tB-LOC\n# \tO\n")
    assert list(read_conll(str(tmp_path / "a.tsv"))) == [{"tokens": ["New York", "# "], "tags": ["B-LOC", "O"]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Ada B-PER\nran\n", "line 2 of '.*a.conll' is 'ran', 1 columns separated by white space; expected 2"),
        ("Ada x B-PER\nran O\n", "line 2 of .*, 2 columns .*; expected 3, a token first"),
        ("Ada\tB-PER\n\tO\n", "line 2 of .* is '.tO', 2 columns separated by tabs"),
        ("\n\n", "has no rows"),
    ],
)
def test_broken_conll_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.conll").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_tagged([str(tmp_path / "a.conll")], "tokens", None)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.conll").write_bytes("Ädä B-PER".encode("latin-1"))
    with pytest.raises(ValueError, match="a.conll' is no UTF-8 .*; convert it"):
        read_tagged([str(tmp_path / "a.conll")], "tokens", None)
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="are files of two kinds"):
        read_tagged([str(tmp_path / "*")], "tokens", None)
    with pytest.raises(FileNotFoundError, match="no file matches 'none.conll'"):
        read_tagged(["none.conll"], "tokens", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a"], "tags": ["O"]}, "has no column 'tokens', but 'words', 'tags'"),
        ({"tokens": ["a"], "labels": ["O"]}, "has no column 'tags'"),
        ({"tokens": "a b", "tags": ["O"]}, "row 0 of it has 'a b' and .'O'., expected a list of tokens"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "has 2 tokens and 1 tags, expected as many of both"),
        ({"tokens": [], "tags": []}, "has 0 tokens and 0 tags"),
        ({"tokens": [1], "tags": ["O"]}, "has the token 1, expected a text"),
        ({"tokens": ["a"], "tags": [None]}, "has the tag None, expected a name"),
        ({"tokens": ["a"], "ner_tags": [3]}, "has the tag 3, expected a name .* numbers need the names"),
    ],
)
def test_broken_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        check_tagged(Dataset.from_list([row]), "it", "tokens", None)


def test_numbers_of_tags_have_the_names_of_the_data_set():
    names = ["O", "B-PER", "I-PER"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    rows = Dataset.from_dict(
        {
            "tokens": [["Ada", "ran"]],
            "ner_tags": [[1, 0]],
        },
        features,
    )
    assert check_tagged(rows, "it", "tokens", None)["tags"][:] == [["B-PER", "O"]]


# ---- Schemes


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["B-A", "I-A", "O", "B-B"], "IOB2"),
        (["I-A", "I-A", "O", "I-B", "B-B", "I-A"], "IOB1"),
        (["B-A", "E-A", "S-B", "O"], "IOBES"),
        (["B-A", "I-A", "L-A", "U-B"], "BILOU"),
    ],
)
def test_schemes_are_told_apart(tags, scheme, caplog):
    rows = Dataset.from_dict({"tokens": [["x"] * len(tags)], "tags": [tags]})
    assert find_scheme(rows, "it") == scheme and not caplog.text
    assert set(tags) <= set(list_tags(rows, scheme)) and list_tags(rows, scheme)[0] == "O"


@pytest.mark.parametrize(
    ("tags", "count", "place"),
    [
        (["O", "I-A", "O", "B-A", "I-B"], 2, "row 1 .O before I-A."),
        (["B-A", "O", "S-A", "E-A"], 2, "row 1 .B-A before O."),
        (["B-A", "I-A", "U-B", "B-A"], 2, "row 1 .I-A before U-B."),
    ],
)
def test_broken_sequences_are_counted(tags, count, place, caplog):
    rows = Dataset.from_dict({"tokens": [["x"], ["x"] * len(tags)], "tags": [["O"], tags]})
    find_scheme(rows, "the rows")
    assert re.search(f"the rows: {count} of about . entities break .*, the first in {place}", caplog.text)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["PER"], "'PER' is no tag of IOB, IOBES or BILOU; write O, or a prefix and a type"),
        (["B_PER"], "'B_PER' is no tag"),
        (["X-PER"], "'X-PER' is no tag"),
        (["B-"], "'B-' is no tag"),
        (["S-A", "U-A"], "mixes tags of IOBES .E, S. and BILOU"),
    ],
)
def test_tags_of_no_scheme_are_refused(tags, message):
    with pytest.raises(ValueError, match=message):
        find_scheme(Dataset.from_dict({"tokens": [tags], "tags": [tags]}), "it")


def test_tags_that_the_model_does_not_know_are_refused():
    rows = Dataset.from_dict({"tokens": [["a"], ["b"]], "tags": [["O"], ["B-X"]]})
    with pytest.raises(
        ValueError, match="row 1 of it has the tag 'B-X', expected one of 'O', 'B-PER'; the tags of it are"
    ):
        check_known(rows, ["O", "B-PER"], "it")


# ---- Windows


@pytest.mark.parametrize(("max_length", "stride"), [(64, 0), (12, 0), (12, 4), (7, 4), (5, 0), (5, 2)])
def test_every_word_is_labelled_once_on_its_first_token(tokenizer, max_length, stride):
    rows = Dataset.from_dict({"tokens": [WORDS, ["Ada"], WORDS * 3], "tags": [TAGS, ["B-PER"], TAGS * 3]})
    names = list_tags(rows, "IOB2")
    numbers = {name: number for number, name in enumerate(names)}
    features = rows.map(
        make_windows,
        with_indices=True,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "numbers": numbers, "max_length": max_length, "stride": stride},
        remove_columns=rows.column_names,
    )
    seen = []
    for window in features:
        assert len(window["labels"]) == len(window["input_ids"]) <= max_length
        positions = [position for position, label in enumerate(window["labels"]) if label != -100]
        for position, word in zip(positions, window["words"], strict=True):
            tokens, tags = rows[window["row"]]["tokens"], rows[window["row"]]["tags"]
            seen.append((window["row"], word))
            assert window["labels"][position] == numbers[tags[word]]
            first = tokenizer(tokens[: word + 1], is_split_into_words=True, add_special_tokens=False).word_ids()
            ids = tokenizer(tokens[: word + 1], is_split_into_words=True, add_special_tokens=False)["input_ids"]
            assert window["input_ids"][position] == ids[first.index(word)]
    assert sorted(seen) == [(row, word) for row in range(3) for word in range(len(rows[row]["tokens"]))]

    width = max(len(window["labels"]) for window in features)
    labels = np.array([window["labels"] + [-100] * (width - len(window["labels"])) for window in features])
    logits = np.eye(len(names))[np.where(labels == -100, 1, labels)]  # right where there is a label, else B-LOC
    assert read_tags(rows, features, logits, labels, names) == rows["tags"][:]


def test_a_word_is_scored_where_it_is_farthest_from_a_cut(tokenizer):
    words, tags = ["a"] * 20, ["O"] * 20
    batch = make_windows({"tokens": [words], "tags": [tags]}, [0], tokenizer, {"O": 0}, max_length=12, stride=4)
    assert [len(window) for window in batch["words"]] == [
        8,
        6,
        6,
    ]  # windows of ten words share four: half goes to each


def test_words_of_which_nothing_is_left_are_outside(tokenizer):
    rows = Dataset.from_dict({"tokens": [["Ada", "", "ran"]], "tags": [["O", "B-PER", "O"]]})
    batch = make_windows(rows[:], [0], tokenizer, {"O": 0, "B-PER": 1}, max_length=12, stride=0)
    assert batch["words"] == [[0, 2]]
    labels = np.array(batch["labels"])
    logits = np.eye(2)[np.ones_like(labels)]
    windows = [{"row": 0, "words": [0, 2]}]
    assert read_tags(rows, windows, logits, labels, ["O", "B-PER"]) == [["B-PER", "O", "B-PER"]]


def test_names_of_special_tokens_are_words(tokenizer):
    batch = make_windows({"tokens": [["[SEP]", "Ada"]], "tags": [["O", "O"]]}, [0], tokenizer, {"O": 0}, 32, 0)
    assert batch["words"] == [[0, 1]] and batch["input_ids"][0].count(tokenizer.sep_token_id) == 1


# ---- The script


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, make_model):
    """A model, and CoNLL files."""
    folder = tmp_path_factory.mktemp("ner")
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}
    model = make_model(modernalbert.ModernAlbertForMaskedLM, vocab_size=padded_vocab_size(tokenizer), **ids)
    model.save_pretrained(folder / "model")
    save_tokenizer(tokenizer, folder / "model")
    for name, repeats in (("train", 3), ("dev", 1)):
        lines = [f"{word} _ {tag}" for word, tag in zip(WORDS * repeats, TAGS * repeats, strict=True)]
        (folder / f"{name}.conll").write_text("\n".join([*lines, "", "Ada _ B-PER", "", *lines[:7]]) + "\n")
    return folder


def run(folder, output_dir, *arguments, model=None, train=True):
    command = ["--model_name_or_path", model or folder / "model", "--output_dir", output_dir]
    command += ["--validation_files", folder / "dev.conll", "--max_length", "24", "--stride", "8", "--use_cpu", "True"]
    command += ["--report_to", "none", "--disable_tqdm", "True", *arguments]
    if train:
        command += ["--do_train", "--train_files", folder / "train.conll", "--learning_rate", "1e-2"]
    return load_script("run_ner").main([str(part) for part in command])


def test_a_tagger_learns_and_its_card_works(folder, tmp_path, monkeypatch):
    results = run(folder, tmp_path / "out", "--max_steps", "20", "--merge_after", "uniform")
    assert list(results["scores"])[:4] == ["f1", "precision", "recall", "accuracy"] and results["scores"]["f1"] > 0.5
    assert results["details"]["by_type"]["PER"]["support"] == 5 and results["data"]["validation"]["windows"] > 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [WORDS, ["Ada"], WORDS[:7]]
    assert all(len(line["predictions"]) == len(line["tags"]) for line in lines)
    config = modernalbert.ModernAlbertConfig.from_pretrained(tmp_path / "out")
    assert list(config.id2label.values()) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    for path in (tmp_path / "out", tmp_path / "out" / "merged"):
        card = ModelCard.load(path / "README.md")
        _, scores = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert {score.task_type for score in scores} == {"token-classification"}
        monkeypatch.chdir(path.parent)
        exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], {})
    again = run(folder, tmp_path / "again", model=tmp_path / "out", train=False)
    assert again["scores"]["f1"] == results["scores"]["f1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "x"], "give either `dataset` or `validation_files`"),
        (["--stride", "22"], r"`stride` \(22\) must be at least 0 and below the 22 tokens of a window"),
        (["--max_length", "65"], r"`max_length` \(65\) must be .* at most the 64 tokens"),
        (["--train_files", "{folder}/outside.conll"], "all tags of the train rows are O"),
        (
            ["--train_files", "{folder}/places.conll"],
            "row 0 of the validation rows has the tag 'B-PER', expected one of",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(folder, tmp_path, arguments, message):
    (folder / "outside.conll").write_text("a O\n")
    (folder / "places.conll").write_text("Rome B-LOC\n")
    arguments = [part.replace("{folder}", str(folder)) for part in arguments]
    with pytest.raises(ValueError, match=message):
        command = ["--do_train", "--train_files", folder / "train.conll", *arguments]
        run(folder, tmp_path / "out", *command, train=False)
    with pytest.raises(ValueError, match="`train_files` go with `validation_files`"):
        load_script("run_ner").TaggingArguments("m", dataset="x", train_files=["y"])
