"""Metrics of the task scripts as `evaluate.Metric` modules, which need no network; and baselines.

Values are from 0 (correlations: -1) to 1. The modules work with `evaluate.evaluator` and `evaluate.combine`:

    evaluate.combine([Accuracy(), F1()]).compute(predictions=[0, 1, 1], references=[0, 1, 0])
"""

import math
import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from scipy.sparse import hstack
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import accuracy_score as tag_accuracy
from seqeval.metrics import classification_report
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import PreTrainedModel


# Columns of the two texts, and the metrics in the order that GLUE reports them. The first enters the mean over tasks:
# accuracy for MRPC and QQP and Pearson for STS-B, as in RoBERTa's and, by its baselines, ModernBERT's table.
GLUE_TASKS = {
    "cola": (("sentence", None), ("matthews_correlation",)),
    "sst2": (("sentence", None), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman")),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}

# Tasks of the mean, as in the paper: without WNLI, and MNLI on the matched set only.
GLUE_MEAN = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Module(evaluate.Metric):
    """Base of the metrics: rows stay in memory, so that no cache is needed."""

    inputs: Features

    def __init__(self, **kwargs):
        # evaluate creates its cache folder even if rows stay in memory.
        super().__init__(**{"keep_in_memory": True, "cache_dir": tempfile.gettempdir(), **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        description = type(self).__doc__
        return evaluate.MetricInfo(
            description=description, citation="", inputs_description=description, features=self.inputs
        )


class LabelMetric(Module):
    """A metric of predicted and reference classes, `function(references, predictions)`."""

    inputs = Features({"predictions": Value("int64"), "references": Value("int64")})
    function: Callable

    def _compute(self, predictions, references) -> dict[str, float]:
        return {self.name: float(type(self).function(np.asarray(references), np.asarray(predictions)))}


class Accuracy(LabelMetric):
    """Share of the rows whose class is predicted correctly."""

    function = accuracy_score


class F1(LabelMetric):
    """F1 of class 1 in binary classification."""

    function = f1_score


class MatthewsCorrelation(LabelMetric):
    """Matthews correlation; 0 if predictions or references are constant."""

    function = matthews_corrcoef


def correlate(test: Callable, references: np.ndarray, predictions: np.ndarray) -> float:
    """Statistic of a correlation test of scipy; 0 if either side is constant."""
    constant = min(np.ptp(references), np.ptp(predictions)) == 0
    return 0.0 if constant else test(references, predictions).statistic


class Pearson(LabelMetric):
    """Pearson correlation of predicted and reference values; 0 if either is constant."""

    inputs = Features({"predictions": Value("float64"), "references": Value("float64")})
    function = staticmethod(partial(correlate, pearsonr))


class Spearman(Pearson):
    """Spearman correlation of predicted and reference values; 0 if either is constant."""

    function = staticmethod(partial(correlate, spearmanr))


class Seqeval(Module):
    """F1, precision and recall of entities, micro-averaged, as `conlleval` counts them, and the accuracy of tags.

    A row is a list of tags, in IOB1, IOB2 (BIO), IOBES or BILOU. With `by_type=True` also the figures of each type of
    entity, `{type: {precision, recall, f1-score, support}}`.
    """

    inputs = Features({"predictions": List(Value("string")), "references": List(Value("string"))})

    def _compute(self, predictions, references, by_type: bool = False) -> dict:
        predictions, references = (
            [[to_iobes(tag) for tag in row] for row in rows] for rows in (predictions, references)
        )
        report = classification_report(references, predictions, output_dict=True, zero_division=0)
        averages = {name: report.pop(name) for name in list(report) if name.endswith(" avg")}
        names = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
        scores = {name: float(averages["micro avg"][own]) for name, own in names.items()}
        scores["accuracy"] = float(tag_accuracy(references, predictions))
        if by_type:
            scores["by_type"] = {kind: {k: float(v) for k, v in figures.items()} for kind, figures in report.items()}
        return scores


class Squad(Module):
    """F1 and exact match of answers by the rules of SQuAD v1.1, for rows as `evaluate`'s `squad` takes them."""

    inputs = Features(
        {
            "predictions": {"id": Value("string"), "prediction_text": Value("string")},
            "references": {
                "id": Value("string"),
                "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
            },
        }
    )

    def _compute(self, predictions, references) -> dict[str, float]:
        answers = {row["id"]: row["prediction_text"] for row in predictions}
        golds = {row["id"]: list(row["answers"]["text"]) for row in references}
        return average_scores(score_answers(answers, golds, unanswerable=False), golds)


class SquadV2(Module):
    """F1 and exact match by the rules of SQuAD v2, overall and by kind of question (`HasAns_`, `NoAns_`).

    Rows are those that `evaluate`'s `squad_v2` takes; an answer counts as none where its `no_answer_probability` exceeds
    `no_answer_threshold`.
    """

    inputs = Features(
        {
            "predictions": {**Squad.inputs["predictions"], "no_answer_probability": Value("float64")},
            "references": Squad.inputs["references"],
        }
    )

    def _compute(self, predictions, references, no_answer_threshold: float = 1.0) -> dict[str, float]:
        answers = {
            row["id"]: "" if row["no_answer_probability"] > no_answer_threshold else row["prediction_text"]
            for row in predictions
        }
        golds = {row["id"]: list(row["answers"]["text"]) for row in references}
        return average_scores(score_answers(answers, golds, unanswerable=True), golds)


METRICS = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": Pearson,
    "spearman": Spearman,
}


def compute_metrics(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Named metrics of class logits `[examples, classes]` or predicted values `[examples, 1]`."""
    return score_labels(names, predict(logits), labels)


@torch.no_grad()
def score_model(model: PreTrainedModel, batches: Iterable[dict], metrics: Sequence[str] = ()) -> dict[str, float]:
    """Named metrics of a sequence classifier, or without names the masked-LM loss in nats per masked token.

    Raises:
        ValueError: A metric is not finite.
    """
    logits, labels, total, count = [], [], 0.0, 0
    for batch in batches:
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        if metrics:
            logits.append(output.logits.float().cpu())
            labels.append(batch["labels"])
        else:
            labelled = int((batch["labels"] != -100).sum())
            total, count = total + output.loss.item() * labelled, count + labelled
    figures = {"loss": total / max(count, 1)}
    if metrics:
        figures = compute_metrics(tuple(metrics), torch.cat(logits).numpy(), torch.cat(labels).numpy())
    for name, value in figures.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is not finite: the outputs are not, or all labels or all predictions are equal")
    return figures


def score_labels(names: Sequence[str], predictions: Sequence, labels: Sequence) -> dict[str, float]:
    """Named metrics of predicted classes or values, `[examples]`."""
    scores = {}
    for name in names:
        scores |= METRICS[name]().compute(predictions=predictions, references=labels)
    return scores


def predict(logits: np.ndarray) -> np.ndarray:
    """Classes `[examples]` of class logits `[examples, classes]`, or predicted values of `[examples, 1]`."""
    return logits.argmax(axis=-1) if logits.shape[-1] > 1 else logits.squeeze(-1)


def glue_mean(scores: dict[str, float]) -> float | None:
    """Mean of the eight tasks' scores, given by task; None if one is missing."""
    return float(np.mean([scores[task] for task in GLUE_MEAN])) if scores.keys() >= set(GLUE_MEAN) else None


def to_iobes(tag: str) -> str:
    """A BILOU tag as its IOBES counterpart, which seqeval reads as it reads IOB1 and IOB2; other tags unchanged."""
    return {"L-": "E-", "U-": "S-"}.get(tag[:2], tag[:2]) + tag[2:]


def normalize(text: str) -> str:
    """An answer as SQuAD's official scripts compare it: lower case, no ASCII punctuation, articles or extra spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def token_f1(prediction: str, gold: str, unanswerable: bool) -> float:
    """Harmonic mean of word precision and recall; two empty texts score 1 in v2 and 0 in v1.1, as officially."""
    predicted, expected = normalize(prediction).split(), normalize(gold).split()
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return float(unanswerable and not predicted and not expected)
    return 2 * common / (len(predicted) + len(expected))


def score_answers(
    predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]], unanswerable: bool
) -> dict[str, dict[str, float]]:
    """Exact match and F1 of every question, the best over its gold answers.

    Args:
        predictions: Answers; `""` for none.
        golds: Gold answers; empty if the question is unanswerable.
        unanswerable: Whether v2's rules apply, where a gold answer that normalises to nothing does not count.

    Returns:
        `exact` and `f1`, both by question.
    """
    scores = {"exact": {}, "f1": {}}
    for name, texts in golds.items():
        if unanswerable:
            texts = [text for text in texts if normalize(text)] or [""]
        prediction = predictions[name]
        scores["exact"][name] = max(float(normalize(prediction) == normalize(text)) for text in texts)
        scores["f1"][name] = max(token_f1(prediction, text, unanswerable) for text in texts)
    return scores


def average_scores(scores: Mapping[str, Mapping[str, float]], golds: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Means of [`score_answers`], F1 first; if some questions are unanswerable, also by kind (`HasAns_`, `NoAns_`)."""
    kinds = {
        "": list(golds),
        "HasAns_": [name for name, texts in golds.items() if texts],
        "NoAns_": [name for name, texts in golds.items() if not texts],
    }
    if not kinds["NoAns_"]:
        kinds = {"": kinds[""]}
    return {
        f"{kind}{metric}": sum(scores[metric][name] for name in names) / len(names)
        for kind, names in kinds.items()
        for metric in ("f1", "exact")
        if names
    }


def score_baselines(
    names: Sequence[str], train: Sequence[Sequence], labels: Sequence, texts: Sequence[Sequence], expected: Sequence
) -> dict[str, dict[str, float]]:
    """Metrics of two baselines: the majority class, and logistic regression on TF-IDF of unigrams and bigrams.

    For a sentence pair the features are those of both texts and their product, which captures shared words. Regression
    tasks use the mean and ridge regression instead.

    Args:
        names: Names of the metrics.
        train: One or two columns of training texts.
        labels: Integer classes, or floats, of the training texts.
        texts: Columns of the texts to predict for.
        expected: Labels of these texts.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(
        text for column in train for text in column
    )

    def encode(columns):
        parts = [vectorizer.transform(list(column)) for column in columns]
        return hstack([*parts, parts[0].multiply(parts[1])] if len(parts) == 2 else parts).tocsr()

    regression = isinstance(labels[0], float)
    model = Ridge() if regression else LogisticRegression(max_iter=1000)
    constant = float(np.mean(labels)) if regression else np.bincount(labels).argmax()
    predictions = {
        "majority": np.full(len(expected), constant),
        "TF-IDF": model.fit(encode(train), labels).predict(encode(texts)),
    }
    return {baseline: score_labels(names, values, expected) for baseline, values in predictions.items()}
