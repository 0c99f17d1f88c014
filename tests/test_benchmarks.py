"""What the benchmarks of the checkpoints count and run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXTS, VOCAB, load_script
from transformers import pipeline

from modernalbert import ModernAlbertForMaskedLM, ModernAlbertModel
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.export.embedder import write_embedder, write_projection


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


@pytest.mark.parametrize("layers", [None, 2])
def test_every_form_of_an_embedder_has_the_same_vectors(make_model, tokenizer, tmp_path, layers):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    script = load_script("embedding", BENCHMARKS)
    folder = make_folder(make_model, tokenizer, ModernAlbertModel, tmp_path / "model")
    torch.manual_seed(0)
    write_embedder(folder, torch.nn.Linear(32, 24), 16)
    name = str(folder / "sentence-transformer")
    depth = {"config_kwargs": {"num_hidden_layers": layers}} if layers else {}
    expected = sentence_transformers.SentenceTransformer(name, device="cpu", **depth).encode(TEXTS[:5])
    bf16, fp32, int8 = script.other_forms(name, layers, tmp_path / "onnx").values()
    assert abs(fp32.encode(TEXTS[:5]) - expected).max() < 1e-4
    assert 1e-4 < abs(bf16.encode(TEXTS[:5], convert_to_tensor=True).float().numpy() - expected).max() < 0.05
    assert bf16.megabytes == pytest.approx(script.load(name).megabytes / 2)
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


def test_the_plot_has_a_point_for_every_model_and_form(tmp_path):
    script = load_script("embedding", BENCHMARKS)
    models = {
        name: {"scores": {"stsb": 80 + n}, "megabytes": 1 + n, "one sentence": {"milliseconds": 10 - n}}
        for n, name in enumerate(("a", "a, bf16", "b"))
    }
    figure = script.plot({**models, "BM25": {"scores": {"scifact": 60}}}, "stsb", "one sentence")
    left, right = ([tuple(zip(*line.get_data(), strict=True)) for line in axes.lines] for axes in figure.axes)
    assert left == [((10, 80),), ((9, 81),), ((8, 82),)] and right == [((1, 80),), ((2, 81),), ((3, 82),)]


def test_a_table_of_depths_has_the_scores_of_every_seed(make_model, tokenizer, tmp_path, capsys, monkeypatch):
    """Fine-tuned with and without smaller depths, by the script that users run."""
    script = load_script("depth", BENCHMARKS)
    folder = make_folder(make_model, tokenizer, ModernAlbertForMaskedLM, tmp_path / "model")
    for name, texts in (("train", TEXTS[:24]), ("validation", TEXTS[24:50])):
        rows = "".join(f"{text}\t{n % 2}\n" for n, text in enumerate(texts))
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + rows)
    files = {f"{name}_files": [str(tmp_path / f"{name}.tsv")] for name in ("train", "validation")}
    task = {"script": "run_glue", "do_train": True, "max_steps": 2, "text_columns": ["text"], "use_cpu": True, **files}
    task |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": 32}
    (tmp_path / "tasks.json").write_text(json.dumps({"parity": task}))
    # The scripts, without a process for each
    monkeypatch.setattr(script, "start_script", lambda name, *arguments: load_script(name).main(list(arguments)))
    flags = ["--model", str(folder), "--tasks", str(tmp_path / "tasks.json"), "--only", "parity", "--seeds", "0", "1"]
    flags += ["--learning_rate", "1e-3", "--repeats", "1", "--processes", "1", "--output_dir", str(tmp_path / "out")]
    script.main(flags)
    found = json.loads((tmp_path / "out" / "depth.json").read_text())
    assert {kind: list(depths) for kind, depths in found["scores"]["parity"].items()} == {
        "full depth alone": ["2", "4"],
        "elastic": ["2", "4"],
    }
    assert all(len(scores) == 2 for depths in found["scores"]["parity"].values() for scores in depths.values())
    assert "| 2 layers |" in capsys.readouterr().out


# ---- Merging


def test_merges_are_measured_by_the_distance_to_the_encoder_they_were_distilled_from(make_model, tokenizer, tmp_path):
    script = load_script("merging", BENCHMARKS)
    teacher_folder = make_folder(make_model, tokenizer, ModernAlbertModel, tmp_path / "teacher")
    student = make_model(ModernAlbertForMaskedLM, vocab_size=padded_vocab_size(tokenizer)).eval()
    student.save_pretrained(tmp_path / "student")
    save_tokenizer(tokenizer, tmp_path / "student")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    args = Namespace(distil=str(teacher_folder), train_data=[str(data)], validation_data=[str(data)])
    args.calibration_rows = args.validation_rows = 100
    with pytest.raises(ValueError, match="has no projection to the states of"):
        script.distillation_losses(args, str(tmp_path / "student"))

    torch.manual_seed(0)
    projection = torch.nn.Linear(32, 32)
    write_projection(tmp_path / "student", projection)
    losses = script.distillation_losses(args, str(tmp_path / "student"))

    teacher = ModernAlbertModel.from_pretrained(teacher_folder).eval()
    of_tokens, of_texts = [], []
    with torch.no_grad():
        for text in TEXTS:
            inputs = tokenizer(text, return_tensors="pt")
            expected = teacher(**inputs).last_hidden_state[0]
            states = student.model(**inputs).last_hidden_state[0]
            of_tokens.append(1 - torch.cosine_similarity(projection(states), expected, dim=-1))
            of_texts.append(1 - torch.cosine_similarity(projection(states.mean(0)), expected.mean(0), dim=-1))
    naive = torch.cat(of_tokens).mean() + torch.stack(of_texts).mean()
    assert losses["routed"] == pytest.approx(naive.item(), rel=1e-5)
    # No training has said what its routing was, and of four experts four are left.
    assert set(losses) == {"routed", *script.METHODS} - {"ema", "cluster to 4"}
    assert all(abs(loss - losses["routed"]) > 1e-6 for name, loss in losses.items() if name != "routed")


# ---- Pairs


@pytest.fixture
def pairs_script():
    return load_script("pairs", BENCHMARKS)


def test_states_of_pairs_are_means_over_their_own_tokens(make_model, tokenizer, pairs_script):
    """Whatever they are padded with; the second text is read in sight of the first, or by itself."""
    names = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    model = make_model(ModernAlbertModel, vocab_size=padded_vocab_size(tokenizer), mol_groups=[], **names).eval()
    firsts, seconds = TEXTS[:3], [TEXTS[3], TEXTS[4] * 2, TEXTS[5]]
    together = pairs_script.mean_states(model, tokenizer, firsts, seconds)
    apart = pairs_script.see_apart(model, tokenizer, firsts, seconds)
    for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        with torch.no_grad():
            pair = model(**tokenizer(first, second, return_tensors="pt", return_token_type_ids=False))
            alone = [
                model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)) for text in (first, second)
            ]
        torch.testing.assert_close(
            torch.tensor(together[row]), pair.last_hidden_state[0].mean(dim=0), rtol=1e-4, atol=1e-5
        )
        u, v = (torch.nn.functional.normalize(each.last_hidden_state[0].mean(dim=0), dim=0) for each in alone)
        torch.testing.assert_close(torch.tensor(apart[row]), torch.cat([(u - v).abs(), u * v]), rtol=1e-4, atol=1e-5)


def test_a_linear_model_is_scored_on_rows_it_has_not_seen(pairs_script):
    features = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0)).double().numpy()
    target = features @ features[0, 0]
    assert pairs_script.score(list(features), [list(part) for part in target]) > 99.9
    assert pairs_script.score(list(features), [list((part > 0).astype(int)) for part in target]) > 95
    unrelated = torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).double()
    assert abs(pairs_script.score(list(features), unrelated.tolist())) < 20
    assert pairs_script.score(list(features), (unrelated > 0).int().tolist()) == pytest.approx(50, abs=10)


def test_the_table_of_pairs_has_both_views(make_model, tokenizer, pairs_script, tmp_path, capsys):
    folder = make_folder(make_model, tokenizer, ModernAlbertModel, tmp_path / "model")
    (tmp_path / "same").mkdir()
    for split, start in (("train", 0), ("validation", 7)):
        rows = [{"a": TEXTS[n % 5], "b": TEXTS[(n + n % 2) % 5], "label": n % 2} for n in range(start, start + 40)]
        (tmp_path / "same" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs_script.main(["--models", str(folder), "--pairs", f"{tmp_path / 'same'}:a:b"])
    header, _, row = capsys.readouterr().out.splitlines()[:3]
    assert header == "|  | same, together | same, apart |"
    name, _, apart = row.strip("| ").split(" | ")
    assert name == "model" and float(apart) == 100  # equal texts have no difference
