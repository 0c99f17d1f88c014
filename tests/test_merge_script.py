"""Merging as users run it: every format, the figures of the report, the way to the Hub, and routing seen in training."""

import copy
import html
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import load_script
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from modernalbert import (
    ModernAlbertForMaskedLM,
    ModernAlbertForSequenceClassification,
    ModernAlbertForTokenClassification,
)
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.callbacks import RoutingFrequencies
from modernalbert.training.data import load_texts
from modernalbert.training.evaluation.metrics import score_model
from modernalbert.training.export import folder as export
from modernalbert.training.export.adapter import write_adapter
from modernalbert.training.export.folder import push_folder
from modernalbert.training.export.redaction import read_text
from modernalbert.training.packing import PackedCollator, TokenMasker, pack_texts
from modernalbert.training.reports.merging import recovered_share, states_by_depth


TEXTS = [f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(40)]
ROWS = [{"a": text, "b": "and more", "y": n % 3} for n, text in enumerate(TEXTS)]
CLUSTER = ["--method", "cluster", "--format", "routed", "--calibration_data", "x"]
GROUPS = {"mol_groups": [0, 1], "mol_intermediate_size": 40}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=320, model_max_length=64)


@pytest.fixture(scope="module")
def tiny(make_model, tokenizer):
    """Builds a model for the tokenizer."""

    def build(model_class, **overrides):
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}
        return make_model(model_class, vocab_size=padded_vocab_size(tokenizer), **{**ids, **GROUPS, **overrides})

    return build


@pytest.fixture(scope="module")
def root(tiny, tokenizer, tmp_path_factory):
    """A folder with a masked language model, a classifier of three classes, texts and labelled rows."""
    root = tmp_path_factory.mktemp("merging")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    shutil.copy(root / "texts.jsonl", root / "calibration.jsonl")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    masked_lm = tiny(ModernAlbertForMaskedLM)
    classifier = tiny(ModernAlbertForSequenceClassification, seed=1, num_labels=3)
    for name, model in (("masked-lm", masked_lm), ("classifier", classifier)):
        model.save_pretrained(root / name)
        save_tokenizer(tokenizer, root / name)
    return root


@pytest.fixture
def no_check(monkeypatch):
    """Leaves the fresh process out, which costs seconds."""
    monkeypatch.setattr(export, "check_export", lambda *arguments: None)


def merge(root, name, output, *arguments):
    command = ["--model_name_or_path", str(root / name), "--output_dir", str(output), "--max_length", "32"]
    return load_script("merge_experts").main([*command, *map(str, arguments)])


def calibrate(root):
    return ["--calibration_data", root / "calibration.jsonl", "--calibration_rows", 20]


def packed_batch(root, tokenizer):
    """All texts, packed as the script does, in a batch."""
    rows = pack_texts(load_texts([str(root / "texts.jsonl")]), tokenizer, 32)
    return PackedCollator(tokenizer)(list(rows)), rows


# ---- Formats and figures


def test_a_fold_per_depth_is_reported_beside_one_per_group(root, tmp_path):
    validate = ["--validation_data", root / "texts.jsonl", "--per_depth", "true"]
    report = merge(root, "masked-lm", tmp_path / "out", "--method", "frequency", *validate, *calibrate(root))
    found = report["methods"]
    assert list(found) == ["frequency, per depth", "frequency", "drop"]
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert merged.config.ffn_modulation == "per_depth"
    layers = [layer.mlp.depths for layer in merged.model.layers]
    assert [len(depths) for depths in layers] == [2, 2]
    extra = sum(parameter.numel() for depths in layers for parameter in depths[0].parameters())
    sizes = {name: result["parameters"] for name, result in found.items()}
    assert sizes["frequency, per depth"] == merged.num_parameters() == sizes["frequency"] + extra
    assert sizes["frequency"] == sizes["drop"]
    assert found["frequency, per depth"]["score"] != found["frequency"]["score"]
    html = (tmp_path / "out" / "merge_report.html").read_text()
    assert f"{sizes['frequency']:,}" in html and "frequency, per depth" in html


@pytest.mark.parametrize("arguments", [("uniform", "folded"), ("frequency", "adapter")], ids=str)
def test_per_depth_goes_with_a_fold_of_routing(root, tmp_path, arguments):
    method, format = arguments
    with pytest.raises(ValueError, match=f"`per_depth` folds what .* got '{method}' and '{format}'"):
        flags = ["--method", method, "--format", format, "--per_depth", "true"]
        merge(root, "masked-lm", tmp_path / "out", *flags, *calibrate(root))
    assert not (tmp_path / "out").exists()


