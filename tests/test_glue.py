"""`scripts/run_glue.py` and `scripts/compare_results.py` on a few rows, and the metrics that they report."""

import json
import re
import shutil
import statistics

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import yaml
from datasets import ClassLabel, Dataset, load_dataset
from helpers import DATA, SCRIPTS, load_script
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import PeftModel
from peft.tuners.lora import Linear
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
)

from modernalbert import ModernAlbertForMaskedLM
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.data import check_labelled
from modernalbert.training.evaluation.glue import read_classes, read_split
from modernalbert.training.evaluation.labels import find_classes, number_labels
from modernalbert.training.evaluation.metrics import GLUE_MEAN, GLUE_TASKS, compute_metrics
from modernalbert.training.finetuning import add_lora


GOOD, BAD = ["fine", "lovely", "great"], ["awful", "dull", "poor"]
TEXTS = [f"A {GOOD[n % 3] if n % 2 else BAD[n % 3]} film, number {n}." for n in range(24)]
LENGTH = ["--max_length", "32"]
COMMON = ["--do_train", "--max_steps", "2", *LENGTH, "--learning_rate", "1e-3", "--logging_steps", "1"]
QUIET = ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]


def rows_of(task):
    """Rows with a task's columns; classes go round, values of STS-B rise."""
    columns, _ = GLUE_TASKS[task]
    labels = [n / 5 for n in range(24)] if task == "stsb" else [n % (3 if task == "mnli" else 2) for n in range(24)]
    return {**{column: TEXTS for column in columns if column}, "label": labels}


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_model):
    """A folder with a masked language model, GLUE as parquet, and csv files with three named classes."""
    root = tmp_path_factory.mktemp("glue")
    tokenizer = train_tokenizer(TEXTS, vocab_size=320, model_max_length=64)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}
    make_model(ModernAlbertForMaskedLM, vocab_size=padded_vocab_size(tokenizer), **ids).save_pretrained(root / "model")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **ids}
    for name in ("bert", "albert", "modernbert"):
        config = AutoConfig.for_model(name, vocab_size=padded_vocab_size(tokenizer), **shape)
        AutoModelForMaskedLM.from_config(config).save_pretrained(root / name)
    for name in ("model", "bert", "albert", "modernbert"):
        save_tokenizer(tokenizer, root / name)
    for task in GLUE_TASKS:
        splits = ("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",)
        for split in ("train", *splits):
            (root / "data" / task).mkdir(parents=True, exist_ok=True)
            rows = {name: values[:: -1 if split == "train" else 1] for name, values in rows_of(task).items()}
            Dataset.from_dict(rows).to_parquet(root / "data" / task / f"{split}.parquet")
    names = ("yes", "no", "maybe")
    write_csv(root / "three.csv", [(text, names[n % 3]) for n, text in enumerate(TEXTS)])
    return root


def write_csv(path, rows):
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))


def run(root, output_dir, *arguments, model="model", common=COMMON):
    command = ["--model_name_or_path", root / model, "--output_dir", output_dir, *common, *QUIET, *arguments]
    return load_script("run_glue").main([str(part) for part in command])


def glue(root, output_dir, *tasks_and_arguments, **kwargs):
    return run(root, output_dir, "--data_dir", root / "data", "--task_name", *tasks_and_arguments, **kwargs)


def own(root, output_dir, *arguments, files="three.csv", **kwargs):
    """Trains on the rows of a file in the other order."""
    header, *lines = (root / files).read_text().splitlines()
    train = output_dir.parent / f"train-{output_dir.name}.csv"
    train.write_text("\n".join([header, *reversed(lines)]) + "\n")
    data = ["--train_files", train, "--validation_files", root / files]
    return run(root, output_dir, *data, *arguments, **kwargs)


