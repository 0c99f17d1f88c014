"""A saved folder as users meet it: remote code in a fresh process, Auto classes, pipelines, adapters, offloading."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import modernalbert
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer


CODE = sorted(path.name for path in Path(modernalbert.__file__).parent.glob("*_modernalbert.py"))
AUTO_CLASSES = {
    "AutoModel": modernalbert.ModernAlbertModel,
    "AutoModelForMaskedLM": modernalbert.ModernAlbertForMaskedLM,
    "AutoModelForSequenceClassification": modernalbert.ModernAlbertForSequenceClassification,
    "AutoModelForTokenClassification": modernalbert.ModernAlbertForTokenClassification,
    "AutoModelForQuestionAnswering": modernalbert.ModernAlbertForQuestionAnswering,
    "AutoModelForMultipleChoice": modernalbert.ModernAlbertForMultipleChoice,
}
MLM = "AutoModelForMaskedLM"
each_head = pytest.mark.parametrize("head", AUTO_CLASSES)
TEXTS = ["The quick brown fox jumps over the lazy dog.", "A lazy cat.", "Zürich sells crème brûlée, and foxes jump."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=320, model_max_length=64)


@pytest.fixture(scope="module")
def batch(tokenizer):
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def models(make_model, tokenizer):
    """A model for every Auto class, under its name."""
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    vocab_size = padded_vocab_size(tokenizer)
    return {
        head: make_model(model_class, seed=seed, vocab_size=vocab_size, **ids)
        for seed, (head, model_class) in enumerate(AUTO_CLASSES.items())
    }


@pytest.fixture(scope="module")
def folders(models, tokenizer, tmp_path_factory):
    """Where each of `models` is saved, with its tokenizer."""
    root = tmp_path_factory.mktemp("saved")
    for head, model in models.items():
        model.save_pretrained(root / head)
        save_tokenizer(tokenizer, root / head)
    return {head: root / head for head in models}


def inputs_for(head, batch):
    choices = head == "AutoModelForMultipleChoice"
    return {name: tensor[:, None] if choices else tensor for name, tensor in batch.items()}


def run(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def run_fresh(function, folder, *arguments, allowed=()):
    """Result of a function of this file in a new process without our package and all that it can do without."""
    hidden = {"accelerate", "flash_attn", "kernels", "modernalbert", "peft", "sentence_transformers"} - set(allowed)
    lines = [
        "import sys, torch",
        f"sys.modules.update(dict.fromkeys({sorted(hidden)}))",  # None there stops an import
        inspect.getsource(function),
        "arguments = torch.load(sys.argv[1])",
        f"torch.save({function.__name__}(*arguments), sys.argv[2])",
    ]
    torch.save(arguments, folder / "arguments.pt")
    caches = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(lines), "arguments.pt", "result.pt"],
        env={**os.environ, **caches, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(folder / "result.pt", weights_only=False)


# ---- What is saved


@each_head
def test_saved_folder_is_complete(folders, head):
    config = json.loads((folders[head] / "config.json").read_text())
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *CODE}
    assert {path.name for path in folders[head].iterdir()} == names
    assert set(config["auto_map"]) == {"AutoConfig", *AUTO_CLASSES}
    for reference in config["auto_map"].values():
        file, _, name = reference.partition(".")
        assert f"class {name}(" in (folders[head] / f"{file}.py").read_text()
    for name in CODE:
        assert (folders[head] / name).read_bytes() == (Path(modernalbert.__file__).parent / name).read_bytes()


@each_head
def test_importing_the_package_replaces_trust_remote_code(models, folders, batch, head):
    model = getattr(transformers, head).from_pretrained(folders[head])
    assert type(model) is AUTO_CLASSES[head]
    torch.testing.assert_close(run(model, inputs_for(head, batch)), run(models[head], inputs_for(head, batch)))


# ---- Remote code


def load_and_run(cases, batch):
    import transformers

    results = {}
    for name, (head, folder) in cases.items():
        auto_class = getattr(transformers, head)
        model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        choices = head == "AutoModelForMultipleChoice"
        with torch.no_grad():
            output = model(**{key: value[:, None] if choices else value for key, value in batch.items()})[0]
        results[name] = {
            "module": type(model).__module__,
            "state": dict(model.state_dict()),
            "output": output,
            "problems": [sorted(info[problem]) for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        }
    return results


def test_folders_load_by_remote_code(models, folders, batch, tmp_path):
    cases = {head: (model, head, str(folders[head])) for head, model in models.items()}
    for fold in (False, True):
        merged = modernalbert.ModernAlbertForMaskedLM.from_pretrained(folders[MLM]).merge_experts(fold=fold)
        merged.save_pretrained(tmp_path / f"merged-{fold}")
        cases[f"merged, folded: {fold}"] = (merged, MLM, str(tmp_path / f"merged-{fold}"))
    # As a download leaves it in the cache.
    repository = tmp_path / "hf" / "hub" / "models--someone--modernalbert"
    shutil.copytree(folders[MLM], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    cases["hub"] = (models[MLM], MLM, "someone/modernalbert")

    results = run_fresh(load_and_run, tmp_path, {name: case[1:] for name, case in cases.items()}, batch)
    for name, (model, head, _) in cases.items():
        result, state = results[name], model.state_dict()
        assert result["module"].startswith("transformers_modules."), name
        assert result["problems"] == [[], [], []], name
        assert result["state"].keys() == state.keys(), name
        assert all(torch.equal(result["state"][key], state[key]) for key in state), name
        torch.testing.assert_close(result["output"], run(model, inputs_for(head, batch)))


def fine_tune_and_save(folder, target, batch):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    with torch.no_grad():
        return {"state": dict(model.state_dict()), "output": model.eval()(**batch)[0]}


def test_fine_tuned_remote_model_saves_its_code(models, folders, batch, tmp_path):
    target = tmp_path / "tuned"
    tuned = run_fresh(fine_tune_and_save, tmp_path, str(folders[MLM]), str(target), batch)
    assert {path.name for path in target.iterdir()} == {path.name for path in folders[MLM].iterdir()}
    changed = [key for key, tensor in models[MLM].state_dict().items() if not torch.equal(tuned["state"][key], tensor)]
    assert set(changed) == set(models[MLM].state_dict())
    # A fresh cache, so that nothing but the folder can be the source.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    result = run_fresh(load_and_run, fresh, {"tuned": (MLM, str(target))}, batch)["tuned"]
    assert all(torch.equal(result["state"][key], tensor) for key, tensor in tuned["state"].items())
    torch.testing.assert_close(result["output"], tuned["output"])


def run_pipelines(folders, texts, masked):
    from transformers import pipeline

    results = {}
    for task, folder in folders.items():
        model = pipeline(task, model=folder, trust_remote_code=True)
        results[task] = model(masked if task == "fill-mask" else texts, batch_size=len(texts))
    return results


def test_pipelines(models, folders, tokenizer, tmp_path):
    """On a padded batch, they give what the model gives for each text alone.

    transformers has no `question-answering` pipeline since version 5.
    """
    heads = {
        "fill-mask": MLM,
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "feature-extraction": "AutoModel",
    }
    masked = [f"{text} A [MASK] fox." for text in TEXTS]
    results = run_fresh(run_pipelines, tmp_path, {task: str(folders[heads[task]]) for task in heads}, TEXTS, masked)

    def logits(task, text):
        return run(models[heads[task]], tokenizer(text, return_tensors="pt"))[0]

    for index, (text, text_with_mask) in enumerate(zip(TEXTS, masked, strict=True)):
        found = {task: result[index] for task, result in results.items()}
        mask = tokenizer(text_with_mask)["input_ids"].index(tokenizer.mask_token_id)
        best = logits("fill-mask", text_with_mask)[mask].softmax(-1).topk(5)
        assert [answer["token"] for answer in found["fill-mask"]] == best.indices.tolist()
        assert [answer["score"] for answer in found["fill-mask"]] == pytest.approx(best.values.tolist(), rel=1e-4)

        score, label = logits("text-classification", text).softmax(-1).max(-1)
        assert found["text-classification"]["label"] == f"LABEL_{label}"
        assert found["text-classification"]["score"] == pytest.approx(score.item(), rel=1e-4)

        scores, labels = logits("token-classification", text)[1:-1].softmax(-1).max(-1)  # [CLS] and [SEP] have none
        assert [answer["entity"] for answer in found["token-classification"]] == [f"LABEL_{i}" for i in labels]
        assert [answer["score"] for answer in found["token-classification"]] == pytest.approx(
            scores.tolist(), rel=1e-4
        )

        states = logits("feature-extraction", text)
        torch.testing.assert_close(torch.tensor(found["feature-extraction"])[0, : len(states)], states)


def encode_save_encode(folder, target, texts):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    first = model.encode(texts, convert_to_tensor=True)
    model.save_pretrained(target)
    again = SentenceTransformer(target, trust_remote_code=True, device="cpu")
    return first, again.encode(texts, convert_to_tensor=True), type(again[0].auto_model).__module__


def test_sentence_transformers(models, folders, batch, tmp_path):
    target = tmp_path / "embedder"
    first, again, module = run_fresh(
        encode_save_encode,
        tmp_path,
        str(folders["AutoModel"]),
        str(target),
        TEXTS,
        allowed=["accelerate", "sentence_transformers"],
    )
    real = batch["attention_mask"][..., None]
    mean = (run(models["AutoModel"], batch) * real).sum(dim=1) / real.sum(dim=1)
    torch.testing.assert_close(first, mean)
    torch.testing.assert_close(first, again)
    assert module.startswith("transformers_modules.")
    assert set(CODE) <= {path.name for path in target.iterdir()}


# ---- From one head to another


def encoder_of(state_dict):
    names = {key.removeprefix("model."): tensor for key, tensor in state_dict.items()}
    return {key: tensor for key, tensor in names.items() if key.startswith(("embeddings.", "layers.", "final_norm."))}


STARTS = [(source, head) for source in ("AutoModel", MLM) for head in AUTO_CLASSES]
STARTS += [
    ("AutoModelForSequenceClassification", head) for head in ("AutoModel", MLM, "AutoModelForTokenClassification")
]


@pytest.mark.parametrize(("source", "head"), STARTS)
def test_a_head_starts_from_the_encoder_of_another(models, folders, source, head):
    model, info = getattr(transformers, head).from_pretrained(folders[source], output_loading_info=True)
    state, given = model.state_dict(), models[source].state_dict()
    own = {key for key in state if key.removeprefix("model.") not in encoder_of(state)}
    assert info["missing_keys"] == own - set(given) - {"decoder.weight"}  # which is tied
    assert not info["mismatched_keys"]
    for key, tensor in encoder_of(given).items():
        assert torch.equal(encoder_of(state)[key], tensor), key
    for key in info["missing_keys"]:
        if key.endswith("dense.weight"):  # initialised, and not with the library's 0.02
            assert state[key].std().item() == pytest.approx(model.config.hidden_size**-0.5, rel=0.15)


# ---- Types and devices


@pytest.mark.parametrize("device_map", [None, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention"] * 2], ids=["full", "mixed"])
def test_loading_equals_construction(make_model, batch, tmp_path, layer_types, dtype, device_map):
    """Above all the tables of rotary frequencies, which are not saved."""
    source = make_model(modernalbert.ModernAlbertForMaskedLM, vocab_size=320, layer_types=layer_types)
    source.save_pretrained(tmp_path)
    loaded = modernalbert.ModernAlbertForMaskedLM.from_pretrained(tmp_path, dtype=dtype, device_map=device_map)

    built = modernalbert.ModernAlbertForMaskedLM(source.config)
    built.load_state_dict(source.state_dict())
    for name, parameter in built.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "router" in name else dtype)
    assert {name: tensor.dtype for name, tensor in loaded.named_parameters()} == {
        name: tensor.dtype for name, tensor in built.named_parameters()
    }
    buffers = dict(built.named_buffers())
    assert len(buffers) == 2 * len(set(source.config.layer_types))
    for name, tensor in loaded.named_buffers():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, buffers[name]), name
    torch.testing.assert_close(run(loaded, batch), run(built, batch))


ALL_ON_DISK = pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.15"), reason="needs accelerate 1.15: a whole model on the disk"
)


@pytest.mark.parametrize(
    "share", [pytest.param(0.3, marks=ALL_ON_DISK, id="disk"), pytest.param(0.8, id="cpu and disk")]
)
def test_offloading_changes_nothing(models, folders, batch, tmp_path, share):
    size = sum(parameter.nbytes for parameter in models[MLM].parameters())
    model = modernalbert.ModernAlbertForMaskedLM.from_pretrained(
        folders[MLM], device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path
    )
    assert set(model.hf_device_map.values()) == ({"disk"} if share < 0.5 else {"cpu", "disk"})
    torch.testing.assert_close(run(model, batch), run(models[MLM], batch))


# ---- Checkpoints that do not fit


def copy_with(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@each_head
@pytest.mark.parametrize("key", ["layers.1.mlp.experts.in_B", "layers.0.attn_norm.weight", "embeddings.norm.weight"])
def test_missing_encoder_tensor_is_an_error(folders, tmp_path, head, key):
    prefix = "" if head == "AutoModel" else "model."
    broken = copy_with(folders[head], tmp_path / "broken", lambda tensors: tensors.pop(prefix + key))
    with pytest.raises(ValueError, match=f"1 tensors of the encoder are missing in .*broken: {prefix}{key}"):
        AUTO_CLASSES[head].from_pretrained(broken)


def test_unknown_encoder_tensor_is_an_error(folders, tmp_path):
    extra = {f"model.layers.{index}.attn.Wo.weight": torch.zeros(32, 32) for index in range(2, 8)}
    broken = copy_with(folders[MLM], tmp_path / "broken", lambda tensors: tensors.update(extra))
    with pytest.raises(
        ValueError, match=r"6 tensors of the encoder are unexpected in .*Wo\.weight, \.\.\.\. The file is"
    ):
        AUTO_CLASSES[MLM].from_pretrained(broken)


def test_truncated_file_is_an_error(folders, tmp_path):
    shutil.copytree(folders[MLM], tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(SafetensorError, match="file not fully covered"):
        AUTO_CLASSES[MLM].from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, r"5 tensors of the encoder are unexpected .* own config\.json"),
        ({"num_hidden_groups": 4}, ValueError, r"12 tensors of the encoder are missing .* own config\.json"),
        ({"num_experts": 8}, RuntimeError, "ignore_mismatched_sizes"),  # the library's
        ({"num_experts": 1}, RuntimeError, "ignore_mismatched_sizes"),
        ({"num_hidden_groups": 3}, StrictDataclassClassValidationError, "must be a multiple of `num_hidden_groups`"),
    ],
)
def test_overriding_the_architecture_is_an_error(folders, overrides, error, message):
    with pytest.raises(error, match=message):
        AUTO_CLASSES[MLM].from_pretrained(folders[MLM], **overrides)


# ---- Changing a loaded model


@pytest.mark.parametrize("size", [384, 300])
def test_resizing_the_vocabulary_keeps_the_tie(models, folders, batch, tmp_path, size):
    model = AUTO_CLASSES[MLM].from_pretrained(folders[MLM])
    model.resize_token_embeddings(size)
    table = model.model.embeddings.tok_embeddings.weight
    assert model.decoder.weight is table and table.shape[0] == model.decoder.bias.shape[0] == size
    assert model.config.vocab_size == size
    kept = min(size, models[MLM].config.vocab_size)
    batch = {**batch, "input_ids": batch["input_ids"].clamp(max=size - 1)}
    torch.testing.assert_close(run(model, batch)[..., :kept], run(models[MLM], batch)[..., :kept])
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert table.grad is not None

    model.save_pretrained(tmp_path)
    again = AUTO_CLASSES[MLM].from_pretrained(tmp_path)
    assert again.decoder.weight is again.model.embeddings.tok_embeddings.weight
    torch.testing.assert_close(run(again, batch), run(model, batch))


def test_lora_trains_saves_and_merges(folders, batch, tmp_path):
    """From a pretrained model to a classifier; the head is not in the checkpoint, so that the adapter saves it whole."""
    torch.manual_seed(0)
    head = "AutoModelForSequenceClassification"
    labels = torch.tensor([0, 1, 0])
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["Wqkv", "Wi", "Wo"], modules_to_save=["head", "classifier"]
    )
    model = peft.get_peft_model(AUTO_CLASSES[head].from_pretrained(folders[MLM]), settings)
    adapted = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert len(adapted) == 2 * 4  # shared blocks count once
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("experts" in name or "router" in name for name in trainable)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(10):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")

    expected = run(model, batch)
    base = AUTO_CLASSES[head].from_pretrained(folders[MLM])
    assert not torch.allclose(run(base, batch), expected, atol=1e-2)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(run(again, batch), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(run(merged, batch), expected)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AUTO_CLASSES[head].from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(run(loaded, batch), run(merged, batch))