def test_a_masked_language_model_is_merged_and_measured(root, tokenizer, tmp_path):
    validate = ["--validation_data", root / "texts.jsonl", "--compare", "uniform", "svd"]
    report = merge(root, "masked-lm", tmp_path / "out", "--method", "regression", *validate, *calibrate(root))
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report
    assert list(report["methods"]) == ["regression", "uniform", "svd", "drop"] and not report["not_measured"]

    routed = ModernAlbertForMaskedLM.from_pretrained(root / "masked-lm").eval()
    masked, rows = packed_batch(root, tokenizer)
    masker = TokenMasker(tokenizer, 0.3, 42)

    def naive_loss(model):
        total, count = 0.0, 0
        for index, row in enumerate(rows):
            input_ids, labels = masker(torch.tensor([row["input_ids"]]), [(index,)])
            batch = PackedCollator(tokenizer)([{"input_ids": input_ids[0].tolist()}])
            logits = model(**batch).logits[0]
            for logit, label in zip(logits, labels[0], strict=True):
                if label != -100:
                    total, count = total - logit.log_softmax(-1)[label].item(), count + 1
        return total / count

    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert merged.config.num_experts == 0
    dropped = copy.deepcopy(routed).merge_experts("drop")
    with torch.no_grad():
        losses = {name: naive_loss(model) for name, model in (("routed", routed), ("m", merged), ("d", dropped))}
    assert report["routed"]["loss"] == pytest.approx(losses["routed"], abs=1e-4)
    assert report["methods"]["regression"]["score"]["loss"] == pytest.approx(losses["m"], abs=1e-4)
    assert report["methods"]["drop"]["score"]["loss"] == pytest.approx(losses["d"], abs=1e-4)

    # The first evaluation rows, with their masks, are what errors are measured on: two batches of 16.
    batches = []
    for start in (0, 16):
        part = [
            {"input_ids": masker(torch.tensor([row["input_ids"]]), [(start + index,)])[0][0].tolist()}
            for index, row in enumerate(list(rows)[start : start + 16])
        ]
        batches.append(PackedCollator(tokenizer)(part))
    for group in (0, 1):
        seen = []
        handle = routed.model.layers[group].mlp.register_forward_hook(
            lambda m, i, o, seen=seen: seen.append((i[0], o))
        )
        with torch.no_grad():
            for batch in batches:
                routed(**batch)
        handle.remove()
        for depth in range(2):  # two batches, each with two runs of the group
            difference = scale = 0
            for inputs, outputs in seen[depth::2]:
                difference += (merged.model.layers[group].mlp(inputs) - outputs).square().sum().item()
                scale += outputs.square().sum().item()
            error = report["methods"]["regression"]["layer_error"][str(group)][depth]
            assert error == pytest.approx((difference / scale) ** 0.5, rel=1e-3)

    page = (tmp_path / "out" / "merge_report.html").read_text()
    assert not re.search(r"<(script|link|img|image)\b|@import|base64|\bsrc=", page) and page.count("<svg") == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "| regression |" in card and "without\nrouting" in card
    for path in (tmp_path / "out").iterdir():
        assert str(root) not in read_text(path), path.name


def test_usage_is_the_mean_weight_of_each_expert(root, tokenizer, tmp_path, no_check):
    report = merge(root, "masked-lm", tmp_path / "out", "--calibration_data", root / "texts.jsonl")
    assert report["error_text"] == "calibration" and "routed" not in report
    assert report["not_measured"] == ["the loss or the metric of the task: the command had no `validation_data`"]
    routed = ModernAlbertForMaskedLM.from_pretrained(root / "masked-lm").eval()
    # All texts, in any order: they do not see each other, but where rows cut them.
    script = load_script("merge_experts")
    args = script.MergingArguments("", "", calibration_data=[str(root / "texts.jsonl")], max_length=32)
    for group in (0, 1):
        used, tokens = torch.zeros(2, 4), 0
        for batch in script.load_calibration(args, tokenizer):
            seen = []
            handle = routed.model.layers[group].mlp.router.register_forward_hook(
                lambda m, i, o, seen=seen: seen.append(o)
            )
            with torch.no_grad():
                routed(**batch)
            handle.remove()
            tokens += int(batch["attention_mask"].sum())
            for depth, (_, weights, experts) in enumerate(seen):
                assert len(weights) == batch["attention_mask"].sum()  # padding is not routed
                for token in range(len(weights)):
                    for weight, expert in zip(weights[token], experts[token], strict=True):
                        used[depth, expert] += weight
        torch.testing.assert_close(torch.tensor(report["experts"][str(group)]["usage"]), used / tokens)
        cosines = torch.tensor(report["experts"][str(group)]["similarity"])
        assert cosines.shape == (2, 4, 4)
        torch.testing.assert_close(cosines.diagonal(dim1=1, dim2=2), torch.ones(2, 4))


