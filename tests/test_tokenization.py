import json
import os
import random
import re
import subprocess
import sys

import pytest
from datasets import Dataset
from helpers import load_script
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from modernalbert.tokenization import load_tokenizer, padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training import data


CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog says hello world.",
    "hello world, hello again: naïve cafés in Zürich sell crème brûlée.",
    "  indented\tlines\n\nand blank ones\r\n",
    "天地玄黃，宇宙洪荒。 שלום עולם. مرحبا بالعالم",
] * 5
TRICKY = {
    "emoji-zwj": "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽",
    "decomposed": "e\u0301 a\u030a o\u0302\u0323",
    "composed": "é å ộ",
    "canonical-singletons": "\u212b \u2126 \u1e9b\u0323 \uac00 \u1100\u1161",
    "stray-combining": "\u0301\u0301x",
    "null": "a\x00b\x00",
    "control": "\x01\x1b[0m\x7f\ufeff\u200b\u00ad",
    "newline": "\n",
    "newlines": "\r\n\n\r\n \n",
    "cjk": "漢字かな交じり文、한국어。𠜎",
    "rtl": "שָׁלוֹם \u202bمرحبا\u202c",
    "spaces": "   both ends   ",
    "no-break-spaces": "\u00a0\u3000\u2003x\u2028y\u2029",
    "punctuation": " ' s 're don't , . ! ?  n't",
    "last-code-point": "\U0010ffff\ufffe\uffff",
    "almost-special": "[MASK [CLS ] [mask] [pad]",
    "empty": "",
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, vocab_size=512)


@pytest.fixture(scope="module")
def script():
    return load_script("train_tokenizer")


def foreign_tokenizer(**kwargs):
    """A word-level tokenizer that was not made here, with a gap in its ids."""
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4, "hello": 5, "world": 200}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")),
        unk_token="[UNK]",
        **kwargs,
    )