def read_predictions(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(found, expected):
    """Batches of other sizes round differently."""
    for line, other in zip(found, expected, strict=True):
        assert line.pop("logits") == pytest.approx(other["logits"], abs=1e-5)
        assert line == {name: value for name, value in other.items() if name != "logits"}


def test_metrics_of_predictions_are_those_of_the_libraries(root, tmp_path):
    reference = {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": sklearn.metrics.f1_score,
        "matthews_correlation": sklearn.metrics.matthews_corrcoef,
        "pearson": lambda labels, values: scipy.stats.pearsonr(labels, values).statistic,
        "spearman": lambda labels, values: scipy.stats.spearmanr(labels, values).statistic,
    }
    for task in ("mrpc", "stsb"):
        scores = glue(root, tmp_path / task, task)["scores"]
        lines = read_predictions(tmp_path / task / "predictions.jsonl")
        labels, predictions = [line["label"] for line in lines], [line["prediction"] for line in lines]
        assert labels == pytest.approx(rows_of(task)["label"])
        assert scores == pytest.approx({name: reference[name](labels, predictions) for name in GLUE_TASKS[task][1]})
    logits, labels = np.random.default_rng(0).normal(size=(50, 2)), np.arange(50) % 2
    found = compute_metrics(("matthews_correlation", "f1"), logits, labels)
    assert found == pytest.approx({name: reference[name](labels, logits.argmax(1)) for name in found})


# ---- Tasks


def test_all_of_glue(root, tmp_path):
    start = json.dumps({task: {"start_from": "mnli"} for task in ("mrpc", "stsb", "rte")})
    results = glue(root, tmp_path, "all", "--max_steps", "1", "--baselines", "--task_arguments", start)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    scores = results["scores"]
    assert list(scores)[0] == "mean" and set(scores) == {"mean", *GLUE_TASKS}
    assert scores["mean"] == pytest.approx(statistics.mean(scores[task] for task in GLUE_MEAN))
    assert set(results["details"]["baselines"]["majority"]) == set(scores)
    table = (tmp_path / "results.md").read_text()
    assert "| cola (matthews_correlation) |" in table and "| mean |" in table and "| majority | TF-IDF |" in table

    mnli = json.loads((tmp_path / "mnli" / "seed-42-lr-0.001" / "results.json").read_text())
    assert list(mnli["scores"]) == ["accuracy", "accuracy_mismatched"]
    assert len(read_predictions(tmp_path / "mnli" / "seed-42-lr-0.001" / "predictions_mismatched.jsonl")) == 24
    rte = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rte" / "seed-42-lr-0.001")
    assert rte.config.num_labels == 2
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mnli" / "seed-42-lr-0.001")
    far = ModernAlbertForMaskedLM.from_pretrained(root / "model")
    name = "layers.0.mlp.Wi.weight"  # one step from MNLI's, two from the beginning
    distance = [(m.base_model.get_parameter(name) - rte.model.get_parameter(name)).norm() for m in (before, far)]
    assert 0 < distance[0] < distance[1]


def test_classes_may_have_names(root, tmp_path):
    own(root, tmp_path / "out")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    lines = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [line["label"] for line in lines[:3]] == ["yes", "no", "maybe"]
    assert all(config.id2label[int(np.argmax(line["logits"]))] == line["prediction"] for line in lines)
    evaluate = ["--validation_files", root / "three.csv", "--max_eval_samples", "7"]
    run(root, tmp_path / "again", *evaluate, model=tmp_path / "out", common=LENGTH)
    assert_same(read_predictions(tmp_path / "again" / "predictions.jsonl"), lines[:7])


def test_a_regression_of_ones_own(root, tmp_path):
    write_csv(tmp_path / "values.csv", [(text, n / 8) for n, text in enumerate(TEXTS)])
    results = own(root, tmp_path / "out", "--task_name", "mine", files=tmp_path / "values.csv")
    assert results["task"] == "mine" and list(results["scores"]) == ["pearson", "spearman"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_the_router_is_logged_and_its_loss_can_be_left_out(root, tmp_path):
    for coefficient in ("0", "1"):
        own(root, tmp_path / coefficient, "--router_aux_loss_coef", coefficient)
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0] for name in ("0", "1")]
    for log in logs:
        assert 0 < log["router_entropy/group_1"] <= 1
        assert sum(log[f"expert_load/group_1/expert_{n}"] for n in range(4)) == pytest.approx(1)
    assert logs[0]["aux_loss"] == pytest.approx(logs[1]["aux_loss"])
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(logs[1]["aux_loss"], rel=1e-3)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "1").config.router_aux_loss_coef == 1