def test_a_classifier_is_measured_by_its_task(root, tokenizer, tmp_path, no_check):
    task = ["--validation_data", root / "rows.jsonl", "--text_columns", "a", "b", "--label_column", "y"]
    report = merge(root, "classifier", tmp_path / "out", "--method", "svd", *task)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    right = 0
    for row in ROWS:
        logits = merged(**tokenizer(row["a"], row["b"], truncation=True, max_length=32, return_tensors="pt")).logits
        right += int(logits.argmax() == row["y"])
    assert report["methods"]["svd"]["score"] == {"accuracy": right / len(ROWS)}
    assert report["not_measured"] == ["usage and similarity of the experts: the command had no `calibration_data`"]
    assert set(report["methods"]["svd"]["layer_error"]) == {"0", "1"}


def test_a_class_is_its_name_in_the_validation_rows(root, tiny, tokenizer, tmp_path, no_check):
    """Rows that lack a class, and name the others in another order than the model, score as the names say."""
    model = tiny(ModernAlbertForSequenceClassification, seed=1, num_labels=3)
    model.config.id2label, model.config.label2id = {0: "7", 1: "2", 2: "N"}, {"7": 0, "2": 1, "N": 2}
    model.save_pretrained(tmp_path / "named")
    save_tokenizer(tokenizer, tmp_path / "named")
    names = ["7", "2"] * 20
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{t},{n}\n" for t, n in zip(TEXTS, names, strict=True))
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": int(n)}) + "\n" for t, n in zip(TEXTS, names, strict=True))
    )
    with torch.no_grad():
        inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
        predicted = model(**inputs).logits.argmax(-1).tolist()
    expected = sum(model.config.id2label[p] == name for p, name in zip(predicted, names, strict=True)) / 40
    for ending in ("csv", "jsonl"):
        report = merge(tmp_path, "named", tmp_path / ending, "--validation_data", tmp_path / f"rows.{ending}")
        assert report["routed"] == {"accuracy": expected}
    (tmp_path / "rows.csv").write_text("text,label\na,7\nb,8\n")
    with pytest.raises(ValueError, match="row 1 of .* has the label '8', expected one of .* '7', '2', 'N'"):
        merge(tmp_path, "named", tmp_path / "out", "--validation_data", tmp_path / "rows.csv")
    assert not (tmp_path / "out").exists()


def test_a_regression_needs_labels_that_differ(tiny, tokenizer, tmp_path):
    tiny(ModernAlbertForSequenceClassification, num_labels=1).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "rows.csv").write_text("text,label\na,1.5\nb,1.5\n")
    with pytest.raises(ValueError, match="all labels of `validation_data` are 1.5: nothing correlates"):
        merge(tmp_path, "model", tmp_path / "out", "--validation_data", tmp_path / "rows.csv")
    assert not (tmp_path / "out").exists()


def test_figures_that_are_not_finite_are_refused(tiny, tokenizer):
    model = tiny(ModernAlbertForMaskedLM)
    with torch.no_grad():
        model.decoder.bias[0] = float("nan")
    batch = {**tokenizer(TEXTS[:2], padding=True, return_tensors="pt")}
    with pytest.raises(ValueError, match="loss is not finite"):
        score_model(model, [{**batch, "labels": batch["input_ids"]}])


def test_a_report_says_where_it_was_measured_on_text_of_the_methods(root, tmp_path, no_check):
    same = ["--calibration_data", root / "texts.jsonl", "--validation_data", root / ".." / root.name / "texts.jsonl"]
    report = merge(root, "masked-lm", tmp_path / "out", *same, "--calibration_rows", 4)
    (reason,) = report["not_measured"]
    assert reason.endswith("texts.jsonl is both `calibration_data` and `validation_data`")


