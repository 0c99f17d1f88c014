"""A folder that leaves a run: written atomically, loaded by a process without the package, held against others."""

import copy
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from helpers import load_script
from safetensors.torch import load_file, save_file

import modernalbert
from modernalbert.tokenization import padded_vocab_size, train_tokenizer
from modernalbert.training.export import folder as export
from modernalbert.training.export.adapter import write_adapter
from modernalbert.training.export.embedder import write_embedder
from modernalbert.training.export.folder import (
    check_exportable,
    check_writable,
    draft_folder,
    export_model,
    load_exportable,
    new_folder,
    run_fresh,
    write_model,
)
from modernalbert.training.export.hub import export_to_hub


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["A list is sorted in place."] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model(make_model, tokenizer):
    groups = {"mol_groups": [0, 1], "mol_intermediate_size": 40, "vocab_size": padded_vocab_size(tokenizer)}
    return make_model(modernalbert.ModernAlbertForMaskedLM, **groups)


# ---- A process without the package


def test_a_fresh_process_sees_no_package():
    with pytest.raises(RuntimeError, match="does not load in a fresh process(.|\n)*ModuleNotFoundError"):
        run_fresh("import modernalbert.merging_modernalbert")
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        run_fresh("from modernalbert import ModernAlbertModel")


def change_code(folder, change):
    """Changes the module that `config.json` points at."""
    path = folder / "modeling_modernalbert.py"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "merging_modernalbert.py").unlink(),
        # What would work here, where the package can be imported, and nowhere else.
        lambda folder: change_code(folder, lambda code: code.replace("from .merging_", "from modernalbert.merging_")),
    ],
    ids=["a file is missing", "the code imports the package"],
)
def test_a_folder_that_needs_the_package_is_refused(model, tokenizer, tmp_path, monkeypatch, change):
    save = type(model).save_pretrained

    def save_incompletely(self, folder):
        save(self, folder)
        change(folder)

    monkeypatch.setattr(type(model), "save_pretrained", save_incompletely)
    with pytest.raises(RuntimeError, match="does not load in a fresh process"):
        export_model(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_outputs_are_refused(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "run_fresh", lambda code, folder, sentence, output: write_outputs(output))
    with pytest.raises(RuntimeError, match="but gives other outputs"):
        export_model(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- What can be exported


def test_what_cannot_be_exported_is_refused(make_model, tokenizer, tmp_path, model):
    def save(name, **config):
        model.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text()) | config
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        return str(tmp_path / name)

    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="'.*lora' is a LoRA; fold it into its model"):
        check_exportable(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="is a bert, expected a ModernALBERT"):
        check_exportable(save("bert", model_type="bert"))
    for heads in (None, ["BertModel"], ["ModernAlbertConfig"]):
        with pytest.raises(ValueError, match="expected one class of ModernALBERT"):
            check_exportable(save("heads", architectures=heads))
    with pytest.raises(ValueError, match=r"has no classifier.*ForSequenceClassification was not trained"):
        load_exportable(save("headless", architectures=["ModernAlbertForSequenceClassification"]))
    diverged = make_model(modernalbert.ModernAlbertForMaskedLM)
    with torch.no_grad():
        diverged.model.layers[0].attn.Wqkv.weight[0, 0] = float("nan")
    diverged.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ValueError, match=r"`model.layers.0.attn.Wqkv.weight` of .* is not finite: training diverged"):
        load_exportable(str(tmp_path / "diverged"))


