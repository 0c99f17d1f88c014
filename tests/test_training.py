"""Data, export, and every script end to end on a few rows, as the README runs them."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import load_script
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForSequenceClassification

import modernalbert
from modernalbert.tokenization import save_tokenizer, train_tokenizer
from modernalbert.training.data import PackedCollator, find_files, load_files, pack_texts
from modernalbert.training.evaluation.metrics import compute_metrics
from modernalbert.training.export import folder as export


TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "A list is sorted in place, and nothing is returned. " * 6,
]
TEXTS += [f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tokenizer):
    """A model after two steps of the pretraining script, and the folder with its files."""
    folder = tmp_path_factory.mktemp("pretrained")
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["--preset", "nano", "--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / "model")]
    arguments += ["--train_data", str(folder / "*.jsonl"), "--validation_data", str(folder / "texts.jsonl")]
    arguments += [
        "--max_length",
        "32",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--report_to",
        "none",
    ]
    arguments += ["--use_cpu", "True", "--disable_tqdm", "True", "--learning_rate", "1e-3"]
    results = load_script("pretrain").main(arguments)
    return folder, arguments, results


@pytest.mark.parametrize("max_length", [7, 32, 1000])
def test_packing_loses_no_token_and_cuts_full_rows(tokenizer, max_length):
    packed = pack_texts(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length)["input_ids"]
    expected = [token for text in TEXTS if text for token in tokenizer(text)["input_ids"]]
    assert [token for row in packed for token in row] == expected
    assert all(len(row) == max_length for row in packed[:-1])
    assert tokenizer.model_max_length == 8192


def test_positions_start_anew_with_every_text(tokenizer):
    rows = [
        {"input_ids": tokenizer(a)["input_ids"] + tokenizer(b)["input_ids"]} for a, b in (("ab", "c"), ("a", "bc"))
    ]
    batch = PackedCollator(tokenizer)(rows)
    for row, positions in zip(rows, batch["position_ids"], strict=True):
        second = row["input_ids"][1:].index(tokenizer.cls_token_id) + 1
        length = len(row["input_ids"])
        assert positions.tolist()[:length] == [*range(second), *range(length - second)]


def test_packed_texts_do_not_see_each_other(tokenizer):
    """The loss of a packed row equals that of its texts apart."""
    model = modernalbert.ModernAlbertForMaskedLM(modernalbert.ModernAlbertConfig.preset("nano", vocab_size=320)).eval()
    first, second = tokenizer("One text.")["input_ids"], tokenizer("Another one, longer.")["input_ids"]
    batch = PackedCollator(tokenizer)([{"input_ids": first + second}])
    packed = model(**batch).logits[0]
    for start, end in ((0, len(first)), (len(first), len(first) + len(second))):
        alone = model(batch["input_ids"][:, start:end]).logits[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda folder, tok: find_files([str(folder / "no*.txt")]), FileNotFoundError, "no file matches"),
        (lambda folder, tok: find_files([__file__]), ValueError, "convert it to one of .parquet"),
        (lambda folder, tok: pack_texts(Dataset.from_dict({"text": ["", " "]}), tok, 8), ValueError, "all of its 2"),
    ],
)
def test_bad_data_is_refused(tmp_path, tokenizer, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path, tokenizer)


def test_files_of_several_kinds_are_read_together(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    assert sorted(load_files([str(tmp_path / "*")])["text"]) == ["one", "three", "two"]


def test_metrics():
    logits, labels = torch.eye(2)[[0, 1, 1, 0]].numpy(), [0, 1, 0, 0]
    expected = {"accuracy": 3 / 4, "f1": 2 / 3, "matthews_correlation": 1 / 3**0.5}  # by hand
    assert compute_metrics(tuple(expected), logits, labels) == pytest.approx(expected)
    values = torch.tensor([[1.0], [2.0], [4.0]]).numpy()
    assert compute_metrics(("pearson", "spearman"), values, [3, 5, 9]) == pytest.approx({"pearson": 1, "spearman": 1})


def test_pretraining(pretrained):
    folder, _, results = pretrained
    assert results["eval_loss"] < results["eval_loss_start"]
    assert json.loads((folder / "model" / "results.json").read_text()) == results
    model = modernalbert.ModernAlbertForMaskedLM.from_pretrained(folder / "model")
    assert not model.config.sparse_prediction and model.num_parameters() == results["parameters"]
    assert {"modeling_modernalbert.py", "tokenizer.json"} <= {path.name for path in (folder / "model").iterdir()}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max_length", "2048"], r"`max_length` \(2048\) exceeds .* \(1024\)"),
        (["--preset", "huge"], "there is no preset 'huge'"),
        (["--config_name", "some/model"], "exactly one of `preset`, `config_name` and `model_name_or_path`"),
    ],
)
def test_pretraining_refuses(pretrained, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        load_script("pretrain").main([*pretrained[1], "--output_dir", str(tmp_path), *extra])


def test_fields_of_a_trained_model_can_be_overridden(pretrained, tokenizer):
    pretrain = load_script("pretrain")
    start = {"tokenizer": "", "train_data": [], "model_name_or_path": str(pretrained[0] / "model")}
    overrides = json.dumps({"router_aux_loss_coef": 0.5})
    model = pretrain.build_model(pretrain.PretrainingArguments(**start, config_overrides=overrides), tokenizer)
    assert model.config.router_aux_loss_coef == 0.5
    with pytest.raises(StrictDataclassClassValidationError, match="`router_jitter_noise`"):
        overrides = json.dumps({"router_jitter_noise": -1})
        pretrain.build_model(pretrain.PretrainingArguments(**start, config_overrides=overrides), tokenizer)


def test_fine_tuning_merging_and_export(pretrained, tmp_path):
    rows = [{"a": text, "b": "x", "y": n % 3} for n, text in enumerate(TEXTS[3:])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, merged = str(tmp_path / "model"), str(tmp_path / "merged")
    task = ["--validation_files", str(tmp_path / "rows.jsonl"), "--text_columns", "a", "b", "--label_column", "y"]
    task += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
    run_glue, merge_experts = load_script("run_glue"), load_script("merge_experts")
    training = ["--train_files", str(tmp_path / "rows.jsonl"), "--do_train", "--max_steps", "2"]
    start = ["--model_name_or_path", str(pretrained[0] / "model")]
    run_glue.main([*start, "--output_dir", model, *training, *task])
    assert AutoModelForSequenceClassification.from_pretrained(model).config.num_labels == 3

    merge_experts.main(["--model_name_or_path", model, "--output_dir", merged])
    config = AutoModelForSequenceClassification.from_pretrained(merged).config
    assert config.num_experts == 0 and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    evaluation = ["--model_name_or_path", merged, "--output_dir", str(tmp_path / "evaluated")]
    assert 0 <= run_glue.main([*evaluation, *task])["scores"]["accuracy"] <= 1

    with pytest.raises(FileExistsError, match="exists and is not empty"):
        merge_experts.main(["--model_name_or_path", model, "--output_dir", merged])
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_experts.main(["--model_name_or_path", merged, "--output_dir", str(tmp_path / "again")])
    with pytest.raises(ValueError, match="no column 'missing'"):
        run_glue.main([*start, "--output_dir", model, *training, *task, "--label_column", "missing"])
    assert not (tmp_path / "again").exists()


def test_an_export_that_does_not_load_leaves_nothing(pretrained, tmp_path, tokenizer, monkeypatch):
    model = modernalbert.ModernAlbertForMaskedLM.from_pretrained(pretrained[0] / "model")
    monkeypatch.setattr(export, "RELOAD", "raise SystemExit('no such luck')")
    with pytest.raises(RuntimeError, match="does not load in a fresh process:\nno such luck"):
        export.export_model(model, tokenizer, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_quickstart_data(tmp_path):
    """The two classes differ in word order alone, and validation sentences come from texts that training has not."""
    quickstart = load_script("quickstart")
    files = quickstart.write_data(tmp_path, sentences=500, seed=0)
    train, validation = (Path(files[name]).read_text().splitlines() for name in ("train", "validation"))
    assert len(train) > 5 * len(validation) > 1000 and not set(train) & set(validation)
    rows = [json.loads(line) for line in Path(files["order_validation"]).read_text().splitlines()]
    assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6
    trained = [json.loads(line)["text"] for line in Path(files["order_train"]).read_text().splitlines()]
    assert not {row["text"] for row in rows} & set(trained)
    texts = " ".join(json.loads(line)["text"] for line in validation)
    assert all((row["text"] in texts) == bool(row["label"]) for row in rows)