@pytest.mark.parametrize(
    ("name", "target", "fresh"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query", {"bert.pooler.dense"}),
        ("albert", "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn", {"albert.pooler"}),
        ("modernbert", "Wqkv", {"head"}),
    ],
)
def test_another_encoder_runs_by_the_same_command(root, tmp_path, name, target, fresh):
    extra = ["--router_aux_loss_coef", "0.1", "--merge_after", "uniform"]
    results = own(root, tmp_path / "whole", *extra, model=name)
    assert results["model_type"] == name and list(results["scores"]) == ["accuracy"]
    own(root, tmp_path / "lora", *extra, "--peft", model=name)
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert target in settings["target_modules"]
    # What starts at random; "score" is PEFT's own.
    assert set(settings["modules_to_save"]) == {"classifier", "score", *fresh}


# ---- Seeds, rates, resuming


def test_finished_runs_are_skipped(root, tmp_path, monkeypatch):
    first = own(root, tmp_path, "--seeds", "0", "1")
    (tmp_path / "seed-1-lr-0.001" / "results.json").unlink()
    trained = []

    def train(self, **kwargs):
        trained.append(self.args.seed)
        self.state.global_step = 2

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr("modernalbert.training.finetuning.write_files", lambda *arguments: None)
    own(root, tmp_path, "--seeds", "0", "1")
    assert trained == [1]
    with pytest.raises(ValueError, match=r"finished run with other settings \(max_steps: 2 before, 3 now\)"):
        own(root, tmp_path, "--seeds", "0", "1", "--max_steps", "3")
    assert first["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("extra", "half", "checkpoint"),  # what was being written, and where to go on
    [
        ([], "checkpoint-4/trainer_state.json", "checkpoint-2"),
        ([], "config.json", "checkpoint-4"),
    ],
)
def test_a_killed_run_goes_on(root, tmp_path, monkeypatch, extra, half, checkpoint):
    arguments = ["--max_steps", "4", "--save_steps", "2", "--save_total_limit", "2", *extra]
    expected = own(root, tmp_path, *arguments)
    logits = read_predictions(tmp_path / "predictions.jsonl")
    weights = "adapter_model.safetensors" if extra else "model.safetensors"
    for name in ("results.json", "predictions.jsonl", weights, half):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="checkpoints of a run with other settings .*weight_decay"):
        own(root, tmp_path, *arguments, "--weight_decay", "0.5")
    resumed, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **given: resumed.append(given) or train(self, **given))
    assert own(root, tmp_path, *arguments)["scores"] == expected["scores"]
    assert resumed == [{"resume_from_checkpoint": str(tmp_path / checkpoint)}]
    assert read_predictions(tmp_path / "predictions.jsonl") == logits
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]


def test_training_stops_early_and_keeps_the_best(root, tmp_path):
    every = ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    best = ["--load_best_model_at_end", "True", "--early_stopping_patience", "2", "--max_steps", "40"]
    for _ in range(2):
        results = own(root, tmp_path, *every, *best, "--learning_rate", "1e-9")  # no score changes
        assert results["details"]["steps"] == 3 and (tmp_path / "checkpoint-1").is_dir()
        (tmp_path / "results.json").unlink()  # as if it was killed then: it does not go on


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_regression_starts_from_a_classifier(root, tmp_path, name):
    """Their forward writes into the configuration that labels are classes."""
    start = json.dumps({"stsb": {"start_from": "mnli"}})
    glue(root, tmp_path, "stsb", "mnli", "--task_arguments", start, model=name)
    folder = tmp_path / "stsb" / "seed-42-lr-0.001"
    assert AutoConfig.from_pretrained(folder).problem_type == "regression"
    (logged, _), values = (
        [entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"][:2]],
        rows_of("stsb")["label"],
    )
    assert logged > np.var(values)  # squares of differences from 0 to 4.6; the entropy of one class is 0


def test_a_classifier_of_other_classes_can_go_on(root, tmp_path):
    own(root, tmp_path / "three")
    results = run(root, tmp_path / "two", "--task_name", "sst2", "--data_dir", root / "data", model=tmp_path / "three")
    config = AutoConfig.from_pretrained(tmp_path / "two")
    assert config.num_labels == 2 and config.id2label == {0: "LABEL_0", 1: "LABEL_1"} and results["task"] == "sst2"


def test_other_data_is_another_run(root, tmp_path):
    """The content counts, not where the file is."""
    for name, cut in (("same", None), ("other", -1)):
        (tmp_path / f"{name}.csv").write_text("".join((root / "three.csv").read_text().splitlines(True)[:cut]))
    results = own(root, tmp_path / "out")
    assert own(root, tmp_path / "out", files=tmp_path / "same.csv") == results
    with pytest.raises(ValueError, match=r"finished run with other settings \(data: "):
        own(root, tmp_path / "out", files=tmp_path / "other.csv")
    (tmp_path / "out" / "results.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoints of a run with other settings \(data: "):
        own(root, tmp_path / "out", files=tmp_path / "other.csv")


def test_another_model_of_the_same_name_is_another_run(root, tmp_path):
    shutil.copytree(root / "model", tmp_path / "model")
    own(root, tmp_path / "out", model=tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "out" / "arguments.json").read_text()
    model = ModernAlbertForMaskedLM.from_pretrained(tmp_path / "model")
    model.base_model.final_norm.weight.data += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"other settings \(model_name_or_path: 'model \w+' before, 'model \w+' now"):
        own(root, tmp_path / "out", model=tmp_path / "model")


