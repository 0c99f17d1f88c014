"""The checkpoints of this repository: what they hold, and that they know something."""

import json

import pytest
import torch
from helpers import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

from modernalbert import ModernAlbertForMaskedLM
from modernalbert.training.export.folder import check_public
from modernalbert.training.export.hub import export_to_hub


FOLDERS = [ROOT / "checkpoints" / name for name in ("modernalbert-nano", "modernalbert-nano-embed")]
each_checkpoint = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@each_checkpoint
def test_a_checkpoint_is_small_and_public(folder):
    weights = [load_file(path) for path in folder.rglob("*.safetensors")]
    tensors = [tensor for part in weights for tensor in part.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert sum(tensor.numel() for tensor in tensors) < 8e6
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 12 * 2**20
    assert not list(folder.rglob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    check_public(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"


@each_checkpoint
def test_a_checkpoint_becomes_a_folder_for_the_hub(folder, tmp_path):
    if folder.name.endswith("embed"):
        pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    export_to_hub(folder, tmp_path / "hub")  # loads it in a process without the package
    assert (tmp_path / "hub" / "modeling_modernalbert.py").exists()
    sizes = [sum(path.stat().st_size for path in f.rglob("*.safetensors")) for f in (folder, tmp_path / "hub")]
    assert sizes[1] <= 1.01 * sizes[0]  # in the precision that the checkpoint is stored in
    assert (tmp_path / "hub" / "README.md").read_text() == (folder / "README.md").read_text()


def test_it_fills_masks():
    fill = pipeline("fill-mask", model=str(FOLDERS[0]))
    answers = [guess["token_str"] for guess in fill("She opened the [MASK] and walked into the garden.", top_k=3)]
    assert "door" in answers
    answers = [guess["token_str"] for guess in fill('"I do not know," [MASK] the old man.', top_k=3)]
    assert "said" in answers


def test_its_experts_correct_something():
    model = ModernAlbertForMaskedLM.from_pretrained(FOLDERS[0]).eval()
    assert model.config.has_router
    ids = torch.randint(2000, 20000, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routed, dropped = (m(ids).logits for m in (model, model.merge_experts("drop", inplace=False)))
    assert (routed - dropped).norm() > 0.01 * routed.norm()


def test_a_classifier_starts_from_it():
    model, info = AutoModelForSequenceClassification.from_pretrained(FOLDERS[0], output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_it_embeds_sentences():
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    model = sentence_transformers.SentenceTransformer(str(FOLDERS[1]), device="cpu")
    pairs = [
        ("A man is playing a flute.", "Somebody makes music."),
        ("The price of oil fell sharply.", "Crude became much cheaper."),
        ("Cells divide by mitosis.", "One cell becomes two daughter cells."),
    ]
    first, second = (model.encode(list(texts), convert_to_tensor=True) for texts in zip(*pairs, strict=True))
    assert first.shape == (3, 384) and model.max_seq_length == 256
    assert model.similarity(first, second).argmax(dim=1).tolist() == [0, 1, 2]


def test_half_of_its_depth_embeds_alike():
    """It was trained for that: before, cosines were 0.84 to 0.88."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    texts = ["A man is playing a flute.", "The price of oil fell sharply.", "One cell becomes two daughter cells."]
    full, half = (
        sentence_transformers.SentenceTransformer(str(FOLDERS[1]), device="cpu", config_kwargs=depth).encode(
            texts, convert_to_tensor=True
        )
        for depth in ({}, {"num_hidden_layers": 3})
    )
    assert (full * half).sum(dim=1).min() > 0.96 and not torch.equal(full, half)
