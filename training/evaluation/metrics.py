"""Metrics of the GLUE tasks and what they are compared with, computed without network."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import hstack
from scipy.stats import pearsonr, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


# Columns of the two texts, and the metrics in the order that GLUE reports them. The first is the task's figure in the
# mean: accuracy for MRPC and QQP and Pearson for STS-B, as in RoBERTa's and, by its baselines, ModernBERT's table.
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

# Tasks of the mean, as in the paper: no WNLI, and of MNLI the matched set alone.
GLUE_MEAN = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


def correlation(function: Callable) -> Callable:
    """A correlation of scipy that is 0 where a constant has none, like scikit-learn's of Matthews."""
    return lambda labels, values: 0.0 if min(np.ptp(labels), np.ptp(values)) == 0 else function(labels, values)[0]


METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": correlation(pearsonr),
    "spearman": correlation(spearmanr),
}


def compute_metrics(names: tuple[str, ...], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Named metrics, each from 0 or -1 to 1, of class logits `[examples, classes]` or predicted values `[examples, 1]`."""
    predictions = predict(logits)
    return {name: float(METRICS[name](labels, predictions)) for name in names}


def predict(logits: np.ndarray) -> np.ndarray:
    """Classes `[examples]` of class logits `[examples, classes]`, or predicted values of `[examples, 1]`."""
    return logits.argmax(axis=-1) if logits.shape[-1] > 1 else logits.squeeze(-1)


def glue_mean(scores: dict[str, float]) -> float | None:
    """Plain mean of the eight tasks' figures, by task; None where one is missing."""
    return float(np.mean([scores[task] for task in GLUE_MEAN])) if scores.keys() >= set(GLUE_MEAN) else None


def score_baselines(
    names: tuple[str, ...], train: Sequence[Sequence], labels: Sequence, texts: Sequence[Sequence], expected: Sequence
) -> dict[str, dict[str, float]]:
    """Metrics of what needs no model: the majority class, and logistic regression on TF-IDF of words and their pairs.

    For a sentence pair the features are those of both texts and their product, which sees the words they share. A
    regression has the mean in place of the majority, and ridge regression.

    Args:
        names: Of the metrics.
        train: One or two columns of training texts.
        labels: Integer classes, or floats, of the training texts.
        texts: Columns to predict for.
        expected: Their labels.
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
    return {
        baseline: {name: float(METRICS[name](expected, values)) for name in names}
        for baseline, values in predictions.items()
    }