# ---- What is written


@pytest.mark.parametrize(("extra", "task"), [([], "mrpc"), (["--peft"], "mrpc"), ([], "stsb")])
def test_cards(root, tmp_path, monkeypatch, extra, task):
    """Their usage runs as written, and the Hub reads the scores."""
    results = glue(root, tmp_path / "out", task, "--merge_after", "uniform", *extra)
    for folder, prefix in ((tmp_path / "out", ""), (tmp_path / "out" / "merged", "merged_")):
        card = ModelCard.load(folder / "README.md")
        name, scores = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert name == folder.name
        for score in scores:
            assert score.metric_value == pytest.approx(results["scores"][prefix + score.metric_name], abs=1e-4)
        assert str(tmp_path) not in card.content and "None" not in card.content
        code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1].replace('"model"', f'"{root}/model"')
        monkeypatch.chdir(folder.parent)
        exec(code, {})


def test_the_tokenizer_is_saved_as_it_was(root, tmp_path):
    own(root, tmp_path / "out", "--merge_after", "uniform")
    for folder in (tmp_path / "out", tmp_path / "out" / "merged"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert json.loads((folder / name).read_text()) == json.loads((root / "model" / name).read_text())


# ---- LoRA and merging


def test_a_lora_is_saved_and_reloaded(root, tmp_path):
    own(root, tmp_path / "out", "--peft", "--peft_rank", "4")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= files
    assert not {"model.safetensors", "training_args.bin"} & files
    base = AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=3)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = adapted(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    lines = read_predictions(tmp_path / "out" / "predictions.jsonl")
    torch.testing.assert_close(torch.tensor([line["logits"] for line in lines]), logits, rtol=1e-4, atol=1e-5)

    evaluate = ["--validation_files", root / "three.csv"]
    run(root, tmp_path / "again", *evaluate, model=tmp_path / "out", common=LENGTH)
    assert_same(read_predictions(tmp_path / "again" / "predictions.jsonl"), lines)
    with pytest.raises(ValueError, match="is a LoRA: fine-tune the model that it belongs to"):
        own(root, tmp_path / "more", model=tmp_path / "out")


def test_an_adapter_of_a_shared_block_acts_at_every_depth(root):
    model = AutoModelForSequenceClassification.from_pretrained(root / "model")
    model = add_lora(model, "SEQ_CLS", [], rank=2).eval()
    adapters = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(adapters) == 2 * 4  # two groups of two layers, each with Wqkv, Wi and twice Wo
    calls = []
    for adapter in adapters:
        adapter.lora_A["default"].register_forward_hook(lambda module, *_: calls.append(module))
    model(input_ids=torch.tensor([[1, 5, 6, 2]]))
    assert len(calls) == 4 * 4 and all(calls.count(adapter.lora_A["default"]) == 2 for adapter in adapters)


@pytest.mark.parametrize(("method", "lora"), [("uniform", []), ("frequency", ["--peft"])], ids=["whole", "lora"])
def test_experts_are_merged_after_training(root, tmp_path, method, lora):
    results = own(root, tmp_path / "out", "--merge_after", method, *lora)
    assert list(results["scores"]) == ["accuracy", "merged_accuracy"]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged")
    assert merged.config.num_experts == 0 and merged.num_parameters() == results["details"]["merged_parameters"]
    evaluate = ["--validation_files", root / "three.csv"]
    again = run(root, tmp_path / "again", *evaluate, model=tmp_path / "out" / "merged", common=LENGTH)
    assert again["scores"]["accuracy"] == results["scores"]["merged_accuracy"]


# ---- Refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("", "yes"), "row 0 of '.*train-out.csv' has no 'text'"),
        (("text", ""), "row 0 of '.*train-out.csv' has no 'label'"),
    ],
)
def test_a_broken_row_is_refused(root, tmp_path, row, message):
    text = (root / "three.csv").read_text() + ",".join(row) + "\n"
    (tmp_path / "broken.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        own(root, tmp_path / "out", files=tmp_path / "broken.csv")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], "row 2 of .*validation.parquet' has the label -1, as in test sets"),
        (
            [0, 1, 2],
            "row 2 of .*parquet' has the label '2', expected one of the classes of the train rows: '0', '1'; the",
        ),
        ([0.0, 1.0, 0.5], "row 2 of .*parquet' has the label '0.5', expected .* labels of .* are '0.0', '0.5', '1.0'"),
        (["1", "0", "positive"], "row 2 of .*parquet' has the label 'positive', expected one of the classes"),
    ],
)
def test_labels_that_are_no_class_are_refused(root, tmp_path, labels, message):
    (tmp_path / "sst2").mkdir()
    Dataset.from_dict(rows_of("sst2")).to_parquet(tmp_path / "sst2" / "train.parquet")
    Dataset.from_dict({"sentence": TEXTS[:3], "label": labels}).to_parquet(tmp_path / "sst2" / "validation.parquet")
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "out", "--task_name", "sst2", "--data_dir", tmp_path)
    assert not (tmp_path / "out").exists()