def test_a_report_says_why_nothing_was_measured(root, tmp_path, no_check):
    report = merge(root, "masked-lm", tmp_path / "out")
    (reason,) = report["not_measured"]
    assert reason.startswith("what merging costs: the command had neither `calibration_data` nor `validation_data`")
    assert html.escape(reason) in (tmp_path / "out" / "merge_report.html").read_text()


def test_recovered_share():
    assert recovered_share({"loss": 2.0}, {"loss": 2.5}, {"loss": 4.0}) == 0.75
    assert recovered_share({"accuracy": 0.8, "f1": 0}, {"accuracy": 0.5, "f1": 0}, {"accuracy": 0.6, "f1": 0}) < 0
    assert recovered_share({"accuracy": 0.5}, {"accuracy": 0.6}, {"accuracy": 0.5}) is None
    assert recovered_share({"loss": 3.0}, {"loss": 2.0}, {"loss": 2.5}) is None


def test_an_adapter_of_peft_equals_the_folded_model(root, tokenizer, tmp_path):
    merge(root, "classifier", tmp_path / "out", "--method", "cat", "--format", "adapter")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "base/model.safetensors"} <= files
    assert not any("experts" in name for name in load_file(tmp_path / "out" / "base" / "model.safetensors"))
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (12, 24, "base")

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    folded = ModernAlbertForSequenceClassification.from_pretrained(root / "classifier").merge_experts("cat")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(adapted(**inputs).logits, folded(**inputs).logits, rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(**inputs).logits, folded(**inputs).logits, rtol=1e-2, atol=1e-2)


def test_tasks_share_a_base_where_experts_and_heads_alone_were_trained(tiny, tokenizer, tmp_path, no_check, randomize):
    first = tiny(ModernAlbertForSequenceClassification, num_labels=3)
    second = copy.deepcopy(first)
    for module in (*(layer.mlp.experts for layer in second.model.layers), second.head, second.classifier):
        randomize(module, seed=7)
    tasks = {"first": first, "second": second}
    for name, model in tasks.items():
        write_adapter(copy.deepcopy(model).merge_experts("svd", fold=False), tokenizer, tmp_path / name)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first" / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "first" / "adapter", adapter_name="first").eval()
    adapted.load_adapter(tmp_path / "second" / "adapter", adapter_name="second")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for name in ("second", "first"):
        adapted.set_adapter(name)
        expected = tasks[name].merge_experts("svd")(**inputs).logits
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_single_adapter_becomes_one_of_peft(tiny, tokenizer, tmp_path, no_check):
    model = tiny(ModernAlbertForMaskedLM, num_experts=1, num_experts_per_tok=1)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "calibration.jsonl").write_text(json.dumps({"text": " ".join(TEXTS)}) + "\n")
    report = merge(tmp_path, "model", tmp_path / "out", "--format", "adapter", *calibrate(tmp_path))
    assert report["experts"]["1"]["usage"] == [[1], [1]]
    assert (
        max(report["methods"]["uniform"]["layer_error"]["1"]) < 1e-6 < report["methods"]["drop"]["layer_error"]["1"][0]
    )


def test_an_adapter_that_differs_is_refused(tiny, tokenizer, tmp_path, no_check, monkeypatch):
    monkeypatch.setattr(
        "modernalbert.training.export.adapter.LoraConfig", lambda lora_alpha, **others: LoraConfig(**others)
    )
    from peft import LoraConfig

    model = tiny(ModernAlbertForMaskedLM).merge_experts(fold=False)
    with pytest.raises(RuntimeError, match="other outputs than the folded model, by up to"):
        write_adapter(model, tokenizer, tmp_path)


def test_fewer_experts_reload(root, tmp_path, no_check):
    method = ["--method", "cluster", "--format", "routed", "--num_experts", 2, "--compare", "frequency"]
    report = merge(root, "masked-lm", tmp_path / "out", *method, *calibrate(root))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_experts == 2 and loaded.model.layers[0].mlp.router.weight.shape == (2, 32)
    assert report["parameters"]["merged"] == loaded.num_parameters()
    assert set(report["methods"]) == {"cluster", "frequency", "drop"}
    assert "and 2 are left" in (tmp_path / "out" / "README.md").read_text()


