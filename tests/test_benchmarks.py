"""What the benchmarks of the checkpoints count and run."""

from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXTS, VOCAB, load_script
from transformers import pipeline

from modernalbert import ModernAlbertForMaskedLM, ModernAlbertModel
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.export.embedder import write_embedder


BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


def make_folder(make_model, tokenizer, model_class, folder: Path) -> Path:
    names = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    model = make_model(model_class, vocab_size=padded_vocab_size(tokenizer), mol_groups=[], **names)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


# ---- Words that are masked


def test_a_word_of_one_token_or_not(tokenizer):
    word_token = load_script("fill_mask", BENCHMARKS).word_token
    token = word_token(tokenizer, "Sentence ", "number", " 7.")
    assert tokenizer.decode([token]).strip() == "number"
    assert word_token(tokenizer, "Sentence ", "extraordinary", " 7.") is None


def test_questions_are_words_of_the_text_that_all_tokenizers_have(tokenizer):
    script = load_script("fill_mask", BENCHMARKS)
    other = train_tokenizer(["says says says " * 20], vocab_size=300)
    texts = [f"{text} It also says extraordinary things about {n}." for n, text in enumerate(TEXTS)]
    questions = script.make_questions(texts, [tokenizer], 50, seed=0)
    assert len(questions) == 50
    for before, word, after in questions:
        assert any(before + word + after in text for text in texts) and word.isalpha() and word != "extraordinary"
    assert {word for _, word, _ in script.make_questions(texts, [tokenizer, other], 20, seed=0)} == {"says"}


def test_answers_are_those_of_the_pipeline(make_model, tokenizer, tmp_path):
    script = load_script("fill_mask", BENCHMARKS)
    folder = make_folder(make_model, tokenizer, ModernAlbertForMaskedLM, tmp_path / "model")
    model = ModernAlbertForMaskedLM.from_pretrained(folder).eval()
    expected = pipeline("fill-mask", model=str(folder))("Sentence [MASK] says.", top_k=4)
    found = script.answer(model, tokenizer, "Sentence [MASK] says.", 4)
    assert found == [guess["token_str"].strip() for guess in expected]


# ---- Embedders


def test_an_embedder_runs_in_onnx_with_the_same_vectors(make_model, tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    script = load_script("embedding", BENCHMARKS)
    folder = make_folder(make_model, tokenizer, ModernAlbertModel, tmp_path / "model")
    torch.manual_seed(0)
    write_embedder(folder, torch.nn.Linear(32, 24), 16)
    name = str(folder / "sentence-transformer")
    expected = sentence_transformers.SentenceTransformer(name, device="cpu").encode(TEXTS[:5])
    fp32, int8 = script.in_onnx(name, tmp_path).values()
    assert abs(fp32.encode(TEXTS[:5]) - expected).max() < 1e-4
    assert 1e-4 < abs(int8.encode(TEXTS[:5]) - expected).max() < 0.2
    assert int8.megabytes < 0.6 * fp32.megabytes


def test_correlation_is_of_cosines(tmp_path):
    script = load_script("embedding", BENCHMARKS)
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,score\nx,x,0.9\nx,xy,0.5\nx,y,0.1\n")
    vectors = {"x": [1.0, 0.0], "y": [0.0, 2.0], "xy": [3.0, 3.0]}

    class Model:
        def encode(self, texts, **kwargs):
            return torch.tensor([vectors[text] for text in texts])

    assert script.correlate(Model(), f"{path}:a:b:score") == pytest.approx(100)
    path.write_text("a,b,score\nx,x,0.1\nx,xy,0.5\nx,y,0.9\n")
    assert script.correlate(Model(), f"{path}:a:b:score") == pytest.approx(-100)