def test_rows_without_texts_are_refused():
    for texts, message in (([], "it has no rows"), ([1], "row 0 of 'it' has 1 as 'text', expected a text")):
        with pytest.raises(ValueError, match=message):
            check_labelled(Dataset.from_dict({"text": texts, "y": [0] * len(texts)}), "it", ["text"], "y")


def test_a_class_is_its_name_whatever_its_number(root, tmp_path):
    """The rows number their classes in another order than the model does, or not at all."""
    own(root, tmp_path / "model", "--max_steps", "1")
    expected = read_predictions(tmp_path / "model" / "predictions.jsonl")[:3]
    rows = Dataset.from_dict({"text": TEXTS[:3], "label": [0, 1, 2]})
    rows.cast_column("label", ClassLabel(names=["yes", "no", "maybe"])).to_parquet(tmp_path / "rows.parquet")
    evaluate = ["--validation_files", tmp_path / "rows.parquet"]
    run(root, tmp_path / "out", *evaluate, model=tmp_path / "model", common=LENGTH)
    assert_same(read_predictions(tmp_path / "out" / "predictions.jsonl"), expected)
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="label '0', expected one of the classes of the trained model: 'maybe', 'no'"):
        run(root, tmp_path / "again", *evaluate, model=tmp_path / "model", common=LENGTH)