def test_outputs_that_are_not_finite_are_refused(make_model, tokenizer, tmp_path, monkeypatch):
    model = make_model(modernalbert.ModernAlbertForMaskedLM, vocab_size=padded_vocab_size(tokenizer))
    with torch.no_grad():
        model.model.embeddings.tok_embeddings.weight.fill_(float("inf"))
    monkeypatch.setattr(export, "run_fresh", lambda code, folder, sentence, output: write_outputs(output))
    with pytest.raises(RuntimeError, match="outputs are not finite"):
        export_model(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def write_outputs(path):
    save_file({"output": torch.ones(1)}, path)


# ---- What is saved agrees with itself


def test_the_tokenizer_takes_what_the_model_takes(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_export", lambda *arguments: None)
    export_model(model, tokenizer, tmp_path / "folded")
    write_adapter(copy.deepcopy(model).merge_experts(fold=False), tokenizer, tmp_path / "adapter")
    for folder in ("folded", "adapter/base"):
        settings = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        limit = json.loads((tmp_path / folder / "config.json").read_text())["max_position_embeddings"]
        assert settings["model_max_length"] == limit == 64
    assert tokenizer.model_max_length == 8192  # the caller's own


# ---- Folders


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_the_umask_is_obeyed(model, tokenizer, tmp_path, monkeypatch, umask):
    monkeypatch.setattr(export, "check_export", lambda *arguments: None)
    before = os.umask(umask)
    try:
        export_model(model, tokenizer, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name


def test_a_folder_in_the_model_or_in_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for output in ("model", "model/merged", "model/../model/a/b"):
        with pytest.raises(ValueError, match="lies in the folder of the model"):
            new_folder(tmp_path / output, tmp_path / "model")
    new_folder(tmp_path / "model-merged", tmp_path / "model")
    new_folder(tmp_path / "model-merged", "org/name")
    with pytest.raises(NotADirectoryError, match="config.json' is a file, and a folder is expected there"):
        new_folder(tmp_path / "model" / "config.json" / "out")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        new_folder(tmp_path / "model")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot write to"):
        check_writable(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        with draft_folder(tmp_path / "a" / "out") as draft:
            (draft / "model.safetensors").write_text("half")
            raise OSError(28, "No space left on device")
    assert list((tmp_path / "a").iterdir()) == []


def test_the_second_of_two_is_refused(tmp_path):
    """At once where it begins while the first is at work, and at the end where both began together."""
    with draft_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("first")
        with pytest.raises(FileExistsError, match="another process is writing '.*out'"):
            new_folder(tmp_path / "out")
        new_folder(tmp_path / "out2")
    with pytest.raises(FileExistsError, match="another process has written '.*late' meanwhile"):
        with draft_folder(tmp_path / "late") as draft:
            (tmp_path / "late").mkdir()
            (tmp_path / "late" / "file").write_text("first")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "late"}
    assert (tmp_path / "out" / "file").read_text() == (tmp_path / "late" / "file").read_text() == "first"


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import sys, time; from modernalbert.training.export.folder import draft_folder\n"
        "with draft_folder(sys.argv[1]) as draft:\n"
        "    (draft / 'model.safetensors').write_text('half'); print('there', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "there\n"
        with pytest.raises(FileExistsError, match="another process is writing"):
            new_folder(tmp_path / "out")
        (left,) = tmp_path.iterdir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    own = tmp_path / ".out.draft"  # not one of ours
    own.mkdir()
    for _ in range(50):
        new_folder(tmp_path / "out")
        if not left.exists():
            break
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == [own]


def test_a_model_is_written_into_an_empty_folder(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_export", lambda *arguments: None)
    (tmp_path / "out").mkdir()
    with draft_folder(tmp_path / "out") as draft:
        write_model(model, tokenizer, draft)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_an_export_that_does_not_load_leaves_nothing(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "RELOAD", "raise SystemExit('no such luck')")
    with pytest.raises(RuntimeError, match="does not load in a fresh process:\nno such luck"):
        export.export_model(model, tokenizer, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# ---- A folder for the Hub


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    write_model(model, tokenizer, folder)
    (folder / "README.md").write_text("# A card\n")
    return folder


def outputs_of(folder):
    model, tokenizer = load_exportable(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        return model(**tokenizer("A list is sorted.", return_tensors="pt")).logits


def test_half_precision_halves_the_files_and_loads_in_float32(saved, tmp_path):
    export_to_hub(saved, tmp_path / "half", torch.float16)
    assert (tmp_path / "half" / "README.md").read_text() == "# A card\n"
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", saved)]
    assert 0.5 <= sizes[0] / sizes[1] < 0.6
    rounded, exact = outputs_of(tmp_path / "half"), outputs_of(saved)
    assert 0 < (rounded - exact).norm() < 1e-2 * exact.norm()
    # A second export changes no bit.
    export_to_hub(tmp_path / "half", tmp_path / "again", torch.float16)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("half", "again")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_folder_without_code_needs_the_package(saved, tmp_path):
    export_to_hub(saved, tmp_path / "bare", code=False)
    assert not list((tmp_path / "bare").rglob("*.py"))
    torch.testing.assert_close(outputs_of(tmp_path / "bare"), outputs_of(saved), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modernalbert"):
        run_fresh(
            "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])", str(tmp_path / "bare")
        )
    # Its code comes back.
    export_to_hub(tmp_path / "bare", tmp_path / "whole")
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in (tmp_path / "whole").glob("*.py")}


def test_what_half_precision_cannot_hold_is_refused(model, tokenizer, tmp_path):
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.model.final_norm.weight[0] = 1e6
    large.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    with pytest.raises(
        ValueError, match="`model.final_norm.weight` holds values that torch.float16 does not; store it"
    ):
        export_to_hub(tmp_path / "large", tmp_path / "half", torch.float16)
    assert not (tmp_path / "half").exists()


def test_a_sentence_transformer_is_exported_whole(saved, tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    torch.manual_seed(0)
    write_embedder(saved, torch.nn.Linear(32, 24), 16)
    source = saved / "sentence-transformer"
    export_to_hub(source, tmp_path / "half", torch.float16)
    export_to_hub(source, tmp_path / "bare", torch.float16, code=False)
    texts = ["A list is sorted in place.", "A list."]
    expected = sentence_transformers.SentenceTransformer(str(source), device="cpu").encode(texts)
    for name in ("half", "bare"):
        folder = tmp_path / name
        dtypes = {tensor.dtype for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()}
        assert dtypes == {torch.float16} and len(list(folder.rglob("*.safetensors"))) == 2
        embedder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        assert {parameter.dtype for parameter in embedder.parameters()} == {torch.float32}
        assert embedder.max_seq_length == 16 and embedder.get_embedding_dimension() == 24
        assert abs(embedder.encode(texts) - expected).max() < 1e-2
    assert list((tmp_path / "half").glob("*.py")) and not list((tmp_path / "bare").rglob("*.py"))

    bert = tmp_path / "bert"
    shutil.copytree(source, bert)
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({"model_type": "bert", "dtype": config["dtype"]}))
    with pytest.raises(ValueError, match="is a bert, expected a ModernALBERT"):
        export_to_hub(bert, tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "`dtype` must be one of float32, float16, bfloat16"),
        (["--dry_run", "true"], "give both"),
        (["--push_to_hub", "me/model", "--code", "false"], "without the code nobody can load"),
    ],
)
def test_wrong_arguments_of_the_script_are_refused(saved, tmp_path, arguments, message):
    command = ["--model_name_or_path", str(saved), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        load_script("export_hub").main([*command, *arguments])


def test_the_script_shows_what_it_would_upload(saved, tmp_path, caplog):
    command = ["--model_name_or_path", str(saved), "--output_dir", str(tmp_path / "out")]
    with caplog.at_level("INFO"):
        load_script("export_hub").main([*command, "--push_to_hub", "me/model", "--dry_run", "true"])
    assert "model.safetensors" in caplog.text and "nothing was uploaded" in caplog.text
