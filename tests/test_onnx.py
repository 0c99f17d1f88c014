"""The exported graph beside PyTorch, on sizes that it was not traced with, and what the script refuses."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, load_script
from transformers import AutoConfig, AutoTokenizer

import modernalbert
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer


pytest.importorskip("onnxruntime", reason='needs onnxruntime: `pip install ".[export]"`')
onnx = pytest.importorskip("onnx", reason='needs onnx: `pip install ".[export]"`')
pytest.importorskip("onnxscript", reason='needs onnxscript: `pip install ".[export]"`')
from modernalbert.training.export import onnx as onnx_export  # noqa: E402


PAGE = ROOT / "docs" / "deployment.md"
TEXTS = ["The quick brown fox jumps over the lazy dog.", "A lazy cat.", "Zürich sells crème brûlée."]
# An export costs seconds a layer: one block that runs twice, but for the encoder alone, which has two such.
SMALL = {"num_hidden_layers": 2, "num_hidden_groups": 1, "mol_groups": [0]}
HEADS = {
    "ModernAlbertModel": (
        ["last_hidden_state"],
        {"num_hidden_layers": 4, "num_hidden_groups": 2, "mol_groups": [1]},
    ),
    "ModernAlbertForMaskedLM": (["logits"], {"mol_groups": [], "num_experts": 4, "decoder_bias": False}),
    "ModernAlbertForSequenceClassification": (["logits"], {"num_labels": 3}),
    "ModernAlbertForTokenClassification": (["logits"], {"num_labels": 5}),
    "ModernAlbertForQuestionAnswering": (["start_logits", "end_logits"], {"dtype": torch.bfloat16}),
    "ModernAlbertForMultipleChoice": (["logits"], {"classifier_pooling": "mean"}),
}
each_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(scope="module")
def script():
    return load_script("export_onnx")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=320, model_max_length=64)


@pytest.fixture(scope="module")
def make_folder(make_model, tokenizer, tmp_path_factory):
    """Saves a model with full and sliding layers, and gives its folder."""

    def make(head, dtype=torch.float32, **overrides):
        settings = {**SMALL, "num_experts": 0, "vocab_size": padded_vocab_size(tokenizer), **overrides}
        settings["layer_types"] = ["full_attention", "sliding_attention"] * (settings["num_hidden_layers"] // 2)
        folder = tmp_path_factory.mktemp("models") / "model"
        make_model(getattr(modernalbert, head), dtype=dtype, **settings).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        return folder

    return make


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def clear(self):
        self.messages.clear()


@pytest.fixture(scope="module")
def reported(script):
    handler = Messages()
    script.logger.addHandler(handler)
    yield handler
    script.logger.removeHandler(handler)


@pytest.fixture(scope="module")
def exported(make_folder, script, reported):
    """For every head, as it is first asked for: its folder, the exported one, and what the script reported."""
    done = {}

    def export(head):
        if head not in done:
            source = make_folder(head, **HEADS[head][1])
            target = source.parent / "onnx"
            reported.clear()
            script.main(["--model_name_or_path", str(source), "--output_dir", str(target), "--quantize"])
            reports = [json.loads(text) for text in reported.messages if text.startswith("{")]
            done[head] = source, target, {Path(report["file"]).name: report for report in reports}
        return done[head]

    return export


def batch_of(shape, *mask):
    """Random tokens, and a mask of the spans `[start, end)` that are real in each row."""
    input_ids = torch.randint(5, 300, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(shape[-1])
    mask = torch.stack([(positions >= start) & (positions < end) for start, end in mask]).long()
    return {"input_ids": input_ids, "attention_mask": mask.view(shape)}


BATCHES = {
    "one token": batch_of((1, 1), (0, 1)),
    "one long row": batch_of((1, 64), (0, 64)),
    "padded on the right": batch_of((3, 20), (0, 20), (0, 3), (0, 11)),
    "padded on the left": batch_of((3, 20), (0, 20), (17, 20), (9, 20)),
    "padded on both sides, one row all padding": batch_of((4, 33), (5, 30), (0, 0), (1, 2), (0, 33)),
}


def run_both(head, source, file, batch):
    """Outputs of onnxruntime and of PyTorch, by name."""
    model = getattr(modernalbert, head).from_pretrained(source, dtype=torch.float32)
    if head == "ModernAlbertForMultipleChoice":  # rows are choices of one question
        batch = {name: tensor[None] for name, tensor in batch.items()}
    with torch.no_grad():
        expected = {name: value.numpy() for name, value in model(**batch).items()}
    session = onnx_export.open_session(file)
    found = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    return dict(zip([output.name for output in session.get_outputs()], found, strict=True)), expected


@each_head
def test_exported_equals_pytorch(exported, head):
    source, target, reports = exported(head)
    for name, batch in BATCHES.items():
        found, expected = run_both(head, source, target / "model.onnx", batch)
        assert list(found) == list(expected) == HEADS[head][0], name
        for output in found:
            np.testing.assert_allclose(found[output], expected[output], rtol=1e-4, atol=1e-4, err_msg=name)
    assert reports["model.onnx"]["largest_difference"] < 1e-4 < 0.1 < reports["model.onnx"]["largest_output"]


@each_head
def test_quantized_stays_near(exported, head):
    source, target, reports = exported(head)
    report = reports["model_int8.onnx"]
    assert report["bytes"] == (target / "model_int8.onnx").stat().st_size
    found, expected = run_both(head, source, target / "model_int8.onnx", BATCHES["padded on the right"])
    for output in found:
        assert found[output].shape == expected[output].shape
        error = np.abs(found[output] - expected[output]).max()
        assert 0 < error < 0.2 * np.abs(expected[output]).max()
    assert 0 < report["largest_difference"] < 0.2 * report["largest_output"]


def test_every_product_with_a_weight_is_quantized(make_model, tmp_path):
    """And a weight that two layers share is stored once."""
    settings = {**SMALL, "num_experts": 0, "hidden_size": 128, "intermediate_size": 256}
    model = make_model(modernalbert.ModernAlbertForMaskedLM, **settings)
    plain, small = tmp_path / "model.onnx", tmp_path / "model_int8.onnx"
    onnx_export.write_onnx(model, plain)
    onnx_export.quantize_onnx(plain, small)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights < plain.stat().st_size < weights + 150_000
    assert small.stat().st_size < weights / 4 + 150_000
    graph = onnx.load(small).graph
    products = [node.op_type for node in graph.node if node.op_type.startswith("MatMul")]
    layers = model.config.num_hidden_layers
    # Four of each layer, the embedding's projection, the head's two and the decoder; attention multiplies activations.
    assert products.count("MatMulInteger") == 4 * layers + 4 and products.count("MatMul") == 2 * layers
    assert set(tmp_path.iterdir()) == {small, plain}
    assert model.config._attn_implementation == "sdpa"  # as it was before the export


def test_the_folder_is_complete(exported):
    source, target, _ = exported("ModernAlbertForSequenceClassification")
    names = {"model.onnx", "model_int8.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == names | {"configuration_modernalbert.py"}
    assert not [path for path in source.parent.iterdir() if path.name.startswith(".")]
    config = AutoConfig.from_pretrained(target)
    assert config.architectures == ["ModernAlbertForSequenceClassification"] and config.num_labels == 3
    assert AutoTokenizer.from_pretrained(target)(TEXTS) == AutoTokenizer.from_pretrained(source)(TEXTS)
    assert str(ROOT).encode() not in (target / "model.onnx").read_bytes()


def test_the_usage_on_the_page_runs_without_torch(exported, tmp_path):
    source, target, _ = exported("ModernAlbertForSequenceClassification")
    (tmp_path / "runs").mkdir()
    shutil.copytree(target, tmp_path / "runs" / "mrpc-onnx")
    usage = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    hidden = "import sys\nsys.modules.update(torch=None, modernalbert=None)\n"
    command = [sys.executable, "-I", "-c", hidden + usage]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert process.returncode == 0, process.stderr
    texts = re.search(r"tokenizer\((\[.*?\])", usage).group(1)
    batch = AutoTokenizer.from_pretrained(source)(json.loads(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = modernalbert.ModernAlbertForSequenceClassification.from_pretrained(source)(**batch).logits
    assert process.stdout == f"{logits.argmax(-1).numpy()}\n"


def test_the_file_names_its_free_sizes(exported):
    shapes = {}
    for head in ("ModernAlbertForTokenClassification", "ModernAlbertForMultipleChoice"):
        session = onnx_export.open_session(exported(head)[1] / "model.onnx")
        assert [item.name for item in session.get_inputs()] == ["input_ids", "attention_mask"]
        assert len({tuple(item.shape) for item in session.get_inputs()}) == 1
        shapes[head] = session.get_inputs()[0].shape, session.get_outputs()[0].shape
    assert shapes["ModernAlbertForTokenClassification"] == (["batch", "sequence"], ["batch", "sequence", 5])
    assert shapes["ModernAlbertForMultipleChoice"][0] == ["batch", "num_choices", "sequence"]


@pytest.mark.parametrize("overrides", [{"num_experts": 4}, {"num_experts": 1}], ids=["routed", "adapter"])
def test_experts_are_refused(make_folder, script, overrides):
    source = make_folder("ModernAlbertForMaskedLM", **overrides)
    with pytest.raises(ValueError, match=r"`num_experts=\d`, and a plain encoder is expected; .*merge_experts\.py"):
        script.main(["--model_name_or_path", str(source), "--output_dir", str(source.parent / "onnx")])
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("modulation", ["moa", "depth_lora"])
def test_modulations_that_cannot_be_folded_are_refused(make_model, tokenizer, tmp_path, modulation):
    with pytest.raises(ValueError, match=f"`ffn_modulation` is '{modulation}', and a plain encoder is expected"):
        onnx_export.export_onnx(make_model(ffn_modulation=modulation), tokenizer, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_experts_folded_at_every_depth_are_exported(make_model, tokenizer, tmp_path):
    batches = [{"input_ids": torch.arange(5, 29)[None]}]
    model = make_model(vocab_size=len(tokenizer)).merge_experts("frequency", batches=batches, per_depth=True)
    (difference,) = onnx_export.export_onnx(model, tokenizer, tmp_path / "onnx").values()
    assert difference.largest < 1e-4 < difference.scale


def test_half_precision_is_refused(make_model, tokenizer, tmp_path):
    model = make_model(num_experts=0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="is in torch.bfloat16, expected torch.float32"):
        onnx_export.export_onnx(model, tokenizer, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(exported, tokenizer, tmp_path, monkeypatch):
    """Neither a graph of other weights, nor an opset that torch did not write but said nothing about."""
    head = "ModernAlbertForSequenceClassification"
    source, target, _ = exported(head)
    model = getattr(modernalbert, head).from_pretrained(source)
    with torch.no_grad():
        model.classifier.bias += 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "write_onnx", lambda model, path, opset: shutil.copy(target / path.name, path))
        with pytest.raises(RuntimeError, match=r"differ from PyTorch's by 1\.0e-02"):
            onnx_export.export_onnx(model, tokenizer, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
    graph = SimpleNamespace(graph=[], opset_imports={"": 18})
    program = SimpleNamespace(model=graph, save=lambda path: path.touch())
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    with pytest.raises(ValueError, match="cannot write opset 19, only 18"):
        onnx_export.export_onnx(model, tokenizer, tmp_path / "onnx", opset=19)
    with pytest.raises(ValueError, match=r"`opset` \(17\) must be from 18 to"):
        onnx_export.export_onnx(model, tokenizer, tmp_path / "onnx", opset=17)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match="onnxruntime cannot run 'model.onnx'"):
        onnx_export.open_session(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_filled_folder_is_refused(exported, script):
    source, target, _ = exported("ModernAlbertModel")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        script.main(["--model_name_or_path", str(source), "--output_dir", str(target)])