@pytest.mark.parametrize(
    ("train", "validation", "names"),
    [
        (["1", "2", "N"], ["2", "1"], ["1", "2", "N"]),
        (["false", "mixed", "true"], ["true", "False"], ["false", "mixed", "true"]),
        ([10, 5000], [5000, 10], ["10", "5000"]),
        ([1, 2], ["2", 1.0], ["1", "2"]),
        ([0.0, 1.0], [1, 0], ["0.0", "1.0"]),
        ([True, False], [False, True], ["false", "true"]),
        (["None", "NA"], ["NA", "None"], ["NA", "None"]),
        (["10", "9", "-2"], ["9"], ["-2", "9", "10"]),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_classes_are_texts_in_every_file(tmp_path, caplog, train, validation, names, ending):
    """The same classes in training and validation, whatever type a reader would give to either file alone."""
    rows, sources = {}, {}
    for split, values in (("train", train * 2), ("validation", validation)):
        sources[split] = str(tmp_path / f"{split}.{ending}")
        if ending == "csv":
            lines = ["text,label", *(f"a,{str(v).lower() if isinstance(v, bool) else v}" for v in values)]
        else:
            lines = [json.dumps({"text": "a", "label": value}) for value in values]
        (tmp_path / f"{split}.{ending}").write_text("\n".join(lines) + "\n")
        rows[split], _ = read_split("mine", split, [sources[split]], None, ["text"], "label")
    numbered, found = read_classes(rows, sources, None, None)
    assert found == names

    def spell(value):
        text = str(value).lower() if isinstance(value, bool) or value in ("False",) else str(value)
        return text if text in names else text.removesuffix(".0") if text.endswith(".0") else f"{text}.0"

    for split, values in (("train", train * 2), ("validation", validation)):
        assert [names[number] for number in numbered[split]["label"]] == [spell(value) for value in values]


@pytest.mark.parametrize(
    ("labels", "regression", "message"),
    [
        (["a"] * 4, None, "all 4 rows of 'it' have the label 'a'; a classifier needs two classes"),
        (["1", "1.0", "b"], None, "classes '1' and '1.0', which are one; write one of them"),
        (["True", "true"], None, "classes 'True' and 'true', which are one"),
        (["good", " good", "bad"], None, "classes ' good' and 'good', which are one"),
        (["caf\u00e9", "cafe\u0301"], None, "which are one"),
        ([str(n) for n in range(30)], None, "30 classes in 30 rows; is '0' a class"),
        (["1", "x"], True, "has the label 'x', no number to regress on"),
        (["2", "2"], True, "all labels of 'it' are 2: there is nothing to learn"),
    ],
)
def test_labels_that_make_no_sense_are_refused(labels, regression, message):
    rows = Dataset.from_dict({"text": labels, "label": labels})
    with pytest.raises(ValueError, match=message):
        find_classes(rows, labels, "it", regression)


def test_numbers_are_classes_or_values():
    for labels, asked, expected in (
        (["1", "2", "1"], None, ["1", "2"]),
        (["1", "2.5", "1"], None, None),
        (["1", "2", "1"], True, None),
        (["1", "2.5", "1"], False, ["1", "2.5"]),
        (["1e3", "2"], None, None),
        (["01", "02", "10"], None, ["01", "02", "10"]),
        (["+1", "0"], None, ["+1", "0"]),
        (["0", "3000000"] * 2, None, ["0", "3000000"]),
    ):
        assert find_classes(Dataset.from_dict({"label": labels}), labels, "it", asked) == expected
    assert number_labels(["1", "2.5"], "it", None) == [1.0, 2.5]
    with pytest.raises(ValueError, match="row 1 of 'it' has the label 'nan', expected a number"):
        number_labels(["1", "nan"], "it", None)
    with pytest.raises(ValueError, match="6 classes in 4 rows"):
        rows = Dataset.from_dict({"label": [0, 1, 2, 3]}).cast_column("label", ClassLabel(names=list("abcdef")))
        find_classes(rows, list("abcd"), "it", None)


def test_what_was_understood_is_logged(root, tmp_path, caplog):
    with caplog.at_level("INFO"):
        own(root, tmp_path / "out", "--max_steps", "1")
    assert "'label' is 3 classes ('maybe', 'no', 'yes'); 24 train rows, 24 validation rows" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task_name", "glue"], "there is no task 'glue'; the tasks are cola, .*, or `all`"),
        ([], "give either `task_name` or `validation_files`"),
        (["--validation_files", "x", "--data_dir", "y"], "are one task"),
        (["--task_name", "rte", "--text_columns", "a", "b", "c"], "must name one or two columns"),
        (["--task_name", "rte", "--task_arguments", '{"rte": {"epochs": 1}}'], "'rte' has 'epochs', expected some"),
        (["--task_name", "rte", "--task_arguments", '{"rte": {"start_from": "mnli"}}'], "name both in `task_name`"),
        (["--task_name", "rte", "--task_arguments", '{"ret": {}}'], "`task_arguments` names 'ret', which is no task"),
        (["--task_name", "rte", "--task_arguments", '{"rte": {"learning_rate": "5e-5"}}'], "expected a number"),
        (["--task_name", "rte", "--max_length", "65"], r"`max_length` \(65\) must be .* at most the 64 tokens"),
        (["--task_name", "rte", "rte"], "names a task twice"),
        (["--task_name", "rte", "--train_files", "x.csv"], "`train_files` need `validation_files`"),
        (["--validation_files", "x", "--label_column", "text"], "name a column twice"),
        (["--validation_files", "x", "--text_columns", "a", "a"], "name a column twice"),
        (["--task_name", "rte", "--task_arguments", "{rte"], "`task_arguments` is no JSON"),
        (["--task_name", "rte", "--task_arguments", '{"rte": 3}'], "3 for 'rte', expected an object of arguments"),
        (
            ["--task_name", "rte", "--task_arguments", '{"rte": {"start_from": 3}}'],
            "3 as `start_from`, expected a name",
        ),
        (["--task_name", "rte", "--task_arguments", '{"rte": {"learning_rate": 0}}'], "expected a positive number"),
        (
            ["--task_name", "rte", "--task_arguments", '{"rte": {"per_device_train_batch_size": 1.5}}'],
            "a whole number",
        ),
        (["--validation_files", "{root}/three.csv"], "`do_train` with `validation_files` needs `train_files`"),
        (
            ["--task_name", "rte", "--data_dir", "{root}/data", "--do_train", "False"],
            "it was not trained for this task",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(root, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(
            root,
            tmp_path / "out",
            *(argument.format(root=root) if "{root}" in argument else argument for argument in arguments),
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "`baselines` learn from training rows: give `do_train`"),
        ({"problem_type": "multi_label_classification"}, "gives several classes to a text"),
    ],
)
def test_what_a_trained_classifier_does_not_go_with_is_refused(root, tmp_path, fields, message):
    shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"architectures": ["ModernAlbertForSequenceClassification"], **fields}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    arguments = ["--validation_files", root / "three.csv", *([] if fields else ["--baselines"])]
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "out", *arguments, model=tmp_path / "model", common=LENGTH)