def run_python(code, *arguments):
    """Runs `code` in a new process and returns what it prints, read as JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("text", TRICKY.values(), ids=TRICKY.keys())
def test_round_trip_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_round_trip_of_random_text_is_lossless(tokenizer):
    generator = random.Random(0)
    texts = [generator.randbytes(60).decode("utf-8", errors="replace") for _ in range(100)]
    code_points = [*range(0xD800), *range(0xE000, 0x110000)]
    texts += ["".join(map(chr, generator.choices(code_points, k=20))) for _ in range(100)]
    assert tokenizer.batch_decode(tokenizer(texts).input_ids, skip_special_tokens=True) == texts


def test_no_text_is_out_of_vocabulary(tokenizer):
    ids = tokenizer("".join(TRICKY.values())).input_ids
    assert tokenizer.unk_token_id not in ids


def test_offsets_point_into_the_given_text(tokenizer):
    text = "e\u0301 hello 漢 world"
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ((start, end),) = [
        span for token, span in zip(encoding.tokens(), encoding.offset_mapping, strict=True) if token == "Ġhello"
    ]
    assert text[start:end].strip() == "hello"


def test_special_tokens_take_the_first_ids(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "cls", "sep", "pad", "mask")]
    assert ids == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.all_special_ids) == ids


def test_layout_of_one_text_and_of_two(tokenizer):
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in ("hello fox", "lazy world"))
    assert tokenizer("hello fox").input_ids == [1, *a, 2]
    assert tokenizer("hello fox", "lazy world").input_ids == [1, *a, 2, *b, 2]


def test_no_token_type_ids_unless_asked_for_and_then_zero(tokenizer):
    assert list(tokenizer("hello", "world")) == ["input_ids", "attention_mask"]
    assert set(tokenizer("hello", "world", return_token_type_ids=True).token_type_ids) == {0}


def test_pads_on_the_right(tokenizer):
    short, long = tokenizer(["dog", "the lazy dog says"], padding=True).input_ids
    n = len(tokenizer("dog").input_ids)
    assert len(short) == len(long) > n
    assert short[:n] == tokenizer("dog").input_ids
    assert set(short[n:]) == {tokenizer.pad_token_id}
    assert tokenizer(["dog", "the lazy dog says"], padding=True).attention_mask[0] == [1] * n + [0] * (len(long) - n)


def test_truncates_at_model_max_length():
    tokenizer = train_tokenizer(CORPUS, vocab_size=320, model_max_length=16)
    ids = tokenizer(CORPUS[0], truncation=True).input_ids
    assert len(ids) == 16
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_mask_takes_the_space_before_it(tokenizer):
    ids = tokenizer("hello [MASK] world").input_ids
    assert ids == tokenizer("hello[MASK] world").input_ids
    assert ids.count(tokenizer.mask_token_id) == 1
    assert tokenizer.added_tokens_decoder[tokenizer.mask_token_id].lstrip


def test_learns_merges_from_the_corpus(tokenizer):
    assert len(tokenizer.tokenize("hello")) < len(tokenizer.tokenize("olleh"))


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(iter(CORPUS), vocab_size=512).get_vocab() == tokenizer.get_vocab()


def test_empty_texts_are_passed_over(tokenizer):
    assert train_tokenizer(["", *CORPUS, ""], vocab_size=512).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "expected"), [(320, 64, 320), (300, 64, 320), (270, 8, 272), (261, 1, 261)]
)
def test_vocab_size_is_rounded_up_and_filled(vocab_size, multiple, expected):
    tokenizer = train_tokenizer(CORPUS, vocab_size=vocab_size, pad_vocab_to_multiple_of=multiple)
    assert len(tokenizer) == padded_vocab_size(tokenizer, multiple) == expected


def test_small_corpus_leaves_the_vocabulary_small():
    tokenizer = train_tokenizer(["hello hello"])
    assert 261 < len(tokenizer) < 270
    assert padded_vocab_size(tokenizer) == 320


def test_padded_vocab_size_covers_the_highest_id():
    assert padded_vocab_size(foreign_tokenizer()) == 256
    assert padded_vocab_size(foreign_tokenizer(), multiple=1) == 201


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"texts": []}, ValueError, "nothing to train on"),
        ({"texts": ["", ""]}, ValueError, "nothing to train on"),
        ({"texts": "hello"}, TypeError, "single str"),
        ({"texts": ["a", 3]}, TypeError, "text 1 is of type int"),
        ({"texts": ["", None]}, TypeError, "text 1 is of type NoneType"),
        ({"texts": [["a", "b"]]}, TypeError, "text 0 is of type list"),
        ({"texts": CORPUS, "vocab_size": 260}, ValueError, r"`vocab_size` \(260\) is below 261"),
        ({"texts": CORPUS, "pad_vocab_to_multiple_of": 0}, ValueError, r"multiple \(0\) .* must be 1 or more"),
    ],
    ids=["empty", "empty-texts", "one-str", "int", "none", "nested", "vocab-size", "multiple"],
)
def test_train_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(**kwargs)


def test_reloads_the_same_in_a_new_process(tokenizer, tmp_path):
    texts = [*TRICKY.values(), *CORPUS[:4], "hello [MASK] world"]
    expected = tokenizer(texts).input_ids
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    (tmp_path / "texts.json").write_text(json.dumps(texts))

    through_auto = run_python(
        "import json, sys; from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); texts = json.load(open(sys.argv[2]))\n"
        "print(json.dumps([dict(t(texts)), t.model_max_length, t.padding_side,"
        " t.decode(t(' a , b').input_ids, skip_special_tokens=True)]))",
        tmp_path / "new" / "folder",
        tmp_path / "texts.json",
    )
    assert through_auto[0] == dict(tokenizer(texts))
    assert through_auto[1:] == [8192, "right", " a , b"]

    through_tokenizers = run_python(
        "import json, sys; from tokenizers import Tokenizer\n"
        "t = Tokenizer.from_file(sys.argv[1]); texts = json.load(open(sys.argv[2]))\n"
        "print(json.dumps([e.ids for e in t.encode_batch(texts)]))",
        tmp_path / "new" / "folder" / "tokenizer.json",
        tmp_path / "texts.json",
    )
    assert through_tokenizers == expected


def test_saved_config_is_readable_by_transformers_4(tmp_path):
    tokenizer = train_tokenizer(CORPUS, vocab_size=320)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<doc>"]})
    save_tokenizer(tokenizer, tmp_path / "first")
    # Loaded from a folder, 5.x adds keys of its own.
    save_tokenizer(load_tokenizer(tmp_path / "first"), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["additional_special_tokens"] == ["<doc>"]
    assert config["clean_up_tokenization_spaces"] is False
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & config.keys()
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(tmp_path).extra_special_tokens == ["<doc>"]


def test_earlier_truncation_and_padding_are_not_saved(tmp_path):
    tokenizer = train_tokenizer(CORPUS, vocab_size=320)
    tokenizer(["hello", CORPUS[0]], truncation=True, max_length=10, padding="max_length")
    save_tokenizer(tokenizer, tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (CORPUS[0], "hello"):
        assert alone.encode(text).ids == tokenizer(text).input_ids


def test_save_replaces_an_older_tokenizer(tokenizer, tmp_path):
    save_tokenizer(train_tokenizer(["zebra zebra"]), tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_save_refuses_a_python_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="CanineTokenizer has no `tokenizer.json`"):
        save_tokenizer(CanineTokenizer(), tmp_path)


def test_load_takes_token_type_ids_away_and_save_keeps_them_away(tmp_path):
    tokens = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    foreign_tokenizer(**tokens, model_input_names=names).save_pretrained(tmp_path / "theirs")
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path / "theirs")("hello")
    loaded = load_tokenizer(tmp_path / "theirs")
    assert list(loaded("hello")) == ["input_ids", "attention_mask"]
    save_tokenizer(loaded, tmp_path / "ours")
    assert list(AutoTokenizer.from_pretrained(tmp_path / "ours")("hello")) == ["input_ids", "attention_mask"]


def test_save_keeps_model_input_names_that_were_set_later(tmp_path):
    tokenizer = foreign_tokenizer()
    tokenizer.model_input_names = ["input_ids"]
    save_tokenizer(tokenizer, tmp_path)
    assert list(AutoTokenizer.from_pretrained(tmp_path)("hello")) == ["input_ids"]


def test_load_names_the_missing_tokens_and_its_cure_works(tmp_path):
    tokenizer = foreign_tokenizer(cls_token="[CLS]", pad_token="[PAD]")
    save_tokenizer(tokenizer, tmp_path)
    cure = re.escape("add_special_tokens({'sep_token': '[SEP]', 'mask_token': '[MASK]'})")
    with pytest.raises(ValueError, match=f"has no sep_token, mask_token; .*{cure}"):
        load_tokenizer(tmp_path)
    fixed = AutoTokenizer.from_pretrained(tmp_path)
    fixed.add_special_tokens({"sep_token": "[SEP]", "mask_token": "[MASK]"})
    save_tokenizer(fixed, tmp_path)
    assert load_tokenizer(tmp_path).mask_token == "[MASK]"


def test_load_refuses_a_folder_with_a_model_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="has no vocabulary"):
        load_tokenizer(tmp_path)


def test_script_on_a_text_file(script, tmp_path, caplog):
    (tmp_path / "corpus.txt").write_text("\n\n".join(CORPUS), encoding="utf-8", newline="")
    out = tmp_path / "out"
    argv = ["--files", str(tmp_path / "*.txt"), "--vocab_size", "320", "--output_dir", str(out)]
    with caplog.at_level("INFO"):
        script.main(argv)
    assert "vocab_size=320, cls_token_id=1, sep_token_id=2, pad_token_id=3, mask_token_id=4" in caplog.text
    tokenizer = load_tokenizer(out)
    assert len(tokenizer) == 320
    assert tokenizer.decode(tokenizer(CORPUS[2]).input_ids, skip_special_tokens=True) == CORPUS[2]

    with pytest.raises(FileExistsError, match="holds a tokenizer; pass --overwrite"):
        script.main(argv)
    with pytest.raises(ValueError, match="`vocab_size` .* at most"):  # the library ends the process
        script.main([*argv, "--vocab_size", "1000000000", "--overwrite"])
    script.main([*argv, "--vocab_size", "384", "--overwrite"])
    assert len(load_tokenizer(out)) == 384


def test_script_reads_each_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("line one\n\nline two\n")
    (tmp_path / "b.jsonl").write_text('{"body": "row one\\nrow one"}\n{"body": "row two"}\n')
    Dataset.from_dict({"body": ["row three"], "n": [1]}).to_parquet(tmp_path / "c.parquet")
    patterns = [str(tmp_path / name) for name in ("a.txt", "*.jsonl", "[cd].parquet")]
    assert list(data.stream_texts(patterns, text_column="body", line_breaks=True)) == [
        *("line one\n", "\n", "line two\n"),
        *("row one\nrow one", "row two"),
        "row three",
    ]


def test_script_streams_from_the_hub(script, tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_dict({"body": [None, *CORPUS], "n": range(1 + len(CORPUS))}).to_iterable_dataset()

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    hub = "--dataset_name some/set --dataset_config small --split test --text_column body --max_texts 1".split()
    script.main([*hub, "--vocab_size", "320", "--output_dir", str(tmp_path)])
    assert calls == [(("some/set", "small"), {"split": "test", "streaming": True})]
    assert load_tokenizer(tmp_path).mask_token_id == 4


def test_script_passes_over_a_row_without_a_text(script, tmp_path, caplog):
    rows = [*({"text": text} for text in CORPUS * 100), {"text": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script.main(
        ["--files", str(tmp_path / "rows.jsonl"), "--vocab_size", "320", "--output_dir", str(tmp_path / "out")]
    )
    assert f"1 of the {len(rows)} rows of" in caplog.text and len(load_tokenizer(tmp_path / "out")) == 320


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--files", "{}/missing*.txt"], FileNotFoundError, r"no file matches '.*missing\*\.txt'"),
        (["--files", "{}/rows.xml"], ValueError, r"cannot read '.*rows\.xml'; convert it to one of \.parquet"),
        (["--files", "{}/rows.jsonl"], ValueError, "no column 'text', but 'body', 'n'"),
        (["--files", "{}/empty.txt"], ValueError, "nothing to train on"),
        ([], ValueError, "exactly one of `files` and `dataset_name`"),
        (["--files", "x.txt", "--dataset_name", "x/y"], ValueError, "exactly one of `files` and `dataset_name`"),
    ],
    ids=["missing-file", "unknown-ending", "missing-column", "empty-file", "no-source", "two-sources"],
)
def test_script_refuses(script, tmp_path, arguments, error, message):
    (tmp_path / "rows.xml").write_text("body\nhello\n")
    (tmp_path / "rows.jsonl").write_text('{"body": "hello", "n": 1}\n')
    (tmp_path / "empty.txt").touch()
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        script.main([argument.format(tmp_path) for argument in arguments] + ["--output_dir", str(out)])
    assert not out.exists()
