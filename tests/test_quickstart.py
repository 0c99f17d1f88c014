"""From the pretraining script over fine-tuning to a merged model, and the data of the quickstarts."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import load_script
from transformers import AutoModelForSequenceClassification

from modernalbert.training.evaluation.metrics import compute_metrics


TEXTS = [f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(40)]


def test_metrics():
    logits, labels = torch.eye(2)[[0, 1, 1, 0]].numpy(), [0, 1, 0, 0]
    expected = {"accuracy": 3 / 4, "f1": 2 / 3, "matthews_correlation": 1 / 3**0.5}  # by hand
    assert compute_metrics(tuple(expected), logits, labels) == pytest.approx(expected)
    values = torch.tensor([[1.0], [2.0], [4.0]]).numpy()
    assert compute_metrics(("pearson", "spearman"), values, [3, 5, 9]) == pytest.approx({"pearson": 1, "spearman": 1})


def test_fine_tuning_merging_and_export(pretrained, tmp_path):
    rows = [{"a": text, "b": "x", "y": n % 3} for n, text in enumerate(TEXTS)]
    for name, part in (("train", rows[:25]), ("rows", rows[25:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model, merged = str(tmp_path / "model"), str(tmp_path / "merged")
    task = ["--validation_files", str(tmp_path / "rows.jsonl"), "--text_columns", "a", "b", "--label_column", "y"]
    task += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
    run_glue, merge_experts = load_script("run_glue"), load_script("merge_experts")
    training = ["--train_files", str(tmp_path / "train.jsonl"), "--do_train", "--max_steps", "2"]
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


def test_texts_of_pretraining_are_held_out_or_trained_on(tmp_path):
    files = load_script("quickstart_pretraining").write_data(tmp_path, seed=0)
    train, validation = (Path(files[name]).read_text().splitlines() for name in ("train", "validation"))
    assert len(train) > 5 * len(validation) > 1000 and not set(train) & set(validation)


def test_rows_of_the_classification(tmp_path):
    """Every class has as many rows, no text is in two places, and modules of the library belong to one class."""
    quickstart = load_script("quickstart")
    files = quickstart.write_task(tmp_path, rows=50, seed=0)
    rows = {name: [json.loads(line) for line in Path(path).read_text().splitlines()] for name, path in files.items()}
    for name, count in (("train", 50), ("validation", 100)):
        assert Counter(row["label"] for row in rows[name]) == dict.fromkeys(quickstart.AREAS, count)
    texts = [row["text"] for part in rows.values() for row in part]
    assert len(set(texts)) == len(texts)
    modules = [module for modules in quickstart.AREAS.values() for module in modules.split()]
    assert len(set(modules)) == len(modules)


def test_a_folder_of_something_else_is_kept(tmp_path):
    quickstart = load_script("quickstart")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds something else"):
        quickstart.make_folder(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