def test_experts_that_cannot_merge_are_refused_before_training(root, tmp_path):
    for name, changed in {"moa": {"ffn_modulation": "moa"}, "depth": {"router_type": "depth"}}.items():
        shutil.copytree(root / "model", tmp_path / name)
        config = AutoConfig.from_pretrained(root / "model", **changed)
        ModernAlbertForMaskedLM(config).save_pretrained(tmp_path / name)
    for name, method, message in (
        ("moa", "uniform", "only a Mixture of LoRAs can be merged"),
        ("depth", "regression", "`router_type` is 'depth'; use 'uniform'"),
    ):
        with pytest.raises(ValueError, match=message):
            own(root, tmp_path / "out", "--merge_after", method, model=tmp_path / name)
        assert not list((tmp_path / "out").glob("**/*.safetensors"))
    results = own(root, tmp_path / "out", "--merge_after", "uniform", model=tmp_path / "depth")
    assert "merged_accuracy" in results["scores"]


def test_a_single_run_is_not_overwritten_by_several(root, tmp_path):
    own(root, tmp_path)
    with pytest.raises(FileExistsError, match="holds a single run; choose another `output_dir` for 2 runs"):
        own(root, tmp_path, "--seeds", "0", "1")


# ---- Recipe, real data, comparison


def test_the_recipe_has_every_task():
    recipe = yaml.safe_load((SCRIPTS.parent / "recipes" / "glue.yaml").read_text())
    tasks = recipe["task_arguments"]
    assert set(tasks) == set(GLUE_TASKS)
    assert {task for task, values in tasks.items() if "start_from" in values} == {"rte", "mrpc", "stsb"}
    assert all(isinstance(values["learning_rate"], float) for values in tasks.values())


@pytest.mark.skipif(not DATA.exists(), reason="needs GLUE's rows: name their folder in MODERNALBERT_DATA")
@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb"])
def test_real_rows(root, tmp_path, task):
    model = ["--model_name_or_path", str(root / "model"), "--output_dir", str(tmp_path), "--task_name", task]
    few = ["--data_dir", str(DATA / "glue"), "--max_train_samples", "32", "--max_eval_samples", "32"]
    results = load_script("run_glue").main([*model, *COMMON, *QUIET, *few])
    labels = load_dataset("parquet", data_files=str(DATA / "glue" / task / "validation.parquet"), split="train")[
        "label"
    ]
    lines = read_predictions(tmp_path / "predictions.jsonl")
    assert [line["label"] for line in lines] == pytest.approx(list(labels)[:32])
    assert results["data"]["train"]["rows"] == 32


