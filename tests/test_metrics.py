"""Metrics as `evaluate` modules, compared with the libraries and the official definitions, and baselines."""

import evaluate
import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import sklearn.metrics
import transformers
from datasets import Dataset
from seqeval.scheme import BILOU
from transformers import pipeline

import modernalbert
from modernalbert.tokenization import padded_vocab_size, train_tokenizer
from modernalbert.training.evaluation.metrics import (
    F1,
    GLUE_MEAN,
    METRICS,
    Accuracy,
    MatthewsCorrelation,
    Pearson,
    Seqeval,
    Spearman,
    Squad,
    SquadV2,
    compute_metrics,
    glue_mean,
    score_baselines,
)


DRAW = np.random.default_rng(0)
GOOD, BAD = ["fine", "lovely", "great"], ["awful", "dull", "poor"]
TEXTS = [f"A {GOOD[n % 3] if n % 2 else BAD[n % 3]} film, number {n}." for n in range(24)]
WORDS = ["Ada", "went", "to", "Rome", "in", "May"]


@pytest.mark.parametrize(
    ("module", "reference"),
    [
        (Accuracy, sklearn.metrics.accuracy_score),
        (F1, sklearn.metrics.f1_score),
        (MatthewsCorrelation, sklearn.metrics.matthews_corrcoef),
        (Pearson, lambda labels, values: scipy.stats.pearsonr(labels, values).statistic),
        (Spearman, lambda labels, values: scipy.stats.spearmanr(labels, values).statistic),
    ],
)
def test_modules_give_what_the_libraries_give(module, reference):
    metric = module()
    for _ in range(3):
        regression = module in (Pearson, Spearman)
        labels, values = (DRAW.normal(size=40) if regression else DRAW.integers(0, 2, 40) for _ in range(2))
        assert metric.compute(predictions=values, references=labels) == pytest.approx(
            {metric.name: reference(labels, values)}
        )
    assert METRICS[metric.name] is module


def test_metrics_of_logits():
    logits, labels = np.eye(2)[[0, 1, 1, 0]], [0, 1, 0, 0]
    expected = {"accuracy": 3 / 4, "f1": 2 / 3, "matthews_correlation": 1 / 3**0.5}  # by hand
    assert compute_metrics(tuple(expected), logits, labels) == pytest.approx(expected)
    values = np.array([[1.0], [2.0], [4.0]])
    assert compute_metrics(("pearson", "spearman"), values, [3, 5, 9]) == pytest.approx({"pearson": 1, "spearman": 1})


def draw_tags(scheme, kinds=("PER", "LOC")):
    """A sentence of valid tags, with neighbouring entities of one type."""
    tags = []
    for _ in range(DRAW.integers(1, 6)):
        kind, length = kinds[DRAW.integers(len(kinds))], int(DRAW.integers(0, 4))
        names = {"IOB2": "BII", "IOBES": "BIE", "BILOU": "BIL"}[scheme]
        if length == 1 and scheme != "IOB2":
            tags.append({"IOBES": "S", "BILOU": "U"}[scheme] + f"-{kind}")
        elif length:
            inner = [names[1]] * (length - 2) + [names[2]] * (length > 1)
            tags += [f"{prefix}-{kind}" for prefix in [names[0], *inner]]
        tags += ["O"] * int(DRAW.integers(0, 2))
    return tags or ["O"]


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES", "BILOU"])
def test_entities_are_counted_as_seqeval_does(scheme):
    """IOB2 and IOBES in its default mode, which is conlleval's; BILOU in its strict one, which alone knows it."""
    references = [draw_tags(scheme) for _ in range(60)]
    predictions = [
        tags if DRAW.random() < 0.5 else (draw_tags(scheme) + ["O"] * 20)[: len(tags)] for tags in references
    ]
    if scheme == "BILOU":  # strict is as conlleval where every entity is whole
        predictions = [
            tags if len(tags) == len(gold) and tags[-1][0] in "OLU" else gold
            for tags, gold in zip(predictions, references, strict=True)
        ]
    options = {"mode": "strict", "scheme": BILOU} if scheme == "BILOU" else {}
    scores = Seqeval().compute(predictions=predictions, references=references, by_type=True)
    by_type = scores.pop("by_type")
    expected = {
        name: getattr(seqeval.metrics, f"{name}_score")(references, predictions, **options)
        for name in ("f1", "precision", "recall")
    }
    expected["accuracy"] = seqeval.metrics.accuracy_score(references, predictions)
    assert scores == pytest.approx(expected) and 0 < scores["f1"] < 1 and set(by_type) == {"PER", "LOC"}


def test_rows_without_entities_score_zero():
    assert Seqeval().compute(predictions=[["O"]], references=[["O"]])["f1"] == 0


def question(name, *texts):
    return {"id": name, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}


