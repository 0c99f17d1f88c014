"""A saved folder as users meet it: remote code in a fresh process, Auto classes, pipelines, adapters, offloading."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
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
    optional = {"accelerate", "datasets", "flash_attn", "kernels", "peft", "sentence_transformers", "sklearn"}
    lines = [
        "import sys, torch",
        f"sys.modules.update(dict.fromkeys({sorted(optional | {'modernalbert'} - set(allowed))}))",  # cannot be imported
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
    return torch.load(folder / "result.pt")


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
    assert torch.equal(run(model, inputs_for(head, batch)), run(models[head], inputs_for(head, batch)))


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
        assert torch.equal(result["output"], run(model, inputs_for(head, batch))), name


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
    assert torch.equal(result["output"], tuned["output"])


def run_pipelines(folders, texts, masked):
    from transformers import pipeline

    results = {}
    for task, folder in folders.items():
        model = pipeline(task, model=folder, trust_remote_code=True)
        inputs = masked if task == "fill-mask" else texts
        results[task] = {"alone": [model(text) for text in inputs], "together": model(inputs, batch_size=len(inputs))}
    return results


def test_pipelines(models, folders, tokenizer, tmp_path):
    """`question-answering` is none of transformers' pipelines since version 5."""
    tasks = {
        "fill-mask": MLM,
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "feature-extraction": "AutoModel",
    }
    masked = [f"{text} A [MASK] fox." for text in TEXTS]
    sources = {task: str(folders[head]) for task, head in tasks.items()}
    results = run_fresh(run_pipelines, tmp_path, sources, TEXTS, masked)
    for place, text in enumerate(TEXTS):
        found = {}
        for task, result in results.items():
            found[task] = result["alone"][place]
            ...