def test_runs_are_compared(root, tmp_path):
    glue(root, tmp_path / "runs" / "a", "cola", "sst2", "--seeds", "0", "1", "--baselines", "--merge_after", "uniform")
    glue(root, tmp_path / "runs" / "b", "sst2", model="bert")
    glue(root, tmp_path / "runs" / "c", "sst2", model="bert")
    a, b = (json.loads((tmp_path / "runs" / name / "results.json").read_text()) for name in "ab")
    compare = load_script("compare_results")
    table = compare.main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "comparison.md").read_text() == table
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert header == ["model", "parameters", "cola", "sst2"]
    lines = {name: cells for name, *cells in lines}
    assert lines["model, merged"][0] == f"{a['details']['merged_parameters'] / 1e6:.1f}M"
    mean, std = 100 * a["scores"]["sst2"], 100 * a["details"]["std"]["sst2"]
    assert list(lines) == ["model", "model, merged", "bert", "bert (c)", "majority", "TF-IDF"]
    merged_std = 100 * a["details"]["std"]["merged_sst2"]
    assert lines["model, merged"][2] == f"{100 * a['scores']['merged_sst2']:.1f} ± {merged_std:.1f}"
    assert lines["majority"][::2] == ["", "50.0"] and lines["bert"][1:] == ["", f"{100 * b['scores']['accuracy']:.1f}"]
    assert f"| {mean:.1f} ± {std:.1f} |" in table
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    rows = compare.collect([run for folder in ("b", "c") for run in compare.read_results(tmp_path / "runs" / folder)])
    assert len(compare.plot(rows).axes) == 2

    with pytest.raises(FileNotFoundError, match="nor does a folder in it"):
        compare.read_results(tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what the task scripts .* write"):
        compare.read_results(tmp_path / "out")


def write_results(folder, **changes):
    facts = {"task": "custom", "model": "m", "parameters": 3, "scores": {"accuracy": 0.5}, "settings": {}}
    facts |= {"details": {}, "environment": {}, "data": {"validation": {"fingerprint": "a"}}, **changes}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(facts))


def test_scores_on_different_rows_are_not_compared(tmp_path):
    """Every task of one's own has the same name."""
    compare, prints = (
        load_script("compare_results"),
        {"train": {"fingerprint": "b"}, "validation": {"fingerprint": "a"}},
    )
    for name, data in (("one", {}), ("two", {"data": prints, "model": "n"})):
        write_results(tmp_path / name, **data)
    command = ["--runs", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert "| n | 0.0M | 50.0 |" in compare.main(command)
    write_results(tmp_path / "three", data={"validation": {"fingerprint": "c"}})
    with pytest.raises(ValueError, match="the runs of 'custom' were scored on different rows"):
        compare.main(command)


@pytest.mark.parametrize(
    "changes", [{"scores": {}}, {"scores": [1]}, {"scores": {"f1": float("nan")}}, {"parameters": "3"}], ids=str
)
def test_results_that_are_none_are_not_compared(tmp_path, changes):
    write_results(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match="run/results.json' is not what the task scripts"):
        load_script("compare_results").main(["--runs", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_labels_are_not_smoothed_in_a_regression(root, tmp_path):
    rows = "".join(json.dumps({"text": f"a text {n}", "label": n / 4}) + "\n" for n in range(8))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "dev.jsonl").write_text(rows.replace("a text", "text"))
    files = ["--train_files", str(tmp_path / "train.jsonl"), "--validation_files", str(tmp_path / "dev.jsonl")]
    model = ["--model_name_or_path", str(root / "model"), "--output_dir", str(tmp_path / "out"), *files]
    with pytest.raises(ValueError, match="`label_smoothing_factor` is for classes, and 'custom' is a regression"):
        load_script("run_glue").main([*model, *COMMON, *QUIET, "--label_smoothing_factor", "0.1"])


def test_models_of_one_name_are_told_apart():
    runs = [
        {"model": name, "settings": {"model_name_or_path": identity}}
        for name, identity in (("a", "a 0123456789"), ("a", "a fedcba9876"), ("b", "b 0123456789"), ("c/d", "c/d"))
    ]
    names = load_script("compare_results").name_models([*runs, runs[0]])
    assert names == ["a (01234567)", "a (fedcba98)", "b", "c/d", "a (01234567)"]