def test_squad_modules_follow_the_official_scripts():
    """Worked out by hand from evaluate-v1.1.py and evaluate-v2.0.py."""
    given = {"a": "The  Cat!", "b": "black cat", "c": "dog", "d": ""}
    answers = [{"id": name, "prediction_text": text} for name, text in given.items()]
    golds = [question("a", "cat"), question("b", "cat", "dog"), question("c", "bird"), question("d", "the")]
    scores = Squad().compute(predictions=answers, references=golds)
    assert scores == pytest.approx({"exact": 2 / 4, "f1": (1 + 2 / 3) / 4})
    golds = [question("a", "cat"), question("b", "cat"), question("c"), question("d")]
    rows = [{**row, "no_answer_probability": 0.4} for row in answers]
    scores = SquadV2().compute(predictions=rows, references=golds)
    assert scores["exact"] == 2 / 4 and scores["NoAns_exact"] == 1 / 2 and scores["HasAns_f1"] == pytest.approx(5 / 6)
    scores = SquadV2().compute(predictions=rows, references=golds, no_answer_threshold=0.3)
    assert scores["NoAns_exact"] == 1 and scores["HasAns_exact"] == 0


def test_modules_combine_and_count_batches():
    combined = evaluate.combine([Accuracy(), F1(), MatthewsCorrelation()])
    for labels, values in (([0, 1], [0, 1]), ([1, 0], [0, 0])):
        combined.add_batch(references=labels, predictions=values)
    expected = {"accuracy": 3 / 4, "f1": 2 / 3, "matthews_correlation": 1 / 3**0.5}
    assert combined.compute() == pytest.approx(expected)


@pytest.fixture(scope="module")
def build(make_model):
    """Makes a tiny model with a head, and its tokenizer."""
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=320, model_max_length=64)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}

    def make(head, **fields):
        return make_model(head, vocab_size=padded_vocab_size(tokenizer), **ids, **fields), tokenizer

    return make


def test_the_evaluator_of_texts_takes_them(build):
    model, tokenizer = build(modernalbert.ModernAlbertForSequenceClassification, num_labels=2)
    data = Dataset.from_dict({"text": WORDS, "label": [0, 1] * 3})
    task = evaluate.evaluator("text-classification")
    mapping, metric = {"LABEL_0": 0, "LABEL_1": 1}, evaluate.combine([Accuracy(), F1()])
    found = task.compute(model, data, metric=metric, tokenizer=tokenizer, label_mapping=mapping, device=-1)
    rows = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(WORDS)
    predictions = [mapping[row["label"]] for row in rows]
    assert found["accuracy"] == sklearn.metrics.accuracy_score([0, 1] * 3, predictions)
    assert found["f1"] == sklearn.metrics.f1_score([0, 1] * 3, predictions)


def test_the_evaluator_of_tokens_takes_them(build):
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    model, tokenizer = build(modernalbert.ModernAlbertForTokenClassification, id2label=names)
    tags = ["B-PER", "O", "O", "B-PER", "O", "O"]
    data = Dataset.from_dict({"tokens": [WORDS], "ner_tags": [tags]})
    task = evaluate.evaluator("token-classification")
    found = task.compute(model, data, metric=Seqeval(), tokenizer=tokenizer, device=-1)
    assert 0 <= found["f1"] <= 1 and 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("metric", [Squad, SquadV2])
def test_the_evaluator_of_questions_takes_them(monkeypatch, metric):
    """transformers 5.24 has neither a pipeline for it nor a class that evaluate 0.4.6 asks for."""
    monkeypatch.setattr(transformers, "TFPreTrainedModel", (), raising=False)

    def answer(question, context, **kwargs):
        return [{"answer": text.split()[0], "score": 0.5} for text in context]

    answer.task = "question-answering"
    text = " ".join(WORDS)
    row = {"id": "1", "question": "Who went?", "context": text, "answers": {"text": ["Ada"], "answer_start": [0]}}
    task = evaluate.QuestionAnsweringEvaluator()
    options = {"squad_v2_format": metric is SquadV2, "device": -1}
    assert task.compute(answer, Dataset.from_list([row]), metric=metric(), **options)["f1"] == 1


def test_a_constant_correlates_with_nothing():
    assert compute_metrics(("pearson", "spearman"), np.ones((3, 1)), np.arange(3.0)) == {"pearson": 0, "spearman": 0}


def test_the_mean_is_that_of_the_paper():
    """ModernBERT-base in table 5 of its paper, and the mean that the ModernALBERT paper gives it."""
    scores = dict(zip(GLUE_MEAN, (65.1, 96.0, 92.2, 91.8, 92.1, 89.1, 93.9, 87.4), strict=True))
    assert glue_mean({**scores, "wnli": 0.0}) == pytest.approx(88.45)
    assert glue_mean({task: scores[task] for task in GLUE_MEAN[1:]}) is None


def test_baselines():
    train, labels = [TEXTS], [n % 2 for n in range(24)]
    unseen, expected = [["A lovely play.", "A dull play.", "A poor play."]], [1, 0, 0]
    scores = score_baselines(("accuracy",), train, [0, *labels[1:-1], 0], unseen, expected)
    assert scores == {"majority": {"accuracy": 2 / 3}, "TF-IDF": {"accuracy": 1}}
    first, second = ["red hat", "old car", "big sea", "new map"], ["red hat", "wet dog", "big sea", "top cat"]
    pairs, values = [first * 3, second * 3], [1.0, 0.0, 1.0, 0.0] * 3  # whether they are alike, no word alone says
    unseen, expected = [["old car", "new map"], ["old car", "top cat"]], [1.0, 0.0]
    scores = score_baselines(("pearson",), pairs, values, unseen, expected)
    assert scores["majority"] == {"pearson": 0} and scores["TF-IDF"]["pearson"] == pytest.approx(1)