def test_weights_seen_in_training_merge_by_ema(root, tmp_path, no_check):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]))
    files = ["--train_files", root / "rows.jsonl", "--validation_files", tmp_path / "few.jsonl"]
    task = [
        *files,
        "--text_columns",
        "a",
        "b",
        "--label_column",
        "y",
        "--max_length",
        64,
        "--do_train",
        "--max_steps",
        2,
    ]
    task += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
    start = ["--model_name_or_path", root / "classifier", "--output_dir", tmp_path / "trained"]
    load_script("run_glue").main([str(value) for value in [*start, *task]])
    facts = json.loads((tmp_path / "trained" / "routing_weights.json").read_text())
    assert facts["steps"] == 2 and facts["mol_groups"] == [0, 1]
    assert [sum(row) for row in facts["weights"]] == pytest.approx([1, 1])
    seen = tmp_path / "trained" / "checkpoint-2" / "routing_weights.json"
    assert json.loads(seen.read_text()) == facts

    merge(tmp_path, "trained", tmp_path / "out", "--method", "ema", "--routing_weights", seen)
    expected = ModernAlbertForSequenceClassification.from_pretrained(tmp_path / "trained")
    expected.merge_experts("ema", weights=facts["weights"])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "best"], "there is no merging method 'best'"),
        (["--compare", "best"], "there is no merging method 'best'"),
        (["--method", "regression"], "give some as `calibration_data`"),
        (["--method", "ema"], "give the `routing_weights.json`"),
        (["--format", "zip"], "the formats are folded, adapter, routed"),
        (["--format", "routed"], "`--format routed` goes with `--method cluster --num_experts n`"),
        (["--method", "cluster", "--calibration_data", "x"], "'cluster' does not give format 'folded'"),
        (["--method", "cluster", "--calibration_data", "x", "--format", "routed"], "'cluster' needs `num_experts`"),
        (["--num_experts", "2"], "`num_experts` is for method 'cluster'; uniform merge"),
        (["--dry_run"], "`dry_run` shows what `push_to_hub` would upload"),
        (["--push_to_hub", "no name"], "Repo id must use alphanumeric"),
        (["--routing_weights", "{root}/rows.jsonl"], "does not hold routing weights"),
        (["--routing_weights", "{root}/other.json"], r"MoL groups \[5\], this one has \[0, 1\]"),
        (["--validation_data", "{root}/rows.jsonl"], "has no column 'text'"),
        (["--text_columns", "a", "a"], "must be one or two columns and another one"),
        (["--label_column", "text"], "must be one or two columns and another one"),
        (["--rank", "33"], r"`rank` \(33\) must be at most 32"),
        (["--rank", "0"], r"`rank` \(0\) must be at least 1"),
        (["--max_length", "65"], r"`max_length` \(65\) must be at most the 64 tokens"),
        ([*CLUSTER, "--num_experts", "4"], r"`num_experts` \(4\) must be from 2 to 3"),
        ([*CLUSTER, "--num_experts", "1"], r"`num_experts` \(1\) must be from 2 to 3"),
        (["--calibration_data", "{root}/blank.txt"], "`calibration_data` holds no text"),
        (["--validation_data", "{root}/one.txt"], "no token of `validation_data` is masked"),
    ],
)
def test_what_does_not_go_together_is_refused(root, tmp_path, arguments, message):
    (root / "blank.txt").write_text(" \n" * 200)
    (root / "one.txt").write_text("a\n")
    (root / "other.json").write_text('{"mol_groups": [5], "weights": [[1, 2, 3, 4]]}')
    with pytest.raises(ValueError, match=message):
        merge(root, "masked-lm", tmp_path / "out", *(argument.format(root=root) for argument in arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[-1, 1, 1, 1]] * 2, r"the weights of group 0 are \[-1, 1, 1, 1\], expected finite numbers of at least 0"),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], "the weights of group 1 are .* not all 0"),
        ([[float("nan")] * 4] * 2, "expected finite numbers"),
        ([[1e999] * 4] * 2, "expected finite numbers"),
        ([["1"] * 4] * 2, "expected finite numbers"),
        ([[0.5, 0.5]] * 2, r"rows of \[2, 2\], expected 2 rows, one for each MoL group, of 4 values"),
        ("none", "`weights` is none, expected a list of rows"),
    ],
)
def test_weights_that_are_no_shares_are_refused(root, tmp_path, weights, message):
    (tmp_path / "weights.json").write_text(json.dumps({"mol_groups": [0, 1], "weights": weights}))
    with pytest.raises(ValueError, match=f"weights.json': .*{message}"):
        merge(root, "masked-lm", tmp_path / "out", "--method", "ema", "--routing_weights", tmp_path / "weights.json")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.json"]


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({"ffn_modulation": "moa"}, [], "only a Mixture of LoRAs can be merged, and `ffn_modulation` is 'moa'"),
        ({"num_experts": 0}, [], "there is nothing to merge in .*: `num_experts` is 0"),
        ({"router_type": "depth"}, ["--validation_data", "x"], "`router_type` is 'depth'; use .* and give no text"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused(tiny, tmp_path, overrides, arguments, message):
    tiny(ModernAlbertForMaskedLM, **overrides).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        merge(tmp_path, "model", tmp_path / "out", *arguments)


def test_validation_rows_are_for_two_heads(tiny, tmp_path):
    tiny(ModernAlbertForTokenClassification).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="sequence classifiers, not for a ModernAlbertForTokenClassification"):
        merge(tmp_path, "model", tmp_path / "out", "--validation_data", "x")


