"""Models, configurations and tokenizers as the scripts load them: whole, or refused with the file."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM
from modernalbert.tokenization import load_tokenizer as load_pretraining_tokenizer
from modernalbert.tokenization import save_tokenizer, train_tokenizer
from modernalbert.training.loading import check_folder, check_size, load_config, load_model, load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("saved")
    make_model(ModernAlbertForMaskedLM, dtype=torch.bfloat16, vocab_size=320).save_pretrained(folder)
    save_tokenizer(train_tokenizer(["some words"], vocab_size=320), folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_model_is_loaded_in_float32(saved):
    model, new = load_model(AutoModelForMaskedLM, saved)
    assert new == [] and {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_head_may_be_new_or_of_another_shape(saved, tmp_path):
    config = load_config(saved, num_labels=3)
    model, new = load_model(AutoModelForSequenceClassification, saved, config)
    assert any("classifier" in name for name in new) and not any(name.startswith("model.") for name in new)
    model.save_pretrained(tmp_path)
    _, new = load_model(AutoModelForSequenceClassification, tmp_path, load_config(tmp_path, num_labels=5))
    assert sorted(new) == ["classifier.bias", "classifier.weight"]
    _, new = load_model(AutoModel, tmp_path)
    assert new == []


@pytest.mark.parametrize("change", ["vocab_size", "lost", "bert"])
def test_an_encoder_that_would_start_at_random_is_refused(model, tmp_path, change):
    if change == "vocab_size":
        change_config(model, vocab_size=384)
    elif change == "lost":
        tensors = load_file(model / "model.safetensors")
        del tensors["model.layers.1.attn.Wqkv.weight"]
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    else:
        model = tmp_path / "bert"
        config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        BertForMaskedLM(config).save_pretrained(model)
        change_config(model, intermediate_size=64)
    with pytest.raises((ValueError, RuntimeError), match="start at random|size|shape"):
        load_model(AutoModelForSequenceClassification, model)


def test_a_pooler_belongs_to_the_head(tmp_path):
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    _, new = load_model(AutoModelForSequenceClassification, tmp_path)
    assert "bert.pooler.dense.weight" in new


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_damaged_file_is_named(model, name):
    path = model / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for load in (load_config, load_tokenizer, lambda folder: load_model(AutoModelForMaskedLM, folder)):
        with pytest.raises(ValueError, match=rf"{name}' is damaged .*; restore it from a copy"):
            load(model)


def test_a_tokenizer_that_is_json_and_no_tokenizer_is_refused(model):
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="cannot read the tokenizer of '.*model'"):
        load_tokenizer(model)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_pretraining_tokenizer])
def test_what_cannot_be_fetched_is_named(load, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="some/model"):
        load("some/model")
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):  # a folder that holds neither
        load(tmp_path)


def test_a_folder_without_a_vocabulary_is_refused(model):
    (model / "tokenizer.json").unlink(), (model / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no vocabulary|tokenizer"):
        load_tokenizer(model)


def test_pickled_weights_are_refused(model):
    (model / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, model / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(AutoModelForMaskedLM, model)


def test_a_lora_is_loaded_on_its_base(saved, tmp_path):
    base, _ = load_model(AutoModelForSequenceClassification, saved)
    heads = [name for name, child in base.named_children() if child is not base.base_model]
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["Wqkv"], modules_to_save=heads))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(saved)
    adapted.save_pretrained(tmp_path)
    model, new = load_model(AutoModelForSequenceClassification, tmp_path)
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        difference = (model.eval()(ids).logits - adapted.eval()(ids).logits).abs().max()
    assert new == [] and difference < 0.05 and load_config(tmp_path).model_type == "modernalbert"
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; pickled weights are not read"):
        load_model(AutoModelForSequenceClassification, tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("./none", FileNotFoundError, "there is no folder './none'"),
        ("runs/none/model", FileNotFoundError, "there is no folder 'runs/none/model'"),
        ("", FileNotFoundError, "the name of a model is empty"),
        (__file__, ValueError, "is a file; give the folder of a model"),
    ],
)
def test_what_is_no_folder_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        check_folder(name)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 10**12, "a model with a size of 1e.12 does not fit"),
        ("vocab_size", 10**9 - 1, "parameters, which do not fit"),
    ],
)
def test_a_model_that_does_not_fit_in_memory_is_refused(field, value, message):
    config = ModernAlbertConfig.preset("nano")
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        check_size(config)