# ---- The Hub


class FakeApi:
    calls = []

    def create_repo(self, repo_id, exist_ok):
        self.calls.append(("create", repo_id, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.rglob("*"))))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(export, "HfApi", FakeApi)
    return FakeApi


def test_the_folder_and_nothing_else_is_uploaded(root, tmp_path, no_check, api):
    merge(root, "masked-lm", tmp_path / "out", "--push_to_hub", "someone/merged")
    (create, upload) = api.calls
    assert create == ("create", "someone/merged", True)
    assert upload == ("upload", "someone/merged", sorted(path.name for path in (tmp_path / "out").iterdir()))
    assert 'model="someone/merged"' in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_lists_and_uploads_nothing(root, tmp_path, no_check, api, caplog):
    caplog.set_level("INFO")
    merge(root, "classifier", tmp_path / "out", "--format", "adapter", "--push_to_hub", "someone/merged", "--dry_run")
    assert not api.calls
    for path in (tmp_path / "out").rglob("*.*"):
        line = f"{path.stat().st_size:,} bytes  {path.relative_to(tmp_path / 'out').as_posix()}"
        assert line in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("note.json", '{"from": "{source}/x"}', "names a local path"),
        ("note.md", "made in {home}/runs", "names a local path"),
        ("note.txt", "hf_" + "aB3" * 10, "looks like a secret"),
        ("note.py", 'TOKEN = "hf_' + "aB3" * 10 + '"', "looks like a secret"),
        ("training_args.bin", "x", "none of the files of a model"),
        ("optimizer.safetensors", None, "state of a training run"),
        ("trainer_state.json", "{}", "state of a training run"),
    ],
)
def test_what_is_not_for_the_public_is_refused(tmp_path, api, monkeypatch, name, content, message):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder, source = tmp_path / "out", tmp_path / "source"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "modernalbert", "note": "hf_hub_download"}')
    push_folder(folder, "someone/merged", dry_run=True)
    if content is None:
        save_file({"exp_avg.0": torch.ones(1)}, folder / "part" / name)
    else:
        content = content.replace("{source}", str(source)).replace("{home}", str(tmp_path / "home"))
        (folder / "part" / name).write_text(content)
    with pytest.raises(ValueError, match=f"'part/{name}' .*{message}.*nothing was uploaded"):
        push_folder(folder, "someone/merged")
    assert not api.calls


# ---- Routing seen in training


class RecordingTrainer(Trainer):
    """Keeps the router logits of real tokens, by optimiser step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, {**inputs, "output_router_logits": True}, True, num_items_in_batch)
        if model.training:
            real = inputs["attention_mask"].bool()
            logits = torch.stack([layer[real].detach() for layer in outputs.router_logits])
            self.seen.setdefault(self.state.global_step, []).append(logits)
        return (loss, outputs) if return_outputs else loss


def build_trainer(tiny, tokenizer, folder, callback, **arguments):
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 5, "save_steps": 2}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.05, **arguments}
    trainer = RecordingTrainer(
        model=tiny(ModernAlbertForMaskedLM),
        args=TrainingArguments(str(folder), **settings),
        data_collator=PackedCollator(tokenizer),
        train_dataset=rows,
        eval_dataset=rows[:5],
        callbacks=[callback],
    )
    trainer.seen = {}
    return trainer


def test_routing_frequencies_are_those_of_steps_one_by_one(tiny, tokenizer, tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = build_trainer(tiny, tokenizer, tmp_path, RoutingFrequencies(decay=0.7), **evaluating)
    trainer.train()
    average = torch.zeros(2, 4)
    for step in range(5):
        logits = torch.cat(trainer.seen[step], dim=1)  # [layers, tokens, experts]
        weights, experts = logits.softmax(-1).topk(trainer.model.config.num_experts_per_tok)
        if trainer.model.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        mean = torch.zeros(2, 4)
        for layer in range(4):
            for expert in range(4):
                chosen = (experts[layer] == expert) * weights[layer]
                mean[layer // 2, expert] += chosen.sum() / logits.shape[1] / 2
        average = 0.7 * average + 0.3 * mean
        if step in (1, 3, 4):
            folder = tmp_path / f"checkpoint-{step + 1}"
            facts = json.loads((folder / "routing_weights.json").read_text())
            torch.testing.assert_close(torch.tensor(facts["weights"]), average / (1 - 0.7 ** (step + 1)))
            assert (facts["steps"], facts["decay"], facts["mol_groups"]) == (step + 1, 0.7, [0, 1])
    assert json.loads((tmp_path / "routing_weights.json").read_text()) == facts
    hooks = [hook for layer in trainer.model.model.layers for hook in layer.mlp.router._forward_hooks.values()]
    assert not any("RoutingFrequencies" in hook.__qualname__ for hook in hooks)


@pytest.mark.parametrize("restore", [False, True])
def test_routing_frequencies_go_on_where_a_run_was_stopped(tiny, tokenizer, tmp_path, restore):
    settings = {"restore_callback_states_from_checkpoint": restore}
    build_trainer(tiny, tokenizer, tmp_path, RoutingFrequencies(), **settings).train()
    whole = (tmp_path / "routing_weights.json").read_text()
    (tmp_path / "routing_weights.json").unlink()
    again = build_trainer(tiny, tokenizer, tmp_path, RoutingFrequencies(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "routing_weights.json").read_text() == whole


def test_a_checkpoint_without_frequencies_can_be_resumed(tiny, tokenizer, tmp_path):
    build_trainer(tiny, tokenizer, tmp_path, RoutingFrequencies()).train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RoutingFrequencies"]
    path.write_text(json.dumps(state))
    again = build_trainer(tiny, tokenizer, tmp_path, RoutingFrequencies())
    again.train(resume_from_checkpoint=str(path.parent))
    assert json.loads((tmp_path / "routing_weights.json").read_text())["steps"] == 3


def test_routing_frequencies_are_means_over_processes(tiny, tokenizer, tmp_path, monkeypatch):
    """Another process sent 30 tokens, all to the last expert."""
    other = torch.tensor([[0.0, 0, 0, 30, 30]] * 2)
    trainer = build_trainer(tiny, tokenizer, tmp_path, RoutingFrequencies(), max_steps=1, save_strategy="no")
    with monkeypatch.context() as patch:
        patch.setattr(RoutingFrequencies, "on_step_end", with_another_process(RoutingFrequencies.on_step_end, other))
        trainer.train()
    logits = torch.cat(trainer.seen[0], dim=1)
    weights, experts = logits.softmax(-1).topk(trainer.model.config.num_experts_per_tok)
    if trainer.model.config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    own = (F.one_hot(experts, 4) * weights[..., None]).sum(2).unflatten(0, (2, 2)).sum((1, 2))
    expected = (own + other[:, :4]) / (2 * logits.shape[1] + 30)
    found = json.loads((tmp_path / "routing_weights.json").read_text())["weights"]
    torch.testing.assert_close(torch.tensor(found), expected)


def with_another_process(on_step_end, sums):
    def patched(self, *arguments, **named):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(sums))
            on_step_end(self, *arguments, **named)

    return patched


def test_states_are_those_of_each_depth(tiny, tokenizer, root):
    model = tiny(ModernAlbertForMaskedLM)
    batch, _ = packed_batch(root, tokenizer)
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 5), slice(5, None))]
    states = states_by_depth(model, halves)
    tokens = int(batch["attention_mask"].sum())
    assert {group: tuple(depths.shape) for group, depths in states.items()} == dict.fromkeys((0, 1), (2, tokens, 32))
    seen = []
    model.model.layers[1].mlp_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(**halves[0])
    for depth in range(2):
        torch.testing.assert_close(states[1][depth][: seen[depth].shape[1]], seen[depth][0], rtol=0, atol=0)
